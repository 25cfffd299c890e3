"""The functions that CuPy had for cuDNN's batch normalisation: what they computed, in a few lines of NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bnkernels.compat import cudnn
from tools.backends import Backend

# Options of the calls, the shape of x, the axes of the statistics, and the shape of the parameters.
CASES: dict[str, tuple[dict[str, Any], tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = {
    "matrix": ({"is_for_conv2d": False, "cudnn_mode": 0}, (6, 5), (0,), (5,)),
    "activations": ({"is_for_conv2d": True, "cudnn_mode": 0}, (6, 2, 3, 2), (0,), (1, 2, 3, 2)),
    "NCHW": ({"is_for_conv2d": True, "cudnn_mode": 1}, (4, 3, 2, 5), (0, 2, 3), (3,)),
    "NCHW, (1, C, 1, 1)": ({"is_for_conv2d": True, "cudnn_mode": 2}, (4, 3, 2, 5), (0, 2, 3), (1, 3, 1, 1)),
    "NHWC": ({"is_for_conv2d": True, "cudnn_mode": 2, "d_layout": 1}, (4, 2, 5, 3), (0, 1, 2), (3,)),
}


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("case", CASES)
def test_functions_are_their_definitions(backend: Backend, rng: np.random.Generator, case: str, dtype: str) -> None:
    options, shape, axes, of_parameters = CASES[case]
    x, gy = (rng.standard_normal((2, *shape)) + 1).astype(dtype)
    gamma, beta, mean, var = rng.uniform(0.5, 2, (4, *of_parameters)).astype(dtype)
    on_x, on_gy, on_gamma, on_beta, on_mean, on_var = backend.arrays(x, gy, gamma, beta, mean, var)
    tolerance = {"float16": 1e-2, "float32": 2e-5, "float64": 1e-10}[dtype]

    def assert_close(got: Any, want: np.ndarray) -> None:
        got = backend.asnumpy(got)
        np.testing.assert_allclose(got.reshape(want.shape), want, rtol=tolerance, atol=tolerance)

    wide, dy = np.float64(x), np.float64(gy)
    kept = wide.mean(axes, keepdims=True).shape
    new_mean, new_var = wide.mean(axes, keepdims=True), wide.var(axes, keepdims=True)
    scale, shift = (np.float64(array).reshape(kept) for array in (gamma, beta))
    xhat = (wide - new_mean) / np.sqrt(new_var + 1e-3)
    count = x.size / new_mean.size

    given = on_x, on_gamma, on_beta, on_mean, on_var
    y, save_mean, save_inv_std = cudnn.batch_normalization_forward_training(
        *given, None, None, eps=1e-3, decay=0.75, debug=False, **options
    )
    assert (y.dtype, y.shape, save_mean.shape) == (x.dtype, x.shape, gamma.shape)
    assert_close(y, scale * xhat + shift)
    assert_close(save_mean, new_mean)
    assert_close(save_inv_std, 1 / np.sqrt(new_var + 1e-3))
    assert_close(on_mean, 0.75 * np.float64(mean).reshape(kept) + 0.25 * new_mean)
    assert_close(on_var, 0.75 * np.float64(var).reshape(kept) + 0.25 * new_var * count / (count - 1))

    statistics = save_mean, save_inv_std
    gx, ggamma, gbeta = cudnn.batch_normalization_backward(
        on_x, on_gamma, on_gy, *statistics, eps=1e-3, debug=False, **options
    )
    of_gamma, of_beta = ((dy * one).sum(axes, keepdims=True) for one in (xhat, np.ones(shape)))
    assert_close(gbeta, of_beta)
    assert_close(ggamma, of_gamma)
    assert_close(gx, scale / np.sqrt(new_var + 1e-3) * (dy - (of_beta + xhat * of_gamma) / count))
    assert (gx.dtype, ggamma.dtype, ggamma.shape) == (x.dtype, x.dtype, gamma.shape)

    y = cudnn.batch_normalization_forward_inference(*given, eps=1e-3, **options)
    running = (np.float64(backend.asnumpy(array)).reshape(kept) for array in (on_mean, on_var))
    mean_now, var_now = running
    assert_close(y, scale * (wide - mean_now) / np.sqrt(var_now + 1e-3) + shift)


def test_statistics_go_where_the_caller_says(backend: Backend, rng: np.random.Generator) -> None:
    x = rng.standard_normal((6, 5))
    given = backend.arrays(x, np.ones(5), np.zeros(5), np.zeros(5), np.ones(5))
    mean, inv_std = (backend.empty((5,), "float64") for _ in range(2))
    options: dict[str, Any] = {"eps": 1e-5, "decay": 0.9, "is_for_conv2d": False, "cudnn_mode": 0, "debug": False}
    y = cudnn.batch_normalization_forward_training(*given, mean, inv_std, **options)
    np.testing.assert_allclose(backend.asnumpy(mean), x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(backend.asnumpy(inv_std), 1 / np.sqrt(x.var(0) + 1e-5), rtol=1e-12)
    reserve_space, again = cudnn.batch_normalization_forward_training_ex(*given, mean, inv_std, **options)
    assert reserve_space is None
    np.testing.assert_array_equal(backend.asnumpy(again), backend.asnumpy(y))
    assert len(cudnn.batch_normalization_forward_training_ex(*given, None, None, **options)) == 4
    for wrong, message in (
        ({"cudnn_mode": 3}, "cudnn_mode must be 0, 1 or 2"),
        ({"is_for_conv2d": True}, "x must have four axes"),
        ({"decay": 2}, "decay must be between 0 and 1"),
    ):
        with pytest.raises(ValueError, match=message):
            cudnn.batch_normalization_forward_training(*given, mean, inv_std, **options | wrong)
    with pytest.raises(ValueError, match="mean and inv_std must be two arrays, or both None"):
        cudnn.batch_normalization_forward_training(*given, mean, None, **options)
