"""Kernels on a device that was not the current one: zeros, or an illegal access."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from bnkernels._runtime import Launch
from tests.regress.calls import CALLS, EVERY_ARRAY, make_arrays
from tests.regress.device import record_of, recording


@pytest.mark.parametrize(("op", "name"), EVERY_ARRAY)
def test_apex_1022_an_array_on_another_device_is_an_error(op: str, name: str) -> None:
    """A pointer of one device was passed to a kernel on another; the error names the array and both devices."""
    on = record_of(make_arrays(op))
    on[name].device_number = 1
    with recording() as runtime:
        with pytest.raises(ValueError, match=r"is on device [01] but .* is on device [01]; move one of them"):
            CALLS[op].run(on)
        assert runtime.launches == []


@pytest.mark.parametrize("op", CALLS)
def test_apex_1022_all_arrays_on_the_second_device(op: str) -> None:
    """The launch is for the device of the arrays, not for the current one."""
    on = record_of(make_arrays(op))
    for array in on.values():
        array.device_number = 1
    with recording() as runtime:
        CALLS[op].run(on)
        assert [record.like.device_number for record in runtime.launches] == [1]


class FakeDevice:
    """A device that knows whether it is the current one."""

    current: FakeDevice | None = None

    def __init__(self, number: int) -> None:
        self.id = number

    def __enter__(self) -> FakeDevice:
        FakeDevice.current = self
        return self

    def __exit__(self, *_: object) -> None:
        FakeDevice.current = None


@pytest.fixture
def cuda_runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, list]]:
    """Return the CUDA runtime over a CuPy that only records, and its records: (what, current device, details)."""
    records: list[tuple] = []

    def note(*details: object) -> None:
        records.append((*details, FakeDevice.current and FakeDevice.current.id))

    class RawModule:
        def __init__(self, **_: object) -> None:
            note("compile")

        def get_function(self, name: str) -> Any:
            note("function", name)
            return lambda grid, block, arguments, shared_mem: note("launch", name, grid, block, shared_mem)

    cupy = ModuleType("cupy")
    cupy.ndarray = SimpleNamespace
    cupy.RawModule = RawModule
    cupy.empty = lambda shape, dtype: note("empty", shape)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    spec = importlib.util.find_spec("bnkernels._cuda")
    module = importlib.util.module_from_spec(spec)  # a copy: whoever imports the real one must not get this
    spec.loader.exec_module(module)
    yield module.CudaRuntime(), records


def test_apex_1022_cuda_runtime_enters_the_device(cuda_runtime: tuple[Any, list]) -> None:
    """Everything, be it compiled, allocated or launched, happens while the array's device is the current one."""
    runtime, records = cuda_runtime
    like, launch = SimpleNamespace(device=FakeDevice(1)), Launch((2, 1, 1), (32, 4, 1), 64)
    runtime.empty((5,), np.dtype("float32"), like)
    runtime.launch("batch_norm_forward", "kernel", launch, np.zeros(()), like)
    assert records == [
        ("empty", (5,), 1),
        ("compile", 1),
        ("function", "kernel", 1),
        ("launch", "kernel", (2, 1, 1), (32, 4, 1), 64, 1),
    ]
    assert FakeDevice.current is None


def test_cupy_5795_a_kernel_belongs_to_its_device(cuda_runtime: tuple[Any, list]) -> None:
    """A handle loaded on one device was cached and used on another; each device loads once and keeps its own."""
    runtime, records = cuda_runtime
    launch = Launch((1, 1, 1), (32, 1, 1))
    for number in (0, 1, 0, 1):
        for entry_point in ("one", "two"):
            like = SimpleNamespace(device=FakeDevice(number))
            runtime.launch("batch_norm_forward", entry_point, launch, np.zeros(()), like)
    assert [record[-1] for record in records if record[0] == "compile"] == [0, 1]
    assert sorted(record[1:] for record in records if record[0] == "function") == [
        ("one", 0),
        ("one", 1),
        ("two", 0),
        ("two", 1),
    ]
    assert [record[-1] for record in records if record[0] == "launch"] == [0, 0, 1, 1] * 2
