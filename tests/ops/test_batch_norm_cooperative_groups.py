"""Groups in the cooperative batch-norm kernels: columns of blocks take the groups of their slices in turn."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bnkernels as bn
from bnkernels.ops.batch_norm.launch import MIN_BLOCKS, SMALL, cooperative, elements_of_access, own_bytes
from bnkernels.ops.batch_norm.problem import BACKWARD, FORWARD, Pass, Problem
from bnkernels.runtime.arguments import accumulator
from bnkernels.runtime.occupancy import resident
from bnkernels.runtime.seam import WORKSPACE_BYTES, LaunchPlan, Limits
from bnkernels.runtime.workspace import MOST_BARRIERS, PARTIALS
from tests.ops.test_batch_norm_cooperative import (
    DTYPES,
    KIB,
    PIPELINED,
    TINY,
    as_matrix,
    assert_moved_once,
    case_of,
    kernels,
    tiny,
)
from tools import backends, oracle
from tools.backends import Backend
from tools.emulator import EmulatorRuntime

F32, F16, BF16, F64 = *DTYPES, np.dtype("float64")
WIDE = Limits(8, 227 * KIB, 228 * KIB, cooperative=True)  # sixteen blocks that hold 100 KiB each
# Limits, groups and their shape (outer, C, inner), data type.
CASES: list[tuple[Limits, int, tuple[int, int, int], np.dtype]] = [
    (WIDE, 40, (300, 48, 1), F32),
    (WIDE, 5, (300, 48, 1), F32),
    (TINY, 7, (300, 160, 1), F32),
    (WIDE, 3, (12, 9, 512), F32),
    (PIPELINED, 8, (3000, 8, 1), F32),
    (TINY, 3, (600, 48, 1), BF16),
    (PIPELINED, 5, (2200, 40, 1), F32),
    (PIPELINED, 3, (2200, 264, 1), F16),
    (WIDE, 4, (2200, 72, 1), BF16),
    (TINY, 3, (5000, 8, 1), F16),
    (TINY, 2, (20, 3, 1024), F16),
    (PIPELINED, 6, (150, 3, 40), F32),
    (TINY, 3, (700, 17, 1), F32),
    (TINY, 3, (300, 6, 49), BF16),
    (TINY, 4, (900, 52, 1), F64),
]


def groups_of(
    rng: np.random.Generator, groups: int, shape: tuple[int, int, int], dtype: np.dtype
) -> tuple[np.ndarray, ...]:
    """Return x, gamma, beta, dy, residual of so many groups (outer, C, inner)."""
    cases = [case_of(rng, shape, dtype) for _ in range(groups)]
    x, dy, residual = (np.stack([case[i] for case in cases]) for i in (0, 3, 4))
    return x, *cases[0][1:3], dy, residual


def problem_of(groups: int, shape: tuple[int, int, int], dtype: np.dtype) -> Problem:
    """Return the problem of groups (outer, C, inner) in C order."""
    outer, channels, inner = shape
    strides = ((channels * inner, inner, 1),)
    return Problem(groups, *shape, dtype, strides, options=True, group_strides=(outer * channels * inner,))


def check_against_oracle(backend: Backend, rng: np.random.Generator, groups: int, shape: Any, dtype: np.dtype) -> None:
    """Run forward and backward and compare every group with extended precision."""
    x, gamma, beta, dy, residual = groups_of(rng, groups, shape, dtype)
    acc, rows = accumulator(dtype), shape[0] * shape[2]
    gamma, beta = gamma.astype(acc), beta.astype(acc)
    running = [np.full((groups, shape[1]), start, acc) for start in (0.5, 2.0)]
    on = backend.arrays(x, gamma, beta, *running)
    given = {"residual": backend.asarray(residual), "activation": "silu", "grouped": True}
    y, statistics = bn.batch_norm_forward(*on, momentum=0.25, **given)
    dx, dgamma, dbeta, dresidual = bn.batch_norm_backward(backend.asarray(dy), *on[:3], statistics, **given)
    y, statistics, dx, dresidual, mean, var = map(backend.asnumpy, (y, statistics, dx, dresidual, *on[3:]))
    u, exact_grads = oracle.unit_roundoff(acc), []
    for t in range(groups):
        more = {"residual": as_matrix(residual[t])}
        exact = oracle.forward(as_matrix(x[t]), gamma, beta, 1e-5, "silu", **more)
        grad = oracle.backward(as_matrix(dy[t]), as_matrix(x[t]), gamma, beta, 1e-5, "silu", **more)
        oracle.assert_within(as_matrix(y[t]), exact.y, exact.z_bound, f"y of group {t}")
        oracle.assert_within(statistics[t, 2], exact.rstd, oracle.SLACK * u * exact.rstd, f"rstd of group {t}")
        new_var = 1.5 + 0.25 * exact.var * rows / (rows - 1)
        oracle.assert_within(mean[t], 0.375 + 0.25 * exact.mean, 4 * u * (1 + np.abs(exact.mean)), "running_mean")
        oracle.assert_within(var[t], new_var, oracle.SLACK * u * new_var, "running_var")
        oracle.assert_within(as_matrix(dx[t]), grad.dx, grad.dx_bound, f"dx of group {t}")
        oracle.assert_within(as_matrix(dresidual[t]), grad.dresidual, grad.dresidual_bound, f"dresidual of group {t}")
        exact_grads.append(grad)
    for name, got in (("dgamma", dgamma), ("dbeta", dbeta)):
        bound = sum(getattr(grad, f"{name}_bound") for grad in exact_grads)
        oracle.assert_within(backend.asnumpy(got), sum(getattr(grad, name) for grad in exact_grads), bound, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("groups", "shape"), [(3, (700, 32, 1)), (3, (12, 6, 512))], ids=str)
def test_all_backends_match_extended_precision(
    backend: Backend, rng: np.random.Generator, groups: int, shape: tuple[int, int, int], dtype: np.dtype
) -> None:
    check_against_oracle(backend, rng, groups, shape, dtype)


def plan_of(kind: Pass, limits: Limits, groups: int, shape: tuple[int, int, int], dtype: np.dtype) -> LaunchPlan:
    """Return the cooperative plan of groups in C order."""
    problem = problem_of(groups, shape, dtype)
    return cooperative(kind, problem, limits, elements_of_access(kind, problem))


def channels_of_block(plan: LaunchPlan, dtype: np.dtype) -> int:
    """Return the channels of a slice."""
    (threads, _, _), variant = plan.launch.block, plan.kernel.split("_cooperative_")[1]
    if variant.startswith("inner"):
        return 1
    return threads * next((n for name, n in (("pair", 2), ("single", 1)) if name in variant), 16 // dtype.itemsize)


def way(limits: Limits, groups: int, shape: tuple[int, int, int], dtype: np.dtype) -> tuple[bool, ...]:
    """Return of the backward whether columns share a slice's groups, blocks its rows, and so on."""
    plan = plan_of(BACKWARD, limits, groups, shape, dtype)
    (columns, splits, _), slices = plan.launch.grid, -(-shape[1] // channels_of_block(plan, dtype))
    return columns > slices, splits > 1, columns < slices, plan.stages == 2


def test_the_cases_are_all_ways_to_share_groups() -> None:
    """The groups of a slice between columns, its rows between blocks, several slices a column, or two stages."""
    ways = {way(*case) for case in CASES}
    assert {shared[:2] for shared in ways} == {(False, False), (False, True), (True, False), (True, True)}
    assert {(True, True, False), (True, False, True), (True, True, True)} <= {shared[1:] for shared in ways}
    assert {(False, True), (True, True), (True, False)} <= {(shared[1], shared[3]) for shared in ways}


def both(emulated: EmulatorRuntime, x: Any, dy: Any, gamma: Any, beta: Any, mask: Any = None) -> list[Any]:
    """Return all results of forward and backward."""
    on_x, on_dy, *vectors = map(emulated.asarray, (x, dy, gamma, beta))
    given = {"grouped": True, "mask": None if mask is None else emulated.asarray(mask)}
    y, statistics = bn.batch_norm_forward(on_x, *vectors, **given)
    return [y, statistics, *bn.batch_norm_backward(on_dy, on_x, *vectors, statistics, **given)]


def assert_same_bits(emulated: EmulatorRuntime, found: list[list[Any]]) -> None:
    """Check that several runs gave the same, and left all barrier counters as they should be."""
    for other in found[1:]:
        for got, want in zip(other, found[0], strict=True):
            np.testing.assert_array_equal(got, want)
    if emulated.workspace_array is not None:  # as where a block has a slice alone
        assert set(emulated.workspace_array.view(np.uint32)[: PARTIALS // 4].tolist()) <= {0, 2**31}


@pytest.mark.emulator
@pytest.mark.parametrize(("limits", "groups", "shape", "dtype"), CASES, ids=str)
def test_every_way_to_share_groups_matches_extended_precision(
    emulated: EmulatorRuntime,
    rng: np.random.Generator,
    limits: Limits,
    groups: int,
    shape: tuple[int, int, int],
    dtype: np.dtype,
) -> None:
    with tiny(emulated, 1, limits):
        check_against_oracle(backends.make("emulator"), rng, groups, shape, dtype)
    plans = [plan_of(kind, limits, groups, shape, dtype) for kind in (FORWARD, BACKWARD)]
    assert kernels(emulated) == [plan.kernel for plan in plans]


@pytest.mark.emulator
@pytest.mark.parametrize(("limits", "groups", "shape", "dtype"), CASES[1:9], ids=str)
def test_the_order_of_blocks_changes_no_bit_of_groups(
    emulated: EmulatorRuntime,
    rng: np.random.Generator,
    limits: Limits,
    groups: int,
    shape: tuple[int, int, int],
    dtype: np.dtype,
) -> None:
    x, gamma, beta, dy, _ = groups_of(rng, groups, shape, dtype)
    found = []
    for seed in range(3):
        with tiny(emulated, seed, limits):
            found.append(both(emulated, x, dy, gamma, beta))
    assert_same_bits(emulated, found)


@pytest.mark.emulator
def test_groups_that_lie_between_the_rows_of_others_are_read_there(
    emulated: EmulatorRuntime, rng: np.random.Generator
) -> None:
    """Sequences (N, T, C) normalised by time step: a group's rows are T C elements apart."""
    x, dy = (emulated.asarray(rng.standard_normal((300, 5, 64)).astype("f4")) for _ in range(2))
    found = []
    for place in (lambda array: array, lambda array: array.copy()):
        on_x, on_dy = (place(array.transpose(1, 0, 2)) for array in (x, dy))
        y, statistics = bn.batch_norm_forward(on_x, grouped=True, activation="elu")
        grads = bn.batch_norm_backward(on_dy, on_x, None, None, statistics, grouped=True, activation="elu")
        found.append([y, statistics, *grads])
    assert set(kernels(emulated)) == {f"bnk_batch_norm_{way}_cooperative_f32" for way in ("forward", "backward")}
    for one, two in zip(*found, strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.emulator
@pytest.mark.parametrize(
    ("shape", "dtype", "axis"),
    [((5, 300, 64), "float32", 1), ((3, 1000, 64), "float16", 1), ((3, 4, 5, 64, 64), "float16", 1)],
    ids=str,
)
def test_every_byte_of_groups_is_moved_once_16_at_a_time(
    counting_emulator: EmulatorRuntime, shape: tuple[int, ...], dtype: str, axis: int
) -> None:
    x, dy = (counting_emulator.asarray(np.ones(shape, dtype)) for _ in range(2))
    counting_emulator.reset()
    with counting_emulator.device_limits(WIDE):
        _, statistics = bn.batch_norm_forward(x, axis=axis, grouped=True)
        bn.batch_norm_backward(dy, x, None, None, statistics, axis=axis, grouped=True)
    data = prod(shape) * np.dtype(dtype).itemsize
    for record, reads in zip(counting_emulator.launches, (1, 2), strict=True):
        assert sum(t.vector_accesses for t in assert_moved_once(record, data, reads)) * 16 == (reads + 1) * data


@settings(deadline=None, max_examples=300)
@given(
    kind=st.sampled_from([FORWARD, BACKWARD]),
    groups=st.integers(2, 3000),
    outer=st.integers(1, 10**5),
    channels=st.integers(1, 600),
    inner=st.one_of(st.just(1), st.integers(1, 2000)),
    dtype=st.sampled_from([*DTYPES, F64]),
    limits=st.sampled_from([Limits(132, 227 * KIB, 228 * KIB, cooperative=True), PIPELINED, WIDE, TINY]),
)
def test_a_choice_covers_all_groups_and_fits_the_workspace(
    kind: Pass, groups: int, outer: int, channels: int, inner: int, dtype: np.dtype, limits: Limits
) -> None:
    shape = outer, channels, inner
    count = elements_of_access(kind, problem_of(groups, shape, dtype))
    if groups * prod(shape) * dtype.itemsize <= SMALL or (outer > 1 and channels * inner * dtype.itemsize >= 2**32):
        assert count == 0
        return
    choice = plan_of(kind, limits, groups, shape, dtype)
    if choice is None:
        return
    (columns, splits, _), (threads, workers, _) = choice.launch.grid, choice.launch.block
    width = channels_of_block(choice, dtype)
    slices = -(-channels // width)
    runs = max(columns // slices, 1)  # as in cooperative_slices.cuh
    assert columns == (slices * runs if runs > 1 else columns)
    assert runs <= groups, "every column has a group"
    assert choice.splits == splits * (runs if kind is BACKWARD else 1), "who exchanges sums has a workspace"
    assert choice.launch.cooperative == (splits > 1)
    if splits > 1 or runs > 1:
        assert columns <= MOST_BARRIERS
    if splits > 1:
        assert columns * splits <= resident(limits, threads * workers, choice.launch.shared_bytes, MIN_BLOCKS)
    number = accumulator(dtype).itemsize
    kept = choice.held * choice.stages * threads * workers * count * dtype.itemsize * (2 if kind is BACKWARD else 1)
    assert choice.launch.shared_bytes - kept == own_bytes(kind.direction, width, workers, number, grouped=True)
    if choice.splits > 1:
        results = 2 * splits * (3 if kind is FORWARD else 2) if splits > 1 else 0
        assert PARTIALS + columns * (results + 10 * (kind is BACKWARD)) * width * number <= WORKSPACE_BYTES


@pytest.mark.parametrize(
    ("groups", "strides", "count"), [(3, (64,), 4), (3, (66,), 1), (1, (66,), 4), (3, (640, 65), 1)], ids=str
)
def test_accesses_are_as_wide_as_the_strides_of_groups_allow(groups: int, strides: tuple[int, ...], count: int) -> None:
    given = tuple((640, 1, 0) for _ in strides)
    problem = Problem(groups, 1024, 64, 1, F32, given, options=True, group_strides=strides)
    assert elements_of_access(FORWARD, problem) == count
