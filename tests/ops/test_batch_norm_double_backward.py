"""The double backward: finite differences, extended precision, PyTorch, and what must hold for any input."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import bnkernels as bn
from bnkernels.ops.activations import ACTIVATIONS, activation_named
from tests.ops.test_batch_norm_activations import CASES
from tests.ops.test_batch_norm_layouts import TENSORS, VIEWS, as_rows
from tools import oracle
from tools.backends import Backend
from tools.oracle_double_backward import OUTPUTS, double_backward, second_derivative

LIKE_X = ("x", "dy", "residual", "ddx", "ddresidual")
VECTORS = ("gamma", "beta", "ddgamma", "ddbeta")
INCOMING = ("ddx", "ddgamma", "ddbeta", "ddresidual")
ABSENT = [(), ("gamma",), ("beta",), ("residual", "ddresidual"), ("gamma", "beta", "residual", "ddresidual")]

Arrays = dict[str, Any]


def make(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any = "float64", axis: int = 1) -> Arrays:
    """Return all inputs by name: gamma of both signs, nothing symmetric."""
    acc_dtype = "float32" if np.dtype(dtype).itemsize == 2 else dtype
    channels = shape[axis]
    arrays = {name: (rng.standard_normal(shape) + 0.4).astype(dtype) for name in LIKE_X}
    arrays |= {name: rng.standard_normal(channels).astype(acc_dtype) for name in VECTORS}
    arrays["gamma"] = (rng.uniform(0.5, 2, channels) * rng.choice([-1, 1], channels)).astype(acc_dtype)
    return arrays


def without(arrays: Arrays, *names: str) -> Arrays:
    """Return the inputs, those of these names None."""
    return arrays | dict.fromkeys(names)


def on_device(backend: Backend, arrays: Arrays) -> Arrays:
    """Return copies with the same strides."""
    return {name: array if array is None else backend.like(array) for name, array in arrays.items()}


def call(on: Arrays, statistics: Any, out: Any = None, **options: Any) -> tuple:
    """Call the op."""
    given = [on[name] for name in ("ddx", "ddgamma", "ddbeta", "dy", "x", "gamma", "beta")]
    tensors = {name: on[name] for name in ("residual", "ddresidual")}
    return bn.batch_norm_double_backward(*given, statistics, **tensors, out=out, **options)


def statistics_of(on: Arrays, **options: Any) -> Any:
    """Return the forward's statistics."""
    return bn.batch_norm_forward(on["x"], on["gamma"], on["beta"], residual=on["residual"], **options)[1]


def run(backend: Backend, arrays: Arrays, **options: Any) -> dict[str, np.ndarray]:
    """Return the outputs by name, without dresidual where there is no residual."""
    on = on_device(backend, arrays)
    found = call(on, statistics_of(on, **options), **options)
    return {name: backend.asnumpy(array) for name, array in zip(OUTPUTS, found, strict=False)}


def first_order(backend: Backend, arrays: Arrays, **options: Any) -> float:
    """Return L, from the forward and the backward."""
    on = on_device(backend, arrays)
    given = [on[name] for name in ("dy", "x", "gamma", "beta")]
    grads = bn.batch_norm_backward(*given, statistics_of(on, **options), residual=on["residual"], **options)
    return inner_of(backend, grads, arrays)


def inner_of(backend: Backend, grads: tuple, arrays: Arrays) -> float:
    """Return the product of the gradients with what comes in for them."""
    pairs = zip(grads, INCOMING, strict=False)
    return float(sum((backend.asnumpy(grad) * arrays[name]).sum() for grad, name in pairs if arrays[name] is not None))


def inner(incoming: Arrays, found: dict[str, np.ndarray]) -> float:
    """Return the product of a direction (x, gamma, beta, residual) with the gradients of these."""
    pairs = (("ddx", "dx"), ("ddgamma", "dgamma"), ("ddbeta", "dbeta"), ("ddresidual", "dresidual"))
    return float(sum((incoming[one] * found[other]).sum() for one, other in pairs))


def assert_central_differences(arrays: Arrays, found: dict[str, np.ndarray], loss: Callable[[Arrays], float]) -> None:
    """Check every gradient of L by differences of L."""
    step = 1e-6
    for output, name in zip(OUTPUTS, ("dy", "x", "gamma", "beta", "residual"), strict=True):
        if arrays[name] is None:
            continue
        for index in np.ndindex(arrays[name].shape):
            up, down = (arrays | {name: arrays[name].copy()} for _ in range(2))
            up[name][index] += step
            down[name][index] -= step
            numeric = (loss(up) - loss(down)) / (2 * step)
            assert abs(numeric - found[output][index]) <= 2e-7 * (1 + abs(numeric)), (output, index)


@pytest.mark.parametrize("absent", ABSENT, ids=lambda names: " ".join(names) or "all")
@pytest.mark.parametrize(("activation", "alpha"), CASES)
def test_gradients_of_the_backward_match_central_differences(
    backend: Backend, rng: np.random.Generator, activation: str, alpha: float | None, absent: tuple[str, ...]
) -> None:
    arrays = without(make(rng, (6, 2)), *absent)
    options = {"activation": activation, "alpha": alpha}
    found = run(backend, arrays, **options)
    assert_central_differences(arrays, found, lambda given: first_order(backend, given, **options))


@pytest.mark.parametrize("absent", ABSENT, ids=lambda names: " ".join(names) or "all")
@pytest.mark.parametrize("activation", ["leaky_relu", "tanh"])
def test_frozen_statistics_match_central_differences(
    backend: Backend, rng: np.random.Generator, activation: str, absent: tuple[str, ...]
) -> None:
    arrays = without(make(rng, (6, 2)), *absent)
    mean, var, eps = rng.standard_normal(2), rng.uniform(0.5, 2, 2), 0.25

    def loss(given: Arrays) -> float:
        on, running = on_device(backend, given), backend.arrays(mean, var)
        forward = [on[name] for name in ("dy", "x", "gamma", "beta")]
        options = {"eps": eps, "residual": on["residual"], "activation": activation}
        return inner_of(backend, bn.batch_norm_inference_backward(*forward, *running, **options), given)

    statistics = backend.asarray(np.stack([mean, np.zeros(2), (var + eps) ** -0.5]))
    found = call(on_device(backend, arrays), statistics, activation=activation, frozen=True)
    found = {name: backend.asnumpy(array) for name, array in zip(OUTPUTS, found, strict=False)}
    assert_central_differences(arrays, found, loss)


@pytest.mark.parametrize(("activation", "alpha"), CASES)
def test_second_derivative_matches_central_differences(activation: str, alpha: float | None) -> None:
    phi = activation_named(activation, alpha)

    def slope(z: np.ndarray) -> np.ndarray:
        return phi.backward(np, np.ones_like(z), phi.forward(np, z.copy()) if phi.from_output else z)

    z = np.linspace(-6, 6, 240)  # not 0, where some have a kink
    numeric = (slope(z + 1e-5) - slope(z - 1e-5)) / 2e-5
    np.testing.assert_allclose(phi.second(np, z), numeric, atol=1e-9)


def second_alone(backend: Backend, z: np.ndarray, activation: str, alpha: float | None) -> np.ndarray:
    """Return phi''(z): q of a batch norm that changes nothing, where the gradient that comes in is the residual's."""
    x, ones = backend.asarray(np.zeros_like(z)), backend.asarray(np.ones_like(z))
    statistics = np.zeros((3, z.shape[1]), z.dtype)
    statistics[2] = 1
    options = {"residual": backend.asarray(z), "ddresidual": ones, "activation": activation, "alpha": alpha}
    return backend.asnumpy(
        bn.batch_norm_double_backward(*[None] * 3, ones, x, None, None, backend.asarray(statistics), **options)[4]
    )


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("activation", "alpha"), CASES)
def test_second_derivative_at_any_size(backend: Backend, activation: str, alpha: float | None, dtype: str) -> None:
    size = np.concatenate([np.logspace(-9, 1.3, 200), np.linspace(0.01, 12, 100)])
    z = np.concatenate([-size, size]).astype(dtype).reshape(-1, 4)
    exact = second_derivative(z.astype(oracle.Extended), activation, alpha)
    bound = oracle.SLACK * oracle.unit_roundoff(z.dtype) * (1 + np.abs(exact)) * (1 + np.minimum(np.abs(z), 4))
    oracle.assert_within(second_alone(backend, z, activation, alpha), exact, bound, "phi''")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("activation", "alpha"), CASES)
def test_second_derivative_is_0_at_infinity_and_nan_at_nan(
    backend: Backend, activation: str, alpha: float | None, dtype: str
) -> None:
    z = np.array([[np.inf, -np.inf, 1e30, -1e30, np.nan]], dtype)
    expected = [0, 0, 0, 0, np.nan]
    np.testing.assert_array_equal(activation_named(activation, alpha).second(np, z.astype("float64"))[0], expected)
    found = second_alone(backend, z, activation, alpha)[0]
    np.testing.assert_array_equal(found[:4], 0)
    if activation not in oracle.PIECEWISE_LINEAR:
        assert np.isnan(found[4])


# Workers that merge in one level and in two, more rows than workers hold, a slice that is not full.
SHAPES = [(2, 1), (3, 5), (64, 20), (65, 33), (257, 7), (1100, 3)]


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("activation", "frozen"), [*((activation, False) for activation in ACTIVATIONS), ("relu", True), ("silu", True)]
)
def test_matches_extended_precision(
    backend: Backend, rng: np.random.Generator, shape: tuple[int, int], dtype: str, activation: str, frozen: bool
) -> None:
    arrays = make(rng, shape, dtype)
    exact = double_backward(arrays, 0.1, activation, frozen=frozen)
    on = on_device(backend, arrays)
    found = call(on, statistics_of(on, activation=activation, eps=0.1), activation=activation, frozen=frozen)
    for name, array in zip(OUTPUTS, found, strict=True):
        oracle.assert_within(backend.asnumpy(array), *exact[name], name)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize(("shape", "axis"), TENSORS)
def test_any_channel_axis_matches_extended_precision(
    backend: Backend, rng: np.random.Generator, shape: tuple[int, ...], axis: int, dtype: str
) -> None:
    if dtype == "bfloat16":
        dtype = pytest.importorskip("ml_dtypes").bfloat16
    arrays = make(rng, shape, dtype, axis)
    rows = {name: as_rows(array, axis) if name in LIKE_X else array for name, array in arrays.items()}
    exact = double_backward(rows, 1e-3, "silu")
    on = on_device(backend, arrays)
    statistics = statistics_of(on, axis=axis, eps=1e-3)
    found = call(on, statistics, axis=axis, activation="silu")
    for name, array in zip(OUTPUTS, map(backend.asnumpy, found), strict=True):
        assert array.flags.c_contiguous
        oracle.assert_within(as_rows(array, axis) if array.ndim > 1 else array, *exact[name], name)


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("which", LIKE_X)
def test_views_give_the_bits_of_a_dense_array(
    backend: Backend, rng: np.random.Generator, which: str, view: str
) -> None:
    spread, _ = VIEWS[view]
    arrays = make(rng, (4, 6, 8, 10), "float32")
    dense = arrays | {which: np.ascontiguousarray(spread(arrays[which]))}
    for want, got in zip(
        run(backend, dense, activation="tanh").values(),
        run(backend, arrays | {which: spread(arrays[which])}, activation="tanh").values(),
        strict=True,
    ):
        np.testing.assert_allclose(got, want, rtol=0 if backend.name != "reference" else 1e-5, atol=1e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_hessian_is_symmetric(backend: Backend, rng: np.random.Generator, activation: str) -> None:
    """Hessian of <dy, y> over x, gamma, beta and residual together: <a, H b> = <b, H a>."""
    arrays, other = make(rng, (40, 5)), make(rng, (40, 5))
    a, b = ({name: given[name] for name in INCOMING} for given in (arrays, other))
    of_a, of_b = (run(backend, arrays | given, activation=activation) for given in (a, b))
    assert inner(b, of_a) == pytest.approx(inner(a, of_b), rel=1e-11, abs=1e-10)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_l_is_linear_in_dy_and_blind_to_a_shift_of_x(
    backend: Backend, rng: np.random.Generator, activation: str, dtype: str
) -> None:
    """So <ddy, dy> is L itself, and dx sums to 0."""
    arrays = make(rng, (130, 6), dtype)
    found = run(backend, arrays, activation=activation)
    eps = np.finfo(dtype).eps
    loss = first_order(backend, {n: a.astype("float64") for n, a in arrays.items()}, activation=activation)
    product = found["ddy"].astype("float64") * arrays["dy"]
    assert product.sum() == pytest.approx(loss, abs=20 * eps * np.abs(product).sum())
    dx = found["dx"].astype("float64")
    assert (np.abs(dx.sum(0)) <= 30 * eps * np.abs(dx).sum(0)).all()


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_is_linear_in_what_comes_in(backend: Backend, rng: np.random.Generator, activation: str) -> None:
    arrays, other = make(rng, (40, 5)), make(rng, (40, 5))
    mixed = arrays | {name: 2 * arrays[name] - 3 * other[name] for name in INCOMING}
    one, two, both = (
        run(backend, given, activation=activation)
        for given in (arrays, arrays | {name: other[name] for name in INCOMING}, mixed)
    )
    for name in OUTPUTS:
        np.testing.assert_allclose(both[name], 2 * one[name] - 3 * two[name], rtol=1e-11, atol=1e-11, err_msg=name)


@pytest.mark.parametrize("given", [(), *((name,) for name in INCOMING)], ids=lambda names: " ".join(names) or "none")
def test_what_does_not_come_in_is_zero(backend: Backend, rng: np.random.Generator, given: tuple[str, ...]) -> None:
    arrays = make(rng, (30, 4))
    absent = [name for name in INCOMING if name not in given]
    zeros = arrays | {name: np.zeros_like(arrays[name]) for name in absent}
    wants, gots = (run(backend, each, activation="gelu_tanh") for each in (zeros, without(arrays, *absent)))
    for name in OUTPUTS:
        np.testing.assert_allclose(gots[name], wants[name], rtol=1e-13, atol=1e-13, err_msg=name)
        assert given or not gots[name].any()


@pytest.mark.parametrize("activation", ["identity", "relu", "leaky_relu"])
def test_without_curvature_beta_and_residual_do_not_matter(
    backend: Backend, rng: np.random.Generator, activation: str
) -> None:
    found = run(backend, make(rng, (30, 4), "float32"), activation=activation)
    assert not found["dbeta"].any()
    assert not found["dresidual"].any()
    assert found["dx"].any()


def test_nothing_passes_a_closed_relu_not_even_infinity(backend: Backend, rng: np.random.Generator) -> None:
    arrays = make(rng, (30, 4), "float32")
    closed = oracle.forward(*(arrays[name] for name in ("x", "gamma", "beta")), 1e-5, residual=arrays["residual"]).z < 0
    results = [
        run(backend, arrays | {"dy": np.where(closed, value, arrays["dy"]).astype("float32")}, activation="relu")
        for value in (np.inf, 0)
    ]
    for name in OUTPUTS:
        np.testing.assert_array_equal(*(found[name] for found in results), err_msg=name)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_is_that_of_pytorch(torch: ModuleType, backend: Backend, rng: np.random.Generator, activation: str) -> None:
    functions = torch.nn.functional
    theirs = {"identity": lambda z: z, "gelu_tanh": lambda z: functions.gelu(z, approximate="tanh")}
    phi = theirs.get(activation) or getattr(functions, activation)
    arrays = make(rng, (3, 4, 5, 6))
    leaves = {name: torch.from_numpy(array).requires_grad_() for name, array in arrays.items()}
    dy, x, gamma, beta, residual = inputs = [leaves[name] for name in ("dy", "x", "gamma", "beta", "residual")]
    y = phi(functions.batch_norm(x, None, None, gamma, beta, training=True) + residual)
    grads = torch.autograd.grad(y, inputs[1:], dy, create_graph=True)
    loss = sum((grad * leaves[name]).sum() for grad, name in zip(grads, INCOMING, strict=True))
    expected = torch.autograd.grad(loss, inputs, allow_unused=True)
    found = run(backend, arrays, activation=activation)
    for name, want, leaf in zip(OUTPUTS, expected, inputs, strict=True):
        right = np.zeros(leaf.shape) if want is None else want.numpy()
        np.testing.assert_allclose(found[name], right, rtol=1e-9, atol=1e-10, err_msg=name)
