"""The batch normalisation of DeZero: what the book's text defines, on DeZero itself and on a graph of its kind.

The graph below has what DeZero 0.0.13 gives a function, and no more: data, gradients, a creator, outputs held weakly.
"""

from __future__ import annotations

import importlib
import sys
import warnings
import weakref
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.compat.test_courses import gradients

MODULE = "bnkernels.compat.dezero"


class Config:
    """Modes of the graph."""

    enable_backprop = train = True


class Variable:
    """Node of the graph that holds an array."""

    def __init__(self, data: Any, name: str | None = None) -> None:
        self.data, self.name, self.grad, self.creator = data, name, None, None

    def backward(self, create_graph: bool = False) -> None:
        """Go back one function, which is as far as these tests go."""
        function, Config.enable_backprop = self.creator, create_graph
        try:
            grads = function.backward(*(output().grad for output in function.outputs))
        finally:
            Config.enable_backprop = True
        for one, grad in zip(function.inputs, grads, strict=True):
            one.grad = grad


class Parameter(Variable):
    """Variable of a layer."""


def as_variable(given: Any) -> Variable:
    """Return a variable."""
    return given if isinstance(given, Variable) else Variable(given)


class Function:
    """Node of the graph that computes."""

    def __call__(self, *given: Any) -> Any:
        """Compute, and note in the graph who did."""
        inputs = [as_variable(one) for one in given]
        results = self.forward(*(one.data for one in inputs))
        outputs = [Variable(one) for one in (results if isinstance(results, tuple) else (results,))]
        if Config.enable_backprop:
            for output in outputs:
                output.creator = self
            self.inputs, self.outputs = inputs, [weakref.ref(output) for output in outputs]
        return outputs if len(outputs) > 1 else outputs[0]


class Layer:
    """Owner of parameters."""

    def __call__(self, x: Any) -> Any:
        """Return the output."""
        return self.forward(x)


def dezero_itself() -> ModuleType:
    """Return DeZero, or skip: of the index it does not run on NumPy 2."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module("dezero")
    except (ImportError, AttributeError) as error:
        pytest.skip(f"DeZero cannot be imported: {error}")


@pytest.fixture(params=["graph", "dezero"])
def dezero(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, ModuleType]]:
    """Return DeZero, or the graph of its kind, and the adapter on top of it."""
    names = {"Config", "Function", "Layer", "Parameter", "Variable", "as_variable"}
    if request.param == "graph":
        graph: Any = SimpleNamespace(**{name: globals()[name] for name in names})
        monkeypatch.setitem(sys.modules, "dezero", graph)
    else:
        graph = dezero_itself()
    sys.modules.pop(MODULE, None)
    yield graph, importlib.import_module(MODULE)
    sys.modules.pop(MODULE, None)
    graph.Config.train = True


@pytest.mark.parametrize("shape", [(7, 4), (3, 4, 2, 5)])
def test_function_and_layer(dezero: Any, rng: np.random.Generator, shape: tuple[int, ...]) -> None:
    graph, compat = dezero
    axes, along = ((0,), (4,)) if len(shape) == 2 else ((0, 2, 3), (4, 1, 1))
    layer = compat.BatchNorm(decay=0.8)
    mean, var = np.zeros(4), np.ones(4)
    gamma, beta = rng.standard_normal((2, 4))
    for _ in range(2):
        x, gy = rng.standard_normal((2, *shape)) + 1
        given = graph.Variable(x)
        layer(x)  # the first call makes the parameters, and every one counts
        layer.gamma.data[...], layer.beta.data[...] = gamma, beta
        y = layer(given)
        y.grad = graph.Variable(gy)
        y.backward()
        scale, shift = gamma.reshape(along), beta.reshape(along)
        xhat = (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + 2e-5)
        np.testing.assert_allclose(y.data, scale * xhat + shift, rtol=1e-11, atol=1e-12)
        found = given.grad, layer.gamma.grad, layer.beta.grad
        for got, want in zip(found, gradients(x, gy, scale, axes, 2e-5), strict=True):
            np.testing.assert_allclose(got.data, want, rtol=1e-9, atol=1e-10)
        for one in (layer.gamma, layer.beta):
            one.grad = None
        adjust = (count := x.size / 4) / max(count - 1, 1)
        for _ in range(2):
            mean, var = 0.8 * mean + 0.2 * x.mean(axes), 0.8 * var + 0.2 * adjust * x.var(axes)
        np.testing.assert_allclose(layer.avg_mean.data, mean, rtol=1e-11)
        np.testing.assert_allclose(layer.avg_var.data, var, rtol=1e-11)
    graph.Config.train = False
    y = layer(given)
    deviation = np.sqrt(var.reshape(along) + 2e-5)
    np.testing.assert_allclose(y.data, scale * (x - mean.reshape(along)) / deviation + shift, rtol=1e-11, atol=1e-12)
    given.grad, y.grad = None, graph.Variable(gy)
    y.backward()
    np.testing.assert_allclose(given.grad.data, gy * scale / deviation, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(layer.avg_mean.data, mean, rtol=1e-11)


@pytest.mark.parametrize("train", [True, False])
def test_gradients_of_gradients_match_central_differences(dezero: Any, rng: np.random.Generator, train: bool) -> None:
    graph, compat = dezero
    graph.Config.train = train
    x, gy, ggx, direction = rng.standard_normal((4, 6, 3))

    def gradient(x: np.ndarray, create_graph: bool) -> tuple[Any, Any]:
        """Return the input and its gradient; those of the parameters are cleared, as between two steps."""
        given, *vectors = (graph.Variable(array) for array in (x, np.full(3, 1.5), np.zeros(3)))
        y = compat.batch_nrom(given, *vectors, np.zeros(3), np.ones(3))
        y.grad = graph.Variable(gy)
        y.backward(create_graph=create_graph)
        for vector in vectors:
            vector.grad = None
        return given, given.grad

    given, gx = gradient(x, True)
    given.grad, gx.grad = None, graph.Variable(ggx)
    gx.backward()
    step = 1e-6
    values = [(gradient(x + sign * step * direction, False)[1].data * ggx).sum() for sign in (1, -1)]
    exact = (given.grad.data * direction).sum()
    assert abs((values[0] - values[1]) / (2 * step) - exact) <= 1e-7 * np.abs(given.grad.data).sum()


def test_a_graph_that_would_end_is_refused(dezero: Any, rng: np.random.Generator) -> None:
    graph, compat = dezero
    given = graph.Variable(rng.standard_normal((6, 3)))
    layer = compat.BatchNorm()
    y = layer(given)
    y.grad = graph.Variable(given.data)
    y.backward(create_graph=True)
    gx, given.grad = given.grad, None
    gx.grad = graph.Variable(given.data)
    with pytest.raises(RuntimeError, match="gradients of gradients have no graph"):
        gx.backward(create_graph=True)
