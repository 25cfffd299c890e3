"""Channels whose values are within range and whose sums are not: the mean is within range too, and so is the result.

On NumPy arrays such a sum is formed anew in smaller units, and so it is in the kernels of batch norm; those of layer
norm and of linear layers divide before they add.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import bnkernels as bn
from bnkernels.runtime.arguments import accumulator
from tests.ops.test_batch_norm_exact_data import dtype_named
from tools.backends import Backend

MIXED = np.array([[1.0], [1], [-1], [-1]])
# By name: the data type and x.
CASES: dict[str, tuple[str, np.ndarray]] = {
    "2 of 2e38": ("float32", np.full((2, 1), 2e38)),
    "4 of both signs": ("float32", 3e38 * MIXED),
    "4, one far from their mean": ("float32", 3e38 * np.array([[1.0], [-1], [-1], [-1]])),
    "5000 x 8 of 1e35": ("float32", np.full((5000, 8), 1e35)),
    "bfloat16: 2 of 2e38": ("bfloat16", np.full((2, 1), 2e38)),
    "bfloat16: 4 of both signs": ("bfloat16", 3e38 * MIXED),
    "float64: 4 of 1e308": ("float64", np.full((4, 1), 1e308)),
    "float64: 5000 x 8 of 1e305": ("float64", np.full((5000, 8), 1e305)),
    "float64: 2 of both signs": ("float64", np.array([[1e308], [-1e308]])),
    "float64: 4 of both signs": ("float64", 1e308 * MIXED),
}


def whole(backend: Backend, x: np.ndarray) -> Any:
    return bn.batch_norm_forward(backend.asarray(x))[0]


def masked(backend: Backend, x: np.ndarray) -> Any:
    return bn.batch_norm_forward(backend.asarray(x), mask=backend.asarray(np.ones(len(x), bool)))[0]


def grouped(backend: Backend, x: np.ndarray) -> Any:
    return bn.batch_norm_forward(backend.asarray(np.stack([x, x])), grouped=True)[0]


def in_parts(backend: Backend, x: np.ndarray) -> Any:
    moments = np.stack([backend.asnumpy(bn.batch_norm_moments(backend.asarray(x)))])
    statistics, _ = bn.batch_norm_statistics(backend.asarray(moments))
    return bn.batch_norm_normalise(backend.asarray(x), None, None, statistics)


def of_rows(backend: Backend, x: np.ndarray) -> Any:
    return bn.layer_norm_forward(backend.asarray(x.T))[0]


OPS: dict[str, Callable[[Backend, np.ndarray], Any]] = {
    "batch norm": whole,
    "masked": masked,
    "grouped": grouped,
    "in parts": in_parts,
    "layer norm": of_rows,
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("op", OPS)
def test_a_channel_without_a_variance_in_range_is_beta(backend: Backend, case: str, op: str) -> None:
    """A constant one has none, and that of the others is out of range, which counts as infinite."""
    dtype, x = CASES[case]
    y = backend.asnumpy(OPS[op](backend, x.astype(dtype_named(dtype))))
    np.testing.assert_array_equal(y.astype(np.float64), 0)


FAR_APART = {
    "workers": 3e38 * np.where(np.arange(64) % 2, -1.0, 1.0)[:, None],
    "a value and the mean": 3e38 * np.array([[1.0], [-1], [-1], [-1]]),
    "chunks of a thread": 3e38 * np.where(np.arange(300) < 256, 1.0, -1.0)[:, None] * np.ones((1, 32)),
}


@pytest.mark.parametrize("far", FAR_APART)
def test_distances_out_of_range_are_an_infinite_variance(backend: Backend, far: str) -> None:
    """Wherever kernels subtract: the mean stays within range, and nothing becomes NaN."""
    x = FAR_APART[far].astype(np.float32)
    on_x, dy = backend.arrays(x, np.ones_like(x))
    y, statistics = bn.batch_norm_forward(on_x)
    mean, _, rstd = backend.asnumpy(statistics)
    np.testing.assert_array_equal(rstd, 0)
    np.testing.assert_allclose(mean, x.astype(np.float64).mean(0), atol=1e-6 * 3e38)
    dx, dgamma, dbeta = bn.batch_norm_backward(dy, on_x, None, None, statistics)
    for found, wanted in ((y, 0), (dx, 0), (dgamma, 0), (dbeta, len(x))):
        np.testing.assert_array_equal(backend.asnumpy(found), wanted)


CONSTANT = {case: row for case, row in CASES.items() if (row[1] == row[1][0]).all()}


@pytest.mark.parametrize("case", CONSTANT)
def test_the_mean_of_equal_numbers_is_that_number(backend: Backend, case: str) -> None:
    dtype, x = CASES[case]
    x = x.astype(dtype_named(dtype))
    acc_dtype = accumulator(x.dtype)
    running = backend.asarray(np.zeros(x.shape[1], acc_dtype))
    moments = backend.asnumpy(bn.batch_norm_moments(backend.asarray(x)))
    bn.batch_norm_forward(backend.asarray(x), None, None, running, None, momentum=1.0)
    np.testing.assert_array_equal(moments[1], x[0].astype(acc_dtype))
    np.testing.assert_array_equal(backend.asnumpy(running), x[0].astype(acc_dtype))


@pytest.mark.parametrize("norm", ["batch", "layer"])
@pytest.mark.parametrize("case", [case for case, row in CASES.items() if row[1].shape[1] == 1])
def test_a_product_without_a_variance_in_range_is_beta(backend: Backend, case: str, norm: str) -> None:
    dtype, x = CASES[case]
    x = x.astype(dtype_named(dtype))
    factors = (x, np.ones((1, 1), x.dtype)) if norm == "batch" else (np.ones((1, 1), x.dtype), x.T.copy())
    y, z, statistics = bn.linear_batch_norm_forward(*(given := backend.arrays(*factors)), norm=norm)
    np.testing.assert_array_equal(backend.asnumpy(y).astype(np.float64), 0)
    dy = backend.asarray(np.ones(y.shape, x.dtype))
    dx, *_ = bn.linear_batch_norm_backward(dy, *given, None, None, z, statistics, norm=norm)
    assert np.isfinite(backend.asnumpy(dx).astype(np.float64)).all()


@pytest.mark.parametrize("case", CONSTANT)
@pytest.mark.parametrize("op", ["batch norm", "masked", "grouped", "layer norm"])
def test_equal_gradients_move_nothing(backend: Backend, case: str, op: str) -> None:
    """Their mean is what they are, so dx is 0, where the other numbers are of no size."""
    dtype, dy = CASES[case]
    dy = dy.astype(dtype_named(dtype))
    x = (np.arange(dy.size).reshape(dy.shape) % 3 - 1).astype(dy.dtype)
    if op != "layer norm":
        dy, x = (np.stack([a, a, a]) if op == "grouped" else a for a in (dy, x))
        on_dy, on_x, mask = backend.arrays(dy, x, np.ones(len(x), bool) if op == "masked" else None)
        options = {"mask": mask, "grouped": op == "grouped"}
        dx, *_ = bn.batch_norm_backward(on_dy, on_x, None, None, bn.batch_norm_forward(on_x, **options)[1], **options)
    else:
        on_dy, on_x = backend.arrays(dy.T, x.T)
        dx, *_ = bn.layer_norm_backward(on_dy, on_x, None, None, bn.layer_norm_forward(on_x)[1])
    found, size = np.abs(backend.asnumpy(dx).astype(np.float64)).max(), float(dy.astype(np.float64).max())
    assert found <= 1e-4 * size


@pytest.mark.parametrize("parts", [1, 4])
def test_a_large_channel_of_both_ends_of_the_range_is_beta(backend: Backend, parts: int) -> None:
    """And its mean is right, and its neighbours are as they would be without it."""
    size = 3000 * parts
    x = np.random.default_rng(0).standard_normal((size, 8)).astype(np.float32)
    x[:, 3] = np.where(np.arange(size) % 4, -1.6e38, 1.6e38)
    x[:, 5] = np.where(np.arange(size) < size // 2, 3e38, -3e38)
    given = backend.asarray(x)
    y, statistics = map(backend.asnumpy, bn.batch_norm_forward(given))
    ordinary = x.copy()
    ordinary[:, [3, 5]] = 0
    alone = backend.asnumpy(bn.batch_norm_forward(backend.asarray(ordinary))[0])
    np.testing.assert_array_equal(y[:, [3, 5]], 0)
    np.testing.assert_allclose(statistics[0, 3], -0.8e38, rtol=1e-6)
    np.testing.assert_allclose(statistics[0, 5], 0, atol=3e38 * 1e-6)
    np.testing.assert_array_equal(np.delete(y, [3, 5], 1), np.delete(alone, [3, 5], 1))
