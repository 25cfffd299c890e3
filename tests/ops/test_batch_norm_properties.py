"""Random shapes, layouts, data types and options, on all backends: the formulas, and what must hold for any input."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import bnkernels as bn
from bnkernels.ops.activations import ACTIVATIONS
from tools import oracle
from tools.backends import Backend

# Derandomised: a run is the same everywhere. The backend has no state that one example could leave to the next.
SETTINGS = settings(
    derandomize=True,
    deadline=None,
    max_examples=60,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.differing_executors],
)
LAYOUTS = {
    "dense": lambda a: a,
    "Fortran": np.asfortranarray,
    "gaps": lambda a: np.repeat(np.repeat(a, 2, 0), 3, 1)[::2, ::3],
    "reversed": lambda a: np.ascontiguousarray(a[::-1, ::-1])[::-1, ::-1],
    "rows apart": lambda a: np.repeat(a, 2, 0)[::2],
}


class Case(NamedTuple):
    """Arguments of a forward and its backward; x and dy in layouts of their own."""

    x: np.ndarray
    dy: np.ndarray
    gamma: np.ndarray | None
    beta: np.ndarray | None
    eps: float
    activation: str
    momentum: float


@st.composite
def cases(draw: st.DrawFn, fewest_rows: int = 2) -> Case:
    """Draw arguments; the numbers themselves come from a seed, so that no two are equal by design."""
    rows = draw(st.one_of(st.integers(fewest_rows, 70), st.integers(fewest_rows, 700)))
    channels = draw(st.integers(1, 70)) if rows <= 70 else draw(st.integers(1, 4))
    dtype = draw(st.sampled_from(["float32", "float64"]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    offset, scale = draw(st.sampled_from([0, 1, -30, 1000])), draw(st.sampled_from([1, 1e-3, 1e4]))

    def layout(array: np.ndarray) -> np.ndarray:
        return LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))](array)

    x = (scale * (rng.standard_normal((rows, channels)) + offset * rng.standard_normal(channels))).astype(dtype)
    dy = (rng.standard_normal((rows, channels)) + 0.3).astype(dtype)
    gamma = rng.uniform(0.5, 2, channels).astype(dtype) * rng.choice(np.array([-1, 1], dtype), channels)
    return Case(
        layout(x),
        layout(dy),
        gamma if draw(st.booleans()) else None,
        rng.standard_normal(channels).astype(dtype) if draw(st.booleans()) else None,
        draw(st.sampled_from([1e-5, 1e-3, 1.0])),
        draw(st.sampled_from(ACTIVATIONS)),
        draw(st.sampled_from([0.0, 0.1, 0.5, 1.0])),
    )


def put(backend: Backend, case: Case) -> tuple[Any, ...]:
    """Return x, dy, gamma and beta on the backend, in their layouts."""
    return backend.like(case.x), backend.like(case.dy), *backend.arrays(case.gamma, case.beta)


def assume_no_kink(case: Case, exact: oracle.Forward) -> None:
    """Pass over inputs whose rounding could decide on which side of the jump in a slope they are."""
    assume(case.activation not in ("relu", "leaky_relu") or (np.abs(exact.z) > exact.z_bound).all())


def assert_gradients(backend: Backend, grads: tuple, exact: oracle.Backward) -> None:
    for name, grad in zip(("dx", "dgamma", "dbeta"), grads, strict=True):
        oracle.assert_within(backend.asnumpy(grad), getattr(exact, name), getattr(exact, f"{name}_bound"), name)


@SETTINGS
@given(case=cases())
def test_training_follows_the_formulas(backend: Backend, case: Case) -> None:
    exact = oracle.forward(case.x, case.gamma, case.beta, case.eps, case.activation)
    assume_no_kink(case, exact)
    x, dy, *parameters = put(backend, case)
    channels, dtype = case.x.shape[1], case.x.dtype
    running = backend.arrays(np.full(channels, 0.5, dtype), np.full(channels, 2, dtype))
    options = {"eps": case.eps, "activation": case.activation}
    y, statistics = bn.batch_norm_forward(x, *parameters, *running, momentum=case.momentum, **options)
    grads = bn.batch_norm_backward(dy, x, *parameters, statistics, activation=case.activation)

    u, rows = oracle.unit_roundoff(dtype), len(case.x)
    oracle.assert_within(backend.asnumpy(y), exact.y, exact.z_bound, "y")
    assert_gradients(backend, grads, oracle.backward(case.dy, case.x, case.gamma, case.beta, *options.values()))
    old, new = (1 - case.momentum) * oracle.Extended(0.5), case.momentum * exact.mean
    mean_bound = oracle.SLACK * u * (old + case.momentum * np.abs(case.x).max(0))
    oracle.assert_within(backend.asnumpy(running[0]), old + new, mean_bound, "running_mean")
    new_var = (1 - case.momentum) * 2 + case.momentum * exact.var * rows / (rows - 1)
    oracle.assert_within(backend.asnumpy(running[1]), new_var, oracle.SLACK * u * new_var, "running_var")


@SETTINGS
@given(case=cases(fewest_rows=1), data=st.data())
def test_inference_follows_the_formulas_and_rows_are_independent(
    backend: Backend, case: Case, data: st.DataObject
) -> None:
    rng = np.random.default_rng(case.x.size)
    channels, dtype = case.x.shape[1], case.x.dtype
    spread = np.abs(case.x).max() + 1
    running = (spread * rng.standard_normal(channels)).astype(dtype), rng.uniform(0.1, 3, channels).astype(dtype)
    exact = oracle.forward(case.x, case.gamma, case.beta, case.eps, case.activation, running)
    assume_no_kink(case, exact)
    x, dy, *parameters = put(backend, case)
    on_running = backend.arrays(*running)
    options = {"eps": case.eps, "activation": case.activation}
    y = bn.batch_norm_inference(x, *parameters, *on_running, **options)
    grads = bn.batch_norm_inference_backward(dy, x, *parameters, *on_running, **options)

    oracle.assert_within(backend.asnumpy(y), exact.y, exact.z_bound, "y")
    assert_gradients(
        backend, grads, oracle.backward(case.dy, case.x, case.gamma, case.beta, *options.values(), running)
    )
    first = data.draw(st.integers(0, len(case.x) - 1))
    last = data.draw(st.integers(first + 1, len(case.x)))
    part = bn.batch_norm_inference(x[first:last], *parameters, *on_running, **options)
    np.testing.assert_array_equal(backend.asnumpy(part), backend.asnumpy(y)[first:last])


@SETTINGS
@given(case=cases(), power=st.integers(-12, 12))
def test_scaling_by_a_power_of_two_is_exact(backend: Backend, case: Case, power: int) -> None:
    x, dy, *parameters = put(backend, case)
    factor = case.x.dtype.type(2.0**power)
    eps = float(case.x.dtype.type(case.eps))

    def run(x: Any, eps: float) -> list[np.ndarray]:
        y, statistics = bn.batch_norm_forward(x, *parameters, eps=eps, activation=case.activation)
        grads = bn.batch_norm_backward(dy, x, *parameters, statistics, activation=case.activation)
        return [backend.asnumpy(array) for array in (y, *grads)]

    y, dx, dgamma, dbeta = run(x, eps)
    scaled = run(backend.like(case.x * factor), eps * float(factor) ** 2)
    for want, got in zip((y, dx / factor, dgamma, dbeta), scaled, strict=True):
        np.testing.assert_array_equal(got, want)


@SETTINGS
@given(case=cases(), data=st.data())
def test_channels_know_nothing_of_each_other(backend: Backend, case: Case, data: st.DataObject) -> None:
    """Any choice and order of channels gives the bits that those channels have in the whole."""
    channels = case.x.shape[1]
    order = data.draw(st.lists(st.integers(0, channels - 1), min_size=1, max_size=channels, unique=True))

    def run(columns: list[int]) -> list[np.ndarray]:
        vectors = [None if array is None else array[columns] for array in (case.gamma, case.beta)]
        x, dy, *parameters = backend.arrays(case.x[:, columns], case.dy[:, columns], *vectors)
        y, statistics = bn.batch_norm_forward(x, *parameters, eps=case.eps, activation=case.activation)
        grads = bn.batch_norm_backward(dy, x, *parameters, statistics, activation=case.activation)
        return [backend.asnumpy(array) for array in (y, *grads)]

    # The number of workers, and with it the order of the sums, depends on the width of a slice and so on the number of
    # channels: all of them, or as many again, compare bit for bit; fewer within rounding.
    exact = len(order) == channels and backend.name != "reference"
    tolerance = 0 if exact else 2000 * np.finfo(case.x.dtype).eps
    for whole, chosen in zip(run(list(range(channels))), run(order), strict=True):
        scale = tolerance * (1 + np.abs(whole).max(initial=0))
        np.testing.assert_allclose(chosen, whole[..., order], rtol=tolerance, atol=scale)


@SETTINGS
@given(case=cases())
def test_in_place_gives_the_same_bits(backend: Backend, case: Case) -> None:
    x, dy = (backend.asarray(np.ascontiguousarray(array)) for array in (case.x, case.dy))
    gamma, beta = backend.arrays(case.gamma, case.beta)
    channels = case.x.shape[1]
    dtype = case.x.dtype
    y, statistics = bn.batch_norm_forward(x, gamma, beta, eps=case.eps, activation=case.activation)
    grads = bn.batch_norm_backward(dy, x, gamma, beta, statistics, activation=case.activation)
    vectors = [backend.empty((channels,), dtype) for _ in range(2)]
    in_place = bn.batch_norm_backward(dy, x, gamma, beta, statistics, activation=case.activation, out=(dy, *vectors))
    out = x, backend.empty((3, channels), dtype)
    bn.batch_norm_forward(x, gamma, beta, eps=case.eps, activation=case.activation, out=out)
    for want, got in zip((*grads, y, statistics), (*in_place, *out), strict=True):
        np.testing.assert_array_equal(backend.asnumpy(got), backend.asnumpy(want))
