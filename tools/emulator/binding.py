"""The engine's C functions, and the kernels of one build, as Python sees them."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from ctypes import POINTER, c_bool, c_char_p, c_double, c_int, c_size_t, c_uint, c_uint64, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from bnkernels.runtime.seam import Launch

from .build import BUILDS, EmulatorError, engine_library, kernel_library
from .sanitizers import Reports


class _Index(ctypes.Structure):
    _fields_ = [(axis, c_uint) for axis in "xyz"]


class _Request(ctypes.Structure):  # engine/scheduler.h: Request
    _fields_ = [
        ("kernel", c_void_p),
        ("arguments", c_void_p),
        ("argument_bytes", c_uint64),
        ("grid", _Index),
        ("block", _Index),
        ("shared_bytes", c_uint64),
        ("seed", c_uint64),
        ("resident", c_uint64),
        ("cooperative", c_uint64),
        ("count_turns", c_uint64),
        ("trace", c_uint64),
        ("rsqrt_error", c_double),
        ("cluster", c_uint64),
        ("only", POINTER(c_uint64)),
        ("only_count", c_uint64),
    ]


class _Totals(ctypes.Structure):  # engine/scheduler.h: Totals
    _fields_ = [
        (name, c_uint64)
        for name in (
            "shared_bytes_read",
            "shared_bytes_written",
            "shared_turns",
            "fewest_shared_turns",
            "barriers",
            "error_address",
        )
    ]


class _Traffic(ctypes.Structure):  # engine/memory.h: Traffic
    _fields_ = [
        (name, c_uint64)
        for name in (
            "address",
            "bytes",
            "reads",
            "writes",
            "bytes_read",
            "bytes_written",
            "unique_bytes_read",
            "unique_bytes_written",
            "vector_accesses",
        )
    ]


# One access or wait (engine/trace.h: Event); `kind` is an index of `KINDS`.
EVENT = np.dtype([("address", "u8"), *((name, "u4") for name in ("bytes", "kind", "block", "thread"))])
KINDS = ("read", "write", "barrier", "wait")


@dataclass(frozen=True)
class Traffic:
    """Global-memory traffic of a launch, in one array or in all.

    `reads` and `writes` count accesses, `vector_accesses` those of 16 bytes among them. A byte that is read twice
    counts twice in `bytes_read` and once in `unique_bytes_read`: where both are equal, everything was read once.
    """

    reads: int = 0
    writes: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    unique_bytes_read: int = 0
    unique_bytes_written: int = 0
    vector_accesses: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        """Return the traffic of both."""
        return Traffic(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class Counts:
    """Counts of a launch: traffic by the address range of each array, shared memory, barriers.

    Only the builds ``plain`` and ``coverage`` see accesses. `barriers` is the most that one block passed. In a
    schedule with `count_turns`, `shared_turns` is how many 128 bytes shared memory serves one after the other, and
    `fewest_shared_turns` how many these would be without bank conflicts.
    """

    arrays: Mapping[range, Traffic]
    shared_bytes_read: int
    shared_bytes_written: int
    shared_turns: int
    fewest_shared_turns: int
    barriers: int

    @property
    def total(self) -> Traffic:
        """The traffic of all arrays."""
        return sum(self.arrays.values(), Traffic())

    def of(self, array: np.ndarray) -> Traffic:
        """Return the traffic of the array that `array` is, or is a view of."""
        address = array.ctypes.data
        return next((traffic for block, traffic in self.arrays.items() if address in block), Traffic())


RSQRT_BOUND = 2.0**-22.9  # PTX ISA, rsqrt.approx


@dataclass(frozen=True)
class Schedule:
    """Choices that the hardware is free to make in a launch: above all the order of blocks and threads.

    Seed 0 is their natural order, any other a reproducible disorder; `resident` blocks are in flight at once; `only`
    names the blocks to run, by their number x + gridDim.x (y + gridDim.y z). `rsqrt_error` is the relative error of
    the hardware's approximation of 1 / sqrt(x), of which PTX promises only that it is at most `RSQRT_BOUND`.
    `count_turns`: whether to count bank conflicts of shared memory, which takes time; `trace`: whether to record every
    access and every wait.
    """

    seed: int = 0
    resident: int = 4
    only: Sequence[int] = ()
    rsqrt_error: float = 0.0
    count_turns: bool = False
    trace: bool = False

    def __post_init__(self) -> None:
        """Refuse what the engine cannot follow."""
        if self.seed < 0 or self.resident < 1 or min(self.only, default=0) < 0 or abs(self.rsqrt_error) > RSQRT_BOUND:
            raise EmulatorError(
                f"expected seed >= 0, resident >= 1, blocks >= 0 and |rsqrt_error| <= {RSQRT_BOUND}, got {self}"
            )


class Binding:
    """One build of the engine and of the kernels in `sources`."""

    def __init__(self, build: str, sources: Mapping[str, str]) -> None:
        if build not in BUILDS:
            raise EmulatorError(f"expected a build among {sorted(BUILDS)}, got {build!r}")
        sanitizer = BUILDS[build].sanitizer
        if sanitizer and not hasattr(ctypes.CDLL(None), f"__{sanitizer}_init"):
            raise EmulatorError(
                f"the build {build!r} needs the sanitizer in the process from its start; "
                f"run: python -m tools.emulator run {build} -- [pytest's arguments]"
            )
        self.build = build
        self._sources = dict(sources)
        self._libraries: dict[str, ctypes.CDLL] = {}
        self._reports = Reports()
        # PyDLL keeps the interpreter's lock: the engine has one thread, and so has a launch.
        self._engine = ctypes.PyDLL(str(engine_library(build)))
        for name, result, arguments in (
            ("allocate", c_size_t, [c_size_t, c_size_t, c_char_p]),
            ("reserve", c_size_t, [c_size_t, c_char_p]),
            ("adopt", None, [c_size_t, c_size_t, c_char_p]),
            ("release", None, [c_size_t]),
            ("set_read_only", None, [c_size_t]),
            ("holds", c_bool, [c_size_t]),
            ("broken_guard", c_char_p, []),
            ("traffic", c_bool, [c_size_t, POINTER(_Traffic)]),
            ("events", c_void_p, [POINTER(c_uint64)]),
            ("launch", c_char_p, [POINTER(_Request), POINTER(_Totals)]),
        ):
            function = self._engine[f"bnk_{name}"]
            function.restype, function.argtypes = result, arguments
            setattr(self, f"_{name}", function)

    def allocate(self, size: int, misalignment: int, name: str) -> int:
        """Return the address of `size` poisoned bytes, `misalignment` bytes behind an aligned address."""
        address = self._allocate(size, misalignment, name.encode())
        if not address:
            raise MemoryError(f"no memory for {size} bytes: {name}")
        return address

    def reserve(self, size: int, name: str) -> int:
        """Return the address of `size` zero bytes that take memory only where they are touched."""
        address = self._reserve(size, name.encode())
        if not address:
            raise MemoryError(f"the system refuses to reserve {size} bytes of address space: {name}")
        return address

    def adopt(self, address: int, size: int, name: str) -> None:
        """Let kernels touch memory that the engine did not allocate."""
        self._adopt(address, size, name.encode())

    def release(self, address: int) -> None:
        """Free or forget the array at `address`."""
        self._release(address)

    def set_read_only(self, address: int) -> None:
        """Make a kernel's write to the array that holds `address` an error."""
        self._set_read_only(address)

    def holds(self, address: int) -> bool:
        """Tell whether `address` lies in an array that the engine knows."""
        return self._holds(address)

    def check_guards(self) -> None:
        """Raise if memory around an array was written to."""
        broken = self._broken_guard()
        if broken is not None:
            raise EmulatorError(f"the guard band was overwritten {broken.decode()}")

    def launch(
        self, source: str, entry_point: str, launch: Launch, arguments: np.ndarray, schedule: Schedule
    ) -> Counts:
        """Run a kernel and return what it did; raise what it did wrong."""
        for name, value in launch.constants:
            given = arguments[name]
            if isinstance(value, tuple):
                given = tuple((c_int * len(value)).from_address(int(given)))
            if given != value:
                raise EmulatorError(f"{entry_point}: the kernel is compiled for {name} = {value}, it is given {given}")
        library = self._library(source)
        kernel, cluster = self._kernel(library, source, entry_point, launch, arguments)
        if max(schedule.only, default=0) >= launch.blocks:
            raise EmulatorError(
                f"expected blocks below {launch.blocks}, the size of the grid {launch.grid}, got {schedule}"
            )
        only = (c_uint64 * len(schedule.only))(*schedule.only)
        request = _Request(
            kernel=ctypes.cast(kernel, c_void_p),
            arguments=arguments.ctypes.data,
            argument_bytes=arguments.nbytes,
            grid=_Index(*launch.grid),
            block=_Index(*launch.block),
            shared_bytes=launch.shared_bytes,
            seed=schedule.seed,
            resident=schedule.resident,
            cooperative=launch.cooperative,
            count_turns=schedule.count_turns,
            trace=schedule.trace,
            rsqrt_error=schedule.rsqrt_error,
            cluster=cluster,
            only=only,
            only_count=len(only),
        )
        totals = _Totals()
        error = self._launch(request, totals)
        if error is not None:
            place = _source_line(library._name, totals.error_address)
            raise EmulatorError(f"{source}.cu, {entry_point}: {error.decode()}{place}")
        if reports := self._reports.new():
            raise EmulatorError(f"{source}.cu, {entry_point}: {reports}")
        figures = [getattr(totals, name) for name, _ in _Totals._fields_[:-1]]
        return Counts(self._array_traffic(), *figures)

    def events(self) -> np.ndarray:
        """Return the events of the last launch, in order, of the type `EVENT`; none if it was not traced."""
        count = c_uint64()
        address = self._events(count)
        return np.frombuffer(ctypes.string_at(address, count.value * EVENT.itemsize), EVENT)

    def promised(self, source: str, entry_point: str) -> int:
        """Return how many blocks the registers of a multiprocessor hold, as far as the launch bounds promise it."""
        return _fact(self._library(source), source, entry_point, "min_blocks")

    def argument_bytes(self, source: str, entry_point: str) -> int:
        """Return the size of a kernel's argument struct, in bytes."""
        return _fact(self._library(source), source, entry_point, "argument_bytes")

    def _library(self, source: str) -> ctypes.CDLL:
        if source not in self._libraries:
            self._libraries[source] = ctypes.PyDLL(str(kernel_library(self.build, source, self._sources)))
        return self._libraries[source]

    def _kernel(
        self, library: ctypes.CDLL, source: str, entry_point: str, launch: Launch, arguments: np.ndarray
    ) -> tuple[ctypes._CFuncPtr, int]:
        """Return entry point and blocks of a cluster, after what a driver would check and what it would not."""
        argument_bytes, most_threads, cluster = (
            _fact(library, source, entry_point, name) for name in ("argument_bytes", "max_threads", "cluster")
        )
        if arguments.nbytes != argument_bytes:
            raise EmulatorError(
                f"{source}.cu, {entry_point}: the argument is a struct of {argument_bytes} bytes, "
                f"got a record of {arguments.nbytes}: {arguments.dtype}"
            )
        threads = launch.threads
        if threads > most_threads:
            raise EmulatorError(
                f"{source}.cu, {entry_point}: launch bounds allow {most_threads} threads a block, got {threads}"
            )
        if launch.grid[0] % cluster:
            raise EmulatorError(
                f"{source}.cu, {entry_point}: a grid of clusters is a multiple of {cluster} blocks, got {launch.grid}"
            )
        return library[entry_point], cluster

    def _array_traffic(self) -> dict[range, Traffic]:
        arrays, record, address = {}, _Traffic(), 0
        while self._traffic(address, record):
            values = [getattr(record, name) for name in Traffic.__dataclass_fields__]
            arrays[range(record.address, record.address + record.bytes)] = Traffic(*values)
            address = record.address + 1
        return arrays


def _fact(library: ctypes.CDLL, source: str, entry_point: str, name: str) -> int:
    """Return what a kernel's macro has said of it: see cuda_on_cpu.h."""
    if not hasattr(library, entry_point):
        raise EmulatorError(f"{source}.cu has no kernel {entry_point}")
    fact = library[f"{entry_point}_{name}"]
    fact.restype = c_uint64
    return fact()


@cache
def _symbolizer() -> str | None:
    return shutil.which("addr2line")


def _source_line(library: str, address: int) -> str:
    """Return where in the kernel's text the instruction before `address` comes from, as far as that can be told."""
    if not address or _symbolizer() is None:
        return ""
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(library)]
    if not maps:
        return ""
    base = int(maps[0][0].split("-")[0], 16)
    lines = subprocess.run(
        [_symbolizer(), "-e", library, hex(address - 1 - base)], capture_output=True, text=True
    ).stdout.split()
    return f", at {lines[0].removeprefix('./')}" if lines else ""
