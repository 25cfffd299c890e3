"""The measurement of the host cost: what it prints and says. Nothing here depends on how fast anything is."""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from benchmarks.ops import host_cost
from bnkernels.ops.batch_norm.launch import ARGUMENTS
from bnkernels.ops.batch_norm.problem import BACKWARD, FORWARD, INFERENCE
from bnkernels.runtime import cpu, registry
from bnkernels.runtime.arguments import pack
from bnkernels.runtime.replay import ReplayCache
from tools import backends
from tools import fake_cupy as package
from tools.real_cupy import real

OURS = ["batch_norm_forward", "batch_norm_backward", "batch_norm_inference", host_cost.ELSEWHERE]
THEIRS = ["PyTorch, 1 x 1, inference", "PyTorch, 2 x 1, training"]
ARGUMENT = [host_cost.ARGUMENT] if host_cost.cuda_runtime() else []
NUMPY = int(cpu.why_reference() is None)  # tables of NumPy's arrays


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_cost, "ROUNDS", 3)
    monkeypatch.setattr(host_cost, "CALLS", 2)


@pytest.fixture
def torch(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Put a stand-in in PyTorch's place; return the calls of its batch norm."""
    calls: list[dict[str, Any]] = []

    def batch_norm(x: np.ndarray, mean: Any, var: Any, gamma: Any, beta: Any, training: bool = False) -> None:
        calls.append({"shape": x.shape, "training": training})

    stand_in = types.ModuleType("torch")
    stand_in.set_num_threads = lambda count: None
    stand_in.ones, stand_in.zeros = (lambda *shape: np.ones(shape)), (lambda *shape: np.zeros(shape))
    stand_in.nn = types.SimpleNamespace(functional=types.SimpleNamespace(batch_norm=batch_norm))
    monkeypatch.setitem(sys.modules, "torch", stand_in)
    return calls


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """Put the stand-in in CuPy's place, unknown to the ops yet."""
    stand_in = package.make(backends.emulated_runtime())

    def forget() -> None:
        sys.modules.pop("bnkernels.runtime.cuda", None)
        vars(sys.modules["bnkernels.runtime"]).pop("cuda", None)

    monkeypatch.setitem(sys.modules, "cupy", stand_in)
    monkeypatch.setattr(registry, "runtimes", dict(registry.runtimes))
    forget()
    yield stand_in
    forget()


def tables(text: str) -> list[list[str]]:
    """Return the names in the rows of every table."""
    found: list[list[str]] = []
    for line in text.splitlines():
        if line.split() == ["best", "median"]:
            found.append([])
        elif row := re.fullmatch(r"(\S.*?) +\d+\.\d\d +\d+\.\d\d", line):
            found[-1].append(row[1])
    return found


@pytest.mark.usefixtures("torch")
def test_every_call_has_its_row_and_the_ratio_is_last(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(registry, "why_no_cuda", lambda: "there is none")
    assert host_cost.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert tables("\n".join(lines)) == [OURS + THEIRS] * NUMPY + [OURS + THEIRS + ARGUMENT]
    assert "CuPy's own arrays: not measured: there is none" in lines
    label, ratio = lines[-1].rsplit(" ", 1)
    assert label == "ours / PyTorch's:"
    assert float(ratio) > 0


def test_pytorch_runs_on_one_number_and_trains_on_two(torch: list[dict[str, Any]]) -> None:
    host_cost.measured(host_cost.torch_calls())
    assert {(call["shape"], call["training"]) for call in torch} == {((1, 1), False), ((2, 1), True)}


def test_without_pytorch_there_is_no_ratio(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(registry, "why_no_cuda", lambda: "there is none")
    assert host_cost.main() == 1
    text = capsys.readouterr().out
    assert tables(text) == [OURS] * NUMPY + [OURS + ARGUMENT]
    assert text.splitlines()[-1] == "no ratio: PyTorch is not installed; make host-cost installs it"


@pytest.mark.emulator
@pytest.mark.usefixtures("torch")
def test_cupys_own_arrays_are_measured_where_they_are(
    cupy: types.ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert host_cost.main() == 0
    assert tables(capsys.readouterr().out) == [OURS + THEIRS] * NUMPY + [[*OURS, *THEIRS, host_cost.ARGUMENT]] * 2
    assert not cupy.driver.launches


@pytest.mark.parametrize(("us", "verdict"), [(3.9, "met"), (4.0, "met"), (4.1, "not met")])
@pytest.mark.parametrize("slow", host_cost.TRAINING)
def test_the_slower_of_forward_and_backward_is_judged(
    slow: str, us: float, verdict: str, capsys: pytest.CaptureFixture
) -> None:
    figures = {name: np.array([1.0, 2.0]) for name in OURS} | {THEIRS[0]: np.array([8.0, 5.0])}
    figures[slow] = np.array([us, 50.0])
    assert host_cost.report("some arrays", figures) == us / 5
    first, second = capsys.readouterr().out.splitlines()[-2:]
    assert first == f"at most 4 us, best round of the slower of forward and backward: {us:.2f}, {verdict}"
    assert second == f"below PyTorch's on a 1 x 1 tensor: {us:.2f} and 5.00, met"
    figures[THEIRS[0]] = np.array([us, us])
    host_cost.report("some arrays", figures)
    assert capsys.readouterr().out.endswith(", not met\n")


def test_what_cupy_makes_of_the_argument_is_added(capsys: pytest.CaptureFixture) -> None:
    figures = dict.fromkeys([*OURS, THEIRS[0]], np.array([2.0])) | {host_cost.ARGUMENT: np.array([20.0, 22.0])}
    assert host_cost.report("some arrays", figures) == 11
    assert "forward and backward: 22.00, not met" in capsys.readouterr().out


@pytest.mark.usefixtures("torch")
def test_a_structured_array_as_the_argument_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """By CuPy's own conversion, which describes the type of one at every launch, without a driver as well."""
    real()
    monkeypatch.setattr(host_cost, "ROUNDS", 20)
    (address,) = host_cost.argument_row().values()
    module = host_cost.cuda_runtime()
    layout = ARGUMENTS["forward"][np.dtype(np.float32)]
    record = pack(layout, *range(len(layout)))
    monkeypatch.setattr(module, "CPointer", lambda address: record)
    (described,) = host_cost.argument_row().values()
    assert described.min() > 10 * address.min()


def test_stand_ins_are_launched_by_the_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    """So the figures hold whatever that does: up to CuPy's launch."""
    real()
    module = host_cost.cuda_runtime()
    statement, names = host_cost.our_calls(host_cost.standins().asarray)["batch_norm_forward"]
    (argument,) = host_cost.passed(statement, names)
    assert type(argument) is module.CPointer
    assert host_cost.standins().launch.__func__ is module.CudaRuntime.launch


def test_what_is_measured_is_the_repeated_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first call of each is kept and launched again; only that with a new address is not."""
    kept: list[Any] = []
    record = ReplayCache.record

    def counted(self: ReplayCache, place: int, key: list, work: Any) -> None:
        kept.append(work)
        record(self, place, key, work)

    for kind in (FORWARD, INFERENCE, BACKWARD):
        monkeypatch.setitem(vars(kind), "calls", ReplayCache())
    monkeypatch.setattr(ReplayCache, "record", counted)
    calls = host_cost.our_calls(host_cost.standins().asarray)
    repeated = {name: call for name, call in calls.items() if name != host_cost.ELSEWHERE}
    host_cost.measured(repeated)
    assert len(kept) == len(repeated) == 3
    host_cost.measured({host_cost.ELSEWHERE: calls[host_cost.ELSEWHERE]})
    assert len(kept) == 3 + 1 + 3 * 2


@pytest.mark.skipif(not NUMPY, reason="the compiled kernels need Numba and SciPy")
def test_what_did_nothing_on_numpy_is_not_replayed_later() -> None:
    caches = [kind.calls for kind in (FORWARD, INFERENCE, BACKWARD)]
    before = [(set(cache._entries), set(cache._guesses)) for cache in caches]
    host_cost.report_numpy({})
    assert before == [(set(cache._entries), set(cache._guesses)) for cache in caches]


def test_stand_ins_are_read_as_cupys_arrays_are() -> None:
    array = host_cost.standins().asarray(np.ones((2, 3), np.float32))
    assert (array.data.ptr, array.data.device_id) == (array.ctypes.data, 0)
