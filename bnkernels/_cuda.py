"""The CUDA runtime: kernels compiled and launched through CuPy. The only module that imports CuPy to compute."""

from __future__ import annotations

import threading
from typing import Any

import cupy
import numpy as np

from bnkernels import _source
from bnkernels._runtime import Launch, cupy_reader


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
        self._kernels: dict[tuple[int, str], Any] = {}
        self._modules: dict[tuple[int, str], Any] = {}
        self._lock = threading.Lock()

    def empty(self, shape: tuple[int, ...], dtype: np.dtype, like: Any) -> Any:
        """Return a new array from CuPy's pool, on the device of `like`."""
        with like.device:
            return cupy.empty(shape, dtype)

    def contiguous(self, array: Any) -> Any:
        """Return a C-contiguous copy, made on the current stream of the array's device."""
        with array.device:
            return array.copy(order="C")

    def pointer(self, array: Any) -> int:
        """Return the array's address on its device."""
        return array.data.ptr

    def device(self, array: Any) -> int:
        """Return the number of the device that holds the array."""
        return array.data.device_id

    reader = cupy_reader

    def launch(self, source: str, entry_point: str, launch: Launch, arguments: np.ndarray, like: Any) -> None:
        """Enqueue the kernel; a NumPy array of one structured element is passed by value."""
        with like.device as device:
            kernel = self._kernels.get((device.id, entry_point)) or self._compiled(device.id, source, entry_point)
            kernel(launch.grid, launch.block, (arguments,), shared_mem=launch.shared_bytes)

    def _compiled(self, device: int, source: str, entry_point: str) -> Any:
        with self._lock:
            module = self._modules.get((device, source))
            if module is None:
                module = cupy.RawModule(code=_source.read(source), options=_source.OPTIONS)
                self._modules[device, source] = module
            return self._kernels.setdefault((device, entry_point), module.get_function(entry_point))
