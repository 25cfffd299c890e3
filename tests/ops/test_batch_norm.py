"""Batch norm on all backends, against extended precision, and by what must hold for any input."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest

import bnkernels as bn
from tools import oracle
from tools.backends import Backend

# One below, at and above what a thread holds (4, 16 rows) and a slice is wide (32 channels); primes; held and streamed;
# the last is large for NumPy, which takes it in blocks.
SHAPES = [(2, 1), (3, 5), (64, 20), (63, 33), (65, 32), (17, 1), (128, 20), (257, 7), (260, 33), (1030, 2), (1100, 20)]
ACTIVATIONS = ["identity", "relu", "sigmoid", "tanh"]
DTYPES = ["float32", "float64"]


def make_case(rng: np.random.Generator, shape: tuple[int, int], dtype: str, offset: float = 3.0) -> tuple:
    """Return x, gamma, beta, dy: gamma of both signs, beta not zero, nothing symmetric."""
    channels = shape[1]
    x = rng.standard_normal(shape) * rng.uniform(0.5, 2, channels) + offset * rng.standard_normal(channels)
    gamma = rng.uniform(0.5, 2, channels) * rng.choice([-1, 1], channels)
    beta = rng.standard_normal(channels)
    dy = rng.standard_normal(shape) + 0.3
    return tuple(array.astype(dtype) for array in (x, gamma, beta, dy))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_forward_and_backward_match_extended_precision(
    backend: Backend, rng: np.random.Generator, shape: tuple[int, int], dtype: str, activation: str
) -> None:
    x, gamma, beta, dy = make_case(rng, shape, dtype)
    eps = 0.1 if activation == "tanh" else 1e-5  # a large eps makes a misplaced one gross
    exact = oracle.forward(x, gamma, beta, eps, activation)
    exact_backward = oracle.backward(dy, x, gamma, beta, eps, activation)
    running_mean, running_var = np.full(shape[1], 0.5, dtype), np.full(shape[1], 2.0, dtype)
    on = backend.arrays(x, gamma, beta, running_mean, running_var)

    y, statistics = bn.batch_norm_forward(*on, momentum=0.25, eps=eps, activation=activation)
    grads = bn.batch_norm_backward(backend.asarray(dy), *on[:3], statistics, activation=activation)

    u = oracle.unit_roundoff(x.dtype)
    mean, mean_low, rstd = backend.asnumpy(statistics)
    oracle.assert_within(backend.asnumpy(y), exact.y, exact.z_bound, "y")
    two_parts = mean.astype(oracle.Extended) + mean_low
    mean_bound = 4 * u * np.sqrt(exact.var) + 8 * len(x) * u * u * np.abs(x).max(0)
    assert (np.abs(two_parts - exact.mean) <= mean_bound).all()  # far below u * mean: what one number would lose
    oracle.assert_within(rstd, exact.rstd, oracle.SLACK * u * exact.rstd, "rstd")
    unbiased = exact.var * len(x) / (len(x) - 1)
    new_mean, new_var = 0.75 * 0.5 + 0.25 * exact.mean, 0.75 * 2.0 + 0.25 * unbiased
    oracle.assert_within(backend.asnumpy(on[3]), new_mean, 4 * u * (1 + np.abs(exact.mean)), "running_mean")
    oracle.assert_within(backend.asnumpy(on[4]), new_var, oracle.SLACK * u * new_var, "running_var")
    for name, got in zip(("dx", "dgamma", "dbeta"), grads, strict=True):
        bound = getattr(exact_backward, f"{name}_bound")
        oracle.assert_within(backend.asnumpy(got), getattr(exact_backward, name), bound, name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 3), (64, 20), (300, 33), (1100, 20)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_inference_matches_extended_precision(
    backend: Backend, rng: np.random.Generator, shape: tuple[int, int], dtype: str, activation: str
) -> None:
    x, gamma, beta, dy = make_case(rng, shape, dtype)
    running = rng.standard_normal(shape[1]).astype(dtype), rng.uniform(0.1, 3, shape[1]).astype(dtype)
    exact = oracle.forward(x, gamma, beta, 1e-3, activation, running)
    exact_backward = oracle.backward(dy, x, gamma, beta, 1e-3, activation, running)
    on = backend.arrays(x, gamma, beta, *running)

    y = bn.batch_norm_inference(*on, eps=1e-3, activation=activation)
    grads = bn.batch_norm_inference_backward(backend.asarray(dy), *on, eps=1e-3, activation=activation)

    oracle.assert_within(backend.asnumpy(y), exact.y, exact.z_bound, "y")
    for name, got in zip(("dx", "dgamma", "dbeta"), grads, strict=True):
        bound = getattr(exact_backward, f"{name}_bound")
        oracle.assert_within(backend.asnumpy(got), getattr(exact_backward, name), bound, name)
    for before, after in zip(running, on[3:], strict=True):
        np.testing.assert_array_equal(backend.asnumpy(after), before)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_match_central_differences(backend: Backend, rng: np.random.Generator, activation: str) -> None:
    x, gamma, beta, dy = make_case(rng, (7, 3), "float64")
    on = backend.arrays(x, gamma, beta)
    _, statistics = bn.batch_norm_forward(*on, activation=activation)
    grads = bn.batch_norm_backward(backend.asarray(dy), *on, statistics, activation=activation)

    def loss(*arrays: np.ndarray) -> float:
        y, _ = bn.batch_norm_forward(*backend.arrays(*arrays), activation=activation)
        return float((backend.asnumpy(y) * dy).sum())  # not y.sum(), whose gradient is zero

    step = 1e-6
    for position, grad in enumerate(grads):
        for index in np.ndindex(grad.shape):
            up, down = [[a.copy() for a in (x, gamma, beta)] for _ in range(2)]
            up[position][index] += step
            down[position][index] -= step
            numeric = (loss(*up) - loss(*down)) / (2 * step)
            assert abs(numeric - float(backend.asnumpy(grad)[index])) <= 1e-7


@pytest.mark.parametrize("dtype", DTYPES)
def test_output_has_mean_zero_and_variance_one(backend: Backend, rng: np.random.Generator, dtype: str) -> None:
    x, *_ = make_case(rng, (64, 20), dtype, offset=1000)
    y, _ = bn.batch_norm_forward(backend.asarray(x), eps=1e-30)
    y = backend.asnumpy(y).astype(np.float64)
    assert (np.abs(y.mean(0)) <= 4 * np.finfo(dtype).eps).all()
    assert (np.abs(y.var(0) - 1) <= 16 * np.finfo(dtype).eps).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_dx_sums_to_zero_and_is_orthogonal_to_xhat(backend: Backend, rng: np.random.Generator, dtype: str) -> None:
    x, gamma, beta, dy = make_case(rng, (64, 20), dtype)
    on = backend.arrays(x, gamma, beta)
    _, statistics = bn.batch_norm_forward(*on, eps=1e-30)
    dx = backend.asnumpy(bn.batch_norm_backward(backend.asarray(dy), *on, statistics)[0]).astype(np.float64)
    xhat = oracle.forward(x, None, None, 0.0).xhat.astype(np.float64)
    size = np.abs(dx).sum(0)
    assert (np.abs(dx.sum(0)) <= 8 * np.finfo(dtype).eps * size).all()
    assert (np.abs((dx * xhat).sum(0)) <= 32 * np.finfo(dtype).eps * size).all()


@pytest.mark.parametrize("power", [-20, -5, 5, 20])
def test_scaling_by_a_power_of_two_is_exact(backend: Backend, rng: np.random.Generator, power: int) -> None:
    x, gamma, beta, dy = make_case(rng, (70, 5), "float32")
    factor = np.float32(2.0**power)
    eps = float(np.float32(1e-5))

    def run(x: np.ndarray, eps: float) -> list[np.ndarray]:
        on = backend.arrays(x, gamma, beta)
        y, statistics = bn.batch_norm_forward(*on, eps=eps, activation="relu")
        grads = bn.batch_norm_backward(backend.asarray(dy), *on, statistics, activation="relu")
        return [backend.asnumpy(a) for a in (y, statistics, *grads)]

    y, statistics, dx, dgamma, dbeta = run(x, eps)
    scaled = run(x * factor, eps * float(factor) ** 2)
    expected = (y, statistics * np.array([[factor], [factor], [1 / factor]]), dx / factor, dgamma, dbeta)
    for name, want, got in zip(("y", "statistics", "dx", "dgamma", "dbeta"), expected, scaled, strict=True):
        np.testing.assert_array_equal(got, want.astype(np.float32), err_msg=name)


def test_permuting_channels_permutes_results_bitwise(backend: Backend, rng: np.random.Generator) -> None:
    x, gamma, beta, dy = make_case(rng, (70, 37), "float32")
    order = rng.permutation(37)

    def run(columns: np.ndarray) -> list[np.ndarray]:
        on = backend.arrays(x[:, columns], gamma[columns], beta[columns])
        y, statistics = bn.batch_norm_forward(*on, activation="tanh")
        grads = bn.batch_norm_backward(backend.asarray(dy[:, columns]), *on, statistics, activation="tanh")
        return [backend.asnumpy(a) for a in (y, *grads)]

    for straight, permuted in zip(run(np.arange(37)), run(order), strict=True):
        np.testing.assert_array_equal(straight[..., order], permuted)


def test_negating_x_is_negating_gamma(backend: Backend, rng: np.random.Generator) -> None:
    x, gamma, beta, _ = make_case(rng, (50, 6), "float64")
    y, _ = bn.batch_norm_forward(*backend.arrays(-x, gamma, beta))
    other, _ = bn.batch_norm_forward(*backend.arrays(x, -gamma, beta))
    np.testing.assert_array_equal(backend.asnumpy(y), backend.asnumpy(other))


@pytest.mark.parametrize("rows", [8, 64, 512])
def test_exact_data_gives_the_same_bits_everywhere(backend: Backend, rng: np.random.Generator, rows: int) -> None:
    """Pairs of small integers around a dyadic mean: every sum is exact, so the order of summation cannot matter."""
    half = rng.integers(-8, 9, (rows // 2, 5)).astype(np.float32)
    middle = np.float32([0.25, 1.0, -4.0, 64.0, 0.0])
    x = rng.permutation(np.concatenate([middle + half, middle - half]))
    gamma = np.float32([1, 2, -0.5, 4, 1])  # no beta: kernels round gamma xhat + beta once, NumPy twice
    y, statistics = bn.batch_norm_forward(*backend.arrays(x, gamma))
    mean, mean_low, rstd = backend.asnumpy(statistics)
    np.testing.assert_array_equal(mean, middle)
    np.testing.assert_array_equal(mean_low, 0)
    var = np.float32((half.astype(np.float64) ** 2).mean(0))
    # Kernels refine an approximation of the hardware instead of dividing by a root.
    np.testing.assert_array_max_ulp(rstd, np.float32(1) / np.sqrt(var + np.float32(1e-5)), 2)
    np.testing.assert_array_equal(backend.asnumpy(y), (x - middle) * (gamma * rstd))


@pytest.mark.parametrize("parameters", [(True, False), (False, True), (False, False)])
def test_gamma_and_beta_are_optional(backend: Backend, rng: np.random.Generator, parameters: tuple[bool, bool]) -> None:
    x, gamma, beta, dy = make_case(rng, (30, 4), "float32")
    given = [array if present else None for array, present in zip((gamma, beta), parameters, strict=True)]
    filled = [
        np.ones(4, "float32") if given[0] is None else gamma,
        np.zeros(4, "float32") if given[1] is None else beta,
    ]

    def run(gamma: np.ndarray | None, beta: np.ndarray | None) -> list[np.ndarray]:
        on = backend.arrays(x, gamma, beta)
        y, statistics = bn.batch_norm_forward(*on, activation="sigmoid")
        grads = bn.batch_norm_backward(backend.asarray(dy), *on, statistics, activation="sigmoid")
        running = backend.arrays(np.zeros(4, "float32"), np.ones(4, "float32"))
        frozen = bn.batch_norm_inference(*on, *running, activation="tanh")
        frozen_grads = bn.batch_norm_inference_backward(backend.asarray(dy), *on, *running, activation="tanh")
        return [backend.asnumpy(a) for a in (y, statistics, *grads, frozen, *frozen_grads)]

    for without, with_defaults in zip(run(*given), run(*filled), strict=True):
        np.testing.assert_array_equal(without, with_defaults)


def strided(array: np.ndarray, how: str) -> np.ndarray:
    """Return an array of the same shape in another layout, or a broadcast one."""
    rows, channels = array.shape
    if how == "transposed":
        return np.asfortranarray(array)
    if how == "sliced":
        return np.repeat(np.repeat(array, 2, 0), 3, 1)[::2, ::3]
    if how == "reversed":
        return np.ascontiguousarray(array[::-1, ::-1])[::-1, ::-1]
    return np.broadcast_to(array[:1], (rows, channels))


@pytest.mark.parametrize("how", ["transposed", "sliced", "reversed", "broadcast"])
def test_any_strides_give_the_same_bits(backend: Backend, rng: np.random.Generator, how: str) -> None:
    x, gamma, beta, dy = make_case(rng, (33, 6), "float32")
    x, dy = (x if how == "broadcast" else strided(x, how)), strided(dy, how)
    vectors = backend.arrays(gamma, beta)
    running = backend.arrays(np.zeros(6, "float32"), np.ones(6, "float32"))

    def run(put) -> list[np.ndarray]:
        on_x, on_dy = put(x), put(dy)
        y, statistics = bn.batch_norm_forward(on_x, *vectors)
        grads = bn.batch_norm_backward(on_dy, on_x, *vectors, statistics)
        frozen = bn.batch_norm_inference(on_x, *vectors, *running)
        frozen_grads = bn.batch_norm_inference_backward(on_dy, on_x, *vectors, *running)
        return [backend.asnumpy(a) for a in (y, statistics, *grads, frozen, *frozen_grads)]

    for straight, other in zip(run(backend.asarray), run(backend.like), strict=True):
        np.testing.assert_allclose(straight, other, rtol=0 if backend.name != "reference" else 1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(64, 20), (600, 3), (1100, 20)])
def test_out_may_be_the_input(backend: Backend, rng: np.random.Generator, shape: tuple[int, int]) -> None:
    x, gamma, beta, dy = make_case(rng, shape, "float32")
    channels = shape[1]
    on_x, on_gamma, on_beta = backend.arrays(x, gamma, beta)
    y, statistics = bn.batch_norm_forward(on_x, on_gamma, on_beta)
    fresh = bn.batch_norm_backward(backend.asarray(dy), on_x, on_gamma, on_beta, statistics)
    vectors = [backend.empty((channels,), "float32") for _ in range(2)]

    for aliased in ("dy", "x"):
        on_dy, other_x = backend.arrays(dy, x)
        out = (on_dy if aliased == "dy" else other_x, *vectors)
        assert bn.batch_norm_backward(on_dy, other_x, on_gamma, on_beta, statistics, out=out)[0] is out[0]
        for got, want in zip(out, fresh, strict=True):
            np.testing.assert_array_equal(backend.asnumpy(got), backend.asnumpy(want))
    out = (on_x, backend.empty((3, channels), "float32"))
    got = bn.batch_norm_forward(on_x, on_gamma, on_beta, out=out)
    assert got[0] is out[0]
    assert got[1] is out[1]
    np.testing.assert_array_equal(backend.asnumpy(on_x), backend.asnumpy(y))
    np.testing.assert_array_equal(backend.asnumpy(out[1]), backend.asnumpy(statistics))

    running = backend.arrays(np.zeros(channels, "float32"), np.ones(channels, "float32"))
    on_x = backend.asarray(x)
    want = backend.asnumpy(bn.batch_norm_inference(on_x, on_gamma, on_beta, *running))
    assert bn.batch_norm_inference(on_x, on_gamma, on_beta, *running, out=on_x) is on_x
    np.testing.assert_array_equal(backend.asnumpy(on_x), want)


def test_inputs_are_never_written(backend: Backend, rng: np.random.Generator) -> None:
    originals = make_case(rng, (64, 20), "float32")
    x, gamma, beta, dy = on = backend.arrays(*originals)
    for activation in ACTIVATIONS:
        y, statistics = bn.batch_norm_forward(x, gamma, beta, activation=activation)
        kept = backend.asnumpy(y).copy(), backend.asnumpy(statistics).copy()
        bn.batch_norm_backward(dy, x, gamma, beta, statistics, activation=activation)
        for before, after in zip((*originals, *kept), (*on, y, statistics), strict=True):
            np.testing.assert_array_equal(backend.asnumpy(after), before)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_semantics_are_those_of_pytorch(
    torch: ModuleType, backend: Backend, rng: np.random.Generator, activation: str
) -> None:
    """Momentum, the two variances, eps, the gradients: three steps of training, then inference and its gradient."""
    _, gamma, beta, _ = make_case(rng, (12, 4), "float64")
    layer = torch.nn.BatchNorm1d(4, eps=1e-3, momentum=0.3, dtype=torch.float64)
    layer.weight.data, layer.bias.data = torch.from_numpy(gamma.copy()), torch.from_numpy(beta.copy())
    phi = getattr(torch, activation, lambda z: z)
    running = backend.arrays(np.zeros(4), np.ones(4))
    vectors = backend.arrays(gamma, beta)
    for training in (True, True, True, False):
        x, _, _, dy = make_case(rng, (12, 4), "float64")
        layer.train(training)
        their_x = torch.from_numpy(x).requires_grad_()
        layer.zero_grad()
        their_y = phi(layer(their_x))
        their_y.backward(torch.from_numpy(dy))
        on_x, on_dy = backend.arrays(x, dy)
        if training:
            y, statistics = bn.batch_norm_forward(
                on_x, *vectors, *running, momentum=0.3, eps=1e-3, activation=activation
            )
            grads = bn.batch_norm_backward(on_dy, on_x, *vectors, statistics, activation=activation)
        else:
            y = bn.batch_norm_inference(on_x, *vectors, *running, eps=1e-3, activation=activation)
            grads = bn.batch_norm_inference_backward(on_dy, on_x, *vectors, *running, eps=1e-3, activation=activation)
        theirs = (their_y, their_x.grad, layer.weight.grad, layer.bias.grad, layer.running_mean, layer.running_var)
        for got, want in zip((y, *grads, *running), theirs, strict=True):
            np.testing.assert_allclose(backend.asnumpy(got), want.detach().numpy(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rows", [4, 9000])
def test_inference_gradient_does_not_depend_on_x(backend: Backend, rows: int) -> None:
    """An infinite example spoils its own output, and not the gradient that flows to it."""
    x, dy = np.ones((rows, 2), "float32"), np.full((rows, 2), 3, "float32")
    x[1, 0] = np.inf
    running = backend.arrays(np.zeros(2, "float32"), np.ones(2, "float32"))
    dx, _, dbeta = bn.batch_norm_inference_backward(*backend.arrays(dy, x), None, None, *running, eps=1e-30)
    np.testing.assert_array_equal(backend.asnumpy(dx), 3)
    np.testing.assert_array_equal(backend.asnumpy(dbeta), 3 * rows)
