"""Empty mini-batches: NaN in the running mean, 0.9 in the running variance, or a launch of zero blocks."""

from __future__ import annotations

import numpy as np
import pytest

import bnkernels as bn
from bnkernels.runtime.arguments import accumulator
from tools import backends
from tools.backends import Backend

EMPTY = [(0, 5), (4, 0), (0, 0), (0, 5, 9), (4, 2, 0, 3), (1, 0)]


def launched(backend: Backend) -> int:
    """Return how many kernels ran on the emulator since its reset; elsewhere launches are not counted."""
    return len(backends.emulated_runtime().launches) if backend.name == "emulator" else 0


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("shape", EMPTY[:-1])
def test_pytorch_12013_empty_batch_leaves_the_statistics(backend: Backend, shape: tuple[int, ...], dtype: str) -> None:
    """An empty mini-batch poisoned the running statistics; the outputs must be empty and the statistics the same."""
    if backend.name == "emulator":
        backends.emulated_runtime().reset()
    channels = shape[1]
    x = backend.asarray(np.zeros(shape, dtype))
    acc_dtype = accumulator(np.dtype(dtype))
    mean, var = running = backend.arrays(np.full(channels, 0.5, acc_dtype), np.full(channels, 2, acc_dtype))
    y, statistics = bn.batch_norm_forward(x, None, None, *running)
    dx, dgamma, dbeta = bn.batch_norm_backward(x, x, None, None, statistics, activation="relu")
    assert y.shape == dx.shape == shape
    assert y.dtype == dx.dtype == np.dtype(dtype)
    assert dgamma.dtype == dbeta.dtype == acc_dtype
    for array, expected in ((mean, 0.5), (var, 2), (statistics, 0), (dgamma, 0), (dbeta, 0)):
        np.testing.assert_array_equal(backend.asnumpy(array), expected)
    assert statistics.shape == (3, channels)
    assert dgamma.shape == dbeta.shape == (channels,)
    assert launched(backend) == 0


@pytest.mark.parametrize("shape", EMPTY)
def test_onnxruntime_10128_empty_inference(backend: Backend, shape: tuple[int, ...]) -> None:
    """A grid of zero blocks is an invalid configuration; nothing to compute must launch nothing."""
    if backend.name == "emulator":
        backends.emulated_runtime().reset()
    channels = shape[1]
    x, mean, var = backend.arrays(
        np.zeros(shape, "float32"), np.zeros(channels, "float32"), np.ones(channels, "float32")
    )
    assert bn.batch_norm_inference(x, None, None, mean, var, activation="tanh").shape == shape
    dx, dgamma, dbeta = bn.batch_norm_inference_backward(x, x, None, None, mean, var)
    assert dx.shape == shape
    for array in (dgamma, dbeta):
        assert array.shape == (channels,)
        np.testing.assert_array_equal(backend.asnumpy(array), 0)
    assert launched(backend) == 0
