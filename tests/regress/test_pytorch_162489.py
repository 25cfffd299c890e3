"""Squares beyond float32's range gave zeros on one device and NaN on another.

The answer here, on all: such a variance counts as infinite, so rstd is 0 and y is beta.
"""

from __future__ import annotations

import numpy as np
import pytest

import bnkernels as bn
from tests.backends import Backend


@np.errstate(over="ignore")  # NumPy says so, and goes on
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
