"""The norms of CS231n and of Deep Learning from Scratch: what their texts define, in a few lines of NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bnkernels.compat import cs231n
from bnkernels.compat.deep_learning_from_scratch import BatchNormalization
from tests.nn.common import assert_close
from tools.backends import Backend


def gradients(x: np.ndarray, dout: np.ndarray, gamma: Any, axes: tuple[int, ...], eps: float) -> tuple:
    """Return dx, dgamma and dbeta, by the chain rule through mean and variance."""
    count = x.size / np.mean(x, axes).size
    deviation = np.sqrt(x.var(axes, keepdims=True) + eps)
    xhat = (x - x.mean(axes, keepdims=True)) / deviation
    dxhat = dout * gamma
    of_var = (dxhat * xhat).sum(axes, keepdims=True)
    dx = (dxhat - dxhat.sum(axes, keepdims=True) / count - xhat * of_var / count) / deviation
    return dx, (dout * xhat).sum(axes), dout.sum(axes)


@pytest.mark.parametrize("shape", [(7, 4), (3, 4, 2, 5)])
def test_cs231n_batch_norm(backend: Backend, rng: np.random.Generator, shape: tuple[int, ...]) -> None:
    names = "batchnorm" if len(shape) == 2 else "spatial_batchnorm"
    forward, backward = (getattr(cs231n, f"{names}_{way}") for way in ("forward", "backward"))
    axes, along = ((0,), (4,)) if len(shape) == 2 else ((0, 2, 3), (4, 1, 1))
    gamma, beta = rng.standard_normal((2, 4))
    on_gamma, on_beta = backend.arrays(gamma, beta)
    bn_param: dict[str, Any] = {"mode": "train", "eps": 1e-4, "momentum": 0.8}
    mean, var = np.zeros(4), np.zeros(4)
    for _ in range(3):
        x, dout = rng.standard_normal((2, *shape)) + 1
        out, cache = forward(backend.asarray(x), on_gamma, on_beta, bn_param)
        xhat = (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + 1e-4)
        assert_close(backend, out, gamma.reshape(along) * xhat + beta.reshape(along))
        mean, var = 0.8 * mean + 0.2 * x.mean(axes), 0.8 * var + 0.2 * x.var(axes)
        assert_close(backend, bn_param["running_mean"], mean)
        assert_close(backend, bn_param["running_var"], var)
        found = backward(backend.asarray(dout), cache)
        for got, want in zip(found, gradients(x, dout, gamma.reshape(along), axes, 1e-4), strict=True):
            assert_close(backend, got, want, 1e-10)
    before = bn_param["running_mean"]
    out, cache = forward(backend.asarray(x), on_gamma, on_beta, bn_param | {"mode": "test"})
    scaled = (x - mean.reshape(along)) / np.sqrt(var.reshape(along) + 1e-4)
    assert_close(backend, out, gamma.reshape(along) * scaled + beta.reshape(along))
    forward(backend.asarray(x), on_gamma, on_beta, bn_param)
    assert_close(backend, before, mean)  # replaced, not written
    with pytest.raises(ValueError, match="cache is that of a forward in test mode, which keeps nothing"):
        backward(backend.asarray(dout), cache)
    with pytest.raises(ValueError, match="mode must be one of train, test; got 'eval'"):
        forward(backend.asarray(x), on_gamma, on_beta, {"mode": "eval"})


def test_cs231n_layer_norm(backend: Backend, rng: np.random.Generator) -> None:
    x, dout = rng.standard_normal((2, 7, 4))
    gamma, beta = rng.standard_normal((2, 4))
    out, cache = cs231n.layernorm_forward(*backend.arrays(x, gamma, beta), {})
    xhat = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
    assert_close(backend, out, gamma * xhat + beta)
    dx, dgamma, dbeta = cs231n.layernorm_backward(backend.asarray(dout), cache)
    assert_close(backend, dx, gradients(x, dout, gamma, (1,), 1e-5)[0], 1e-10)
    assert_close(backend, dgamma, (dout * xhat).sum(0), 1e-10)
    assert_close(backend, dbeta, dout.sum(0), 1e-10)


@pytest.mark.parametrize("shape", [(7, 12), (5, 3, 2, 2)])
@pytest.mark.parametrize("given", [True, False])
def test_deep_learning_from_scratch(
    backend: Backend, rng: np.random.Generator, shape: tuple[int, ...], given: bool
) -> None:
    gamma, beta = rng.standard_normal((2, 12))
    on_gamma, on_beta, *running = backend.arrays(gamma, beta, np.zeros(12), np.zeros(12))
    layer = BatchNormalization(on_gamma, on_beta, 0.7, *running if given else ())
    with pytest.raises(RuntimeError, match="call forward before it"):
        layer.backward(on_gamma)
    mean, var = np.zeros(12), np.zeros(12)
    for step in range(2):
        x, dout = rng.standard_normal((2, *shape)) + step
        rows, dy = x.reshape(len(x), -1), dout.reshape(len(x), -1)
        xhat = (rows - rows.mean(0)) / np.sqrt(rows.var(0) + 10e-7)
        assert_close(backend, layer.forward(backend.asarray(x)), (gamma * xhat + beta).reshape(shape), 1e-10)
        mean, var = 0.7 * mean + 0.3 * rows.mean(0), 0.7 * var + 0.3 * rows.var(0)
        dx, dgamma, dbeta = gradients(rows, dy, gamma, (0,), 10e-7)
        assert_close(backend, layer.backward(backend.asarray(dout)), dx.reshape(shape), 1e-9)
        assert_close(backend, layer.dgamma, dgamma, 1e-9)
        assert_close(backend, layer.dbeta, dbeta, 1e-9)
    assert_close(backend, layer.running_mean, mean)
    assert_close(backend, layer.running_var, var)
    assert not given or layer.running_mean is running[0]
    on_gamma += 1  # an optimiser of the book writes into the parameters
    want = (gamma + 1) * (rows - mean) / np.sqrt(var + 10e-7) + beta
    assert_close(backend, layer.forward(backend.asarray(x), train_flg=False), want.reshape(shape), 1e-10)
