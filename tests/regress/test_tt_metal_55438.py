"""Mix-ups of biased and unbiased, of old and new, of the place of eps: each a number that only one reading gives."""

from __future__ import annotations

import numpy as np
import pytest

import bnkernels as bn
from tools.backends import Backend

ONE_TO_FOUR = np.array([[1.0], [2.0], [3.0], [4.0]])  # mean 2.5, biased variance 1.25, unbiased 1.6667


def running_after_one_step(backend: Backend, dtype: str, momentum: float) -> tuple[float, float]:
    """Return the running mean and variance, from 0 and 1, after a forward of ONE_TO_FOUR."""
    running = backend.arrays(np.zeros(1, dtype), np.ones(1, dtype))
    bn.batch_norm_forward(backend.asarray(ONE_TO_FOUR.astype(dtype)), None, None, *running, momentum=momentum)
    mean, var = (float(backend.asnumpy(array)[0]) for array in running)
    return mean, var


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_tt_metal_55438_running_var_takes_the_unbiased_variance(backend: Backend, dtype: str) -> None:
    """The biased variance went into running_var: 1.025 in place of 1.066667. mlx 3817 and tensorflow 55545 too."""
    _, var = running_after_one_step(backend, dtype, 0.1)
    assert var == pytest.approx(0.9 + 0.1 * 5 / 3, rel=4 * float(np.finfo(dtype).eps))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_chainer_332_running_mean_takes_no_correction(backend: Backend, dtype: str) -> None:
    """The factor N / (N - 1) was applied to the mean as well: 0.3333 in place of 0.25."""
    mean, _ = running_after_one_step(backend, dtype, 0.1)
    assert mean == pytest.approx(0.25, rel=4 * float(np.finfo(dtype).eps))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("momentum", "expected"), [(0.0, (0.0, 1.0)), (1.0, (2.5, 5 / 3))])
def test_onnxscript_1289_momentum_is_the_weight_of_the_new(
    backend: Backend, momentum: float, expected: tuple[float, float], dtype: str
) -> None:
    """Frameworks disagree whose weight momentum is: here 0 leaves the statistics alone and 1 replaces them."""
    mean, var = running_after_one_step(backend, dtype, momentum)
    assert mean == expected[0]
    assert var == pytest.approx(expected[1], rel=4 * float(np.finfo(dtype).eps))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_chainer_4505_eps_is_added_once_in_training_and_in_inference(backend: Backend, dtype: str) -> None:
    """Eps was added twice in one mode and never in the other; with eps = 1 the output's variance is v / (v + 1)."""
    x = ONE_TO_FOUR.astype(dtype)
    y, _ = bn.batch_norm_forward(backend.asarray(x), eps=1.0)
    mean, var = backend.arrays(np.array([2.5], dtype), np.array([1.25], dtype))
    frozen = bn.batch_norm_inference(backend.asarray(x), None, None, mean, var, eps=1.0)
    assert backend.asnumpy(y).var() == pytest.approx(1.25 / 2.25, rel=8 * float(np.finfo(dtype).eps))
    np.testing.assert_array_equal(backend.asnumpy(frozen), backend.asnumpy(y))
