"""The CUDA runtime: kernels compiled and launched through CuPy. The only module that imports CuPy to compute."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import cupy
import numpy as np

from bnkernels import _source
from bnkernels._runtime import WORKSPACE_BYTES, Launch, Limits, cupy_reader

Constants = tuple[tuple[str, int], ...]  # of a launch
PER_THREAD = 2  # the handle of the default stream that every thread has its own of


def available() -> str | None:
    """Return None where CUDA kernels can run, else the reason why they cannot."""
    if cupy.cuda.is_available():
        return None
    return "CuPy is installed, but no NVIDIA driver and GPU answer"


class CudaRuntime:
    """Launches on the device of the arrays, on its current stream; never synchronises."""

    array_type = cupy.ndarray
    xp = cupy

    def __init__(self) -> None:
        self._kernels: dict[tuple[int, str, Constants], Any] = {}
        self._limits: dict[int, Limits] = {}
        self._workspaces: dict[tuple[int, int], Any] = {}
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

    reader = cupy_reader

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
            stream = cupy.cuda.get_current_stream()
            key = device.id, stream.ptr, threading.get_ident() if stream.ptr == PER_THREAD else 0
            found = self._workspaces.get(key)
            if found is None:
                if stream.ptr and stream.is_capturing():  # the null stream never is, and does not like to be asked
                    raise RuntimeError(
                        "this launch needs a workspace that its stream does not have yet, and it cannot be made while "
                        "a graph is captured: call the op once on this stream before the capture begins"
                    )
                # With the stream, so that no other one gets its handle.
                found = self._workspaces.setdefault(key, (cupy.zeros(WORKSPACE_BYTES, np.uint8), stream))
        return found[0].data.ptr

    def capture(self, work: Callable[[], None], like: Any) -> Callable[[], None]:
        """Return the launch of a CUDA graph of what `work` launches."""
        with like.device:
            stream = cupy.cuda.Stream(non_blocking=True)
            with stream:
                self.workspace(like)  # it could not be made meanwhile, and is the graph's own
                stream.synchronize()
                stream.begin_capture()
                try:
                    work()
                finally:
                    graph = stream.end_capture()
        return graph.launch

    def launch(self, source: str, entry_point: str, launch: Launch, arguments: np.ndarray, like: Any) -> None:
        """Enqueue the kernel; a NumPy array of one structured element is passed by value."""
        with like.device as device:
            kernel = self._kernels.get((device.id, entry_point, launch.constants)) or self._compiled(
                device.id, source, entry_point, launch.constants
            )
            if launch.cooperative:
                function = kernel.kernel  # RawKernel's own call would need a module compiled for cooperative groups
                function(launch.grid, launch.block, (arguments,), launch.shared_bytes, enable_cooperative_groups=True)
            else:
                kernel(launch.grid, launch.block, (arguments,), shared_mem=launch.shared_bytes)

    def _compiled(self, device: int, source: str, entry_point: str, constants: Constants) -> Any:
        with self._lock:
            kernel = self._kernels.get((device, entry_point, constants))
            if kernel is None:
                code = _source.read(source, entry_point, constants)
                kernel = cupy.RawModule(code=code, options=_source.OPTIONS).get_function(entry_point)
                if device in self._limits:  # which every launch with more shared memory than usual has asked for
                    kernel.max_dynamic_shared_size_bytes = self._limits[device].shared_bytes
                self._kernels[device, entry_point, constants] = kernel
            return kernel
