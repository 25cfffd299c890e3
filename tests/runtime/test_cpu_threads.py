"""Threads of the CPU kernels: how many, who computes what, and the same bits from any number of them, or in a child."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import bnkernels as bn
from bnkernels.runtime import cpu
from bnkernels.runtime.cpu import threads
from tests.regress.calls import EVERY, run
from tools import backends

BATCH_NORM = "bnkernels.ops.batch_norm.cpu"
ROWS = {"N": 700, "C": 100, "K": 40, "O": 3, "P": 200_000, "S": 2, "E": 1400}
IMAGES = {"N": 10, "C": 12, "L": 500, "K": 5, "O": 3, "P": 3, "S": 2, "E": 80}
NO_IMAGES = {op for op in EVERY if op.startswith(("layer_norm", "rms_norm", "linear", "fused"))}


@pytest.fixture(autouse=True)
def own_pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Share work of any size, and leave the number of threads as it was."""
    cpu.kernels(BATCH_NORM)  # imported before: it takes over the size from which on work is shared
    monkeypatch.setattr(threads, "WORTH_SHARING", 1)
    monkeypatch.setattr(threads, "_threads", 0)
    monkeypatch.setattr(threads, "_given", False)
    monkeypatch.setattr(threads, "_pool", None)
    monkeypatch.delenv(threads.VARIABLE, raising=False)
    yield
    threads._forget_pool()


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compute by compiled kernels, those of batch norm in several blocks of rows."""
    with backends.entered("compiled"):
        batch_norm = cpu.kernels(BATCH_NORM)
        monkeypatch.setattr(batch_norm, "WORTH_SHARING", 2**15)
        monkeypatch.setattr(batch_norm, "BLOCK", 2**14)
        batch_norm._division.cache_clear()
        batch_norm.prepare.cache_clear()
        yield
        batch_norm._division.cache_clear()
        batch_norm.prepare.cache_clear()


def digest(op: str, arrays: dict[str, np.ndarray]) -> str:
    """Return a hash of all arrays of an op after its call on copies."""
    arrays = {name: array.copy() for name, array in arrays.items()}
    run(op, arrays)
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays.values())).hexdigest()


def in_a_child(op: str, arrays: dict[str, np.ndarray]) -> str:
    """Return the same of a forked child, which has none of the parent's threads."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from Python 3.12 on: a fork while there are threads
        child = os.fork()
    if not child:
        try:
            os.write(writing, digest(op, arrays).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading, encoding="ascii") as pipe:
        found = pipe.read()
    os.waitpid(child, 0)
    return found


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("op", EVERY)
def test_the_same_bits_whoever_computes(compiled: None, op: str, dtype: str) -> None:
    """By 1, 2 and 3 threads, in 8 threads of Python at once, and in a forked child."""
    arrays = EVERY[op].arrays(ROWS if dtype == "float32" or op in NO_IMAGES else IMAGES, dtype)
    bn.set_num_threads(1)
    wanted = digest(op, arrays)
    for number in (2, 3):
        bn.set_num_threads(number)
        assert digest(op, arrays) == wanted, number
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(digest, [op] * 8, [arrays] * 8)) == {wanted}
    if hasattr(os, "fork"):
        assert in_a_child(op, arrays) == wanted


def test_allprocessors_that_the_process_may_run_on_are_used() -> None:
    assert bn.get_num_threads() == threads.processors() >= 1
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("this system cannot bind a process")
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); import bnkernels as bn; "
    code += "from bnkernels.runtime.cpu import threads; print(bn.get_num_threads(), threads.described())"
    path = os.pathsep.join(filter(None, sys.path))
    found = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, capture_output=True, check=True
    )
    assert found.stdout == b"1 1, the processors of this process\n"


def test_the_variable_and_then_the_call_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(threads.VARIABLE, "5")
    assert (bn.get_num_threads(), threads.described()) == (5, "5, set by BNKERNELS_NUM_THREADS")
    bn.set_num_threads(7)
    assert (bn.get_num_threads(), threads.described()) == (7, "7, set by bnkernels.set_num_threads")


@pytest.mark.parametrize("value", ["0", "-2", "1.5", "two", " "])
def test_a_variable_that_is_no_number_of_threads_is_refused(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv(threads.VARIABLE, value)
    with pytest.raises(ValueError, match=f"BNKERNELS_NUM_THREADS must be .* at least 1, got '{value}'"):
        bn.get_num_threads()


@pytest.mark.parametrize(("value", "error"), [(0, ValueError), (-1, ValueError), (1.5, TypeError), ("2", TypeError)])
def test_another_number_of_threads_is_refused_and_changes_nothing(value: object, error: type[Exception]) -> None:
    bn.set_num_threads(2)
    with pytest.raises(error, match="threads must be"):
        bn.set_num_threads(value)
    assert bn.get_num_threads() == 2


@pytest.mark.parametrize("number", [1, 2, 3, 8])
@pytest.mark.parametrize("tasks", [0, 1, 2, 7])
def test_every_task_is_done_once(number: int, tasks: int) -> None:
    bn.set_num_threads(number)
    done: list[int] = []
    names = set()

    def work(first: int, last: int) -> None:
        names.add(threading.current_thread().name)
        done.extend(range(first, last))

    threads.share(work, tasks, 1000)
    assert sorted(done) == list(range(tasks))
    assert len(names) <= max(1, min(number, tasks))


def test_little_work_wakes_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "WORTH_SHARING", 1000)
    monkeypatch.setattr(threads, "_pool", None)
    bn.set_num_threads(4)
    threads.share(lambda first, last: None, 10, 999)
    assert threads._pool is None
    threads.share(lambda first, last: None, 10, 1000)
    assert threads._pool is not None


@pytest.mark.parametrize("guilty", [0, 1, 2])
def test_an_exception_comes_out_when_all_have_ended(guilty: int) -> None:
    """The caller waits for all: until then the others write into the caller's arrays."""
    bn.set_num_threads(3)
    started, ended = threading.Barrier(3), []

    def work(first: int, last: int) -> None:
        started.wait(60)
        if first == guilty:
            raise ZeroDivisionError(f"task {first}")
        threading.Event().wait(0.05)
        ended.append(first)

    with pytest.raises(ZeroDivisionError, match=f"task {guilty}"):
        threads.share(work, 3, 1000)
    assert sorted(ended) == sorted({0, 1, 2} - {guilty})
    threads.share(lambda first, last: ended.append(3), 1, 1000)
    assert ended[-1] == 3


def test_shared_work_may_share_work() -> None:
    """All threads of the pool would wait for others of it, for ever."""
    bn.set_num_threads(2)
    done = np.zeros((4, 4), int)

    def inner(row: np.ndarray, first: int, last: int) -> None:
        row[first:last] += 1

    def outer(first: int, last: int) -> None:
        for row in range(first, last):
            threads.share(
                lambda begin, end, row=row: np.add(done[row, begin:end], 1, out=done[row, begin:end]), 4, 1000
            )

    threads.share(outer, 4, 1000)
    assert (done == 1).all()
