"""Cooperative batch-norm kernels: right values, each byte read once, whatever the blocks' order and the device."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import numpy as np
import pytest

import bnkernels as bn
from bnkernels.ops.batch_norm import launch
from bnkernels.ops.batch_norm.problem import BACKWARD, FORWARD, Problem
from bnkernels.runtime.arguments import accumulator
from bnkernels.runtime.seam import Limits
from bnkernels.runtime.workspace import PARTIALS
from tests.ops.test_batch_norm import make_case
from tools import backends, oracle
from tools.backends import Backend
from tools.emulator import EmulatorError, EmulatorRuntime

ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed: there is no bfloat16")

KIB = 1024
TINY = Limits(2, 64 * KIB, 66 * KIB, cooperative=True)  # four blocks that hold 32 KiB each: all is large for it
# Twenty blocks, of which most hold two slices: while one waits for others, the next is summed.
PIPELINED = Limits(10, 163 * KIB, 164 * KIB, cooperative=True)
PIPELINED_SHAPES = [(2200, 72, 1), (1850, 3, 40)]
DTYPES = [np.dtype("float32"), np.dtype("float16"), np.dtype(ml_dtypes.bfloat16)]
# Shapes (outer, C, inner): one block a slice, all blocks on one slice, groups that take several slices in turn, a last
# slice that is not whole, a last chunk that is not, rows that do not fit and are read twice; then the same along inner.
SHAPES = [(600, 64, 1), (1111, 16, 1), (257, 200, 1), (700, 104, 1), (5000, 8, 1)]
SHAPES += [(5, 6, 1024), (3, 4, 2504), (2, 2, 17000), (300, 3, 40)]


def problem_of(shape: tuple[int, int, int], dtype: Any, *strides: tuple[int, int, int]) -> Problem:
    """Return the problem of a tensor (outer, C, inner) whose inputs lie in C order, or so."""
    _, channels, inner = shape
    return Problem(1, *shape, np.dtype(dtype), strides or ((channels * inner, inner, 1),))


@contextmanager
def tiny(runtime: EmulatorRuntime, seed: int = 0, limits: Limits = TINY) -> Iterator[None]:
    """Run on a tiny device, in the order of a seed."""
    with runtime.device_limits(limits), runtime.schedule(seed):
        yield


def case_of(rng: np.random.Generator, shape: tuple[int, int, int], dtype: np.dtype) -> tuple[np.ndarray, ...]:
    """Return x, gamma, beta, dy, residual; those of the data as (outer, C, inner)."""
    outer, channels, inner = shape
    x, gamma, beta, dy = make_case(rng, (outer * inner, channels), "float32")
    residual = rng.standard_normal(x.shape)
    x, dy, residual = (
        np.ascontiguousarray(np.moveaxis(array.astype(dtype).reshape(outer, inner, channels), 2, 1))
        for array in (x, dy, residual)
    )
    return x, gamma, beta, dy, residual


def as_matrix(array: np.ndarray) -> np.ndarray:
    """Return (outer, C, inner) as (outer inner, C)."""
    return np.moveaxis(array, 1, 2).reshape(-1, array.shape[1])


def kernels(runtime: EmulatorRuntime) -> list[str]:
    return [record.entry_point for record in runtime.launches]


@pytest.fixture
def emulated_backend(emulated: EmulatorRuntime) -> Backend:
    """Return the emulator as a backend."""
    return backends.make("emulator")


# ---- values ---------------------------------------------------------------------------------------------------------


def check_against_oracle(
    backend: Backend, rng: np.random.Generator, shape: tuple[int, int, int], dtype: np.dtype, activation: str, add: bool
) -> None:
    """Run forward and backward and compare everything with extended precision."""
    x, gamma, beta, dy, residual = case_of(rng, shape, dtype)
    added = as_matrix(residual) if add else None
    exact = oracle.forward(as_matrix(x), gamma, beta, 1e-5, activation, residual=added)
    exact_backward = oracle.backward(as_matrix(dy), as_matrix(x), gamma, beta, 1e-5, activation, residual=added)
    channels, rows = shape[1], shape[0] * shape[2]
    acc = accumulator(x.dtype)
    gamma, beta, running_mean, running_var = (
        np.asarray(array, acc) for array in (gamma, beta, np.full(channels, 0.5), np.full(channels, 2.0))
    )
    on = backend.arrays(x, gamma, beta, running_mean, running_var)
    given = {"activation": activation, "residual": backend.asarray(residual) if add else None}
    y, statistics = bn.batch_norm_forward(*on, momentum=0.25, **given)
    grads = bn.batch_norm_backward(backend.asarray(dy), *on[:3], statistics, **given)

    u = oracle.unit_roundoff(acc)
    oracle.assert_within(as_matrix(backend.asnumpy(y)), exact.y, exact.z_bound, "y")
    mean, mean_low, rstd = backend.asnumpy(statistics)
    mean_bound = 4 * u * np.sqrt(exact.var) + 8 * rows * u * u * np.abs(as_matrix(x).astype("f8")).max(0)
    assert (np.abs(mean.astype(oracle.Extended) + mean_low - exact.mean) <= mean_bound).all()
    oracle.assert_within(rstd, exact.rstd, oracle.SLACK * u * exact.rstd, "rstd")
    new_mean, new_var = 0.375 + 0.25 * exact.mean, 1.5 + 0.25 * exact.var * rows / (rows - 1)
    oracle.assert_within(backend.asnumpy(on[3]), new_mean, 4 * u * (1 + np.abs(exact.mean)), "running_mean")
    oracle.assert_within(backend.asnumpy(on[4]), new_var, oracle.SLACK * u * new_var, "running_var")
    for name, got in zip(("dx", "dgamma", "dbeta", "dresidual"), grads, strict=False):
        got = as_matrix(backend.asnumpy(got)) if got.ndim > 1 else backend.asnumpy(got)
        oracle.assert_within(got, getattr(exact_backward, name), getattr(exact_backward, f"{name}_bound"), name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1024, 64, 1), (16, 6, 2048)], ids=str)
def test_all_backends_match_extended_precision(
    backend: Backend, rng: np.random.Generator, shape: tuple[int, int, int], dtype: np.dtype
) -> None:
    check_against_oracle(backend, rng, shape, dtype, "relu", True)


@pytest.mark.emulator
@pytest.mark.parametrize(
    ("shape", "dtype", "activation", "add"),
    [
        *((shape, DTYPES[i % 3], "gelu", True) for i, shape in enumerate(SHAPES)),
        *((shape, dtype, "identity", False) for shape in SHAPES for dtype in DTYPES),
    ],
    ids=str,
)
def test_a_small_device_matches_extended_precision(
    emulated_backend: Backend,
    emulated: EmulatorRuntime,
    rng: np.random.Generator,
    shape: tuple[int, int, int],
    dtype: np.dtype,
    activation: str,
    add: bool,
) -> None:
    with tiny(emulated, seed=1):
        check_against_oracle(emulated_backend, rng, shape, dtype, activation, add)
    large = prod(shape) * dtype.itemsize > launch.SMALL
    assert ["cooperative" in name for name in kernels(emulated)] == [large, large]


@pytest.mark.emulator
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("shape", PIPELINED_SHAPES, ids=str)
def test_a_pipeline_of_slices_matches_extended_precision(
    emulated_backend: Backend,
    emulated: EmulatorRuntime,
    rng: np.random.Generator,
    shape: tuple[int, int, int],
    dtype: np.dtype,
) -> None:
    problem, count = problem_of(shape, dtype), 16 // dtype.itemsize
    choices = [launch.cooperative(kind, problem, PIPELINED, count) for kind in (FORWARD, BACKWARD)]
    assert all(choice.stages == 2 and choice.splits > 1 for choice in choices)
    with tiny(emulated, 1, PIPELINED):
        check_against_oracle(emulated_backend, rng, shape, dtype, "relu", True)
    assert [record.launch.grid for record in emulated.launches] == [choice.launch.grid for choice in choices]


@pytest.mark.emulator
@pytest.mark.parametrize(
    ("limits", "shape"),
    [
        *((TINY, shape) for shape in [(700, 104, 1), (5000, 8, 1), (2, 2, 17000), (300, 3, 40), (5000, 7, 1)]),
        *((PIPELINED, shape) for shape in PIPELINED_SHAPES),
    ],
)
def test_the_order_of_blocks_and_threads_changes_no_bit(
    emulated: EmulatorRuntime, rng: np.random.Generator, limits: Limits, shape: tuple[int, int, int]
) -> None:
    """And the counters, which the launches before have left behind, do not either."""
    x, gamma, beta, dy, _ = case_of(rng, shape, DTYPES[0])
    found = []
    for seed in range(3):
        on = [emulated.asarray(array) for array in (x, gamma, beta)]
        with tiny(emulated, seed, limits):
            y, statistics = bn.batch_norm_forward(*on)
            found.append([y, statistics, *bn.batch_norm_backward(emulated.asarray(dy), *on, statistics)])
    assert all(record.launch.cooperative for record in emulated.launches)
    for other in found[1:]:
        for got, want in zip(other, found[0], strict=True):
            np.testing.assert_array_equal(got, want)


@pytest.mark.emulator
@pytest.mark.parametrize("shape", [(3000, 8), (5000, 8), (2100, 64), (2100, 65)])
def test_what_shared_memory_held_before_changes_no_bit(
    emulated: EmulatorRuntime, rng: np.random.Generator, shape: tuple[int, int]
) -> None:
    """Some workers of a block have one row fewer than others: the place of that row is never read."""
    x, dy = (emulated.asarray(array.astype("f4")) for array in rng.normal(10, 1, (2, *shape)))
    found = []
    for seed in (0, 1):  # shared memory begins with other bits
        with emulated.schedule(seed):
            y, statistics = bn.batch_norm_forward(x)
            found.append([y, statistics, *bn.batch_norm_backward(dy, x, None, None, statistics)])
    assert all("cooperative" in record.entry_point for record in emulated.launches)
    for got, want in zip(*found, strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.emulator
@pytest.mark.parametrize("shape", [(1111, 16, 1), (3, 4, 2504), (1111, 17, 1), (300, 4, 25)], ids=str)
def test_a_constant_channel_gives_beta_and_nan_stays_in_its_channel(
    emulated: EmulatorRuntime, rng: np.random.Generator, shape: tuple[int, int, int]
) -> None:
    x, gamma, beta, _, _ = case_of(rng, shape, DTYPES[0])
    x[:, 1], x[0, 3, 0] = 16777215.0, np.nan
    with tiny(emulated):
        y, _ = bn.batch_norm_forward(*map(emulated.asarray, (x, gamma, beta)))
    np.testing.assert_array_equal(y[:, 1], beta[1])
    assert np.isnan(y).all((0, 2)).tolist() == [c == 3 for c in range(shape[1])]
    assert np.isfinite(np.delete(y, 3, 1)).all()


@pytest.mark.emulator
@pytest.mark.parametrize("shape", [(700, 104, 1), (5000, 8, 1), (3, 4, 2504), (2, 2, 17000), (2, 2, 17001)], ids=str)
def test_results_may_replace_what_they_are_made_of(
    emulated: EmulatorRuntime, rng: np.random.Generator, shape: tuple[int, int, int]
) -> None:
    """Also where rows are read twice: a thread reads its row before it writes it."""
    x, gamma, beta, dy, _ = case_of(rng, shape, DTYPES[0])
    statistics_out = emulated.asarray(np.empty((3, shape[1]), "f4"))
    with tiny(emulated):
        on = [emulated.asarray(array) for array in (x, gamma, beta)]
        y, statistics = bn.batch_norm_forward(*on, activation="relu")
        dx, *_ = bn.batch_norm_backward(emulated.asarray(dy), *on, statistics, activation="relu")
        vectors = [emulated.asarray(np.empty(shape[1], "f4")) for _ in range(2)]
        for source in ("dy", "x"):
            sources = {"dy": emulated.asarray(dy), "x": emulated.asarray(x)}
            given = (*sources.values(), *on[1:], statistics)
            bn.batch_norm_backward(*given, activation="relu", out=(sources[source], *vectors))
            np.testing.assert_array_equal(sources[source], dx)
        bn.batch_norm_forward(*on, activation="relu", out=(on[0], statistics_out))
    np.testing.assert_array_equal(on[0], y)


@pytest.mark.emulator
def test_a_grid_barrier_flips_one_bit_of_a_counter(emulated: EmulatorRuntime, rng: np.random.Generator) -> None:
    """True for any number of blocks: the next launch may have another."""
    x = emulated.asarray(rng.standard_normal((5000, 8)).astype("f4"))
    with tiny(emulated):
        y, _ = bn.batch_norm_forward(x)
        (launch,) = (record.launch for record in emulated.launches)
        counters = emulated.workspace_array.view(np.uint32)[: PARTIALS // 4]
        for _ in range(2):
            before = counters.copy()
            repeated, _ = bn.batch_norm_forward(x)
            used = counters != before
            assert used.sum() == launch.grid[0], "one of every group"
            assert set((counters ^ before)[used].tolist()) == {2**31}
            np.testing.assert_array_equal(repeated, y)
    assert set(counters.tolist()) <= {0, 2**31}


# ---- what is moved --------------------------------------------------------------------------------------------------


def on_device(runtime: EmulatorRuntime, limits: Limits, shape: tuple[int, ...], dtype: str, axis: int = 1) -> list:
    """Run forward and backward on a device with these limits; return the launches and the bytes of the data."""
    x, dy = (runtime.asarray(np.ones(shape, dtype)) for _ in range(2))
    runtime.reset()
    with runtime.device_limits(limits):
        _, statistics = bn.batch_norm_forward(x, axis=axis)
        bn.batch_norm_backward(dy, x, None, None, statistics, axis=axis)
    return list(runtime.launches)


@pytest.mark.emulator
@pytest.mark.parametrize(
    ("shape", "dtype", "axis"),
    [
        ((256, 1024), "float32", 1),
        ((5000, 64), "float32", 1),
        ((5000, 64), "float16", 1),
        ((20, 2, 16384), "float16", 1),
        ((2, 16, 64, 64), "float32", 1),
        ((8, 32, 32, 32), "float16", -1),
    ],
    ids=str,
)
def test_every_byte_is_moved_once_16_at_a_time(
    counting_emulator: EmulatorRuntime, shape: tuple[int, ...], dtype: str, axis: int
) -> None:
    limits = Limits(8, 227 * KIB, 228 * KIB, cooperative=True)
    forward, backward = on_device(counting_emulator, limits, shape, dtype, axis)
    data = prod(shape) * np.dtype(dtype).itemsize
    for record, reads in ((forward, 1), (backward, 2)):
        large = assert_moved_once(record, data, reads)
        assert sum(t.vector_accesses for t in large) * 16 == (reads + 1) * data


def assert_moved_once(record: Any, data: int, reads: int) -> list:
    """Check that arrays of so many bytes are read once, and one is written once; return their traffic."""
    assert "_cooperative" in record.entry_point
    large = [traffic for block, traffic in record.counts.arrays.items() if len(block) == data]
    assert [t.bytes_read for t in large if t.reads] == [data] * reads
    assert [t.bytes_written for t in large if t.writes] == [data]
    return large


@pytest.mark.emulator
def test_rows_beyond_the_chip_are_read_twice_and_no_others(counting_emulator: EmulatorRuntime) -> None:
    forward, backward = on_device(counting_emulator, TINY, (20000, 8), "float32")
    data = 20000 * 8 * 4
    for record, arrays, kind in ((forward, 1, FORWARD), (backward, 2, BACKWARD)):
        choice = launch.cooperative(kind, problem_of((20000, 8, 1), "float32"), TINY, 4)
        on_chip = choice.held * prod(choice.launch.block) * prod(choice.launch.grid) * launch.VECTOR
        assert 0 < on_chip < data
        read = [t.bytes_read for block, t in record.counts.arrays.items() if len(block) == data and t.reads]
        assert read == [2 * data - on_chip] * arrays


@pytest.mark.emulator
def test_strided_rows_are_read_where_they_lie(emulated: EmulatorRuntime, rng: np.random.Generator) -> None:
    wide = rng.standard_normal((1024, 96)).astype("f4")
    x = emulated.like(wide)[:, 16:80]
    y, _ = bn.batch_norm_forward(x)
    assert kernels(emulated) == ["bnk_batch_norm_forward_cooperative_f32"]
    np.testing.assert_array_equal(y, bn.batch_norm_forward(emulated.asarray(wide[:, 16:80]))[0])


@pytest.mark.emulator
def test_blocks_that_are_not_resident_together_are_a_deadlock(
    emulated: EmulatorRuntime, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A launch that is not cooperative is an error here, and not a GPU that hangs."""
    launch = emulated.launch

    def alone(source: str, entry_point: str, given: Any, *rest: Any) -> None:
        launch(source, entry_point, dataclasses.replace(given, cooperative=False), *rest)

    monkeypatch.setattr(emulated, "launch", alone)
    x = emulated.asarray(rng.standard_normal((20000, 8)).astype("f4"))
    waiting = r"deadlock in block .* wait for a counter \(thread \(0, 0, 0\) at .*grid_barrier.cuh"
    try:
        with emulated.device_limits(TINY), emulated.schedule(resident=2), pytest.raises(EmulatorError, match=waiting):
            bn.batch_norm_forward(x)
    finally:
        emulated.workspace_array[:] = 0  # the next grid barrier counts on it
