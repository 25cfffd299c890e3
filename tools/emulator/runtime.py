"""Arrays in the emulator's memory, and the runtime that runs the kernels on them."""

from __future__ import annotations

import ctypes
import math
import os
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bnkernels.runtime import occupancy, registry, seam
from bnkernels.runtime.seam import Launch, Limits

from .binding import RSQRT_BOUND, Binding, Counts, Schedule
from .build import BUILD_VARIABLE, CUDA, CUDA_VARIABLE, RSQRT_VARIABLE, EmulatorError, read_sources

# A small device: it does not take a GPU's worth of threads for blocks to wait for one another.
LIMITS = Limits(sms=4, shared_bytes=227 * 1024, shared_bytes_of_sm=228 * 1024, cooperative=True, tf32=True)


class Address(NamedTuple):
    """The address of an array, and the number of its device."""

    ptr: int
    device_id: int


class EmulatedArray(np.ndarray):
    """An array that the ops treat as a device array: its type is what they dispatch on.

    Those that `EmulatorRuntime` makes live in blocks of the exact size, poisoned and guarded. What NumPy makes of them
    (slices, sums, copies) is an `EmulatedArray` too, and kernels may run on it, in NumPy's memory, without guards.
    """

    @property
    def data(self) -> Address:
        """Where the array is, as CuPy says it; what NumPy allocated may then be touched by kernels."""
        return Address(registry.runtimes[EmulatedArray].pointer(self), 0)


@dataclass(frozen=True)
class LaunchRecord:
    """One launch and what it did; its events, of the type `binding.EVENT`, where it was traced."""

    source: str
    entry_point: str
    launch: Launch
    counts: Counts
    events: np.ndarray


class EmulatorRuntime(seam.Runtime):
    """Runs the text of ``cuda/`` on the CPU, behind `bnkernels.runtime.seam`.

    Parameters
    ----------
    build : str
        ``plain`` and ``coverage`` judge and count every access; ``asan`` and ``tsan`` need the process to be started
        by ``python -m tools.emulator run``.
    sources : Mapping of str to str, optional
        The text of every file of ``cuda/``, by its path in there. Default: the project's own.
    schedule : Schedule, optional
        Choices that the hardware is free to make in a launch.

    Attributes
    ----------
    launches : list of LaunchRecord
        Launches since the last `reset`.
    workspace_array : EmulatedArray or None
        The workspace, once `workspace` was called.
    """

    array_type = EmulatedArray
    xp = np

    def __init__(
        self, build: str = "plain", sources: Mapping[str, str] | None = None, schedule: Schedule | None = None
    ) -> None:
        self._binding = Binding(build, read_sources() if sources is None else sources)
        self._schedule = schedule or Schedule()
        self._limits = LIMITS._replace(sms=1) if build == "tsan" else LIMITS  # a thread of TSan's takes two megabytes
        self.workspace_array: EmulatedArray | None = None
        self.launches: list[LaunchRecord] = []
        self._captured: list[tuple] | None = None
        self._cut_to: int | None = None

    # ---- the seam ---------------------------------------------------------------------------------------------------

    def empty(self, shape: tuple[int, ...], dtype: np.dtype, like: Any = None) -> EmulatedArray:
        """Return a new C-contiguous array, poisoned: NaN, or -1."""
        return self._new(shape, np.dtype(dtype))

    def contiguous(self, array: EmulatedArray) -> EmulatedArray:
        """Return a C-contiguous copy."""
        return self.asarray(array)

    def on_device(self, array: np.ndarray, like: Any) -> EmulatedArray:
        """Return a copy in the emulator's memory."""
        return self.asarray(array)

    def pointer(self, array: EmulatedArray) -> int:
        """Return the address of the array's first element."""
        address = array.ctypes.data
        if array.size and not self._binding.holds(address):
            self._adopt(array)
        return address

    def device(self, array: EmulatedArray) -> int:
        """Return 0: there is one emulated device."""
        return 0

    def limits(self, array: EmulatedArray) -> Limits:
        """Return the limits of the emulated device."""
        return self._limits

    def workspace(self, array: EmulatedArray) -> int:
        """Return the address of the memory that launches share."""
        if self.workspace_array is None:
            self.workspace_array = self.asarray(np.zeros(seam.WORKSPACE_BYTES, np.uint8))
        return self.pointer(self.workspace_array)

    def launch(self, source: str, entry_point: str, launch: Launch, arguments: np.ndarray, like: Any = None) -> None:
        """Run a kernel to its end, and add to `launches` what it did.

        Raises
        ------
        EmulatorError
            For anything a GPU would not forgive; the message says what, which thread, and where.
        """
        if self._captured is not None:
            self._captured.append((source, entry_point, launch, arguments.copy()))
            return
        if launch.cooperative:
            launch = self._granted(source, entry_point, launch)
        counts = self._binding.launch(source, entry_point, launch, arguments, self._schedule)
        self.launches.append(LaunchRecord(source, entry_point, launch, counts, self._binding.events()))

    def capture(self, work: Callable[[], None], like: Any) -> Callable[[], None]:
        """Return a callable that repeats the launches that `work` makes, as they were: nothing else of it runs again.

        Raises
        ------
        EmulatorError
            If `work` allocates.
        """
        self._captured = captured = []
        try:
            work()
        finally:
            self._captured = None

        def replay() -> None:
            for launch in captured:
                self.launch(*launch)

        return replay

    # ---- for tests --------------------------------------------------------------------------------------------------

    @property
    def build(self) -> str:
        """The name of the build."""
        return self._binding.build

    def argument_bytes(self, source: str, entry_point: str) -> int:
        """Return the size of a kernel's argument struct, in bytes."""
        return self._binding.argument_bytes(source, entry_point)

    def reset(self) -> None:
        """Forget the launches so far."""
        self.launches.clear()

    def asarray(self, array: Any, offset_elements: int = 0, read_only: bool = False) -> EmulatedArray:
        """Return a C-contiguous copy in the emulator's memory.

        Parameters
        ----------
        array : array_like
            Values to copy.
        offset_elements : int
            Distance of the copy's start from an aligned address, in elements.
        read_only : bool
            Make a write to it, by a kernel or by NumPy, an error.
        """
        array = np.asarray(array)
        copy = self._new(array.shape, array.dtype, offset_elements * array.itemsize)
        copy[...] = array
        return self._protect(copy) if read_only else copy

    def like(self, array: np.ndarray, read_only: bool = False) -> EmulatedArray:
        """Return a copy with the strides of `array`, be they zero or negative, in a block of the exact size."""
        if array.size == 0:
            return self.asarray(array, read_only=read_only)
        reach = [(size - 1) * stride for size, stride in zip(array.shape, array.strides, strict=True)]
        before = -sum(distance for distance in reach if distance < 0)
        size = before + sum(distance for distance in reach if distance > 0) + array.itemsize
        block = self._block(size, 0, _describe(array.shape, array.dtype))
        copy = EmulatedArray(array.shape, array.dtype, block, before, array.strides)
        copy[...] = array
        return self._protect(copy) if read_only else copy

    def sparse(self, shape: tuple[int, ...], dtype: np.dtype) -> EmulatedArray:
        """Return an array of zeros, of any size: it takes memory only where it is touched.

        Raises
        ------
        MemoryError
            If the system refuses to promise so much (overcommitment is off): skip the test with that message.
        """
        dtype = np.dtype(dtype)
        size = math.prod(shape) * dtype.itemsize
        address = self._binding.reserve(size, _describe(shape, dtype))
        return EmulatedArray(shape, dtype, self._owned(address, size))

    def holds(self, address: int) -> bool:
        """Tell whether kernels may touch `address` now."""
        return self._binding.holds(address)

    def check_guards(self) -> None:
        """Raise `EmulatorError` if anything was written just before or behind an array."""
        self._binding.check_guards()

    def schedule(self, seed: int = 0, resident: int = 4) -> AbstractContextManager[None]:
        """Run blocks and threads in the order of `seed` (0: the natural one), `resident` blocks at a time."""
        return self._scheduled(replace(self._schedule, seed=seed, resident=resident))

    def only_blocks(self, blocks: Sequence[int]) -> AbstractContextManager[None]:
        """Run these blocks of every grid and no others; block (x, y, z) is x + gridDim.x (y + gridDim.y z)."""
        return self._scheduled(replace(self._schedule, only=tuple(blocks)))

    def rsqrt_error(self, relative: float) -> AbstractContextManager[None]:
        """Let the approximation of 1 / sqrt(x) be off by so much; `RSQRT_BOUND` is the most."""
        return self._scheduled(replace(self._schedule, rsqrt_error=relative))

    def counting_turns(self) -> AbstractContextManager[None]:
        """Count the turns of shared memory."""
        return self._scheduled(replace(self._schedule, count_turns=True))

    def tracing(self) -> AbstractContextManager[None]:
        """Record every access and every wait of a launch in the `events` of its record."""
        return self._scheduled(replace(self._schedule, trace=True))

    @contextmanager
    def device_limits(self, limits: Limits) -> Iterator[None]:
        """Be a device with these limits."""
        before, self._limits = self._limits, limits
        try:
            yield
        finally:
            self._limits = before

    @contextmanager
    def cut_grids(self, resident: int) -> Iterator[None]:
        """Be a device that holds so few blocks at once, and treat larger cooperative grids as CuPy does.

        It cuts a grid of one dimension and warns, and raises ValueError for one of two.
        """
        before, self._cut_to = self._cut_to, resident
        try:
            yield
        finally:
            self._cut_to = before

    # ---- memory -----------------------------------------------------------------------------------------------------

    def _granted(self, source: str, entry_point: str, launch: Launch) -> Launch:
        """Return a cooperative launch whose blocks are all resident at once, or raise."""
        if self._cut_to is not None and launch.blocks > self._cut_to:
            if launch.grid[1:] != (1, 1):
                raise ValueError(f"cooperative grid {launch.grid}: the device holds {self._cut_to} blocks")
            warnings.warn(f"cooperative grid {launch.grid} cut to {self._cut_to} blocks", stacklevel=3)
            return replace(launch, grid=(self._cut_to, 1, 1))
        promised = self._binding.promised(source, entry_point)
        held = occupancy.resident(self._limits, launch.threads, launch.shared_bytes, promised)
        if launch.blocks > held * self._limits.cooperative:
            raise EmulatorError(
                f"{source}.cu, {entry_point}: the blocks of a cooperative grid wait for one another, and of "
                f"{launch.blocks} this device holds {held} at once: {launch}, {self._limits}"
            )
        return launch

    @contextmanager
    def _scheduled(self, schedule: Schedule) -> Iterator[None]:
        before, self._schedule = self._schedule, schedule
        try:
            yield
        finally:
            self._schedule = before

    def _new(self, shape: tuple[int, ...], dtype: np.dtype, misalignment: int = 0) -> EmulatedArray:
        if self._captured is not None:
            raise EmulatorError(f"{_describe(shape, dtype)} is allocated in a capture")
        block = self._block(math.prod(shape) * dtype.itemsize, misalignment, _describe(shape, dtype))
        return EmulatedArray(shape, dtype, block)

    def _block(self, size: int, misalignment: int, name: str) -> ctypes.Array:
        return self._owned(self._binding.allocate(size, misalignment, name), size)

    def _owned(self, address: int, size: int) -> ctypes.Array:
        """Return the bytes at `address`, released with the last array that looks at them."""
        block = (ctypes.c_ubyte * size).from_address(address)
        weakref.finalize(block, self._binding.release, address).atexit = False
        return block

    def _protect(self, array: EmulatedArray) -> EmulatedArray:
        self._binding.set_read_only(array.ctypes.data)
        array.flags.writeable = False
        return array

    def _adopt(self, array: np.ndarray) -> None:
        """Let kernels touch what NumPy allocated, or DLPack brought, until NumPy lets go of it."""
        owner = array
        while isinstance(owner.base, np.ndarray):
            owner = owner.base
        if owner.base is not None and type(owner.base).__name__ != "PyCapsule":
            raise EmulatorError(f"expected an array in memory of the emulator or of NumPy, got one of {owner.base!r}")
        address = owner.ctypes.data
        self._binding.adopt(address, owner.nbytes, f"{_describe(owner.shape, owner.dtype)} of NumPy")
        weakref.finalize(owner, self._binding.release, address).atexit = False


def _describe(shape: tuple[int, ...], dtype: np.dtype) -> str:
    return f"a {dtype} array of shape {tuple(shape)}"


def from_environment() -> EmulatorRuntime:
    """Return the runtime that the variables BNKERNELS_EMULATOR* describe, known to the ops.

    BNKERNELS_EMULATOR_RSQRT is the relative error of the approximation of 1 / sqrt(x), in units of `RSQRT_BOUND`.
    """
    folder = Path(os.environ.get(CUDA_VARIABLE) or CUDA)
    schedule = Schedule(rsqrt_error=float(os.environ.get(RSQRT_VARIABLE) or 0) * RSQRT_BOUND)
    runtime = EmulatorRuntime(os.environ.get(BUILD_VARIABLE) or "plain", read_sources(folder), schedule)
    registry.register(runtime)
    return runtime
