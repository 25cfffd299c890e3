"""Helpers of the tests of layers: formulas, central differences, a network of every kind of layer."""

from __future__ import annotations

from typing import Any

import numpy as np

from bnkernels import nn
from tools.backends import Backend


def assert_close(backend: Backend, got: Any, want: np.ndarray, tolerance: float = 1e-12) -> None:
    """Compare float64 results of a backend."""
    np.testing.assert_allclose(backend.asnumpy(got), want, rtol=tolerance, atol=tolerance)


def normalised(x: np.ndarray, axes: tuple[int, ...], eps: float) -> np.ndarray:
    """Return x less its mean over some axes, over its standard deviation."""
    return (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + eps)


def assert_gradients(backend: Backend, layer: nn.Layer, x: np.ndarray, dy: np.ndarray, **options: Any) -> None:
    """Compare what a backward gives with central differences of the forward, along random directions."""
    layer.forward(backend.asarray(x), **options)
    dx = layer.backward(backend.asarray(dy))
    rng, step = np.random.default_rng(0), 1e-6
    pairs = [(backend.asarray(x), backend.asnumpy(dx))]
    pairs += [(array, backend.asnumpy(layer.gradients[name])) for name, array in layer.parameters.items()]
    for array, gradient in pairs:
        start, direction = backend.asnumpy(array).copy(), rng.standard_normal(gradient.shape)
        values = []
        for sign in (1, -1):
            array[...] = backend.asarray(start + sign * step * direction)
            y = layer.forward(pairs[0][0], **options)
            values.append((backend.asnumpy(y) * dy).sum())
        array[...] = backend.asarray(start)
        numeric, exact = (values[0] - values[1]) / (2 * step), (gradient * direction).sum()
        assert abs(numeric - exact) <= 1e-7 * max(1, np.abs(gradient).sum())


def network(backend: Backend) -> nn.Sequential:
    """Return layers of every kind, in float64."""
    options: dict[str, Any] = {"dtype": "float64", "xp": backend.xp}
    block = nn.Residual(nn.Linear(5, 5, seed=2, **options), nn.BatchNorm(5, activation="relu", **options))
    plain = nn.Residual(nn.Linear(5, 5, seed=3, activation="tanh", **options))
    first = nn.LinearBatchNorm(4, 5, activation="elu", seed=1, **options)
    return nn.Sequential(first, block, plain, nn.LayerNorm(5, **options), nn.GELU(), nn.Linear(5, 2, seed=4, **options))


def trained(backend: Backend, model: Any, steps: int = 3) -> np.ndarray:
    """Make some steps of gradient descent on a fixed problem; return the last output."""
    rng = np.random.default_rng(3)
    optimiser = nn.SGD(model, lr=0.1)
    for _ in range(steps):
        y = model.forward(backend.asarray(rng.standard_normal((8, 4))), training=True)
        model.backward(y)
        optimiser.step()
    return backend.asnumpy(y)
