"""A stand-in for CuPy without a GPU: CuPy 14's rules, several devices, kernels on the emulator.

It has what `bnkernels.runtime.cuda` and its tests use, and refuses what CuPy or a GPU would refuse: options that are no
tuple, NumPy arrays of more than one element as kernel arguments, implicit conversions to NumPy, addresses of another
device.
Beyond CuPy it remembers what it compiled, launched and read back. `tools.fake_cupy.kernels` has the kernels,
`tools.fake_cupy.streams` what benchmarks use: streams with captures, graphs, events, and kernels that are not the
project's. `tests.runtime.test_real_cupy` compares all of them with the real package.
"""

from __future__ import annotations

import ctypes
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

from bnkernels.runtime.seam import Launch
from tools.emulator import LIMITS, EmulatedArray, EmulatorRuntime
from tools.fake_cupy import kernels as fake_cupy_kernels
from tools.fake_cupy.graphs import Stream

MOST_BLOCKS, MOST_THREADS = 32, 2048  # per multiprocessor
CUDA, LEGACY = 2, 1  # numbers of DLPack: memory of a device, the default stream


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
        Compilations by ``(device, code, options)``.
    functions : Counter
        Lookups in a module by ``(device, entry_point)``.
    launches : list of LaunchRecord
        In order.
    replays : list of tuple of int
        Device and stream of every launch of a graph.
    reads : int
        Copies from a device to the host, each of which would wait for the device.
    described : int
        Structured NumPy arrays among the arguments of launches, each of which costs CuPy a description of its type.
    kernels : list of RawKernel
        That modules were asked for.
    of_sm : int or None
        Blocks of any kernel that a multiprocessor holds, in place of what shared memory and threads allow.
    asked : int
        Number of times the driver was asked for that, not counting CuPy's own.
    dead : bool
        Every later call of the device fails, as after an illegal address.
    captures : dict of int to list of callable
        The work of every stream under capture.
    host_kernels : dict of str to callable
        Python functions for the kernels that the emulator cannot compile, by name: see
        `tools.fake_cupy.streams`.
    """

    def __init__(self, emulator: EmulatorRuntime, devices: int) -> None:
        self.emulator, self.devices, self.available = emulator, devices, True
        self.compiled: Counter[tuple] = Counter()
        self.functions: Counter[tuple] = Counter()
        self.launches: list[LaunchRecord] = []
        self.replays: list[tuple[int, int]] = []
        self.reads = self.described = self.asked = 0
        self.of_sm, self.dead, self.allocator = None, False, None  # an allocator within `using_allocator`
        self.kernels: list[fake_cupy_kernels.RawKernel] = []
        self.handles = itertools.count(1 << 20, 16)
        self.pointers: dict[int, fake_cupy_kernels.Function] = {}
        self.invalid: set[int] = set()  # captures
        self.captures: dict[int, list[Callable[[], None]]] = {}
        self.host_kernels: dict[str, Callable[..., None]] = {}
        self._modules: dict[tuple, EmulatorRuntime] = {}
        self._memory: dict[int, weakref.WeakSet[Array]] = defaultdict(weakref.WeakSet)
        self._thread = threading.local()
        self._stream_numbers = itertools.count(1)
        self.null = Stream(self, null=True)

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
    def streams(self) -> dict[int, Stream]:
        """The calling thread's current stream on every device."""
        if not hasattr(self._thread, "streams"):
            self._thread.streams = defaultdict(lambda: self.null)
        return self._thread.streams

    def new_stream(self) -> int:
        """Return the number of a new stream."""
        return next(self._stream_numbers)

    @property
    def capture(self) -> list[Callable[[], None]] | None:
        """Launches captured by the current stream of the current device; None while it captures nothing."""
        return self.captures.get(self.streams[self.device].ptr)

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

    def make_context(self) -> None:
        """Let the calling thread speak to the driver of its device, as memory, launches and `Device.use` do."""
        if self.dead:
            raise RuntimeError("cudaErrorIllegalAddress: an illegal memory access was encountered")
        self._contexts.add(self.device)

    @property
    def _contexts(self) -> set[int]:
        if not hasattr(self._thread, "contexts"):
            self._thread.contexts = set()
        return self._thread.contexts

    def blocks_of_sm(self, func: int, blockSize: int, dynamicSMemSize: int) -> int:
        """Return how many blocks of a kernel a multiprocessor holds, as ``cupy.cuda.driver`` says it."""
        if self.device not in self._contexts:
            raise RuntimeError("CUDA_ERROR_INVALID_CONTEXT: invalid device context")
        self.asked += 1
        return self.resident(func, blockSize, dynamicSMemSize) // LIMITS.sms

    def resident(self, func: int, threads: int, shared_bytes: int) -> int:
        """Return how many blocks of a kernel the device holds."""
        if func not in self.pointers:
            raise RuntimeError("CUDA_ERROR_INVALID_HANDLE: invalid resource handle")
        by_memory = LIMITS.shared_bytes_of_sm // (shared_bytes + 1024)
        of_sm = min(MOST_BLOCKS, MOST_THREADS // threads, by_memory) if self.of_sm is None else self.of_sm
        return of_sm * LIMITS.sms

    def hold(self, array: Array) -> None:
        """Let kernels of the array's device touch its memory."""
        self._memory[array.device.id].add(array)
        if self.allocator is not None:
            self.allocator(array._memory)

    def load(self, code: str, options: tuple) -> EmulatorRuntime:
        """Return the module compiled for the current device; like CuPy, without a lock of its own."""
        key = self.device, code, options
        if key not in self._modules:
            time.sleep(0.01)  # other threads get their turn, as they do while NVRTC works
            self.compiled[key] += 1
            self._modules[key] = EmulatorRuntime(self.emulator.build, {"module.cu": code})
        return self._modules[key]

    def launch(self, module: EmulatorRuntime, name: str, launch: Launch, address: int) -> None:
        """Run a kernel on the current device, after a look at the addresses that its argument holds."""
        record = np.frombuffer(ctypes.string_at(address, module.argument_bytes("module", name)), np.uint8)
        words = record[: record.size // 8 * 8].view(np.uint64).tolist()
        for device in self._memory.keys() - {self.device}:
            if any(self._holds(word, device) for word in words):
                raise RuntimeError(f"cudaErrorIllegalAddress: {name} got memory of device {device} on {self.device}")
        self.launches.append(LaunchRecord(self.device, self.streams[self.device].ptr, name, launch))
        self.enqueue(lambda: module.launch("module", name, launch, record))  # a launch takes its argument with it

    def launch_twin(self, name: str, launch: Launch, args: tuple) -> None:
        """Run what stands for a kernel of someone else."""
        if name not in self.host_kernels:
            raise RuntimeError(f"the stand-in for CuPy has no host version of the kernel {name}")
        self.launches.append(LaunchRecord(self.device, self.streams[self.device].ptr, name, launch))
        self.enqueue(functools.partial(self.host_kernels[name], launch, *args))

    def _holds(self, address: int, device: int) -> bool:
        offsets = ((address - array.data.ptr, array.nbytes) for array in self._memory[device])
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

    def use(self) -> Device:
        """Make it the current device, also for the driver."""
        self._driver.device = self.id
        self._driver.make_context()
        return self


@dataclass(frozen=True)
class OnHost:
    """Array of another library, whose memory stands for a device's, as NumPy takes it in."""

    array: Any
    stream: int

    def __dlpack__(self, **options: Any) -> Any:
        """Return the array's capsule for the current stream."""
        return self.array.__dlpack__(stream=self.stream, max_version=options.get("max_version"))

    def __dlpack_device__(self) -> tuple[int, int]:
        """Return the CPU."""
        return 1, 0


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

    def view(self, dtype: Any) -> Array:
        """Return the same memory as another type."""
        return self.view_of(self._memory.view(dtype))

    def fill(self, value: Any) -> None:
        """Set every element, in the order of the stream."""
        self.driver.make_context()
        self.driver.enqueue(functools.partial(self._memory.fill, value))

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


def make(emulator: EmulatorRuntime, devices: int = 2) -> types.ModuleType:
    """Return a new module `cupy`, whose driver is its attribute `driver`."""
    driver = Driver(emulator, devices)
    ndarray = driver.array_type = type("ndarray", (Array,), {"__module__": "cupy", "driver": driver})

    def new(array: Any) -> Array:
        driver.make_context()
        return ndarray(array, driver.device)

    def from_dlpack(array: Any) -> Array:
        kind, device = array.__dlpack_device__()
        if kind != CUDA:
            raise TypeError("CPU arrays cannot be directly imported to CuPy.")
        memory = np.from_dlpack(OnHost(array, driver.streams[device].ptr or LEGACY)).view(EmulatedArray)
        emulator.pointer(memory)  # kernels may touch it
        return ndarray(memory, device)

    streams = functools.partial(Stream, driver)
    streams.from_external = functools.partial(Stream.from_external, driver)
    cupy = types.ModuleType("cupy")
    cupy.driver, cupy.ndarray, cupy.from_dlpack = driver, ndarray, from_dlpack
    cupy.empty = lambda shape, dtype: new(emulator.empty(shape, np.dtype(dtype)))
    cupy.zeros = lambda shape, dtype: new(emulator.asarray(np.zeros(shape, dtype)))
    cupy.asarray = lambda a: new(emulator.asarray(a))
    cupy.RawModule = functools.partial(fake_cupy_kernels.RawModule, driver)
    cupy.cuda = types.SimpleNamespace(
        is_available=lambda: driver.available,
        Device=functools.partial(Device, driver),
        Stream=streams,
        Function=fake_cupy_kernels.Function,
        get_current_stream=lambda device_id=-1: driver.streams[driver.device if device_id < 0 else device_id],
        function=fake_cupy_kernels.MODULE,
        driver=types.SimpleNamespace(occupancyMaxActiveBlocksPerMultiprocessor=driver.blocks_of_sm),
    )
    return cupy
