"""A constant channel came out as +-1, or 1e5, instead of 0; here it is exactly beta, and its variance exactly 0."""

from __future__ import annotations

import numpy as np
import pytest

import bnkernels as bn
from tests.ops.test_batch_norm_exact_data import dtype_named
from tools.backends import Backend


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
    np.testing.assert_array_max_ulp(rstd, np.full_like(rstd, 1 / np.sqrt(constants.dtype.type(1e-5))), 2)
    np.testing.assert_array_equal(backend.asnumpy(running[0]), constants)
    np.testing.assert_array_equal(backend.asnumpy(running[1]), 0)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("shape", [(50, 8), (5000, 8), (8, 8, 640)], ids=str)
def test_pytorch_5410_constant_channels_of_any_size_and_type(
    backend: Backend, shape: tuple[int, ...], dtype: str
) -> None:
    """The larger take cooperative kernels; 16-bit constants are summed in float32, up to the largest there is."""
    data = dtype_named(dtype)
    constants = np.array([100, 1000, 65504, 0.1, -1 / 3, 0, 16777215, 6.1e-5])
    constants[6] = constants[6] if dtype != "float16" else -65504
    constants = constants.astype(data)
    beta = np.linspace(-1, 2, 8).astype(np.float32)
    running = backend.arrays(np.ones(8, "float32"), np.ones(8, "float32"))
    along = (slice(None), *[None] * (len(shape) - 2))
    x = backend.asarray(np.broadcast_to(constants[along], shape))
    y, _ = bn.batch_norm_forward(x, None, backend.asarray(beta), *running, momentum=1.0)
    np.testing.assert_array_equal(backend.asnumpy(y), np.broadcast_to(beta.astype(data)[along], shape))
    np.testing.assert_array_equal(backend.asnumpy(running[0]), constants.astype(np.float32))
    np.testing.assert_array_equal(backend.asnumpy(running[1]), 0)


def test_caffe_3963_nine_times_one_hundred(backend: Backend) -> None:
    """Nine equal values gave a variance that was not 0, so the layer amplified its own rounding error."""
    y, _ = bn.batch_norm_forward(backend.asarray(np.full((9, 1), 100, np.float32)))
    np.testing.assert_array_equal(backend.asnumpy(y), 0)
