"""Wide loads from dense views that start in the middle of a vector."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.backends import Backend
from tests.regress.calls import CALLS, EVERY_ARRAY, make_arrays


def misaligned(backend: Backend, array: np.ndarray, offset: int) -> Any:
    """Return a dense copy that starts `offset` elements behind an aligned address."""
    flat = backend.asarray(np.concatenate([np.zeros(offset, array.dtype), array.ravel()]))
    return flat[offset:].reshape(array.shape)


def run(backend: Backend, op: str, spoilt: str | None, offset: int, dtype: str) -> dict[str, np.ndarray]:
    """Return what an op leaves in all its arrays, with one of them misaligned."""
    on = {
        name: misaligned(backend, array, offset if name == spoilt else 0)
        for name, array in make_arrays(op, dtype).items()
    }
    CALLS[op].run(on)
    return {name: backend.asnumpy(array) for name, array in on.items()}


@pytest.mark.parametrize(("dtype", "offset"), [("float32", 1), ("float32", 2), ("float32", 3), ("float64", 1)])
@pytest.mark.parametrize(("op", "name"), EVERY_ARRAY)
def test_flashinfer_634_every_array_at_every_offset(
    backend: Backend, op: str, name: str, offset: int, dtype: str
) -> None:
    """A pointer that was dense but not aligned to 16 bytes crashed, for the output too, which was never checked."""
    aligned, got = run(backend, op, None, 0, dtype), run(backend, op, name, offset, dtype)
    for array in CALLS[op].names:
        tolerance = 0 if backend.name != "numpy" else 1e-6  # NumPy's own sums may depend on the alignment
        np.testing.assert_allclose(got[array], aligned[array], rtol=tolerance, err_msg=array)
