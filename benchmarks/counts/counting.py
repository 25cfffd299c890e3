"""Counts what a call of a case does, launch by launch, on the emulator: bytes, barriers, and how it is launched.

It needs g++ and no GPU. Of shapes that would take the emulator too long, part of the channels is counted, if the launch
proves that the rest does the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

import bnkernels as bn
from benchmarks.counts.devices import H200
from benchmarks.harness.case import Arrays, Call, Case, NotSupportedError, native_dtype
from benchmarks.ops import bench_batch_norm
from bnkernels.ops.batch_norm.launch import NAMES, VECTOR
from bnkernels.runtime import registry, seam
from bnkernels.runtime.seam import Launch, Limits
from tools.backends import emulated_runtime
from tools.emulator import LaunchRecord

WHOLE = 2**22  # numbers of a case that is counted as a whole, though some of its slices may do
DEVICE = H200  # that the launches are planned for
ONE = np.ones((), np.float32)


class Count(NamedTuple):
    """Counts of one launch: bytes by every access, each byte counted once, and of the large arrays alone."""

    source: str
    kernel: str
    launch: Launch
    barriers: int
    read: int
    written: int
    accessed_read: int
    accessed_written: int
    data_read: int  # by every access, from arrays as large as the data
    data_written: int


# ---- the cases ------------------------------------------------------------------------------------------------------

EXTRA = [
    *(
        Case("batch_norm_inference", direction, shape)
        for shape in [(64, 20), (256, 1024), (8192, 1024)]
        for direction in ("forward", "backward")
    ),
    *(Case("softmax_cross_entropy", "", shape) for shape in [(64, 10), (256, 1000)]),
    *(Case(f"{rule}_update", "", (size,)) for size in (1568, 1_000_000) for rule in ("sgd", "momentum", "adam")),
]
CASES = [*bench_batch_norm.CASES, *EXTRA]
# Arrays that an update reads. It writes all of them but the gradients.
UPDATES = {"sgd": 2, "momentum": 3, "adam": 4}


def fewest_bytes(case: Case) -> int:
    """Return the fewest bytes of the data that the case has to read and write."""
    data = case.size * case.itemsize
    if case.op == "batch_norm":
        return bench_batch_norm.bytes_moved(case)
    if case.op == "batch_norm_inference":
        return (2 if case.direction == "forward" else 3) * data
    if case.op == "softmax_cross_entropy":
        return 2 * data + case.shape[0] * (np.dtype(np.int64).itemsize + case.itemsize)  # labels in, losses out
    arrays = UPDATES[case.op.removesuffix("_update")]
    return (2 * arrays - 1) * data


def prepare(case: Case, asarray: Callable[[Any], Any]) -> Call:
    """Return the call of a case on arrays that `asarray` makes; their values do not matter."""
    if case.op == "batch_norm":
        return bench_batch_norm.ours(case, arrays_of(case, asarray))
    if case.op == "batch_norm_inference":
        x, dy = (asarray(np.broadcast_to(ONE, case.shape)) for _ in range(2))
        vectors = [asarray(np.broadcast_to(ONE, case.shape[1:])) for _ in range(4)]
        if case.direction == "forward":
            return lambda: (bn.batch_norm_inference(x, *vectors),)
        return lambda: bn.batch_norm_inference_backward(dy, x, *vectors)
    if case.op == "softmax_cross_entropy":
        logits, labels = (
            asarray(np.broadcast_to(*given)) for given in [(ONE, case.shape), (np.int64(0), case.shape[0])]
        )
        return lambda: bn.softmax_cross_entropy(logits, labels)
    rule = case.op.removesuffix("_update")
    arrays = [asarray(np.broadcast_to(ONE, case.shape)) for _ in range(UPDATES[rule])]
    step = {"step": 1} if rule == "adam" else {}
    return lambda: getattr(bn, case.op)(*arrays, lr=0.1, **step)


def arrays_of(case: Case, asarray: Callable[[Any], Any]) -> Arrays:
    """Return the arrays of a batch-norm case, in its data types and its layout in memory."""
    data, vectors = native_dtype(case.dtype), np.dtype(case.accumulator)
    shapes = bench_batch_norm.input_shapes(case)
    return {
        name: asarray(np.broadcast_to(ONE.astype(data if len(shape) > 1 else vectors), shape))
        for name, shape in shapes.items()
    }


# ---- counting -------------------------------------------------------------------------------------------------------


class Planned(np.ndarray):
    """An array that the ops plan for; nothing runs on it, and its memory is never touched."""

    data = property(lambda self: SimpleNamespace(ptr=self.ctypes.data, device_id=0))


class Planner(seam.Runtime):
    """A runtime behind `bnkernels.runtime.seam` that notes the launches and makes none."""

    array_type = Planned
    xp = np

    def __init__(self) -> None:
        self.launches: list[tuple[str, str, Launch]] = []

    def asarray(self, array: np.ndarray) -> Planned:
        """Return an array of the same shape and data type."""
        return self.empty(array.shape, array.dtype)

    def empty(self, shape: tuple[int, ...], dtype: np.dtype, like: Any = None) -> Planned:
        """Return a new array."""
        return np.empty(shape, dtype).view(Planned)

    def on_device(self, array: np.ndarray, like: Any) -> Planned:
        """Return an array of the same shape and data type."""
        return self.empty(array.shape, array.dtype)

    def pointer(self, array: Planned) -> int:
        """Return the address of the array's first element."""
        return array.ctypes.data

    def device(self, array: Planned) -> int:
        """Return 0: there is one."""
        return 0

    def limits(self, array: Planned) -> Limits:
        """Return the limits of the device that the launches are planned for."""
        return DEVICE.choice

    def workspace(self, array: Planned) -> int:
        """Return an address: nothing is there."""
        return 16

    def launch(self, source: str, entry_point: str, launch: Launch, arguments: np.ndarray, like: Any = None) -> None:
        """Note the launch."""
        self.launches.append((source, entry_point, launch))


@lru_cache(maxsize=1)
def planner() -> Planner:
    """Return the one planner, known to the ops."""
    new = Planner()
    registry.register(new)
    return new


def planned(case: Case) -> list[tuple[str, str, Launch]]:
    """Return source, kernel and launch of everything that a call of the case launches; any size takes no time."""
    call = prepare(case, planner().asarray)
    planner().launches.clear()
    call()
    return list(planner().launches)


def counted_in_full(case: Case) -> list[Count]:
    """Run a call of the case on the emulator and return what each launch did."""
    runtime = emulated_runtime()
    with runtime.device_limits(DEVICE.choice):
        call = prepare(case, runtime.asarray)
        runtime.reset()
        call()
    records = list(runtime.launches)
    runtime.reset()
    return [count_of(record, case, runtime.workspace_array) for record in records]


def count_of(record: LaunchRecord, case: Case, workspace: np.ndarray | None) -> Count:
    """Return the counts of a launch."""
    total = record.counts.total
    others = None if workspace is None else workspace.ctypes.data
    data = [
        traffic
        for block, traffic in record.counts.arrays.items()
        if len(block) == case.size * case.itemsize and block.start != others
    ]
    return Count(
        record.source,
        record.entry_point,
        record.launch,
        record.counts.barriers,
        total.unique_bytes_read,
        total.unique_bytes_written,
        total.bytes_read,
        total.bytes_written,
        sum(traffic.bytes_read for traffic in data),
        sum(traffic.bytes_written for traffic in data),
    )


def fewer_slices(case: Case) -> tuple[Case, Fraction] | None:
    """Return the case with fewer channels, and how often that goes into the whole; None if not.

    Slices of channels are all alike, so fewer of them are proportionally less work. Where blocks own a slice each, two
    of them are counted. Where groups of blocks take the slices in turn, each takes one, or two where it copies the next
    slice meanwhile. In both cases the kernels and the blocks must be those of the whole, and where groups take turns
    their number too.
    """
    full = planned(case)
    launch, channels = full[0][2], case.shape[1] if len(case.shape) > 1 else 0
    if not launch.cooperative:
        counted = 2 * channels // launch.grid[0]
        if not counted or channels % counted or channels // counted != launch.grid[0] // 2:
            return None
        return _if_alike(case, counted, full, grids=channels // counted)
    width = launch.grid[0] * channels_of_slice(case, full[0][1], launch)
    found = (_if_alike(case, counted, full, grids=1) for counted in (width, 2 * width) if counted <= channels)
    return next(filter(None, found), None)


def _if_alike(case: Case, channels: int, full: Sequence[tuple], grids: int) -> tuple[Case, Fraction] | None:
    """Return the case with so many channels if its launches are those of the whole, but for a grid so often as wide."""
    small = replace(case, shape=(case.shape[0], channels, *case.shape[2:]))
    scaled = [
        (source, kernel, replace(launch, grid=(launch.grid[0] * grids, *launch.grid[1:])))
        for source, kernel, launch in planned(small)
    ]
    return (small, Fraction(case.shape[1], channels)) if scaled == full else None


def channels_of_slice(case: Case, kernel: str, launch: Launch) -> int:
    """Return the channels that a group of blocks takes at a time: a thread owns those of an access, or one of many."""
    together = 1 if case.layout in ("NCL", "NCHW") else elements_of_access(case, kernel)
    return launch.block[0] * together


def elements_of_access(case: Case, kernel: str) -> int:
    """Return the elements that an access of a cooperative kernel moves."""
    return next((count for count, name in NAMES.items() if name and name in kernel), VECTOR // case.itemsize)


def counted_by_slices(case: Case, small: Case, times: Fraction) -> tuple[list[Count], str]:
    """Return the counts of each launch of the case, from fewer slices, and the shape that was counted."""
    counts = [
        Count(*count[:2], launch, count.barriers, *(round(figure * times) for figure in count[4:]))
        for count, (_, _, launch) in zip(counted_in_full(small), planned(case), strict=True)
    ]
    return counts, extent(small.shape) if times == 1 else f"{extent(small.shape)}, times {times}"


def counted(case: Case, most: int) -> tuple[list[Count], str]:
    """Return the counts of each launch of a call of the case, and the shape that was counted.

    Raises
    ------
    NotSupportedError
        If the op refuses the case ("not supported yet"), or it cannot be counted here.
    """
    small, times = part_to_count(case, most)
    if small == case:
        return counted_in_full(case), extent(case.shape)
    return counted_by_slices(case, small, times)


def part_to_count(case: Case, most: int) -> tuple[Case, Fraction]:
    """Return what is counted of a case, of up to `most` numbers, and how often that goes into the whole.

    Raises
    ------
    NotSupportedError
        As `counted`.
    """
    planned(replace(case, shape=tuple(min(size, 3) for size in case.shape)))  # refuses quickly
    found = None if case.size <= WHOLE else fewer_slices(case)
    small, times = found or (case, Fraction(1))
    if small.size > most:
        raise NotSupportedError("too large for the emulator, and so are some slices of its channels, if it has slices")
    return small, times


def extent(sizes: Sequence[int]) -> str:
    """Return sizes as ``64x20``."""
    return "x".join(map(str, sizes))
