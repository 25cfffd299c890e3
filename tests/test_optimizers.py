"""The state of an optimiser: taken whole, or not at all."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bnkernels.mlp import MLP
from bnkernels.optimizers import make_optimizer


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"second": np.full(64, "a")}, "second must be real numbers, got <U1"),
        ({"second": np.full(64, None)}, "second must be real numbers, got object"),
        ({"second": np.zeros(64, "complex64")}, "second must be real numbers, got complex64"),
        ({"second": np.zeros(64, "int64")}, "second must be real numbers, got int64"),
        ({"second": np.full(64, 1e300)}, "second holds numbers beyond float32: take a network of float64"),
        ({"steps": np.array(-1)}, "steps must be an integer of at least 0, got int64 -1"),
        ({"steps": np.array(1.5)}, "steps must be an integer of at least 0, got float64 1.5"),
        ({"steps": np.array("1")}, "steps must be an integer of at least 0, got <U1 1"),
    ],
)
def test_a_state_of_which_one_part_is_wrong_changes_nothing(changes: dict[str, Any], message: str) -> None:
    adam = make_optimizer("adam", MLP((4, 5, 3)), lr=0.1)
    size = adam.parameters.size
    state = {"first": np.ones(size), "second": np.ones(size), "steps": np.array(3)}
    with pytest.raises(ValueError, match=message):
        adam.load_state(state | {name: np.resize(array, np.shape(state[name])) for name, array in changes.items()})
    assert adam.steps == 0
    assert not any(array.any() for array in adam.arrays.values())
    adam.load_state(state | {"first": np.full(size, np.inf)})  # of a run that diverged
    assert adam.steps == 3
    assert all(array.all() for array in adam.arrays.values())
