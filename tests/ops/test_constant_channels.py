"""A constant channel, or row, is exactly phi(beta) in every op, down to the smallest eps that there may be.

That is the smallest normal number of the type computed in. A GPU, for which CuPy compiles with ``-ftz=true``, takes
subnormal numbers for 0; the emulator and NumPy do not, so that no smaller eps would mean the same everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import bnkernels as bn
from bnkernels.nn.mlp import MLP
from bnkernels.runtime.arguments import accumulator
from tests.ops.test_batch_norm_exact_data import dtype_named, small_device
from tools.backends import Backend

DTYPES = ["float16", "bfloat16", "float32", "float64"]
CONSTANTS = np.array([7, -1 / 3, 0, 60000, 1e-7, 0.1, -3, 1])
BETA = np.array([0.5, -1, 2, 0, -0.25, 1, -2, 3])
STEPS = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23, "float64": 2.0**-52}


def smallest_eps(data: np.dtype) -> float:
    """Return the smallest normal number of the type that data of this type is computed in."""
    return float(np.finfo(accumulator(data)).tiny)


def vectors(backend: Backend, data: np.dtype, *more: np.ndarray) -> list[Any]:
    """Return gamma, beta and more vectors in the accumulator's type."""
    return backend.arrays(*(v.astype(accumulator(data)) for v in (np.full(8, -1.5), BETA, *more)))


def constant(data: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """Return an array whose channels, along axis 1, are constant."""
    return np.broadcast_to(CONSTANTS.astype(data)[(slice(None), *[None] * (len(shape) - 2))], shape).copy()


def small(backend: Backend, data: np.dtype, **options: Any) -> Any:
    x = backend.asarray(constant(data, (12, 8)))
    return bn.batch_norm_forward(x, *vectors(backend, data), **options)[0]


def large(backend: Backend, data: np.dtype, **options: Any) -> Any:
    x = backend.asarray(constant(data, (6, 8, 40, 40)))
    with small_device(backend):
        return bn.batch_norm_forward(x, *vectors(backend, data), **options)[0]


def masked(backend: Backend, data: np.dtype, **options: Any) -> Any:
    """Normalise constant rows, among others, which give phi(beta) here only so that all may be looked at."""
    x, valid = constant(data, (20, 8)), np.arange(20) % 3 > 0
    x[~valid] = 5
    y = bn.batch_norm_forward(backend.asarray(x), *vectors(backend, data), mask=backend.asarray(valid), **options)[0]
    return backend.asnumpy(y)[valid]


def grouped(backend: Backend, data: np.dtype, **options: Any) -> Any:
    x = np.stack([constant(data, (12, 8)), constant(data, (12, 8))[:, ::-1]])
    return bn.batch_norm_forward(backend.asarray(x), *vectors(backend, data), grouped=True, **options)[0]


def in_parts(backend: Backend, data: np.dtype, eps: float, **options: Any) -> Any:
    parts = [backend.asarray(constant(data, (rows, 8))) for rows in (3, 8)]
    moments = np.stack([backend.asnumpy(bn.batch_norm_moments(part)) for part in parts])
    statistics, _ = bn.batch_norm_statistics(backend.asarray(moments), eps=eps)
    return bn.batch_norm_normalise(parts[1], *vectors(backend, data), statistics, **options)


def inference(backend: Backend, data: np.dtype, **options: Any) -> Any:
    mean = CONSTANTS.astype(data).astype(accumulator(data))
    x = backend.asarray(constant(data, (12, 8)))
    return bn.batch_norm_inference(x, *vectors(backend, data, mean, np.zeros(8)), **options)


def linear(backend: Backend, data: np.dtype, **options: Any) -> Any:
    """Normalise a product of equal examples."""
    x, weight = np.full((12, 3), 0.3), np.arange(24).reshape(3, 8) / 7 - 1
    on = backend.arrays(x.astype(data), weight.astype(data))
    return bn.linear_batch_norm_forward(*on, *vectors(backend, data), **options)[0]


BATCH_NORMS: dict[str, Callable[..., Any]] = {
    "small": small,
    "large": large,
    "masked": masked,
    "grouped": grouped,
    "in parts": in_parts,
    "inference": inference,
    "linear": linear,
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["identity", "relu"])
@pytest.mark.parametrize("op", BATCH_NORMS)
def test_a_constant_channel_is_phi_of_beta(backend: Backend, op: str, activation: str, dtype: str) -> None:
    data = dtype_named(dtype)
    wanted = (BETA if activation == "identity" else np.maximum(BETA, 0)).astype(accumulator(data)).astype(data)
    for eps in (smallest_eps(data), 1e-5):
        y = backend.asnumpy(BATCH_NORMS[op](backend, data, eps=eps, activation=activation))
        along = (slice(None), *[None] * (y.ndim - 2)) if op == "large" else ()
        np.testing.assert_array_equal(y, np.broadcast_to(wanted[along], y.shape))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [5, 64, 1000])
def test_a_constant_row_is_phi_of_beta(backend: Backend, columns: int, dtype: str) -> None:
    data = dtype_named(dtype)
    x = np.repeat(CONSTANTS[:, None], columns, 1).astype(data)
    gamma, beta = (np.resize(v, columns).astype(accumulator(data)) for v in (BETA, BETA))
    on = backend.arrays(x, gamma, beta)
    for eps in (smallest_eps(data), 1e-5):
        y, _ = bn.layer_norm_forward(*on, eps=eps, activation="relu")
        wanted = np.broadcast_to(np.maximum(beta, 0).astype(data), x.shape)
        np.testing.assert_array_equal(backend.asnumpy(y), wanted)
        one = backend.asarray(np.ones((1, columns), data))
        y, *_ = bn.linear_batch_norm_forward(backend.asarray(x[:, :1]), one, *on[1:], norm="layer", eps=eps)
        np.testing.assert_array_equal(backend.asnumpy(y), np.broadcast_to(beta.astype(data), x.shape))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("of", ["channels", "rows"])
def test_gradients_of_the_smallest_eps(backend: Backend, of: str, dtype: str) -> None:
    """They are as large as 1 / sqrt(eps) says, up to infinity in float16, and nothing is NaN."""
    data = dtype_named(dtype)
    eps = smallest_eps(data)
    x = constant(data, (16, 8)) if of == "channels" else np.repeat(CONSTANTS[:, None], 16, 1).astype(data)
    dy = (np.arange(x.size).reshape(x.shape) * 5 % 16 - 6).astype(data)
    on_x, on_dy = backend.arrays(x, dy)
    if of == "channels":
        _, statistics = bn.batch_norm_forward(on_x, eps=eps)
        dx, dgamma, dbeta = bn.batch_norm_backward(on_dy, on_x, None, None, statistics)
    else:
        _, statistics = bn.layer_norm_forward(on_x, eps=eps)
        dx, dgamma, dbeta = bn.layer_norm_backward(on_dy, on_x, None, None, statistics)
    exact_dy = dy.astype(np.float64)
    wanted = (exact_dy - exact_dy.mean(0 if of == "channels" else 1, keepdims=True)) / np.sqrt(eps)
    with np.errstate(over="ignore"):
        wanted = wanted.astype(accumulator(data)).astype(data).astype(np.float64)
    np.testing.assert_allclose(backend.asnumpy(dx).astype(np.float64), wanted, rtol=4 * STEPS[dtype])
    np.testing.assert_array_equal(backend.asnumpy(dgamma), 0)
    np.testing.assert_array_equal(backend.asnumpy(dbeta), exact_dy.sum(0))
    assert np.isinf(wanted).any() == (dtype == "float16")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_fused_training_of_equal_examples_and_neurons(backend: Backend, norm: str, dtype: str) -> None:
    """A mini-batch is one example, over and over; with layer norm, a layer is one neuron: its output is phi(beta)."""
    model = MLP((3, 6, 2), norm=norm, dtype=dtype, eps=smallest_eps(np.dtype(dtype)))
    beta, weight = np.array([0.5, -1, 2, 0, 0.25, 1]), np.arange(12).reshape(6, 2) / 10
    state = model.state() | {"0.beta": beta, "1.weight": weight, "1.bias": np.zeros(2)}
    if norm == "layer":
        state["0.weight"] = np.repeat(np.array([[0.1], [0.7], [-0.3]]), 6, 1)
    model.load_state(state)
    x, y = np.tile(np.array([0.3, 1 / 3, -7], dtype), (77, 1)), np.zeros(77, np.int32)
    on = backend.arrays(model.parameters, x, y)
    losses = bn.fused_training(model.fused, on[0], (), None, *on[1:], batch=77, lr=0.0)
    logits = np.maximum(beta, 0) @ weight
    wanted = np.log1p(np.exp(logits[1] - logits[0]))
    np.testing.assert_allclose(backend.asnumpy(losses), wanted, rtol=20 * STEPS[dtype])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("batch", [11, 77, 200])
def test_the_running_mean_of_equal_examples(backend: Backend, batch: int, dtype: str) -> None:
    """Adding one number 11 times rounds, and the mean made of the sum is a few last places off: that must be found."""
    model = MLP((1, 32, 2), dtype=dtype, momentum=None)  # the first mini-batch replaces the running statistics
    x, weight = np.ones((batch, 1), dtype), (1 + np.arange(32)[None] * np.sqrt(0.1)).astype(dtype)
    model.load_state(model.state() | {"0.weight": weight})
    on = backend.arrays(model.parameters, model.running, x, np.zeros(batch, np.int32))
    bn.fused_training(model.fused, on[0], (), *on[1:], batch=batch, lr=0.0)
    model.running[:] = backend.asnumpy(on[1])
    np.testing.assert_array_equal(model.state()["0.running_mean"], weight[0])
    np.testing.assert_array_equal(model.state()["0.running_var"], 0)
