"""NaN that a fused ReLU, formed with a maximum, turned into 0."""

from __future__ import annotations

import numpy as np
import pytest

import bnkernels as bn
from bnkernels.ops.activations import ACTIVATIONS
from tools.backends import Backend


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("rows", [5, 70, 300])
def test_nnlib_509_nan_stays_and_stays_in_its_channel(
    backend: Backend, rng: np.random.Generator, rows: int, bad: float, activation: str
) -> None:
    """A bad value must fill its channel with NaN, not with 0, and leave every bit of the others. mxnet 11115 too."""
    x, dy = (rng.standard_normal((rows, 3)).astype(np.float32) for _ in range(2))
    spoilt = x.copy()
    spoilt[rows // 2, 1] = bad
    gamma, beta = np.float32([1.5, -2, 0.5]), np.float32([0.1, 0, -0.1])

    def run(x: np.ndarray) -> list[np.ndarray]:
        on = backend.arrays(x, gamma, beta)
        running = backend.arrays(np.zeros(3, "float32"), np.ones(3, "float32"))
        y, statistics = bn.batch_norm_forward(*on, *running, activation=activation)
        grads = bn.batch_norm_backward(backend.asarray(dy), *on, statistics, activation=activation)
        return [backend.asnumpy(array) for array in (y, grads[0], *running, *grads[1:])]

    for clean, got in zip(run(x), run(spoilt), strict=True):
        np.testing.assert_array_equal(got[..., [0, 2]], clean[..., [0, 2]])
    y, dx, running_mean, *_ = run(spoilt)
    assert np.isnan(y[:, 1]).all()
    assert np.isnan(dx[:, 1]).all()
    assert not np.isfinite(running_mean[1])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_pytorch_7999_nan_in_inference_stays_in_its_element(backend: Backend, activation: str) -> None:
    """The activation behind the normalisation must not hide a NaN either where nothing is summed."""
    x = np.float32([[1, np.nan], [2, 3]])
    mean, var = backend.arrays(np.zeros(2, "float32"), np.ones(2, "float32"))
    y = backend.asnumpy(bn.batch_norm_inference(backend.asarray(x), None, None, mean, var, activation=activation))
    np.testing.assert_array_equal(np.isnan(y), np.isnan(x))
