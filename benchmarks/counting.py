"""Counts what a call of a case does, launch by launch, on the emulator: bytes, barriers, and how it is launched.

It needs g++ and no GPU. Of shapes that would take the emulator too long, part of the channels is counted, if the launch
proves that the rest does the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

import bnkernels as bn
from benchmarks import bench_batch_norm
from benchmarks.case import Arrays, Call, Case, NotSupportedError, native_dtype
from bnkernels import _runtime
from bnkernels._runtime import Launch
from tests.backends import emulated_runtime
from tests.emulator import LaunchRecord

MOST_COUNTED = 2**22  # elements that the emulator gets through in a second or two
ONE = np.ones((), np.float32)


class Count(NamedTuple):
    """What one launch did: bytes by every access, and each byte counted once."""

    source: str
    kernel: str
    launch: Launch
    barriers: int
    read: int
    written: int
    accessed_read: int
    accessed_written: int


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
# How many arrays an update reads. It writes all of them but the gradients.
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


class Planner(_runtime.Runtime):
    """A runtime behind the seam of `bnkernels._runtime` that notes the launches and makes none."""

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

    def pointer(self, array: Planned) -> int:
        """Return the address of the array's first element."""
        return array.ctypes.data

    def device(self, array: Planned) -> int:
        """Return 0: there is one."""
        return 0

    def launch(self, source: str, entry_point: str, launch: Launch, arguments: np.ndarray, like: Any = None) -> None:
        """Note the launch."""
        self.launches.append((source, entry_point, launch))


@lru_cache(maxsize=1)
def planner() -> Planner:
    """Return the one planner, known to the ops."""
    new = Planner()
    _runtime.register(new)
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
    call = prepare(case, runtime.asarray)
    runtime.reset()
    call()
    records = list(runtime.launches)
    runtime.reset()
    return [count_of(record) for record in records]


def count_of(record: LaunchRecord) -> Count:
    """Return what a launch did."""
    total = record.counts.total
    return Count(
        record.source,
        record.entry_point,
        record.launch,
        record.counts.barriers,
        total.unique_bytes_read,
        total.unique_bytes_written,
        total.bytes_read,
        total.bytes_written,
    )


def two_slices(case: Case) -> tuple[Case, int] | None:
    """Return the case with fewer channels, two blocks' worth, and how often that goes into the whole; None if not.

    Blocks that own slices of channels all do the same, so fewer slices are proportionally less work. Here that is so if
    both cases launch the same kernels with the same blocks, and the grid of the whole is that many times as wide.
    """
    full = planned(case)
    slices, channels = full[0][2].grid[0], case.shape[1] if len(case.shape) > 1 else 0
    if slices % 2 or not channels or channels % (slices // 2):
        return None
    times = slices // 2
    small = replace(case, shape=(case.shape[0], channels // times, *case.shape[2:]))
    scaled = [
        (source, kernel, replace(launch, grid=(launch.grid[0] * times, *launch.grid[1:])))
        for source, kernel, launch in planned(small)
    ]
    return (small, times) if scaled == full else None


def counted_by_slices(case: Case, small: Case, times: int) -> tuple[list[Count], str]:
    """Return what each launch of the case does, from a count of two slices; and on what was counted."""
    counts = [
        Count(*count[:2], launch, count.barriers, *(figure * times for figure in count[4:]))
        for count, (_, _, launch) in zip(counted_in_full(small), planned(case), strict=True)
    ]
    return counts, f"{extent(small.shape)}, times {times}"


def counted(case: Case) -> tuple[list[Count], str]:
    """Return what each launch of a call of the case does, and on what it was counted.

    Raises
    ------
    NotSupportedError
        If the op refuses the case ("not supported yet"), or it cannot be counted here.
    """
    planned(replace(case, shape=tuple(min(size, 3) for size in case.shape)))  # refuses quickly
    if case.size <= MOST_COUNTED:
        return counted_in_full(case), extent(case.shape)
    found = two_slices(case)
    if found is None or found[0].size > MOST_COUNTED:
        raise NotSupportedError("too large for the emulator, and so are two slices of its channels, if it has slices")
    return counted_by_slices(case, *found)


def extent(sizes: Sequence[int]) -> str:
    """Return sizes as ``64x20``."""
    return "x".join(map(str, sizes))
