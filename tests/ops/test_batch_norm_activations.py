"""Every activation and the residual sum before it, in all four ops: values, gradients, infinity, NaN, alpha."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest

import bnkernels as bn
from bnkernels.ops.activations import ACTIVATIONS
from tests.ops.test_batch_norm import make_case
from tools import oracle
from tools.backends import Backend

ALPHAS = {"leaky_relu": (None, 0.0, 0.25), "elu": (None, 0.5)}
CASES = [(name, alpha) for name in ACTIVATIONS for alpha in ALPHAS.get(name, (None,))]


def alone(backend: Backend, z: np.ndarray, activation: str, alpha: float | None, dy: np.ndarray) -> tuple[Any, Any]:
    """Return phi(z) and dy phi'(z) in float64: a batch norm that changes nothing, and its gradient of the residual."""
    ones, zeros = backend.asarray(np.ones(z.shape[1], z.dtype)), backend.asarray(np.zeros(z.shape[1], z.dtype))
    on_z, on_dy = backend.arrays(z, dy)
    nothing = backend.asarray(np.zeros_like(z))
    options = {"eps": 1e-30, "residual": on_z, "activation": activation, "alpha": alpha}
    y = bn.batch_norm_inference(nothing, None, None, zeros, ones, **options)
    *_, gradient = bn.batch_norm_inference_backward(on_dy, nothing, None, None, zeros, ones, **options)
    return backend.asnumpy(y), backend.asnumpy(gradient)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("activation", "alpha"), CASES)
def test_activation_and_gradient_at_any_size(
    backend: Backend, activation: str, alpha: float | None, dtype: str
) -> None:
    """From the smallest to the largest numbers: near 0 relative to z, in the tails without overflow."""
    size = np.concatenate([np.logspace(-9, 1.3, 200), np.linspace(0.01, 12, 100)])
    z = np.concatenate([-size, size]).astype(dtype).reshape(-1, 4)
    h, gradient = alone(backend, z, activation, alpha, np.full_like(z, -3))
    exact_z, u = z.astype(oracle.Extended), oracle.unit_roundoff(z.dtype)
    exact, slope = oracle.activate(exact_z, activation, alpha), oracle.derivative(exact_z, activation, alpha)
    # z is rounded relative to itself: a tail that falls like exp(-z^2 / 2) then moves by z^2 of that.
    least = np.finfo(dtype).tiny * np.abs(exact_z)  # a gate that is flushed to zero, times z
    oracle.assert_within(h, exact, oracle.SLACK * u * np.abs(exact) * (1 + exact_z * exact_z) + least, "h")
    error = oracle.SLACK * u * (np.abs(slope) + np.abs(exact_z) + 1)
    oracle.assert_within(gradient, -3 * slope, 3 * error, "gradient")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("activation", "alpha"), CASES)
def test_limits_at_infinity_and_nan_everywhere(
    backend: Backend, activation: str, alpha: float | None, dtype: str
) -> None:
    z = np.array([[np.inf, -np.inf, np.nan, 1e30, -1e30]], dtype)
    h, gradient = alone(backend, z, activation, alpha, np.ones_like(z))
    name, a = activation, {"leaky_relu": 0.01, "elu": 1.0}.get(activation) if alpha is None else alpha
    above = 1 if name in ("sigmoid", "tanh") else np.inf
    below = {"identity": -np.inf, "tanh": -1, "leaky_relu": -np.inf if a else 0, "elu": -(a or 0)}.get(name, 0)
    np.testing.assert_array_equal(h[0, :3], [above, below, np.nan])
    np.testing.assert_allclose(
        h[0, 3:], [min(above, z[0, 3]), max(below, {"leaky_relu": a}.get(name, 1) * z[0, 4])], 1e-6
    )
    slope_above = 0 if name in ("sigmoid", "tanh") else 1
    slope_below = {"identity": 1, "leaky_relu": a}.get(name, 0)
    np.testing.assert_allclose(gradient[0, [0, 1, 3, 4]], [slope_above, slope_below, slope_above, slope_below], 1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("shape", "with_residual"),
    [((3, 5), False), ((64, 20), False), ((64, 20), True), ((257, 7), True), ((1100, 20), True)],
)
@pytest.mark.parametrize(("activation", "alpha"), CASES)
def test_training_matches_extended_precision(
    backend: Backend,
    rng: np.random.Generator,
    shape: tuple[int, int],
    dtype: str,
    activation: str,
    alpha: float | None,
    with_residual: bool,
) -> None:
    x, gamma, beta, dy = make_case(rng, shape, dtype)
    residual = rng.standard_normal(shape).astype(dtype) if with_residual else None
    options = {"residual": residual, "alpha": alpha}
    exact = oracle.forward(x, gamma, beta, 1e-5, activation, **options)
    exact_grads = oracle.backward(dy, x, gamma, beta, 1e-5, activation, **options)
    on_x, on_dy, *vectors = backend.arrays(x, dy, gamma, beta)
    (options["residual"],) = backend.arrays(residual)

    y, statistics = bn.batch_norm_forward(on_x, *vectors, activation=activation, **options)
    grads = bn.batch_norm_backward(on_dy, on_x, *vectors, statistics, activation=activation, **options)

    oracle.assert_within(backend.asnumpy(y), exact.y, exact.z_bound, "y")
    assert len(grads) == 3 + with_residual
    for name, got in zip(("dx", "dgamma", "dbeta", "dresidual"), grads, strict=False):
        bound = getattr(exact_grads, f"{name}_bound")
        oracle.assert_within(backend.asnumpy(got), getattr(exact_grads, name), bound, name)


@pytest.mark.parametrize(("activation", "alpha"), CASES)
def test_gradients_match_central_differences(
    backend: Backend, rng: np.random.Generator, activation: str, alpha: float | None
) -> None:
    x, _, _, dy = make_case(rng, (7, 3), "float64")
    residual = rng.standard_normal((7, 3))
    options = {"activation": activation, "alpha": alpha}
    on_x, on_dy, on_residual = backend.arrays(x, dy, residual)
    _, statistics = bn.batch_norm_forward(on_x, residual=on_residual, **options)
    dx, _, _, dresidual = bn.batch_norm_backward(on_dy, on_x, None, None, statistics, residual=on_residual, **options)

    def loss(x: np.ndarray, residual: np.ndarray) -> float:
        on_x, on_residual = backend.arrays(x, residual)
        y, _ = bn.batch_norm_forward(on_x, residual=on_residual, **options)
        return float((backend.asnumpy(y) * dy).sum())

    step = 1e-6
    for position, gradient in enumerate((dx, dresidual)):
        for index in np.ndindex(x.shape):
            up, down = [[x.copy(), residual.copy()] for _ in range(2)]
            up[position][index] += step
            down[position][index] -= step
            numeric = (loss(*up) - loss(*down)) / (2 * step)
            assert abs(numeric - float(backend.asnumpy(gradient)[index])) <= 1e-7


def test_x_may_be_its_own_residual(backend: Backend, rng: np.random.Generator) -> None:
    x, gamma, beta, _ = make_case(rng, (64, 20), "float32")
    on_x, *vectors = backend.arrays(x, gamma, beta)
    y, _ = bn.batch_norm_forward(on_x, *vectors, residual=on_x)
    exact = oracle.forward(x, gamma, beta, 1e-5, residual=x)
    oracle.assert_within(backend.asnumpy(y), exact.y, exact.z_bound, "y")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_are_those_of_pytorch(
    torch: ModuleType, backend: Backend, rng: np.random.Generator, activation: str
) -> None:
    theirs = {
        "identity": lambda z: z,
        "gelu_tanh": lambda z: torch.nn.functional.gelu(z, approximate="tanh"),
    }.get(activation) or getattr(torch.nn.functional, activation)
    z, dy = rng.standard_normal((50, 4)) * 3, rng.standard_normal((50, 4))
    h, gradient = alone(backend, z, activation, None, dy)
    their_z = torch.from_numpy(z).requires_grad_()
    their_h = theirs(their_z)
    their_h.backward(torch.from_numpy(dy))
    np.testing.assert_allclose(h, their_h.detach().numpy(), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(gradient, their_z.grad.numpy(), rtol=1e-11, atol=1e-13)
