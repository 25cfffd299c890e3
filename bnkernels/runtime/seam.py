"""The one interface between the ops and the kernels, which run on CUDA through CuPy or on the CPU emulator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np

MAX_THREADS = 1024
MAX_GRID = (2**31 - 1, 65535, 65535)
MAX_SHARED_BYTES = 227 * 1024  # the most that any device grants a block
WORKSPACE_BYTES = 2**20  # per stream
SHARED_BYTES = 48 * 1024  # per block; granted by every supported device without opt-in


Constant = tuple[str, int | tuple[int, ...]]  # name and value of a member of a kernel's argument


@dataclass(frozen=True)
class Launch:
    """Grid, block (in threads) and dynamic shared memory (in bytes) of one kernel launch.

    The blocks of a cooperative launch are all resident at once, so they may wait for one another. `constants` are
    members of the kernel's argument, by name, that are known when it is compiled: a hint, the argument has them too.
    Several numbers are what a pointer to integers of 32 bits points to.
    """

    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int = 0
    cooperative: bool = False
    constants: tuple[Constant, ...] = field(default=(), repr=False)

    @property
    def blocks(self) -> int:
        """The blocks of the grid."""
        return self.grid[0] * self.grid[1] * self.grid[2]

    @property
    def threads(self) -> int:
        """The threads of a block."""
        return self.block[0] * self.block[1] * self.block[2]

    def __post_init__(self) -> None:
        """Refuse what no device accepts, so that a wrong plan fails where it was made."""
        if min(self.grid) < 1 or min(self.block) < 1:
            raise ValueError(
                f"a launch needs at least one block and one thread, got grid {self.grid}, block {self.block}"
            )
        if self.threads > MAX_THREADS:
            raise ValueError(f"a block holds at most {MAX_THREADS} threads, got {self.block} = {self.threads}")
        if any(got > most for got, most in zip(self.grid, MAX_GRID, strict=True)):
            raise ValueError(f"a grid is at most {MAX_GRID}, got {self.grid}")
        if not 0 <= self.shared_bytes <= MAX_SHARED_BYTES:
            raise ValueError(f"a block gets at most {MAX_SHARED_BYTES} bytes of shared memory, got {self.shared_bytes}")


class LaunchPlan(NamedTuple):
    """Kernel, launch, layout of the argument, and the members of the argument that the choice of the launch decides.

    Attributes
    ----------
    source : str
        Name of the file in ``cuda/``, without its suffix.
    kernel : str
        Name of the entry point.
    launch : Launch
        Launch of the kernel.
    arguments : numpy.dtype
        Layout of its argument.
    splits : int
        Number of blocks that share a slice, a matrix or a network; above 1 they exchange partial results, and wait for
        one another or leave the sum to the last.
    width : int
        Number of columns of a matrix product that a block owns at a time.
    held : int
        Number of 16-byte vectors that a thread keeps on the chip, of every array.
    stages : int
        Number of places on the chip for what a thread keeps: with two, the next comes while one is worked on.
    at_once : int
        Number of rows of a long-row kernel for which blocks wait for one another once.
    kept : int
        Number of arrays of parameters of which a block keeps its own on the chip for all steps of a launch.
    """

    source: str
    kernel: str
    launch: Launch
    arguments: np.dtype
    splits: int = 1
    width: int = 0
    held: int = 0
    stages: int = 1
    at_once: int = 1
    kept: int = 0


class Limits(NamedTuple):
    """Limits of a device, for launch choices. The defaults are what every supported device grants."""

    sms: int
    shared_bytes: int  # most per block; above `SHARED_BYTES` a kernel opts in
    shared_bytes_of_sm: int
    cooperative: bool  # whether the blocks of a launch may wait for one another
    clusters: bool = False  # whether blocks may be launched in clusters
    threads_of_sm: int = 1024
    blocks_of_sm: int = 16
    reserved_bytes: int = 1024  # shared memory that each block costs beside its own
    tf32: bool = False  # whether tensor cores multiply TF32 numbers


class Runtime(Protocol):
    """Interface of a device: memory, addresses, and launches.

    Its arrays have the attributes of CuPy's that `ReplayCache` reads: ``data.ptr``, ``data.device_id``, `dtype`,
    `shape` and `strides`.
    """

    array_type: type
    xp: Any  # the array module (`cupy`, or `numpy` for the emulator)

    def empty(self, shape: tuple[int, ...], dtype: np.dtype, like: Any) -> Any:
        """Return a new C-contiguous array on the device of the array `like`."""

    def contiguous(self, array: Any) -> Any:
        """Return a C-contiguous copy on the device of the array."""

    def on_device(self, array: np.ndarray, like: Any) -> Any:
        """Return a copy of a host array on the device of the array `like`."""

    def pointer(self, array: Any) -> int:
        """Return the address of the array's first element."""

    def device(self, array: Any) -> int:
        """Return the number of the device that holds the array."""

    def limits(self, array: Any) -> Limits:
        """Return the limits of the device that holds the array."""

    def workspace(self, array: Any) -> int:
        """Return the address of `WORKSPACE_BYTES` on the device of the array, for its current stream's next launch.

        It was zeroed once; the next launch finds what a launch leaves there. After a launch that failed it is zeroed
        anew.
        """

    def capture(self, work: Callable[[], None], like: Any) -> Callable[[], None]:
        """Return a callable that repeats the launches that `work` makes, on the current stream; nothing runs yet.

        `work` has run before, so that all kernels are compiled. It must neither allocate nor synchronise, and every
        repetition gets the same addresses and scalars. A repetition goes to the device of `like`, whatever the current
        one is.
        """

    def launch(self, source: str, entry_point: str, launch: Launch, arguments: np.ndarray, like: Any) -> None:
        """Enqueue `entry_point` of ``cuda/<source>.cu`` on the current stream of the device of `like`.

        `arguments` is what `pack` made: a structured array laid out as the kernel's one argument, a struct by value.
        It is read before this returns.
        """


def ceil_div(a: int, b: int) -> int:
    """Return a / b, rounded up."""
    return -(-a // b)
