"""An approximate root that flushes subnormal numbers to zero; here small data are normalised like any other."""

from __future__ import annotations

import numpy as np
import pytest

import bnkernels as bn
from tools.backends import Backend

# Approximate variances. CuPy compiles float32 kernels so that they flush subnormal numbers: there, a normal one.
VARIANCES = {"float32": 5e-39, "float64": 1e-308}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_triton_5438_subnormal_variance(backend: Backend, dtype: str) -> None:
    """With the smallest eps, which is little more: a variance taken for 0 would make y a fifth larger."""
    want = 1e-34 if backend.name == "cuda" and dtype == "float32" else VARIANCES[dtype]
    eps = float(np.finfo(dtype).tiny)
    size = np.dtype(dtype).type(np.sqrt(want))
    x = np.array([[1], [-1], [-1], [1]], dtype) * size
    y, statistics = bn.batch_norm_forward(backend.asarray(x), eps=eps)
    root = np.sqrt(np.float64(size) ** 2 + eps)
    tolerance = 16 * np.finfo(dtype).eps
    np.testing.assert_allclose(backend.asnumpy(y), x / root, rtol=tolerance)
    np.testing.assert_allclose(backend.asnumpy(statistics)[2], 1 / root, rtol=tolerance)


@pytest.mark.parametrize("power", [-20, -40, -60])
def test_triton_8557_scaling_down_is_exact(backend: Backend, power: int) -> None:
    """Scaling by a power of two must not change a bit, down to 2^-126 for eps and to variances about as small."""
    x = np.float32([[3, -1], [-3, 1], [5, 1], [-5, -1]])
    dy = np.float32([[1, 0], [0, 2], [-1, 0], [4, 1]])
    factor = np.float32(2.0**power)

    def run(x: np.ndarray, eps: float) -> list[np.ndarray]:
        on_x = backend.asarray(x)
        y, statistics = bn.batch_norm_forward(on_x, eps=eps)
        grads = bn.batch_norm_backward(backend.asarray(dy), on_x, None, None, statistics)
        return [backend.asnumpy(array) for array in (y, statistics[2], *grads)]

    y, rstd, dx, dgamma, dbeta = run(x, 2.0**-6)
    scaled = run(x * factor, 2.0 ** (2 * power - 6))
    for want, got in zip((y, rstd / factor, dx / factor, dgamma, dbeta), scaled, strict=True):
        np.testing.assert_array_equal(got, want)
