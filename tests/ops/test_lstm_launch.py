"""Launches of an LSTM: one a step or one a sequence, in any order of blocks and threads."""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path

import numpy as np
import pytest

import bnkernels as bn
from bnkernels.ops.lstm.launch import choose, choose_sequence
from bnkernels.ops.lstm.problem import Problem
from bnkernels.runtime import registry, source
from bnkernels.runtime.seam import Limits
from tests.ops.test_lstm import NORMS, by_step, call, gradients
from tests.regress.refusal import refused
from tests.runtime.test_cuda_runtime import forget_the_runtime
from tests.train.test_captured_step import cupy
from tools import backends, oracle_lstm
from tools.backends import Backend
from tools.emulator import EmulatorRuntime
from tools.emulator.build import CUDA_VARIABLE
from tools.fake_cupy import streams

__all__ = ["cupy"]  # the fixture
H200 = Limits(132, 227 * 1024, 228 * 1024, True)


@pytest.mark.emulator
@pytest.mark.parametrize("norm", NORMS)
def test_a_step_is_one_launch(
    emulated: EmulatorRuntime, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator, norm: str | None
) -> None:
    """Behind its product: norms, gates, cell, norm of the cell and hidden state; and backwards."""
    by_step(monkeypatch)
    backend = backends.make("emulator")
    given = oracle_lstm.arguments(rng, (5, 6, 2, 9), norm, "float32")
    saved = call(backend, given, norm=norm)[3]
    assert [record.source for record in emulated.launches] == ["lstm_forward"] * 5
    assert {record.counts.barriers for record in emulated.launches} == {5 if norm else 0}
    emulated.reset()
    gradients(backend, saved, np.ones((5, 6, 9), "float32"), None, None)
    assert [record.source for record in emulated.launches] == ["lstm_backward"] * 5
    assert {record.counts.barriers for record in emulated.launches} == {2 if norm else 1}


@pytest.mark.emulator
@pytest.mark.parametrize("norm", NORMS)
def test_a_sequence_is_one_launch(emulated: EmulatorRuntime, rng: np.random.Generator, norm: str | None) -> None:
    """Its recurrent products too; by unit with a grid barrier a step, by example without."""
    backend = backends.make("emulator")
    given = oracle_lstm.arguments(rng, (5, 6, 2, 9), norm, "float32")
    saved = call(backend, given, norm=norm)[3]
    (record,) = emulated.launches
    assert (record.source, record.launch.grid) == ("lstm_forward_cooperative", (3, 1, 1))
    assert record.launch.cooperative == (norm != "layer")
    emulated.reset()
    gradients(backend, saved, np.ones((5, 6, 9), "float32"), None, None)
    (record,) = emulated.launches
    assert (record.source, record.launch.grid) == ("lstm_backward_cooperative", (3, 1, 1))


@pytest.mark.emulator
@pytest.mark.parametrize("steps", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_the_order_of_blocks_and_threads_changes_no_bit(
    emulated: EmulatorRuntime, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator, norm: str | None, steps: bool
) -> None:
    if steps:
        by_step(monkeypatch)
    backend = backends.make("emulator")
    given = oracle_lstm.arguments(rng, (3, 7, 2, 40), norm, "float32")

    def run() -> list[np.ndarray]:
        *outputs, saved = call(backend, given, norm=norm, lengths=[1, 3] * 3 + [3])
        found = gradients(backend, saved, np.ones((3, 7, 40), "float32"), None, None)
        return [*map(backend.asnumpy, outputs), *found.values()]

    first = run()
    for seed in (1, 2, 3):
        with emulated.schedule(seed, resident=4):
            for one, two in zip(first, run(), strict=True):
                assert np.isfinite(one).all()
                np.testing.assert_array_equal(one, two)


def test_the_launch_follows_from_the_sizes() -> None:
    problem = Problem(9, 64, 1, 100, np.dtype("float32"), "batch", True, 0)
    plan = choose("backward", problem)
    assert (plan.launch.grid, plan.launch.block, plan.held) == ((13, 1, 1), (8, 64, 1), 1)
    assert choose("backward", problem._replace(rows=129)).held == 0
    assert choose("forward", problem._replace(dtype=np.dtype("float64"))).launch.block == (4, 64, 1)
    assert choose("forward", problem._replace(rows=2, units=1, norm=None)).launch.block == (1, 32, 1)
    layer = problem._replace(norm="layer", units=20)
    assert choose("forward", layer).launch == choose("forward", layer._replace(live=True, tracked=3)).launch
    assert choose("forward", layer).launch.grid == (32, 1, 1)
    assert choose("forward", layer._replace(units=513)).held == 0


def test_a_sequence_is_one_launch_where_it_fits() -> None:
    problem, H200 = (
        Problem(9, 64, 1, 100, np.dtype("float32"), "batch", True, 0),
        Limits(132, 227 * 1024, 228 * 1024, True),
    )
    plan = choose_sequence("backward", problem._replace(units=512, rows=64), H200)
    assert (plan.launch.grid, plan.launch.block, plan.launch.cooperative) == ((128, 1, 1), (4, 64, 1), True)
    assert choose_sequence("backward", problem._replace(units=10, rows=512), H200).held == 1
    alone = H200._replace(cooperative=False)
    assert choose_sequence("forward", problem, alone) is None
    assert not choose_sequence("forward", problem._replace(units=1), alone).launch.cooperative
    for change in ({"rows": 513}, {"units": 513}, {"units": 513, "rows": 2}):
        assert choose_sequence("forward", problem._replace(**change), H200) is None
    small = H200._replace(sms=4, shared_bytes=48 * 1024)
    assert choose_sequence("forward", problem._replace(units=500), small) is None


def test_a_sequence_of_layer_norm_is_by_example() -> None:
    """All weights on one multiprocessor, as few examples on each as there can be, and no block waits for another."""
    problem = Problem(9, 64, 1, 100, np.dtype("float32"), "layer", False, 0)
    a100, small = Limits(108, 163 * 1024, 164 * 1024, True), Limits(84, 99 * 1024, 100 * 1024, True)
    for limits in (H200, a100, H200._replace(cooperative=False)):
        launch = choose_sequence("backward", problem, limits).launch
        assert (launch.grid, launch.block, launch.cooperative) == ((64, 1, 1), (128, 1, 1), False)
    assert choose_sequence("forward", problem, small) is None
    assert choose_sequence("forward", problem._replace(units=78), small) is not None
    assert choose_sequence("forward", problem._replace(rows=512, units=64), H200).launch.block == (64, 4, 1)
    assert choose_sequence("forward", problem._replace(rows=3, units=2), H200).launch.grid == (2, 1, 1)
    for units in range(1, 150):
        plan = choose_sequence("forward", problem._replace(units=units), H200)
        assert (plan is None) == (units > 119)
        assert plan is None or plan.launch.block[0] >= units


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_every_kernel_is_found_by_its_name(direction: str, dtype: str) -> None:
    for norm in NORMS:
        problem = Problem(9, 64, 1, 100, np.dtype(dtype), norm, norm == "batch", 0)
        plans = choose(direction, problem), choose_sequence(direction, problem, H200)
        for plan in filter(None, plans):
            assert plan.kernel in source.entry_points(plan.source)


@pytest.mark.emulator
@pytest.mark.parametrize("lengths", [None, [4, 2, 1, 4, 3, 4]])
@pytest.mark.parametrize("norm", NORMS)
def test_the_cuda_runtime_launches_the_same(
    emulated: EmulatorRuntime,
    monkeypatch: pytest.MonkeyPatch,
    rng: np.random.Generator,
    norm: str | None,
    lengths: list[int] | None,
) -> None:
    """On a stand-in for CuPy, which also refuses what CuPy would."""
    cupy = streams.make(emulated)
    if CUDA_VARIABLE in os.environ:  # the sources that the emulated ops run on
        monkeypatch.setattr(source, "folder", lambda: Path(os.environ[CUDA_VARIABLE]))
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(registry, "runtimes", dict(registry.runtimes))
    forget_the_runtime()
    try:
        given, found = oracle_lstm.arguments(rng, (4, 6, 3, 9), norm, "float32"), []
        for asarray, asnumpy in ((cupy.asarray, cupy.asnumpy), (emulated.asarray, np.asarray)):
            first, norms = oracle_lstm.split({name: asarray(array) for name, array in given.items()})
            *outputs, saved = bn.lstm_forward(*first, norms, norm=norm, lengths=lengths)
            *grads, dnorms = bn.lstm_backward(asarray(np.ones((4, 6, 9), "float32")), None, None, saved)
            found.append([asnumpy(array) for array in (*outputs, *grads, *(dnorms or ()))])
    finally:
        forget_the_runtime()
    for one, two in zip(*found, strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.emulator
@pytest.mark.parametrize("fits", [True, False])
@pytest.mark.parametrize("norm", NORMS)
def test_forward_and_backward_are_captured(
    cupy: types.ModuleType, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator, norm: str | None, fits: bool
) -> None:
    """As a user of CuPy captures them: with a memory pool of the graph's, after one run on the same stream."""
    if not fits:
        by_step(monkeypatch)
    given = oracle_lstm.arguments(rng, (6, 5, 3, 9), norm, "float64")
    first, norms = oracle_lstm.split({n: None if a is None else cupy.asarray(a) for n, a in given.items()})
    dy, results = cupy.asarray(rng.standard_normal((6, 5, 9))), []

    def step() -> None:
        *outputs, saved = bn.lstm_forward(*first, norms, norm=norm, eps=0.1, capturable=True)
        *gradients, dnorms = bn.lstm_backward(dy, None, None, saved)
        results[:] = *outputs, *gradients, *(dnorms or ())

    stream, pool = cupy.cuda.Stream(non_blocking=True), cupy.cuda.MemoryPool()
    with stream:
        step()
        with cupy.cuda.using_allocator(pool.malloc):
            stream.begin_capture()
            step()
            graph = stream.end_capture()
    first[0][...] = cupy.asarray(rng.standard_normal((6, 5, 3)))  # other data, in the same place
    graph.launch(stream)
    found = [array.get() for array in results]
    step()
    for got, right in zip(found, results, strict=True):
        np.testing.assert_array_equal(got, right.get())


def test_lengths_are_not_captured(backend: Backend) -> None:
    """They come from the host, which a graph would not look at again."""
    arrays = backend.arrays(*(np.ones(shape, "float32") for shape in ((2, 3, 1), (4, 1), (4, 1))))
    x, *weights = arrays
    with refused(backend, ValueError, "lengths must be None with capturable=True", *arrays):
        bn.lstm_forward(x, None, None, *weights, lengths=[2, 1, 2], capturable=True)
