"""Only one of gamma and beta given: a null pointer, or a gradient that was not there."""

from __future__ import annotations

import numpy as np
import pytest

import bnkernels as bn
from bnkernels.runtime.arguments import accumulator
from tools import oracle
from tools.backends import Backend


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("has_gamma", [True, False])
@pytest.mark.parametrize("has_beta", [True, False])
def test_pytorch_61924_every_combination_of_none(
    backend: Backend, rng: np.random.Generator, has_gamma: bool, has_beta: bool, dtype: str
) -> None:
    """All four combinations, in training and in inference, give the formula's values and all three gradients."""
    x, dy = (rng.standard_normal((20, 4)).astype(dtype) for _ in range(2))
    acc_dtype = accumulator(x.dtype)  # float32 for 16-bit data: apex 403 and oneflow 7574 failed on the mixture
    gamma = np.array([2, -1, 0.5, 3], acc_dtype) if has_gamma else None
    beta = np.array([0.5, 0.25, -1, 0], acc_dtype) if has_beta else None
    running = rng.standard_normal(4).astype(acc_dtype), rng.uniform(0.5, 2, 4).astype(acc_dtype)
    on, on_dy = backend.arrays(x, gamma, beta), backend.asarray(dy)
    on_running = backend.arrays(*running)

    y, statistics = bn.batch_norm_forward(*on, activation="tanh")
    grads = bn.batch_norm_backward(on_dy, *on, statistics, activation="tanh")
    frozen = bn.batch_norm_inference(*on, *on_running, activation="tanh")
    frozen_grads = bn.batch_norm_inference_backward(on_dy, *on, *on_running, activation="tanh")
    for got, got_grads, stats in ((y, grads, None), (frozen, frozen_grads, running)):
        exact = oracle.forward(x, gamma, beta, 1e-5, "tanh", stats)
        oracle.assert_within(backend.asnumpy(got), exact.y, exact.z_bound, "y")
        exact = oracle.backward(dy, x, gamma, beta, 1e-5, "tanh", stats)
        for name, grad in zip(("dx", "dgamma", "dbeta"), got_grads, strict=True):
            oracle.assert_within(backend.asnumpy(grad), getattr(exact, name), getattr(exact, f"{name}_bound"), name)


@pytest.mark.parametrize("kept", ["running_mean", "running_var"])
def test_pytorch_61924_only_one_running_statistic(backend: Backend, kept: str) -> None:
    """The kernels take each running statistic on its own; the one that is given gets its value."""
    statistic = backend.asarray(np.zeros(1))
    bn.batch_norm_forward(backend.asarray(np.array([[1.0], [3.0]])), **{kept: statistic}, momentum=0.5)
    assert backend.asnumpy(statistic)[0] == 1  # half of the mean 2, half of the unbiased variance 2
