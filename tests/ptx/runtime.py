"""Arrays on which the ops launch kernels from their PTX, and the runtime that does so."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from benchmarks.counts.devices import H200
from bnkernels.runtime import registry, seam
from bnkernels.runtime.seam import Launch, Limits
from bnkernels.runtime.source import read
from tools.compile import nvrtc

from .counts import Counts
from .machine import run
from .memory import GlobalMemory
from .parse import Kernel, PtxError, parse

ARCHITECTURE = 90


class PtxArray(np.ndarray):
    """An array that the ops treat as a device array: its type is what they dispatch on."""


@dataclass(frozen=True)
class PtxRecord:
    """One launch and the instructions that it executed."""

    entry_point: str
    launch: Launch
    counts: Counts


@cache
def compiled(source: str, entry_point: str, constants: tuple[tuple[str, int], ...] = ()) -> Kernel:
    """Return a kernel as the newest NVRTC compiles it."""
    return parse(nvrtc.ptx(read(source, entry_point, constants), ARCHITECTURE))[entry_point]


class PtxRuntime(seam.Runtime):
    """Runs the PTX that NVRTC makes of ``cuda/``, behind `bnkernels.runtime.seam`.

    Only float32 kernels are supported: those of the other types contain instructions that are not.

    Parameters
    ----------
    limits : Limits
        Of the device that launches are planned for. Default: those of an H200.

    Attributes
    ----------
    launches : list of PtxRecord
        What ran since the last `reset`.
    """

    array_type = PtxArray
    xp = np

    def __init__(self, limits: Limits = H200.choice) -> None:
        self._memory = GlobalMemory()
        self._limits = limits
        self._workspace: PtxArray | None = None
        self.launches: list[PtxRecord] = []

    def empty(self, shape: tuple[int, ...], dtype: np.dtype, like: Any = None) -> PtxArray:
        """Return a new C-contiguous array, poisoned: NaN, or -1."""
        array = np.empty(shape, dtype).view(PtxArray)
        array.reshape(-1).view(np.uint8)[...] = 0xFF
        return array

    def asarray(self, array: Any) -> PtxArray:
        """Return a C-contiguous copy."""
        return np.array(array, order="C", subok=False).view(PtxArray)

    def contiguous(self, array: PtxArray) -> PtxArray:
        """Return a C-contiguous copy."""
        return self.asarray(array)

    def on_device(self, array: np.ndarray, like: Any) -> PtxArray:
        """Return a copy that kernels can read."""
        return self.asarray(array)

    def pointer(self, array: PtxArray) -> int:
        """Return the address of the array's first element, and let kernels touch its memory until NumPy frees it."""
        owner: Any = array
        while isinstance(owner.base, np.ndarray):
            owner = owner.base
        address = owner.ctypes.data
        if owner.nbytes and not self._memory.holds(address):
            self._memory.allow(address, owner.nbytes)
            weakref.finalize(owner, self._memory.forbid, address).atexit = False
        return array.ctypes.data

    def device(self, array: PtxArray) -> int:
        """Return 0: there is one device."""
        return 0

    def limits(self, array: PtxArray) -> Limits:
        """Return the limits of the device."""
        return self._limits

    def workspace(self, array: PtxArray) -> int:
        """Return the address of the memory that launches share."""
        if self._workspace is None:
            self._workspace = self.asarray(np.zeros(seam.WORKSPACE_BYTES, np.uint8))
        return self.pointer(self._workspace)

    def capture(self, work: Callable[[], None], like: Any) -> Callable[[], None]:
        """Refuse: it is not supported."""
        raise PtxError("captures are not supported; launch the work instead")

    def launch(self, source: str, entry_point: str, launch: Launch, arguments: np.ndarray, like: Any = None) -> None:
        """Run a kernel to its end, and add to `launches` what it did.

        Raises
        ------
        PtxError
            For an instruction that is not supported, and for what a GPU would not forgive.
        """
        counts = run(compiled(source, entry_point, launch.constants), launch, arguments.tobytes(), self._memory)
        self.launches.append(PtxRecord(entry_point, launch, counts))

    def holds(self, address: int) -> bool:
        """Tell whether kernels may touch `address` now."""
        return self._memory.holds(address)

    def reset(self) -> None:
        """Forget the launches so far."""
        self.launches.clear()


@cache
def registered() -> PtxRuntime:
    """Return the one runtime of this process, known to the ops."""
    runtime = PtxRuntime()
    registry.register(runtime)
    return runtime
