"""An approximate root that flushes subnormal numbers to zero; here small data are normalised like any other."""

from __future__ import annotations

import numpy as np
import pytest

import bnkernels as bn
from tests.backends import Backend

# What the variance is about. CuPy compiles float32 kernels so that they flush subnormal numbers: there, a normal one.
VARIANCES = {"float32": 1e-40, "float64": 1e-320}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_triton_5438_subnormal_variance(backend: Backend, dtype: str) -> None:
    want = 1e-34 if backend.name == "cuda" and dtype == "float32" else VARIANCES[dtype]
    size = np.dtype(dtype).type(np.sqrt(want))
    x = np.array([[1], [-1], [-1], [1]], dtype) * size
    y, statistics = bn.batch_norm_forward(backend.asarray(x), eps=0.0)
    var = float(size) ** 2
    tolerance = max(np.spacing(np.dtype(dtype).type(var)) / var, 8 * np.finfo(dtype).eps)  # few digits are left
    np.testing.assert_allclose(backend.asnumpy(y), x / size, rtol=tolerance)
    np.testing.assert_allclose(backend.asnumpy(statistics)[2], 1 / np.float64(size), rtol=tolerance)


@pytest.mark.parametrize("power", [-20, -40, -60])
def test_triton_8557_scaling_down_is_exact(backend: Backend, power: int) -> None:
    """Scaling by a power of two must not change a bit down to variances of 2^-120, which float32 just holds."""
    x = np.float32([[3, -1], [-3, 1], [5, 1], [-5, -1]])
    dy = np.float32([[1, 0], [0, 2], [-1, 0], [4, 1]])
    factor = np.float32(2.0**power)

    def run(x: np.ndarray) -> list[np.ndarray]:
        on_x = backend.asarray(x)
        y, statistics = bn.batch_norm_forward(on_x, eps=0.0)
        grads = bn.batch_norm_backward(backend.asarray(dy), on_x, None, None, statistics)
        return [backend.asnumpy(array) for array in (y, statistics[2], *grads)]

    y, rstd, dx, dgamma, dbeta = run(x)
    for want, got in zip((y, rstd / factor, dx / factor, dgamma, dbeta), run(x * factor), strict=True):
        np.testing.assert_array_equal(got, want)
