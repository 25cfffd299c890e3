"""16-bit data: conversions bit by bit, and rounding once at the end of a computation in float32."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import bnkernels as bn
from tests.ops.test_batch_norm import make_case
from tools import oracle
from tools.backends import Backend

ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed: there is no bfloat16")
HALVES = [np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]
ALL = np.arange(2**16, dtype=np.uint16)
LEAST = np.float32(2**-126)  # the least normal float32: a GPU flushes what is smaller to zero


def flushed(backend: Backend, values: np.ndarray) -> np.ndarray:
    """Return float32 numbers as arithmetic of the backend sees them."""
    return np.where(np.abs(values) < LEAST, np.float32(0), values) if backend.name == "cuda" else values


def bits_of(array: np.ndarray) -> np.ndarray:
    """Return the bits, with one for all NaN and for both zeros: neither is told from its like by arithmetic here."""
    bits = array.view(np.uint16).copy()
    with np.errstate(invalid="ignore"):
        single = array.astype(np.float32)
    bits[np.isnan(single)] = 0xFFFF
    bits[single == 0] = 0
    return bits


def around_every_tie(dtype: np.dtype) -> np.ndarray:
    """Return the midpoints of all neighbouring numbers, the floats beside them, and large, small and special ones."""
    with np.errstate(over="ignore", invalid="ignore"):
        finite = ALL.view(dtype).astype(np.float64)
        finite = np.unique(finite[np.isfinite(finite)])
        middle = ((finite[1:] + finite[:-1]) / 2).astype(np.float32)
    edge = np.float32([65504, 65519.996, 65520, 65536, 3.3895e38, 3.3961e38, 3.4028235e38, 1e-40, 5.9e-8, 2.98e-8])
    # Infinity, two NaN, through one of which a carry would run, and 0.
    special = np.uint32([0x7F800000, 0x7FC00000, 0x7FFFFFFF, 0]).view(np.float32)
    values = np.concatenate([middle, *(np.nextafter(middle, np.float32(end)) for end in (np.inf, -np.inf))])
    return np.concatenate([values, edge, -edge, special, -special])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_number_is_loaded_exactly(backend: Backend, dtype: np.dtype) -> None:
    """A sum over one row: dbeta is dy in float32."""
    dy = ALL.view(dtype)[None]
    zeros, ones = np.zeros(2**16, "float32"), np.ones(2**16, "float32")
    on = backend.arrays(dy, np.zeros(dy.shape, dtype), None, None, zeros, ones)
    with np.errstate(invalid="ignore"):
        _, _, dbeta = bn.batch_norm_inference_backward(*on)
        expected = flushed(backend, dy[0].astype(np.float32))
    np.testing.assert_array_equal(backend.asnumpy(dbeta), expected)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_tie_is_rounded_to_even(backend: Backend, dtype: np.dtype) -> None:
    """With x = 0 the output is beta, rounded: nearest, ties to even, infinity beyond the largest, NaN stays NaN."""
    beta = around_every_tie(dtype)
    channels = len(beta)
    x, mean, var = np.zeros((1, channels), dtype), np.zeros(channels, "float32"), np.ones(channels, "float32")
    y = backend.asnumpy(bn.batch_norm_inference(*backend.arrays(x, None, beta, mean, var), eps=1e-30))
    with np.errstate(over="ignore", invalid="ignore"):
        expected = flushed(backend, beta).astype(dtype)
    np.testing.assert_array_equal(bits_of(y[0]), bits_of(expected))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", [(2, 1), (64, 20), (63, 33), (257, 7), (260, 33), (1100, 20)])
@pytest.mark.parametrize("activation", ["identity", "relu", "gelu"])
def test_16_bits_match_extended_precision_rounded_once(
    backend: Backend, rng: np.random.Generator, shape: tuple[int, int], dtype: np.dtype, activation: str
) -> None:
    x, gamma, beta, dy = make_case(rng, shape, "float32")
    x, dy = x.astype(dtype), dy.astype(dtype)
    exact = oracle.forward(x, gamma, beta, 1e-5, activation)
    exact_backward = oracle.backward(dy, x, gamma, beta, 1e-5, activation)
    running = np.full(shape[1], 0.5, "float32"), np.full(shape[1], 2.0, "float32")
    on = backend.arrays(x, gamma, beta, *running)
    y, statistics = bn.batch_norm_forward(*on, momentum=0.25, activation=activation)
    grads = bn.batch_norm_backward(backend.asarray(dy), *on[:3], statistics, activation=activation)

    assert y.dtype == grads[0].dtype == dtype
    assert statistics.dtype == grads[1].dtype == grads[2].dtype == np.float32
    oracle.assert_within(backend.asnumpy(y), exact.y, exact.z_bound, "y")
    u = oracle.unit_roundoff(dtype)
    oracle.assert_within(backend.asnumpy(statistics)[2], exact.rstd, oracle.SLACK * u * exact.rstd, "rstd")
    new_var = 0.75 * 2.0 + 0.25 * exact.var * len(x) / (len(x) - 1)
    oracle.assert_within(backend.asnumpy(on[4]), new_var, oracle.SLACK * u * new_var, "running_var")
    for name, got in zip(("dx", "dgamma", "dbeta"), grads, strict=True):
        bound = getattr(exact_backward, f"{name}_bound")
        oracle.assert_within(backend.asnumpy(got), getattr(exact_backward, name), bound, name)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", [(64, 20), (5, 3, 40)])
def test_16_bits_are_the_bits_of_float32_rounded(
    backend: Backend, rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype
) -> None:
    """Loading is exact and storing rounds once, so the same numbers in float32 give the same results before it."""
    x, dy, residual = (rng.standard_normal(shape).astype(dtype) for _ in range(3))
    gamma = backend.asarray(rng.uniform(0.5, 2, shape[1]).astype(np.float32))

    def run(*tensors: np.ndarray) -> list[np.ndarray]:
        x, dy, residual = backend.arrays(*tensors)
        options: dict[str, Any] = {"residual": residual, "activation": "leaky_relu"}
        y, statistics = bn.batch_norm_forward(x, gamma, **options)
        grads = bn.batch_norm_backward(dy, x, gamma, None, statistics, **options)
        return [backend.asnumpy(array) for array in (y, statistics, *grads)]

    tolerance = 0 if backend.name != "reference" else 1e-6
    single = run(*(array.astype(np.float32) for array in (x, dy, residual)))
    for half, full in zip(run(x, dy, residual), single, strict=True):
        if half.dtype == dtype and backend.name != "reference":
            np.testing.assert_array_equal(half.view(np.uint16), full.astype(dtype).view(np.uint16))
        else:
            np.testing.assert_allclose(half.astype(np.float32), full.astype(half.dtype).astype(np.float32), tolerance)
