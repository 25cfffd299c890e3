"""More of the stand-in for CuPy: events, arithmetic, and kernels of others.

Benchmarks run on it without a GPU, to see that they would run with one. Arithmetic is NumPy's. Events answer NaN for a
time, so that no figure can come out of a rehearsal.

A kernel that is not the project's cannot run on the emulator. It is compiled by NVRTC where that is installed, and then
its host version runs, a Python function that does the same: ``driver.host_kernels[name](launch, *arguments)``.
"""

from __future__ import annotations

import functools
import os
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from bnkernels.runtime.seam import Launch
from tools import fake_cupy as package
from tools.compile import nvrtc
from tools.emulator import EmulatorRuntime
from tools.emulator.build import BUILD_VARIABLE
from tools.fake_cupy.arrays import Array, bare, computed
from tools.fake_cupy.graphs import Stream
from tools.fake_cupy.kernels import RawKernel

ARCHITECTURES = (80, 90)
ATTRIBUTES = package.ATTRIBUTES | {
    "MultiProcessorCount": 8,
    "L2CacheSize": 2**16,
    "MaxThreadsPerMultiProcessor": 2048,
    "MaxRegistersPerMultiprocessor": 65536,
}


# ---- events ---------------------------------------------------------------------------------------------------------


class Event:
    """``cupy.cuda.Event``."""

    def __init__(self, driver: package.Driver) -> None:
        self._driver, self.recorded = driver, False

    def record(self, stream: Stream | None = None) -> None:
        """Note that it has been passed."""
        self.recorded = True

    def synchronize(self) -> None:
        """Return: it has been passed."""
        self._driver.wait("a wait for an event")


def get_elapsed_time(start_event: Event, end_event: Event) -> float:
    """Return NaN: no time here may be taken for a GPU's."""
    if not (start_event.recorded and end_event.recorded):
        raise RuntimeError("cudaErrorInvalidResourceHandle: both events must have been recorded")
    return float("nan")


# ---- kernels of others ----------------------------------------------------------------------------------------------


def _words(array: Any) -> np.ndarray:
    return np.asarray(array._memory).view(np.uint8).reshape(-1)


def _copy(launch: Launch, source: Array, target: Array, words: np.int64) -> None:
    _words(target)[: 16 * int(words)] = _words(source)[: 16 * int(words)]


def _nothing(launch: Launch, *args: Any) -> None:
    """Stand for a kernel that leaves no trace: an empty one, or one that only reads."""


HOST_KERNELS: dict[str, Callable[..., None]] = {"bnk_copy": _copy, "bnk_empty": _nothing, "bnk_flush": _nothing}


@functools.cache
def compile_for_gpus(code: str) -> bool:
    """Compile a kernel's source for several architectures; return False where NVRTC is absent or cannot run."""
    if not nvrtc.FOLDER.is_dir() or os.environ.get(BUILD_VARIABLE) in ("asan", "tsan"):  # in whose allocators it fails
        return False
    return all(nvrtc.resources(code, architecture) for architecture in ARCHITECTURES)


def raw_kernel(driver: package.Driver) -> Callable[..., RawKernel]:
    """Return ``cupy.RawKernel``."""

    def make(
        code: str, name: str, options: tuple = (), backend: str = "nvrtc", *, enable_cooperative_groups: bool = False
    ) -> RawKernel:
        if type(code) is not str or type(options) is not tuple:
            raise TypeError(f"code must be a str and options a tuple, got {type(code)} and {options!r}")
        if name not in driver.host_kernels:
            raise RuntimeError(f"the stand-in for CuPy has no host version of the kernel {name}")
        if f" {name}(" not in code and "##" not in code:
            raise RuntimeError(f"CUDA_ERROR_NOT_FOUND: {name}")
        compile_for_gpus(code)
        return RawKernel(driver, code, name, options, enable_cooperative_groups)

    return make


class MemoryPool:
    """``cupy.cuda.MemoryPool``: what it has given out stays allocated as long as it is there."""

    def __init__(self) -> None:
        self.memory: list[Any] = []

    def malloc(self, size: Any) -> None:
        """Take memory that was made, which stands here for the size of what would be made."""
        self.memory.append(size)

    def free_all_blocks(self) -> None:
        """Free what nobody uses."""
        self.memory.clear()


# ---- the module -----------------------------------------------------------------------------------------------------


class Module(types.ModuleType):
    """The module `cupy`; what it does not have itself comes from NumPy."""

    def __getattr__(self, name: str) -> Any:
        """Return NumPy's function of the same name, for arrays of the stand-in."""
        found = getattr(np, name)
        if isinstance(found, type) or not callable(found):
            return found
        return lambda *args, **given: computed(self.driver, found, args, given)


class Random:
    """``cupy.random.Generator``."""

    def __init__(self, driver: package.Driver, seed: int) -> None:
        self._driver, self._random = driver, np.random.default_rng(seed)

    def standard_normal(self, size: Any = None, dtype: Any = np.float64) -> Array:
        """Draw numbers."""
        return self._driver.new(self._random.standard_normal(size, dtype=dtype))


def make(emulator: EmulatorRuntime, devices: int = 1) -> types.ModuleType:
    """Return a new module `cupy` with everything; its driver is its attribute `driver`."""
    base = package.make(emulator, devices)
    driver = base.driver
    cupy = Module("cupy")
    cupy.driver, cupy.__version__, cupy.RawModule = driver, "a stand-in", base.RawModule
    cupy.ndarray = driver.array_type = type("ndarray", (Array,), {"__module__": "cupy", "driver": driver})
    driver.new = lambda values: cupy.ndarray(emulator.asarray(np.asarray(values)), driver.device)
    driver.host_kernels.update(HOST_KERNELS)
    cupy.empty = lambda shape, dtype=float: cupy.ndarray(emulator.empty(_shape(shape), np.dtype(dtype)), driver.device)
    cupy.zeros = lambda shape, dtype=float: driver.new(np.zeros(shape, dtype))
    cupy.empty_like = lambda prototype: cupy.empty(prototype.shape, prototype.dtype)
    cupy.asarray = lambda a, dtype=None: driver.new(np.asarray(bare(a), dtype))
    cupy.array = lambda obj, dtype=None: driver.new(np.asarray(bare(obj), dtype))
    cupy.asnumpy = lambda a: a.get() if isinstance(a, package.Array) else np.asarray(a)
    cupy.copyto = lambda dst, src: dst.__setitem__(..., src)
    cupy.RawKernel = raw_kernel(driver)
    cupy.random = types.SimpleNamespace(default_rng=functools.partial(Random, driver))
    cupy.cuda = cuda(base.cuda, driver)
    return cupy


def _shape(shape: Any) -> tuple[int, ...]:
    return tuple(shape) if isinstance(shape, Sequence) else (int(shape),)


def cuda(base: Any, driver: package.Driver) -> types.SimpleNamespace:
    """Return ``cupy.cuda``."""

    def new_device(device: int | None = None) -> package.Device:
        made = base.Device(device)
        made.attributes, made.compute_capability = ATTRIBUTES, "90"
        made.synchronize = functools.partial(driver.wait, "a wait for a device")
        return made

    @contextmanager
    def using_allocator(allocator: Any) -> Iterator[None]:
        before, driver.allocator = driver.allocator, allocator
        try:
            yield
        finally:
            driver.allocator = before

    properties = {"name": b"emulator", "major": 9, "minor": 0, "totalGlobalMem": 2**30}
    return types.SimpleNamespace(
        is_available=base.is_available,
        Device=new_device,
        Stream=base.Stream,
        Function=base.Function,
        Event=functools.partial(Event, driver),
        get_elapsed_time=get_elapsed_time,
        MemoryPool=MemoryPool,
        using_allocator=using_allocator,
        set_allocator=lambda allocator=None: None,
        function=base.function,
        driver=base.driver,
        nvrtc=types.SimpleNamespace(getVersion=lambda: (0, 0)),
        get_current_stream=base.get_current_stream,
        runtime=types.SimpleNamespace(
            memGetInfo=lambda: (2**28, 2**30),
            getDeviceCount=lambda: driver.devices,
            getDeviceProperties=lambda device: properties,
            driverGetVersion=lambda: 0,
            runtimeGetVersion=lambda: 0,
            deviceSynchronize=functools.partial(driver.wait, "a wait for a device"),
        ),
    )
