"""A gradient without its factor gamma, in a test suite whose gamma was always 1."""

from __future__ import annotations

import numpy as np
import pytest

import bnkernels as bn
from tools.backends import Backend


@pytest.mark.parametrize("activation", ["identity", "sigmoid"])
def test_knet_288_gamma_of_either_sign_and_zero(backend: Backend, rng: np.random.Generator, activation: str) -> None:
    """With gamma 2, -3 and 0, beta not 0 and dy not constant, a lost factor cannot hide."""
    x, dy = rng.standard_normal((7, 3)), rng.standard_normal((7, 3))
    gamma, beta = np.array([2.0, -3.0, 0.0]), np.array([0.5, -1.0, 0.25])
    on = backend.arrays(x, gamma, beta)
    _, statistics = bn.batch_norm_forward(*on, activation=activation)
    grads = bn.batch_norm_backward(backend.asarray(dy), *on, statistics, activation=activation)
    dx, dgamma, dbeta = (backend.asnumpy(grad) for grad in grads)

    def loss(x: np.ndarray, gamma: np.ndarray, beta: np.ndarray) -> float:
        z = gamma * (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5) + beta
        return float(((z if activation == "identity" else 1 / (1 + np.exp(-z))) * dy).sum())

    step = 1e-6
    for position, grad in enumerate((dx, dgamma, dbeta)):
        for index in np.ndindex(grad.shape):
            up, down = [[array.copy() for array in (x, gamma, beta)] for _ in range(2)]
            up[position][index] += step
            down[position][index] -= step
            assert abs((loss(*up) - loss(*down)) / (2 * step) - grad[index]) <= 1e-7
    np.testing.assert_array_equal(dx[:, 2], 0)
    assert dgamma[2] != 0
