"""Group norm against the formulas in extended precision, in every place and type, and against PyTorch."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import bnkernels as bn
from bnkernels.ops.layer_norm.launch import choose_backward, choose_forward
from bnkernels.ops.layer_norm.problem import Problem
from bnkernels.runtime.seam import LaunchPlan, Limits
from tests.ops.test_batch_norm_masked import DTYPES, dtype_named
from tools import oracle
from tools.backends import Backend
from tools.oracle import Extended, accumulator, unit_roundoff
from tools.oracle_layer_norm import exact

# One channel; no positions; positions that are no whole vectors, and that are; one group; a channel each; more
# positions than a warp has lanes; several rows of threads; groups of several blocks.
CASES = [
    ((1, 1, 1), 1),
    ((3, 12), 4),
    ((5, 6, 7), 2),
    ((2, 8, 4, 4), 4),
    ((3, 4, 5, 3), 1),
    ((2, 6, 9), 6),
    ((2, 4, 100), 2),
    ((70, 8, 16), 2),
    ((300, 16), 2),
    ((90, 32, 32), 4),
]


AXES = pytest.mark.parametrize("axis", [1, -1], ids=["channels first", "channels last"])


def make(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> list[np.ndarray]:
    """Return x, dy in the type, gamma and beta in that of the accumulator."""
    kind = dtype_named(dtype)
    x, dy = ((rng.standard_normal(shape) * scale + shift).astype(kind) for scale, shift in ((2, 1), (1, 0)))
    of = accumulator(x.dtype)
    return [x, dy, rng.uniform(0.5, 1.5, shape[1]).astype(of), rng.standard_normal(shape[1]).astype(of)]


def problem_of(shape: tuple[int, ...], groups: int, dtype: str, axis: int = 1) -> Problem:
    """Return the problem of a tensor, (N, C, ...), with its channels in an axis."""
    inner = int(np.prod(shape[2:]))
    sizes = shape[0] * groups, shape[1] // groups * inner, np.dtype(dtype_named(dtype))
    return Problem(*sizes, channel_groups=groups, inner=inner, channels_last=axis != 1 and inner > 1)


def plans(shape: tuple[int, ...], groups: int, dtype: str, limits: Limits, axis: int = 1) -> list[LaunchPlan]:
    """Return the plans of both directions."""
    problem = problem_of(shape, groups, dtype, axis)
    return [choose_forward(problem, limits), choose_backward(problem, limits)]


def assert_right(
    backend: Backend, groups: int, x: Any, dy: Any, gamma: Any, beta: Any, activation: str = "identity", axis: int = 1
) -> None:
    """Check forward and backward against the formulas of every group, with the channels in an axis."""
    eps, u, options = 1e-3, unit_roundoff(x.dtype), {"activation": activation, "axis": axis}
    given = (np.ascontiguousarray(np.moveaxis(array, 1, axis)) for array in (x, dy))
    on_x, on_dy, *vectors = backend.arrays(*given, gamma, beta)
    y, statistics = bn.group_norm_forward(on_x, groups, *vectors, eps=eps, **options)
    assert statistics.shape == (3, len(x), groups)
    grads = bn.group_norm_backward(on_dy, on_x, groups, *vectors, statistics, **options)
    y, statistics, dx, dgamma, dbeta = map(backend.asnumpy, (y, statistics, *grads))
    y, dx = (np.ascontiguousarray(np.moveaxis(array, axis, 1)) for array in (y, dx))
    rows, channels = (len(x), groups, -1), x.shape[1] // groups
    inner = x[0].size // x.shape[1]
    for group in range(groups):
        own = slice(group * channels, (group + 1) * channels)
        columns = [None if vector is None else vector[own].repeat(inner) for vector in (gamma, beta)]
        right = exact(x.reshape(rows)[:, group], dy.reshape(rows)[:, group], *columns, eps, activation)
        oracle.assert_within(y.reshape(rows)[:, group], right.y, right.y_bound, "y")
        oracle.assert_within(dx.reshape(rows)[:, group], right.dx, right.dx_bound, "dx")
        np.testing.assert_allclose(statistics[2, :, group].astype(Extended), right.rstd, rtol=float(8 * u))
        mean = statistics[:2, :, group].astype(Extended).sum(0)
        assert (np.abs(mean - right.mean) <= 12 * u / right.rstd + 4 * u * u * np.abs(right.mean)).all()
        for name, sums in (("dgamma", dgamma), ("dbeta", dbeta)):
            of_columns, bound = getattr(right, name), getattr(right, f"{name}_bound")
            of_channels, bound = (array.reshape(channels, inner).sum(1) for array in (of_columns, bound))
            oracle.assert_within(sums[own], of_channels, bound, name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "groups"), CASES)
def test_is_what_the_formulas_say(
    backend: Backend, rng: np.random.Generator, shape: tuple[int, ...], groups: int, dtype: str
) -> None:
    assert_right(backend, groups, *make(rng, shape, dtype))


@AXES
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "sigmoid", "tanh", "gelu", "silu", "elu"])
def test_every_activation(backend: Backend, rng: np.random.Generator, activation: str, axis: int) -> None:
    assert_right(backend, 3, *make(rng, (4, 6, 8), "float32"), activation, axis)
    assert_right(backend, 2, *make(rng, (3, 4, 5), "bfloat16"), activation, axis)


@pytest.mark.parametrize("given", [(False, False), (True, False), (False, True)])
def test_scale_and_shift_are_optional(backend: Backend, rng: np.random.Generator, given: tuple[bool, bool]) -> None:
    x, dy, *vectors = make(rng, (4, 6, 8), "float32")
    assert_right(backend, 2, x, dy, *(v if here else None for v, here in zip(vectors, given, strict=True)), "silu")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("shape", "groups"), [((3, 12), 4), ((2, 8, 5), 2), ((2, 6, 4, 4), 3), ((2, 4, 100, 90), 2)])
def test_agrees_with_pytorch(
    torch: ModuleType, backend: Backend, rng: np.random.Generator, shape: tuple[int, ...], groups: int, dtype: str
) -> None:
    x, dy, gamma, beta = make(rng, shape, dtype)
    tensors = [torch.from_numpy(array.astype("float64")).requires_grad_() for array in (x, gamma, beta)]
    want = torch.nn.functional.group_norm(tensors[0], groups, *tensors[1:], 1e-3)
    wanted = want, *torch.autograd.grad(want, tensors, torch.from_numpy(dy.astype("float64")))
    on_x, on_dy, *vectors = backend.arrays(x, dy, gamma, beta)
    y, statistics = bn.group_norm_forward(on_x, groups, *vectors, eps=1e-3)
    grads = bn.group_norm_backward(on_dy, on_x, groups, *vectors, statistics)
    tolerance = {"float32": 1e-5, "float64": 1e-12}[dtype]
    for got, right in zip((y, *grads), wanted, strict=True):
        right = right.detach().numpy()
        np.testing.assert_allclose(backend.asnumpy(got), right, rtol=tolerance, atol=tolerance * abs(right).max())


@AXES
def test_the_gradients_are_slopes(backend: Backend, rng: np.random.Generator, axis: int) -> None:
    """Central differences."""
    x, dy, gamma, beta = make(rng, (2, 4, 4), "float64")
    options = {"activation": "tanh", "axis": axis}

    def loss(arrays: list[np.ndarray]) -> float:
        on_x, *vectors = backend.arrays(*arrays)
        y, _ = bn.group_norm_forward(on_x, 2, *vectors, **options)
        return float((backend.asnumpy(y) * dy).sum())

    on_x, on_dy, *vectors = backend.arrays(x, dy, gamma, beta)
    _, statistics = bn.group_norm_forward(on_x, 2, *vectors, **options)
    grads = bn.group_norm_backward(on_dy, on_x, 2, *vectors, statistics, **options)
    for number, got in enumerate(map(backend.asnumpy, grads)):
        for i in range(got.size):
            values = []
            for step in (1e-6, -1e-6):
                changed = [x.copy(), gamma.copy(), beta.copy()]
                changed[number].reshape(-1)[i] += step
                values.append(loss(changed))
            assert got.reshape(-1)[i] == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-6, abs=1e-7)


# ---- relations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_of_one_group_without_positions_is_layer_norm(backend: Backend, rng: np.random.Generator, dtype: str) -> None:
    """Bit for bit."""
    x, dy, *vectors = backend.arrays(*make(rng, (70, 48), dtype))
    y, statistics = bn.group_norm_forward(x, 1, *vectors)
    found = y, statistics[:, :, 0], *bn.group_norm_backward(dy, x, 1, *vectors, statistics)
    y, statistics = bn.layer_norm_forward(x, *vectors)
    wanted = y, statistics, *bn.layer_norm_backward(dy, x, *vectors, statistics)
    for got, want in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(backend.asnumpy(got).astype(float), backend.asnumpy(want).astype(float))


def test_with_a_group_for_each_channel_is_instance_norm(backend: Backend, rng: np.random.Generator) -> None:
    x, dy, *vectors = backend.arrays(*make(rng, (3, 6, 5, 4), "float64"))
    y, statistics = bn.group_norm_forward(x, 6, *vectors)
    found = y, *bn.group_norm_backward(dy, x, 6, *vectors, statistics)
    y, statistics = bn.instance_norm_forward(x, *vectors)
    for got, want in zip(found, (y, *bn.instance_norm_backward(dy, x, *vectors, statistics)), strict=True):
        np.testing.assert_allclose(backend.asnumpy(got), backend.asnumpy(want), rtol=1e-12, atol=1e-13)


@AXES
def test_groups_know_nothing_of_each_other(backend: Backend, rng: np.random.Generator, axis: int) -> None:
    """Results of a group alone have the same bits; what is not finite stays in its group of its example."""
    x, _, gamma, beta = make(rng, (3, 6, 8), "float32")
    x[1, 2, 3], x[2, 0, 0] = np.nan, np.inf

    def forward(groups: int, own: slice) -> np.ndarray:
        given = backend.arrays(np.ascontiguousarray(np.moveaxis(x[:, own], 1, axis)), gamma[own], beta[own])
        y, _ = bn.group_norm_forward(given[0], groups, *given[1:], axis=axis)
        return np.moveaxis(backend.asnumpy(y), axis, 1)

    y = forward(3, slice(6))
    wrong = np.isnan(y.reshape(3, 3, 16)).any(2)
    assert np.argwhere(wrong).tolist() == [[1, 1], [2, 0]]
    for group in range(3):
        own = slice(2 * group, 2 * group + 2)
        np.testing.assert_array_equal(forward(1, own), y[:, own])


@AXES
def test_a_constant_group_is_its_shift(backend: Backend, axis: int) -> None:
    x, beta = np.full((2, 6, 6), 0.1, "float32"), np.arange(6, dtype="float32")
    on_x, on_beta = backend.arrays(x, beta)
    y, statistics = bn.group_norm_forward(on_x, 2, None, on_beta, axis=axis)
    np.testing.assert_array_equal(np.moveaxis(backend.asnumpy(y), axis, 1), np.broadcast_to(beta[:, None], x.shape))
    np.testing.assert_array_equal(backend.asnumpy(statistics)[0], np.float32(0.1))


def test_a_mean_far_from_0_costs_no_digits(backend: Backend) -> None:
    x = (2.0**22 + np.arange(192).reshape(2, 8, 12) % 11).astype("float32")
    assert_right(backend, 2, x, np.cos(x), np.ones(8, "float32"), np.zeros(8, "float32"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_finite_groups_give_finite_results(backend: Backend, dtype: str) -> None:
    """Even where the distance of a number from another, or a sum of gradients, is out of range."""
    kind = dtype_named(dtype)
    most = float(ml_dtypes.finfo(kind).max) / 2
    x = np.where(np.arange(24) == 0, most, -most).reshape(1, 4, 6).astype(kind)
    x = np.concatenate([x, (np.arange(24) % 3 - 1).reshape(1, 4, 6).astype(kind)])
    on_x, on_dy, beta = backend.arrays(x, np.full(x.shape, most / 4, kind), np.arange(4, dtype=accumulator(x.dtype)))
    y, statistics = bn.group_norm_forward(on_x, 2, None, beta)
    dx, *_ = bn.group_norm_backward(on_dy, on_x, 2, None, beta, statistics)
    np.testing.assert_array_equal(backend.asnumpy(y)[0, :2].astype(float), np.arange(2.0)[:, None].repeat(6, 1))
    assert np.isfinite(backend.asnumpy(dx).astype(float)).all()
