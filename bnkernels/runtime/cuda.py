"""The CUDA runtime: kernels compiled and launched through CuPy. The only module that imports CuPy to compute."""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import Any, NamedTuple

import cupy
import numpy as np

from bnkernels.runtime.arguments import address_of
from bnkernels.runtime.seam import SHARED_BYTES, WORKSPACE_BYTES, Constant, Launch, Limits
from bnkernels.runtime.source import OPTIONS, read

CPointer = cupy.cuda.function.CPointer
Key = tuple[int, str, tuple[Constant, ...], bool]  # kernel: device, name, constants, opt-in to shared memory
LEGACY, PER_THREAD = 1, 2  # the handles of default streams, as 0 is: of a device, and of a thread


def available() -> str | None:
    """Return None where CUDA kernels can run, else the reason why they cannot."""
    if cupy.cuda.is_available():
        return None
    return "CuPy is installed, but no NVIDIA driver and GPU answer"


class _ForeignStream(NamedTuple):
    """Stream of another library, in the CUDA stream protocol."""

    pointer: int

    def __cuda_stream__(self) -> tuple[int, int]:
        """Return the version of the protocol and the handle."""
        return 0, self.pointer


@lru_cache(maxsize=256)  # a stream that stays the same object keeps its workspace
def _foreign(device: int, pointer: int) -> Any:
    return cupy.cuda.Stream.from_external(_ForeignStream(pointer))


@contextmanager
def on_stream(device: int, pointer: int) -> Iterator[None]:
    """Make a device current, and on it another library's stream, which is known by its handle."""
    with cupy.cuda.Device(device), _foreign(device, pointer):
        yield


class _Owner:
    """Owner of the workspaces of a thread's default streams."""


class Workspaces:
    """Zeroed memory for every stream that asks for it, and as long as the stream is there.

    One for a stream of a device: launches that run at once would share barrier counters. Those of the default
    streams belong to the calling thread, since neither their handles nor their objects tell the streams apart. Memory
    goes back to CuPy's pool, which gives it to later work of the same stream.
    """

    def __init__(self) -> None:
        self._memory: dict[tuple[int, int], Any] = {}  # by the id of the owner, and the device
        self._thread = threading.local()
        self._captured: dict[int, Any] = {}  # in graphs of the caller, whose end is unknown: kept

    def __len__(self) -> int:
        return len(self._memory)

    def current(self, device: int) -> Any:
        """Return the workspace of the current stream of the current device.

        Raises
        ------
        RuntimeError
            If the stream has none yet and is being captured: a graph would clear it at every replay.
        """
        of_graph = getattr(self._thread, "graph", None)
        if of_graph is not None:
            return of_graph
        stream = cupy.cuda.get_current_stream()
        owner = self._owner(stream)
        found = self._memory.get((id(owner), device))
        capturing = stream.ptr > LEGACY and stream.is_capturing()  # that one never is, and does not like to be asked
        if capturing and found is None:
            raise RuntimeError(
                "this launch needs a workspace that its stream does not have yet, and it cannot be made while "
                "a graph is captured: call the op once on this stream before the capture begins"
            )
        if capturing:
            self._captured[found.data.ptr] = found
        if found is None:
            key = id(owner), device
            weakref.finalize(owner, self._memory.pop, key, None).atexit = False
            found = self._memory.setdefault(key, cupy.zeros(WORKSPACE_BYTES, np.uint8))
        return found

    def _owner(self, stream: Any) -> Any:
        if stream.ptr > PER_THREAD:
            return stream
        if not hasattr(self._thread, "owner"):
            self._thread.owner = _Owner()
        return self._thread.owner

    def clear(self, device: int) -> None:
        """Zero the workspace of the current stream: after an error its counters are unknown."""
        key = id(self._owner(cupy.cuda.get_current_stream())), device
        try:
            if key in self._memory:
                self._memory[key].fill(0)
        except Exception:  # nor can the device clear it: the next launch asks for another
            self._memory.pop(key, None)

    @contextmanager
    def of_graph(self, memory: Any) -> Iterator[None]:
        """Give the launches of the calling thread `memory`: they are captured, and it belongs to their graph."""
        self._thread.graph = memory
        try:
            yield
        finally:
            del self._thread.graph


class CudaRuntime:
    """Launches on the device of the arrays, on its current stream; never synchronises."""

    array_type = cupy.ndarray
    xp = cupy

    def __init__(self) -> None:
        self._functions: dict[Key, Any] = {}
        self._resident: dict[tuple[Key, tuple[int, int, int], int], int] = {}  # blocks of a device, at most
        self._limits: dict[int, Limits] = {}
        self._workspaces = Workspaces()
        self._lock = threading.Lock()

    def empty(self, shape: tuple[int, ...], dtype: np.dtype, like: Any) -> Any:
        """Return a new array from CuPy's pool, on the device of `like`."""
        with like.device:
            return cupy.empty(shape, dtype)

    def contiguous(self, array: Any) -> Any:
        """Return a C-contiguous copy, made on the current stream of the array's device."""
        with array.device:
            return array.copy(order="C")

    def on_device(self, array: np.ndarray, like: Any) -> Any:
        """Return a copy of a host array, made on the current stream of the device of `like`."""
        with like.device:
            return cupy.asarray(array)

    def pointer(self, array: Any) -> int:
        """Return the array's address on its device."""
        return array.data.ptr

    def device(self, array: Any) -> int:
        """Return the number of the device that holds the array."""
        return array.data.device_id

    def limits(self, array: Any) -> Limits:
        """Return the limits of the array's device."""
        device = array.device
        found = self._limits.get(device.id)
        if found is None:
            given = device.attributes
            found = self._limits[device.id] = Limits(
                given["MultiProcessorCount"],
                given["MaxSharedMemoryPerBlockOptin"],
                given["MaxSharedMemoryPerMultiprocessor"],
                bool(given["CooperativeLaunch"]),
                int(device.compute_capability) >= 90,
                given["MaxThreadsPerMultiProcessor"],
                given["MaxBlocksPerMultiprocessor"],
                given["ReservedSharedMemoryPerBlock"],
                int(device.compute_capability) >= 80,
            )
        return found

    def workspace(self, array: Any) -> int:
        """Return the address of the workspace of the current stream on the array's device.

        Raises
        ------
        RuntimeError
            If the stream has none yet and is being captured: a graph would clear it at every replay.
        """
        with array.device as device:
            return self._workspaces.current(device.id).data.ptr

    def capture(self, work: Callable[[], None], like: Any) -> Callable[[], None]:
        """Return the launch of a CUDA graph of what `work` launches, with a workspace that is the graph's own."""
        with like.device as device:
            # From the stream that will repeat the graph: later owners of the memory then come after it.
            memory = cupy.zeros(WORKSPACE_BYTES, np.uint8)
            cupy.cuda.get_current_stream().synchronize()  # another one may
            stream = cupy.cuda.Stream(non_blocking=True)
            with stream, self._workspaces.of_graph(memory):
                stream.begin_capture()
                try:
                    work()
                except BaseException:
                    with suppress(Exception):  # it may be invalid, and the reason is what `work` says
                        stream.end_capture()
                    raise
                graph = stream.end_capture()

        def replay() -> None:  # holds the graph and its memory
            with device:
                try:
                    graph.launch()
                except Exception:
                    with suppress(Exception):
                        memory.fill(0)
                    raise

        return replay

    def launch(self, source: str, entry_point: str, launch: Launch, arguments: np.ndarray, like: Any) -> None:
        """Enqueue the kernel.

        Raises
        ------
        RuntimeError
            If blocks that wait for one another do not all fit the device; nothing was launched.
        """
        with like.device as device:
            key = device.id, entry_point, launch.constants, launch.shared_bytes > SHARED_BYTES
            function = self._functions.get(key) or self._compiled(key, source, like)
            if launch.cooperative:
                self._check_that_blocks_fit(key, function, launch, like)
            # The driver copies the argument. An array in its place would make CuPy describe its type every time.
            argument = CPointer(address_of(arguments))
            try:
                function(
                    launch.grid,
                    launch.block,
                    (argument,),
                    launch.shared_bytes,
                    enable_cooperative_groups=launch.cooperative,
                )
            except Exception:
                self._workspaces.clear(device.id)
                raise

    def _compiled(self, key: Key, source: str, like: Any) -> Any:
        _, entry_point, constants, much_shared = key
        shared_bytes = self.limits(like).shared_bytes
        with self._lock:
            function = self._functions.get(key)
            if function is None:
                code = read(source, entry_point, constants)
                kernel = cupy.RawModule(code=code, options=OPTIONS).get_function(entry_point)
                if much_shared:
                    kernel.max_dynamic_shared_size_bytes = shared_bytes
                    kernel.preferred_shared_memory_carveout = 100  # percent: what is left is the L1 cache
                function = self._functions[key] = kernel.kernel
            return function

    def _check_that_blocks_fit(self, key: Key, function: Any, launch: Launch, like: Any) -> None:
        """Raise unless all blocks are resident at once: CuPy would launch fewer, which wait for the others for ever."""
        asked = key, launch.block, launch.shared_bytes
        fit = self._resident.get(asked)
        if fit is None:
            like.device.use()  # current it is, but the driver answers only a thread that has its context
            ask = cupy.cuda.driver.occupancyMaxActiveBlocksPerMultiprocessor
            of_sm = ask(function.ptr, math.prod(launch.block), launch.shared_bytes)
            fit = self._resident[asked] = of_sm * self.limits(like).sms
        if math.prod(launch.grid) > fit:
            raise RuntimeError(
                f"the blocks of {key[1]} wait for one another, and the device holds {fit} at once of the "
                f"{math.prod(launch.grid)} that its launch has (grid {launch.grid}, block {launch.block}, "
                f"{launch.shared_bytes} bytes of shared memory): nothing was launched; run it on another device or on "
                "NumPy arrays, and report it with what `bnkernels info` prints"
            )
