"""Both partitions of the work, with real threads, against the reference."""

from __future__ import annotations

import gc
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from benchmarks.harness import measure
from benchmarks.harness.case import Case, NotSupportedError, cores
from benchmarks.harness.places import Host, cast, copies, to_float64
from benchmarks.ops.bench_batch_norm import inputs
from benchmarks.peers import expression, three_phase

pytestmark = pytest.mark.skipif(three_phase.absent() is not None, reason="the threads need g++")


def check(case: Case, by_example: bool, threads: int) -> None:
    """Compare the first call with the reference, and the second with the first where nothing is updated."""
    host = Host()
    arrays = cast(case, inputs(case, host.random))
    exact = expression.reference(case, to_float64(arrays), np)
    (own,) = copies(arrays, 1)
    call = three_phase.prepare(case, own, by_example, threads)
    found = [np.array(output, np.float64) for output in call()]
    assert measure.error_of(case, found, exact) < 1e-5
    repeated = call()
    np.testing.assert_array_equal(repeated[0], found[0])


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("epilogue", ["", "relu"])
@pytest.mark.parametrize("threads", [1, 2, 3, 64])
@pytest.mark.parametrize("by_example", [True, False])
@pytest.mark.parametrize("shape", [(2, 1), (7, 5), (64, 20), (33, 130)])
def test_both_ways_are_right(
    shape: tuple[int, int], by_example: bool, threads: int, epilogue: str, direction: str
) -> None:
    check(Case("batch_norm", direction, shape, epilogue=epilogue), by_example, threads)


def test_more_threads_than_examples_or_neurons_are_idle() -> None:
    check(Case("batch_norm", "forward", (3, 2)), by_example=True, threads=9)
    check(Case("batch_norm", "backward", (3, 2)), by_example=False, threads=9)


@pytest.mark.parametrize(
    "case",
    [
        Case("batch_norm", "forward", (64, 20), "float64"),
        Case("batch_norm", "forward", (4, 3, 2, 2), layout="NCHW"),
        Case("batch_norm", "forward", (64, 20), epilogue="add_relu"),
    ],
    ids=str,
)
def test_what_it_is_not_written_for_is_refused(case: Case) -> None:
    with pytest.raises(NotSupportedError, match="float32 matrices without a residual"):
        three_phase.prepare(case, {}, by_example=True, threads=2)


def test_the_number_of_threads_has_an_end() -> None:
    with pytest.raises(NotSupportedError, match="1025 threads"):
        three_phase.prepare(Case("batch_norm", "forward", (1025, 2)), {}, by_example=True, threads=1025)


def test_the_threads_are_real_and_end_with_their_pool() -> None:
    tasks = Path("/proc/self/task")
    if not tasks.is_dir():
        pytest.skip("threads are counted in /proc")
    case = Case("batch_norm", "forward", (64, 20))
    arrays = cast(case, inputs(case, Host().random))
    before = len(list(tasks.iterdir()))
    call = three_phase.prepare(case, arrays, by_example=True, threads=64)
    call()
    assert len(list(tasks.iterdir())) == before + 63  # and the caller's own
    del call
    gc.collect()
    deadline = time.monotonic() + 5
    while len(list(tasks.iterdir())) > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(list(tasks.iterdir())) == before


def test_pools_of_several_threads_do_not_disturb_each_other() -> None:
    case = Case("batch_norm", "forward", (64, 20))
    failures: list[BaseException] = []

    def guarded(run: partial) -> None:
        try:
            for _ in range(20):
                run()
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=guarded, args=(partial(check, case, flag, 4),)) for flag in (True, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize("all_cores", [False, True])
def test_a_case_says_how_many_threads_there_are(all_cores: bool) -> None:
    case = Case("batch_norm", "forward", (64, 20), all_cores=all_cores)
    arrays = cast(case, inputs(case, Host().random))
    with pytest.MonkeyPatch.context() as patch:
        made: list[int] = []
        patch.setattr(three_phase, "Pool", lambda threads: made.append(threads))
        for provider in three_phase.PROVIDERS:
            provider.prepare(case, arrays)
    assert made == [cores() if all_cores else 1] * 2


def test_the_rows_say_how_often_everybody_waits() -> None:
    described = {provider.name: provider.describe(None, {}) for provider in three_phase.PROVIDERS}
    assert described == {three_phase.BY_EXAMPLE: "barriers: 2", three_phase.BY_NEURON: "barriers: 0"}
