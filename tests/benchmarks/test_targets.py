"""Targets on a CPU: cases that can be measured, with rivals that there are."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import threading
from collections.abc import Iterator

import numpy as np
import pytest

import benchmarks.__main__ as command
from benchmarks.harness import clocks, measure
from benchmarks.harness.case import Arrays, Call, Case, Op, Provider, cores, one_thread
from benchmarks.harness.places import COPY, Host
from benchmarks.harness.targets import QUESTION, TARGETS, Target
from benchmarks.harness.timing import ROOT
from bnkernels.runtime.cpu.threads import get_num_threads


def test_every_target_is_a_case_of_an_op_with_rivals() -> None:
    assert len({str(target.case) for target in TARGETS}) == len(TARGETS)
    for target in TARGETS:
        op = command.OPS[target.case.op]
        names = {provider.name for provider in op.providers if provider.place == "cpu"}
        assert names & set(target.rivals) if target.rivals else len(names) > 1, target
        assert op.bytes_moved(target.case) > 0
        assert target.flops >= 0


def test_the_targets_are_measured_first_and_alone_where_asked(capsys: pytest.CaptureFixture) -> None:
    for options in ([], ["--targets"]):
        assert command.main(["--place", "cpu", "--list", *options]) == 0
        listed = [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()]
        assert listed[: len(TARGETS)] == [str(target.case) for target in TARGETS]
        assert (len(listed) == len(TARGETS)) == bool(options)
    assert TARGETS[0].case.shape == QUESTION


def test_at_most_and_below() -> None:
    most = Target("", TARGETS[0].case, 0.7, ())
    assert most.met(0.7)
    assert not most.met(0.71)
    assert not most._replace(below=True).met(0.7)


def counting(case: Case, arrays: Arrays) -> Call:
    """Prepare a call that returns how many threads ours and PyTorch have."""
    return lambda: (np.array([get_num_threads()]), np.array([sys.modules["torch"].get_num_threads()]))


def alone(case: Case, arrays: Arrays) -> Call:
    """Prepare a call of somebody who has one thread."""
    one_thread(case)
    return counting(case, arrays)


@pytest.mark.parametrize("all_cores", [True, False])
def test_everybody_has_the_threads_of_the_case(all_cores: bool) -> None:
    pytest.importorskip("torch", reason="PyTorch is not installed")
    case, threads = Case("threads", "forward", (4, 3), all_cores=all_cores), cores() if all_cores else 1
    providers = [Provider("counting", "cpu", counting), Provider("alone", "cpu", alone)]
    right = np.array([float(threads)])
    op = Op(
        "threads",
        cases=[case],
        inputs=lambda case, random: {"x": random(case.shape)},
        reference=lambda case, arrays, xp: (right, right),
        bytes_moved=lambda case: 1000,
        providers=providers,
    )
    rows = {row["provider"]: row for row in measure.measure(op, case, providers, Host(), seconds=0.01)}
    assert rows["counting"]["status"] == rows[COPY]["status"] == "ok"
    assert rows["counting"]["threads"] == threads
    assert rows["alone"]["status"] == ("it computes with one thread" if all_cores else "ok")


def test_a_copy_by_all_cores_copies_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    host, names = Host(), set()
    monkeypatch.setattr(np, "copyto", lambda to, of, copy=np.copyto: (names.add(threading.get_ident()), copy(to, of)))
    host.use_threads(3)
    (limit,) = host.limits(9999)
    (target,) = limit.prepare(TARGETS[0].case, {})()
    assert target.all()
    assert threading.get_ident() not in names
    host.use_threads(1)


@pytest.fixture
def computing() -> Iterator[threading.Thread]:
    """Return a thread that computes for some tenths of a second, without Python's lock."""
    thread = threading.Thread(target=hashlib.pbkdf2_hmac, args=("sha256", b"", b"", 500_000))
    thread.start()
    yield thread
    thread.join()


def test_a_batch_of_threads_waits_until_no_other_computes(computing: threading.Thread) -> None:
    alive: list[bool] = []
    calls = [lambda: alive.append(computing.is_alive())] * 2
    clocks.HostClock().batch(calls, keep=False).run()
    assert alive == [True, True]
    clocks.HostClock(alone=True).batch(calls, keep=False).run()
    assert len(alive[2:]) > len(calls)  # those before wake the threads
    assert not any(alive[2:])


def test_what_others_disturb_for_ever_is_not_timed(
    computing: threading.Thread, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clocks, "LONGEST_WAIT", 0.05)
    with pytest.raises(RuntimeError, match=r"other threads of this process have computed for 0\.05 s"):
        clocks.HostClock(alone=True).batch([list], keep=False).run()


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc alone can be told")
def test_memory_that_was_freed_is_used_again() -> None:
    """In a process of its own: pages that a call touches for the first time are counted by the system."""
    program = """if True:
        import resource
        import numpy as np
        from benchmarks.harness.places import keep_memory
        def faults():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            np.ones(2**24, np.uint8)
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        keep_memory()
        faults()
        print(faults())
    """
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100
