"""Engines of the trainer: the choice among them, and that one goes on where another stopped."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from bnkernels.train.config import ConfigError, TrainingConfig
from bnkernels.train.learner import Learner
from tests.ops.test_fused_training import NORMED, RATES, make_data
from tools.backends import Backend


def network_on(backend: Backend, norm: str, **changes: Any) -> Learner:
    options = {"hidden": (8,), "batch_size": 16, "epochs": 4, "lr": 0.1, "device": "cpu"} | changes
    return Learner(norm, TrainingConfig(**options), (6, *options["hidden"], 3), backend.xp)


@pytest.mark.parametrize(("name", "norm"), NORMED)
def test_the_engines_take_over_from_each_other(
    backend: Backend, rng: np.random.Generator, name: str, norm: str
) -> None:
    """Layers continue from a checkpoint of the fused engine, and the other way round."""
    if backend.name == "reference":
        pytest.skip("has no fused engine")
    x, y = backend.arrays(*make_data(rng, (6, 8, 3), 20 * 16, "float64"))
    options = {"optimizer": name, "dtype": "float64", "activation": "tanh", "lr": RATES[name]}
    ends = []
    for engines in (("layers", "layers"), ("fused", "layers"), ("layers", "fused")):
        before = network_on(backend, norm, engine=engines[0], **options)
        assert str(before.engine) == engines[0]
        before.train(x, y, 0, 10, lambda: False)
        after = network_on(backend, norm, engine=engines[1], **options)
        after.load_arrays(before.arrays())
        after.train(x, y, 0, 20, lambda: False)
        assert after.step == 20
        ends.append(after.arrays())
    for other in ends[1:]:
        assert other.keys() == ends[0].keys()
        for entry, array in ends[0].items():
            np.testing.assert_allclose(other[entry], array, rtol=1e-7, atol=1e-9, err_msg=entry)


def test_the_engine_is_chosen_by_place_and_size_and_says_why(backend: Backend) -> None:
    small, large = network_on(backend, "batch"), network_on(backend, "batch", hidden=(2000, 2000))
    if backend.name == "compiled":
        assert str(small.engine) == str(large.engine) == "fused"
        assert 1 == large.engine.steps_per_turn < large.engine.steps_at_once < small.engine.steps_at_once
        shared = {"hidden": (512, 512), "batch_size": 2048}
        why = "threads share a layer of 512 inputs and 512 outputs, 2048 examples"
        assert str(network_on(backend, "batch", **shared).engine) == f"layers (not fused: {why})"
        assert str(network_on(backend, "batch", **shared, engine="fused").engine) == "fused"
        assert str(network_on(backend, "batch", **shared | {"batch_size": 2047}).engine) == "fused"
        with pytest.raises(ConfigError, match="the engine cannot be graph: it needs a GPU"):
            network_on(backend, "batch", engine="graph")
        return
    if backend.name == "reference":
        missing = r"it needs the compiled kernels of bnkernels\[cpu\]"
        assert re.fullmatch(rf"layers \(not fused: {missing}\)", str(small.engine))
        with pytest.raises(ConfigError, match=f"the engine cannot be fused: {missing}; take engine layers, or auto"):
            network_on(backend, "batch", engine="fused")
        return
    assert str(small.engine) == "fused"
    assert str(large.engine).startswith("layers (not fused: one block needs ")
    assert "; not graph: a layer of 6 inputs and 2000 outputs" in str(large.engine)
    assert re.fullmatch(r"fused \(\d+ blocks\)", str(network_on(backend, "batch", hidden=(1000, 1000)).engine))
    with pytest.raises(ConfigError, match=r"the engine cannot be fused: one block needs .* bytes of shared memory"):
        network_on(backend, "batch", hidden=(2000, 1000), engine="fused")
    assert network_on(backend, "batch", engine="layers").engine.name == "layers"
