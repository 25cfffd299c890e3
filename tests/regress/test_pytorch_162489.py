"""Squares beyond float32's range gave zeros on one device and NaN on another.

The answer here, on all: such a variance counts as infinite, so rstd is 0 and y is beta.
"""

from __future__ import annotations

import numpy as np
import pytest

import bnkernels as bn
from tests.ops.test_batch_norm_exact_data import dtype_named
from tools.backends import Backend


@pytest.mark.parametrize(("dtype", "big"), [("float32", 1e30), ("float64", 1e200)])
def test_pytorch_162489_infinite_variance_gives_beta(backend: Backend, dtype: str, big: float) -> None:
    x = np.array([[1, 1], [-1, 2], [3, 3], [0, 4]], dtype) * np.array([big, 1], dtype)
    gamma, beta = np.array([2, 2], dtype), np.array([-0.5, 0.25], dtype)
    on = backend.arrays(x, gamma, beta)
    y, statistics = bn.batch_norm_forward(*on)
    dy = np.array([[1, 1], [2, 0], [0, 0], [5, 3]], dtype)
    dx, _, dbeta = bn.batch_norm_backward(backend.asarray(dy), *on, statistics)

    y, statistics, dx, dbeta = (backend.asnumpy(array) for array in (y, statistics, dx, dbeta))
    np.testing.assert_array_equal(y[:, 0], beta[0])
    assert statistics[2, 0] == 0
    np.testing.assert_array_equal(dx[:, 0], 0)
    assert dbeta[0] == 8

    alone = backend.arrays(x[:, 1:], gamma[1:], beta[1:])
    other, _ = bn.batch_norm_forward(*alone)
    np.testing.assert_array_equal(y[:, 1:], backend.asnumpy(other))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("shape", [(40, 8), (5000, 8), (2, 8, 4096)], ids=str)
def test_pytorch_162489_in_any_kernel(
    backend: Backend, rng: np.random.Generator, shape: tuple[int, ...], dtype: str
) -> None:
    """True for 16-bit data too, and where the large value is in one of many rows that several blocks share."""
    (x, dy), data = rng.standard_normal((2, *shape)), dtype_named(dtype)
    x[1, 3] = 1e30
    beta = rng.standard_normal(8).astype(np.float32)
    on = backend.arrays(x.astype(data), None, beta)
    y, statistics = bn.batch_norm_forward(*on)
    dx, *_ = bn.batch_norm_backward(backend.asarray(dy.astype(data)), *on, statistics)
    y, dx = backend.asnumpy(y), backend.asnumpy(dx)
    np.testing.assert_array_equal(y[:, 3], beta[3].astype(data))
    np.testing.assert_array_equal(dx[:, 3], 0)
    assert np.isfinite(y.astype(np.float32)).all()
    others = np.delete(y.astype(np.float32), 3, 1)
    assert (others.std(axis=tuple(axis for axis in range(y.ndim) if axis != 1)) > 0.9).all()
