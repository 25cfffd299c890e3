"""A stand-in for CuPy without a GPU: CuPy 14's rules, several devices, kernels on the emulator.

It has what `bnkernels._cuda` and its tests use, and refuses what CuPy or a GPU would refuse: options that are no tuple,
NumPy arrays of more than one element as kernel arguments, implicit conversions to NumPy, addresses of another device.
Beyond CuPy it remembers what it compiled, launched and read back. `tests.fake_cupy_streams` adds what benchmarks use:
streams with captures, graphs, events, and kernels that are not the project's.
"""

from __future__ import annotations

import functools
import itertools
import threading
import time
import types
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from bnkernels._runtime import SHARED_BYTES, Launch
from tests.emulator import LIMITS, EmulatedArray, EmulatorRuntime


@dataclass(frozen=True)
class LaunchRecord:
    """Where a kernel ran, and how."""

    device: int
    stream: int
    entry_point: str
    launch: Launch


class Driver:
    """The devices behind one stand-in, and what happened on them.

    Attributes
    ----------
    compiled : Counter
        How often each ``(device, code, options)`` was compiled.
    functions : Counter
        How often each ``(device, entry_point)`` was looked up in a module.
    launches : list of LaunchRecord
        In order.
    reads : int
        Copies from a device to the host, each of which would wait for the device.
    captures : dict of int to list of callable
        The work of every stream under capture.
    twins : dict of str to callable
        What stands for the kernels that the emulator cannot compile, by name: see `tests.fake_cupy_streams`.
    """

    def __init__(self, emulator: EmulatorRuntime, devices: int) -> None:
        self.emulator, self.devices, self.available = emulator, devices, True
        self.compiled: Counter[tuple] = Counter()
        self.functions: Counter[tuple] = Counter()
        self.launches: list[LaunchRecord] = []
        self.reads = 0
        self.captures: dict[int, list[Callable[[], None]]] = {}
        self.twins: dict[str, Callable[..., None]] = {}
        self._modules: dict[tuple, EmulatorRuntime] = {}
        self._memory: dict[int, weakref.WeakSet[Array]] = defaultdict(weakref.WeakSet)
        self._thread = threading.local()
        self._stream_numbers = itertools.count(1)

    @property
    def device(self) -> int:
        """The calling thread's current device."""
        return getattr(self._thread, "device", 0)

    @device.setter
    def device(self, device: int) -> None:
        if not 0 <= device < self.devices:
            raise RuntimeError(f"cudaErrorInvalidDevice: {device}")
        self._thread.device = device

    @property
    def streams(self) -> dict[int, int]:
        """The calling thread's current stream on every device; 0 is the null stream."""
        if not hasattr(self._thread, "streams"):
            self._thread.streams = defaultdict(int)
        return self._thread.streams

    def new_stream(self) -> int:
        """Return the number of a new stream."""
        return next(self._stream_numbers)

    @property
    def capture(self) -> list[Callable[[], None]] | None:
        """What the current stream of the current device has captured, or None while it captures nothing."""
        return self.captures.get(self.streams[self.device])

    def enqueue(self, work: Callable[[], None]) -> None:
        """Do the work at once; under capture, when the graph is launched."""
        if self.capture is None:
            work()
        else:
            self.capture.append(work)

    def wait(self, what: str) -> None:
        """Refuse to wait for a device while a stream of it is under capture."""
        if self.captures:
            raise RuntimeError(f"cudaErrorStreamCaptureUnsupported: {what} while a stream is being captured")

    def hold(self, array: Array) -> None:
        """Let kernels of the array's device touch its memory."""
        self._memory[array.device.id].add(array)

    def load(self, code: str, options: tuple) -> EmulatorRuntime:
        """Return the module compiled for the current device; like CuPy, without a lock of its own."""
        key = self.device, code, options
        if key not in self._modules:
            time.sleep(0.01)  # other threads get their turn, as they do while NVRTC works
            self.compiled[key] += 1
            self._modules[key] = EmulatorRuntime(self.emulator.build, {"module.cu": code})
        return self._modules[key]

    def launch(self, module: EmulatorRuntime, name: str, launch: Launch, record: np.ndarray) -> None:
        """Run a kernel on the current device, after a look at the addresses that its argument holds."""
        for field, (dtype, _) in record.dtype.fields.items():
            if dtype == np.uint64 and record[field] and not self._holds(int(record[field])):
                raise RuntimeError(f"cudaErrorIllegalAddress: {name}: {field} is not on device {self.device}")
        self.launches.append(LaunchRecord(self.device, self.streams[self.device], name, launch))
        record = record.copy()  # a launch takes its argument with it
        self.enqueue(lambda: module.launch("module", name, launch, record))

    def launch_twin(self, name: str, launch: Launch, args: tuple) -> None:
        """Run what stands for a kernel of someone else."""
        if name not in self.twins:
            raise RuntimeError(f"the stand-in for CuPy has no twin of the kernel {name}")
        self.launches.append(LaunchRecord(self.device, self.streams[self.device], name, launch))
        self.enqueue(functools.partial(self.twins[name], launch, *args))

    def _holds(self, address: int) -> bool:
        offsets = ((address - array.data.ptr, array.nbytes) for array in self._memory[self.device])
        return any(0 <= offset < size for offset, size in offsets)


ATTRIBUTES = {
    "MultiProcessorCount": LIMITS.sms,
    "MaxSharedMemoryPerBlockOptin": LIMITS.shared_bytes,
    "MaxSharedMemoryPerMultiprocessor": LIMITS.shared_bytes_of_sm,
    "CooperativeLaunch": int(LIMITS.cooperative),
    "MaxThreadsPerMultiProcessor": LIMITS.threads_of_sm,
    "MaxBlocksPerMultiprocessor": LIMITS.blocks_of_sm,
    "ReservedSharedMemoryPerBlock": LIMITS.reserved_bytes,
}


class Device:
    """``cupy.cuda.Device``: a context in which it is the current device."""

    def __init__(self, driver: Driver, device: int | None = None) -> None:
        self.id, self._driver, self._before = driver.device if device is None else device, driver, []
        self.attributes, self.compute_capability = ATTRIBUTES, "90" if LIMITS.clusters else "80"

    def __enter__(self) -> Device:
        """Return the device itself, as CuPy's does."""
        self._before.append(self._driver.device)
        self._driver.device = self.id
        return self

    def __exit__(self, *_: object) -> None:
        self._driver.device = self._before.pop()


class Stream:
    """``cupy.cuda.Stream``: of the device current at its making; a context in which it is that device's current one."""

    def __init__(self, driver: Driver) -> None:
        self.ptr, self.device_id, self._driver, self._before = driver.new_stream(), driver.device, driver, []

    def __enter__(self) -> Stream:
        self._before.append(self._driver.streams[self.device_id])
        self._driver.streams[self.device_id] = self.ptr
        return self

    def __exit__(self, *_: object) -> None:
        self._driver.streams[self.device_id] = self._before.pop()


class Array:
    """``cupy.ndarray``, as far as ops need it; each stand-in has its own subclass, bound to its driver."""

    driver: ClassVar[Driver]

    def __init__(self, memory: EmulatedArray, device: int, owner: Array | None = None) -> None:
        self._memory, self._device, self._owner = memory, device, owner
        if owner is None:
            self.driver.hold(self)

    shape = property(lambda self: self._memory.shape)
    strides = property(lambda self: self._memory.strides)
    dtype = property(lambda self: self._memory.dtype)
    size = property(lambda self: self._memory.size)
    nbytes = property(lambda self: self._memory.nbytes)
    data = property(lambda self: types.SimpleNamespace(ptr=self._memory.ctypes.data, device_id=self._device))
    device = property(lambda self: Device(self.driver, self._device))

    def __getitem__(self, key: Any) -> Array:
        """Return a view: no index gives a host's number."""
        key = key if isinstance(key, tuple) else (key,)
        return self.view_of(self._memory[(*key, ...)])

    def view_of(self, memory: Any) -> Array:
        """Return an array that looks at the same memory."""
        return type(self)(memory, self._device, self if self._owner is None else self._owner)

    def __setitem__(self, key: Any, value: float) -> None:
        self._memory[key] = float(value)

    def copy(self, order: str) -> Array:
        """Return a copy in C order on the current device."""
        assert order == "C"
        return type(self)(self.driver.emulator.asarray(self._memory), self.driver.device)

    def get(self) -> np.ndarray:
        """Return a copy on the host."""
        self.driver.wait("a copy to the host")
        self.driver.reads += 1
        return np.array(self._memory, subok=False)

    def item(self) -> float:
        """Return the one element."""
        return self.get().item()

    def __float__(self) -> float:
        return float(self.item())

    def __bool__(self) -> bool:
        return bool(self.get())

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()`.")


class RawModule:
    """``cupy.RawModule``: compiled for a device at the first look for a kernel there."""

    def __init__(self, driver: Driver, *, code: str, options: tuple[str, ...] = ()) -> None:
        if type(code) is not str or type(options) is not tuple or not all(type(o) is str for o in options):
            raise TypeError(f"code must be a str and options a tuple of str, got {type(code)} and {options!r}")
        self._driver, self._code, self._options = driver, code, options

    def get_function(self, name: str) -> RawKernel:
        """Return a new kernel object, compiled for the current device."""
        self._driver.load(self._code, self._options)
        self._driver.functions[self._driver.device, name] += 1
        return RawKernel(self._driver, self._code, self._options, name)


class RawKernel:
    """``cupy.RawKernel``: runs on the current device and its current stream, whatever device its arrays are on."""

    def __init__(self, driver: Driver, code: str, options: tuple[str, ...], name: str) -> None:
        self._driver, self._code, self._options, self._name = driver, code, options, name
        self.max_dynamic_shared_size_bytes = SHARED_BYTES
        self.kernel = self._launch

    def __call__(self, grid: tuple, block: tuple, args: tuple, *, shared_mem: int = 0) -> None:
        """Launch; blocks of a RawKernel of these options may not wait for one another."""
        self._launch(grid, block, args, shared_mem)

    def _launch(
        self, grid: tuple, block: tuple, args: tuple, shared_mem: int = 0, *, enable_cooperative_groups: bool = False
    ) -> None:
        """Launch: a kernel of ours, whose one argument is a struct, on the emulator; any other through its twin."""
        if type(grid) is not tuple or type(block) is not tuple:
            raise TypeError(f"grid and block must be tuples, got {grid!r} and {block!r}")
        for value in args:
            if isinstance(value, np.ndarray) and (value.size != 1 or value.dtype.fields is None):
                raise TypeError(
                    f"only a structured numpy.ndarray of size one is passed by value as a struct, got {value!r}"
                )
        if shared_mem > self.max_dynamic_shared_size_bytes:
            raise RuntimeError(f"CUDA_ERROR_INVALID_VALUE: {shared_mem} bytes of shared memory without opting in")
        launch = Launch(*((*given, 1, 1)[:3] for given in (grid, block)), shared_mem, enable_cooperative_groups)
        if self._name in self._driver.twins:
            self._driver.launch_twin(self._name, launch, args)
            return
        (record,) = args
        if not isinstance(record, np.ndarray):
            raise TypeError(f"the emulator runs kernels of one argument, a struct; {self._name} got {record!r}")
        self._driver.launch(self._driver.load(self._code, self._options), self._name, launch, record)


def make(emulator: EmulatorRuntime, devices: int = 2) -> types.ModuleType:
    """Return a new module `cupy`, whose driver is its attribute `driver`."""
    driver = Driver(emulator, devices)
    ndarray = type("ndarray", (Array,), {"__module__": "cupy", "driver": driver})
    cupy = types.ModuleType("cupy")
    cupy.driver, cupy.ndarray = driver, ndarray
    cupy.empty = lambda shape, dtype: ndarray(emulator.empty(shape, np.dtype(dtype)), driver.device)
    cupy.zeros = lambda shape, dtype: ndarray(emulator.asarray(np.zeros(shape, dtype)), driver.device)
    cupy.asarray = lambda array: ndarray(emulator.asarray(array), driver.device)
    cupy.RawModule = functools.partial(RawModule, driver)
    cupy.cuda = types.SimpleNamespace(
        is_available=lambda: driver.available,
        Device=functools.partial(Device, driver),
        Stream=functools.partial(Stream, driver),
        get_current_stream=lambda: types.SimpleNamespace(
            ptr=driver.streams[driver.device], is_capturing=lambda: driver.capture is not None
        ),
    )
    return cupy
