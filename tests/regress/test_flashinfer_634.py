"""Vector loads from dense views that start in the middle of a vector."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest

import bnkernels as bn
from tests.ops.test_batch_norm_exact_data import OPTIONS, assert_bits, make_case
from tests.regress.calls import CALLS, make_arrays
from tools.backends import Backend


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


@pytest.mark.parametrize(("dtype", "offsets"), [("float32", (1, 2, 3)), ("float64", (1,))])
@pytest.mark.parametrize("op", CALLS)
def test_flashinfer_634_every_array_at_every_offset(
    backend: Backend, op: str, offsets: tuple[int, ...], dtype: str
) -> None:
    """A pointer that was dense but not aligned to 16 bytes crashed, for the output too, which was never checked."""
    aligned = run(backend, op, None, 0, dtype)
    tolerance = 0 if backend.name != "reference" else 1e-6  # NumPy's own sums may depend on the alignment
    for name, offset in product(CALLS[op].names, offsets):
        got = run(backend, op, name, offset, dtype)
        for array in CALLS[op].names:
            np.testing.assert_allclose(got[array], aligned[array], tolerance, err_msg=f"{array}: {name} + {offset}")


@pytest.mark.parametrize("offset", range(1, 8))
@pytest.mark.parametrize("name", ["x", "y", "dy", "dx"])
def test_flashinfer_634_halves_at_every_offset(
    backend: Backend, rng: np.random.Generator, name: str, offset: int
) -> None:
    """Eight halves have 16 bytes. The data are exact, so whichever kernel takes the misaligned array, the bits are."""
    shape = (1024, 40, 1) if offset in (1, 4) else (16, 40, 1)  # the first is cooperative if aligned
    case = make_case(rng, shape, np.dtype(np.float16))
    x, dy = (
        misaligned(backend, array[..., 0], offset if of == name else 0)
        for of, array in (("x", case.x), ("dy", case.dy))
    )
    y, dx = (
        misaligned(backend, np.full(shape[:2], np.nan, np.float16), offset if of == name else 0) for of in ("y", "dx")
    )
    vectors = [backend.empty(extent, "float32") for extent in ((3, 40), (40,), (40,))]
    parameters = backend.arrays(case.gamma, case.beta)
    options = {
        "activation": OPTIONS["activation"],
        "alpha": OPTIONS["alpha"],
        "residual": backend.asarray(case.residual[..., 0]),
    }
    bn.batch_norm_forward(x, *parameters, eps=OPTIONS["eps"], out=(y, vectors[0]), **options)
    dresidual = backend.empty(shape[:2], np.float16)
    bn.batch_norm_backward(dy, x, *parameters, vectors[0], out=(dx, *vectors[1:], dresidual), **options)
    for what, got in {"y": y, "dx": dx, "dresidual": dresidual}.items():
        assert_bits(backend.asnumpy(got), case.expected[what][..., 0], what)
