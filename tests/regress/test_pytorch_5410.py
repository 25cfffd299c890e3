"""A constant channel came out as +-1, or 1e5, instead of 0; here it is exactly beta, and its variance exactly 0."""

from __future__ import annotations

import numpy as np
import pytest

import bnkernels as bn
from tests.backends import Backend


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("rows", [2, 3, 10, 50, 64, 77, 300, 2000])
def test_pytorch_5410_constant_channel_is_exactly_beta(backend: Backend, rows: int, dtype: str) -> None:
    """The rounded mean of equal numbers was not that number, and its error was divided by the root of eps."""
    constants = np.array([100, 1e7, 1e10, 0.1, -1 / 3, 0, 65504.5], dtype)
    gamma, beta = np.arange(-3, 4).astype(dtype), np.linspace(-1, 2, 7).astype(dtype)
    running = backend.arrays(np.ones(7, dtype), np.ones(7, dtype))
    x = backend.asarray(np.broadcast_to(constants, (rows, 7)))
    y, statistics = bn.batch_norm_forward(x, *backend.arrays(gamma, beta), *running, momentum=1.0)
    np.testing.assert_array_equal(backend.asnumpy(y), np.broadcast_to(beta, (rows, 7)))
    mean, mean_low, rstd = backend.asnumpy(statistics)
    np.testing.assert_array_equal(mean, constants)
    np.testing.assert_array_equal(mean_low, 0)
    np.testing.assert_array_equal(rstd, 1 / np.sqrt(constants.dtype.type(1e-5)))
    np.testing.assert_array_equal(backend.asnumpy(running[0]), constants)
    np.testing.assert_array_equal(backend.asnumpy(running[1]), 0)


def test_caffe_3963_nine_times_one_hundred(backend: Backend) -> None:
    """Nine equal values gave a variance that was not 0, so the layer amplified its own rounding error."""
    y, _ = bn.batch_norm_forward(backend.asarray(np.full((9, 1), 100, np.float32)))
    np.testing.assert_array_equal(backend.asnumpy(y), 0)
