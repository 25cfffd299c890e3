"""Layer norm with parameters in the data's own 16 bits: computed with in float32, their gradients rounded once."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import bnkernels as bn
from tests.ops.test_batch_norm_masked import dtype_named
from tools.backends import Backend

# Several rows of a block, with and without whole vectors; rows that several blocks share.
SHAPES = [(7, 20), (70, 64), (2, 40_000)]


@pytest.mark.parametrize("activation", ["identity", "silu"])
@pytest.mark.parametrize("given", ["gamma beta", "gamma", "beta"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_parameters_in_16_bits_are_those_numbers_in_float32(
    backend: Backend, rng: np.random.Generator, shape: tuple[int, int], dtype: str, given: str, activation: str
) -> None:
    data = dtype_named(dtype)
    x, dy = (rng.standard_normal(shape).astype(data) for _ in range(2))
    vectors = [rng.uniform(-2, 2, shape[1]).astype(data) if name in given.split() else None for name in VECTORS]
    stored = results(backend, x, dy, vectors, activation)
    single = results(backend, x, dy, [None if a is None else a.astype("float32") for a in vectors], activation)
    for got, want in zip(stored, single, strict=True):
        np.testing.assert_array_equal(got.astype(float), want.astype(got.dtype).astype(float))
    assert [array.dtype for array in stored] == [data, np.float32, data, data, data]


VECTORS = "gamma", "beta"


def results(backend: Backend, x: np.ndarray, dy: np.ndarray, vectors: list, activation: str) -> list[np.ndarray]:
    x, dy, gamma, beta = backend.arrays(x, dy, *vectors)
    y, statistics = bn.layer_norm_forward(x, gamma, beta, activation=activation)
    gradients = bn.layer_norm_backward(dy, x, gamma, beta, statistics, activation=activation)
    return [backend.asnumpy(array) for array in (y, statistics, *gradients)]


def test_over_several_axes_and_into_given_arrays(backend: Backend, rng: np.random.Generator) -> None:
    x, dy = (rng.standard_normal((6, 4, 5)).astype("float16") for _ in range(2))
    on_x, on_dy, gamma, beta = backend.arrays(x, dy, np.ones((4, 5), "float16"), np.zeros((4, 5), "float16"))
    _, statistics = bn.layer_norm_forward(on_x, gamma, beta, axes=2)
    out = tuple(backend.empty(shape, "float16") for shape in ((6, 4, 5), (4, 5), (4, 5)))
    found = bn.layer_norm_backward(on_dy, on_x, gamma, beta, statistics, axes=2, out=out)
    assert all(got is given for got, given in zip(found, out, strict=True))
    np.testing.assert_allclose(backend.asnumpy(out[2]), dy.astype(float).sum(0), rtol=2**-11)
    others = (out[0], *(backend.empty((4, 5), "float32") for _ in range(2)))
    with pytest.raises(TypeError, match="dgamma must be float16, got float32"):
        bn.layer_norm_backward(on_dy, on_x, gamma, beta, statistics, axes=2, out=others)


@pytest.mark.parametrize(("gamma", "beta"), [("float16", "float32"), ("float32", "float16"), ("bfloat16", None)])
def test_parameters_of_two_types_are_refused(backend: Backend, gamma: Any, beta: Any) -> None:
    x = backend.asarray(np.ones((4, 3), "float16"))
    vectors = [None if name is None else backend.asarray(np.ones(3, dtype_named(name))) for name in (gamma, beta)]
    wrong, right, got = {
        ("float16", "float32"): ("beta", "float16", "float32"),
        ("float32", "float16"): ("gamma", "float16", "float32"),
        ("bfloat16", None): ("gamma", "float32", "bfloat16"),
    }[gamma, beta]
    with pytest.raises(TypeError, match=f"{wrong} must be {right}, got {got}"):
        bn.layer_norm_forward(x, *vectors)


def test_infinite_gradients_of_parameters_stay_so(backend: Backend) -> None:
    """Numbers that float16 cannot hold become infinite, as rounding has it."""
    x = np.array([[1.0, 3.0]] * 8, "float16")
    on_x, dy, gamma = backend.arrays(x, np.full((8, 2), 6e4, "float16"), np.ones(2, "float16"))
    _, statistics = bn.layer_norm_forward(on_x, gamma)
    _, _, dbeta = bn.layer_norm_backward(dy, on_x, gamma, None, statistics)
    assert np.isinf(backend.asnumpy(dbeta)).all()
    assert backend.asnumpy(dbeta).dtype == np.float16 != ml_dtypes.bfloat16
