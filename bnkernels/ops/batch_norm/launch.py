"""Launch choice of batch norm: which kernel, with which grid and argument, as a pure function of pass and problem.

`choose` answers. A one-block kernel owns a slice of neighbouring channels for the whole mini-batch: `width` threads
side by side, one per channel, times `workers` threads that share the channel's rows; no block waits for another. They
keep their rows in registers, or read them twice (two_pass), and know every option if they are named so. A cooperative
kernel moves 16 bytes at a time, or as many as addresses and strides allow, and keeps what it read in shared memory, so
that every byte is read once: up to `splits` blocks share a slice and wait for one another, see
``cooperative_slices.cuh``. The thresholds follow from sizes of the hardware; none has been tuned.

Long because the arguments of all kernels are here, too.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from bnkernels.ops.batch_norm.problem import Pass, Problem, Stage
from bnkernels.runtime import seam as rt
from bnkernels.runtime.arguments import accumulator, arguments_type, suffix
from bnkernels.runtime.occupancy import most_shared, resident
from bnkernels.runtime.seam import MAX_GRID, Launch, LaunchPlan, Limits, ceil_div
from bnkernels.runtime.workspace import MOST_BARRIERS, PARTIALS

WIDTH = 32  # channels of a slice: 128 bytes of float32, four whole memory sectors per row
SECTOR = 32  # bytes that memory moves at once
THREADS = 512  # most threads per block: the launch bounds of the kernels
SERIAL_WORKERS = 64  # that every thread merges itself, as in cuda/lib/reduce/rows.cuh
REGISTERS = 4  # rows that each thread should have: enough to keep its loads in flight, and few in a row to add up
FEW_BLOCKS = 132  # fewer leave multiprocessors of a large device without work
INFERENCE_ROWS = 8  # rows per thread of the inference kernel, which has no reason to keep blocks few
MIN_BLOCKS = 2  # cooperative blocks that are resident on a multiprocessor, as their launch bounds promise
VECTOR = 16  # most bytes that one access moves, as in cuda/lib/numbers/vector.cuh
# Elements of an access, by the size of one, the most first; and what the kernels are called that have so many.
ACCESSES = {2: (8, 2, 1), 4: (4, 1), 8: (1,)}
NAMES = {8: "", 4: "", 2: "_pair", 1: "_single"}
LINE = 128  # bytes of a cache line, of which a block that shares a slice owns one of each row
WIDTHS = (128, 64, 32)  # bytes of a row that a block may own alone: from a cache line down to a sector of memory
SMALL = 64 * 1024  # bytes of data up to which one launch of few blocks takes no longer
ROOM = 0.95  # share of the shared memory that is used: no launch depends on its last bytes
EXCHANGE = 6  # vectors that each thread could move while blocks wait for the result of a slice, some 3 us
QUANTITIES = {"forward": 3, "backward": 2}  # partial results of a channel
EXTRA = {"forward": 2, "backward": 15}  # other numbers of a channel that a cooperative kernel keeps in shared memory
OF_GROUPS = {"forward": 0, "backward": 4}  # and more of them for the sums over groups
PLANES = {"forward": 1, "backward": 2}  # arrays that a cooperative kernel keeps in shared memory


def _strides(names: str, axes: str) -> str:
    return " ".join(f"{name}_{axis}" for name in names.split() for axis in axes.split())


SIZES, AXES = "outer channels inner", "outer channel inner"
OF_MASK = "mask_group mask_outer"
OPTIONS = "stage statistic_rows params_in_storage_type"
DOUBLE = "ddx dy x residual ddresidual"
ARGUMENTS = {
    "forward": arguments_type(
        "x residual mask gamma beta y statistics moments running_mean running_var",
        f"groups {SIZES} {_strides('x residual', f'group {AXES}')} mask_group mask_outer mask_inner",
        "rows inverse_rows inverse_divisor correction momentum eps alpha r_max d_max",
        f"activation given width workers full {OPTIONS}",
    ),
    "backward": arguments_type(
        "dy x residual mask gamma beta statistics running_mean running_var dx dgamma dbeta dresidual sums "
        "partial finished_blocks",
        f"groups {SIZES} {_strides('dy x residual', f'group {AXES}')} mask_group mask_outer mask_inner",
        "rows inverse_rows eps alpha",
        f"activation given width workers full {OPTIONS}",
    ),
    "double_backward": arguments_type(
        f"{DOUBLE} ddgamma ddbeta gamma beta statistics ddy dx dgamma dbeta dresidual",
        f"{SIZES} {_strides(DOUBLE, AXES)}",
        "alpha",
        "activation frozen",
    ),
    "forward_cooperative": arguments_type(
        "x residual mask gamma beta y statistics running_mean running_var partial barrier_counter",
        f"groups {SIZES} {_strides('x residual', 'group outer channel')} {OF_MASK} held stages",
        "momentum divisor correction eps alpha",
        "activation masked",
    ),
    "backward_cooperative": arguments_type(
        "dy x residual mask gamma beta mean mean_low rstd dx dgamma dbeta dresidual partial barrier_counter",
        f"groups {SIZES} {_strides('dy x residual', 'group outer channel')} {OF_MASK} held stages",
        "alpha",
        "activation masked",
    ),
}


@lru_cache(maxsize=1024)
def choose(kind: Pass, problem: Problem, limits: Limits, alignment: int = VECTOR) -> LaunchPlan:
    """Return the kernel of a pass and its launch.

    Parameters
    ----------
    kind : Pass
        The pass.
    problem : Problem
        A tensor with at least one row and one channel.
    limits : Limits
        Limits of the device.
    alignment : int
        Power of two of which all tensors' addresses are multiples; 16 is enough for every kernel.

    Examples
    --------
    >>> from bnkernels.ops.batch_norm.problem import FORWARD
    >>> h200 = Limits(132, 227 * 1024, 228 * 1024, True)
    >>> plan = choose(FORWARD, Problem(1, 64, 20, 1, np.dtype("float32")), h200)
    >>> plan.kernel, plan.launch.block
    ('bnk_batch_norm_forward_registers4_f32', (20, 16, 1))
    """
    alone = one_block(kind, problem)
    if problem.rare or _few_rows(alone, problem):
        return alone
    count = elements_of_access(kind, problem, alignment)
    return (cooperative(kind, problem, limits, count) if count else None) or alone


def _few_rows(alone: LaunchPlan, problem: Problem) -> bool:
    """Return whether a thread of a one-block kernel has few rows of a matrix, each an access away from the next."""
    return problem.inner == 1 and problem.reach < 2**31 and problem.rows <= REGISTERS * alone.launch.block[1]


def _plan(variant: str, struct: str, problem: Problem, launch: Launch, **more: int) -> LaunchPlan:
    kernel = f"bnk_batch_norm_{variant}_{suffix(problem.dtype)}"
    return LaunchPlan(f"batch_norm_{struct}", kernel, launch, ARGUMENTS[struct][accumulator(problem.dtype)], **more)


# ---- one block a slice ----------------------------------------------------------------------------------------------


def slice_width(channels: int, inner: int, dtype: np.dtype) -> int:
    """Return the number of channels that a block owns.

    Neighbouring threads have to read neighbouring addresses. With an inner axis of a sector or more these are rows of
    one channel, so a block owns one. Without it, or with a short one, whose sectors the rows after share, they are
    channels. Outputs always lie so; an input in another order is read less well.

    Examples
    --------
    >>> slice_width(64, 1, np.dtype("float32")), slice_width(64, 7 * 7, np.dtype("float32"))
    (32, 1)
    """
    return 1 if inner * dtype.itemsize >= SECTOR else min(channels, WIDTH)


def _workers(wanted: int, width: int) -> int:
    """Return the workers of a block: as many as wanted and possible, above 64 a power of two, for equal groups."""
    workers = min(wanted, THREADS // width)
    return workers if workers <= SERIAL_WORKERS else 1 << (workers.bit_length() - 1)


def _few_values(wanted: int, rows: int, width: int) -> int:
    """Return as many workers as wanted or more: a number that takes few values, as the kernel is compiled for it."""
    workers, most = 1 << (wanted - 1).bit_length(), _workers(rows, width)
    return min(workers, most)


def variant_of(problem: Problem, workers: int) -> str:
    """Return the first training kernel whose threads can keep all rows in registers, or that reads them twice."""
    most = 8 if problem.dtype.itemsize == 8 else 16  # in the same registers
    if problem.options:
        most //= 2
        return f"options_registers{most}" if problem.rows <= most * workers else "options_two_pass"
    if problem.inner == 1 and problem.rows <= REGISTERS * workers and problem.reach < 2**31:
        return f"registers{REGISTERS}"
    return f"registers{most}" if problem.rows <= most * workers else "two_pass"


def one_block(kind: Pass, problem: Problem) -> LaunchPlan:
    """Return the kernel of a pass whose blocks own their channels alone, or whose rows are any block's.

    Examples
    --------
    >>> from bnkernels.ops.batch_norm.problem import BACKWARD
    >>> problem = Problem(100, 64, 512, 1, np.dtype("float32"), options=True)
    >>> one_block(BACKWARD, problem).launch.grid  # 17 for 100 groups
    (16, 17, 1)
    """
    rows, width, number = problem.rows, _width(problem), accumulator(problem.dtype).itemsize
    slices, groups = ceil_div(problem.channels, width), min(problem.groups, MAX_GRID[1])
    backward, frozen = kind.direction != "forward", kind.stage == Stage.FROZEN
    if kind.direction == "double_backward":
        workers = _workers(ceil_div(rows, REGISTERS), width)
        launch = Launch((slices, 1, 1), (width, workers, 1), 10 * width * workers * number)
        return _plan(kind.direction, kind.direction, problem, launch)
    variant = ("inference_backward" if backward else "inference") + ("_options" if problem.options else "")
    if kind.stage == Stage.APPLY or (frozen and not backward):
        workers = min(ceil_div(rows, INFERENCE_ROWS), THREADS // width)
        tiles = min(ceil_div(rows, workers * INFERENCE_ROWS), MAX_GRID[2])
        return _plan(variant, kind.direction, problem, Launch((slices, groups, tiles), (width, workers, 1)))
    if backward:  # these blocks add up what they found, and few are added faster
        groups = min(groups, max(1, ceil_div(2 * FEW_BLOCKS, slices)))
    workers = _few_values(rows if frozen else ceil_div(rows, REGISTERS), rows, width)
    variant = variant if frozen else f"{kind.direction}_{variant_of(problem, workers)}"
    # Numbers of a worker, and a place between neighbouring channels; with a mask the backward counts rows.
    shared = (5 if backward and problem.options else 4) * width * (workers + 1) * number
    launch = Launch((slices, groups, 1), (width, workers, 1), shared)
    return _plan(variant, kind.direction, problem, launch, splits=groups if backward else 1)


def _width(problem: Problem) -> int:
    """Return the channels of a block: with options fewer where there are few, down to a sector.

    Then no byte that memory moves is wasted. Without options the cooperative kernels fill the device.
    """
    width = slice_width(problem.channels, problem.inner, problem.dtype)
    few = FEW_BLOCKS if problem.options else 0
    while width * problem.dtype.itemsize > SECTOR and ceil_div(problem.channels, width) * problem.groups < few:
        width //= 2
    return width


# ---- several blocks a slice -----------------------------------------------------------------------------------------


def elements_of_access(kind: Pass, problem: Problem, alignment: int = VECTOR) -> int:
    """Return how many elements an access of the cooperative kernel moves; 0 where it is not taken.

    Examples
    --------
    >>> from bnkernels.ops.batch_norm.problem import FORWARD
    >>> images = [Problem(1, 256, 1024, n * n, np.dtype("float16"), ((1024 * n * n, n * n, 1),)) for n in (7, 14, 28)]
    >>> [elements_of_access(FORWARD, problem) for problem in images]
    [1, 2, 8]
    """
    size = problem.groups * problem.rows * problem.channels * problem.dtype.itemsize
    if kind.stage != Stage.WHOLE or kind.direction not in PLANES or size <= SMALL:
        return 0
    return next((count for count in ACCESSES[problem.dtype.itemsize] if _fits(problem, alignment, count)), 0)


def _fits(problem: Problem, alignment: int, count: int) -> bool:
    """Return whether all rows of so many elements lie side by side, at multiples of their size."""
    shape, size = (problem.outer, problem.channels, problem.inner), problem.dtype.itemsize
    rows = problem.rows // (count if problem.inner > 1 else 1)
    steps = [problem.channels * problem.inner, *(strides[0] for strides in problem.strides)]
    # Threads count in 32 bits.
    if rows >= 2**31 or (problem.outer > 1 and not 0 <= min(steps) <= max(steps) < 2**32 // size):
        return False
    along = 1 if problem.inner == 1 else 2  # the axis whose neighbours lie side by side
    if shape[along] % count or alignment % (count * size):
        return False
    if problem.groups > 1 and any(stride % count for stride in problem.group_strides):
        return False
    for strides in problem.strides:
        for axis, (extent, stride) in enumerate(zip(shape, strides, strict=True)):
            if extent > 1 and (stride != 1 if axis == along else stride % count):
                return False
    return True


def cooperative(kind: Pass, problem: Problem, limits: Limits, count: int) -> LaunchPlan | None:
    """Return the cooperative kernel whose accesses move `count` elements, or None where a plain one is to be taken.

    Plain ones are taken where threads had less than a row each, and where shared memory holds no row.

    Examples
    --------
    >>> from bnkernels.ops.batch_norm.problem import FORWARD
    >>> h200 = Limits(132, 227 * 1024, 228 * 1024, True)
    >>> matrix = Problem(1, 8192, 1024, 1, np.dtype("float32"), ((1024, 1, 1),))
    >>> cooperative(FORWARD, matrix, h200, 4).launch.grid  # 8 columns of 32 blocks take the 32 slices in turn
    (8, 32, 1)
    """
    size = problem.dtype.itemsize
    widths = [size] if problem.inner > 1 else [min(width, problem.channels * size) for width in WIDTHS]
    blocks = [_Block(kind.direction, problem, width, count, limits) for width in widths]
    blocks = [block for block in blocks if block.most_held > 0 and block.rows >= block.workers]
    if not blocks:
        return None
    alone = [block for block in blocks if block.keeps_all]
    for block in alone:  # the widest that keeps half of the device busy
        if 2 * block.slices * problem.groups >= limits.sms or block is alone[-1]:
            return block.plan(1)
    return blocks[0].shared() if limits.cooperative else None


def own_bytes(direction: str, channels: int, workers: int, size: int = 4, *, grouped: bool = False) -> int:
    """Return the shared memory of a cooperative block beside its rows: a flag, numbers of a channel, and sums."""
    extra = EXTRA[direction] + (OF_GROUPS[direction] if grouped else 0)
    return 16 + size * (ceil_div(extra * channels, 4) * 4 + 2 * channels * workers)


class _Pipeline(NamedTuple):
    """Turns of the columns of blocks that share slices: `runs` times `columns` of them."""

    columns: int  # number of columns of a run, which take the slices in turn
    runs: int  # number of columns that share the groups of a slice
    rows: int  # number of rows of a thread
    turns: int
    stages: int


class _Block:
    """Block of a cooperative kernel that owns `width` bytes of channels; an access moves `count` elements."""

    def __init__(self, direction: str, problem: Problem, width: int, count: int, limits: Limits) -> None:
        self.direction, self.problem, self.count = direction, problem, count
        inner, size = problem.inner > 1, problem.dtype.itemsize
        self.number, self.exchange = accumulator(problem.dtype).itemsize, EXCHANGE * VECTOR // (count * size)
        self.channels = width // size
        self.columns = max(1, self.channels // count)
        # Eight channels a thread take more registers in the backward: launch bounds of its kernels.
        self.workers = (192 if direction == "backward" and not inner and count == 8 else 256) // self.columns
        self.rows = problem.rows // (count if inner else 1)
        self.slices = ceil_div(problem.channels, self.channels)
        self.partial = own_bytes(direction, self.channels, self.workers, self.number, grouped=problem.groups > 1)
        self.row = PLANES[direction] * self.columns * self.workers * count * size  # bytes of a row of all threads
        # While one waits for its data or for other blocks, the other works.
        most = int(ROOM * most_shared(limits, MIN_BLOCKS))
        self.resident = resident(limits, self.columns * self.workers, most, MIN_BLOCKS)
        self.most_held = (most - self.partial) // self.row

    @property
    def keeps_all(self) -> bool:
        """Whether one block can hold all rows."""
        return ceil_div(self.rows, self.workers) <= self.most_held

    def shared(self) -> LaunchPlan | None:
        """Return the plan with as many blocks a slice as take the least time, or None where there is only one."""
        most = min(self.resident, self.rows // self.workers)
        splits = min(range(2, most + 1), key=self._time, default=None)
        return None if splits is None else self.plan(splits)

    def _time(self, splits: int) -> tuple[bool, float]:
        """Return whether rows are read twice, and the time that a thread takes, in that of a row read and written."""
        pipeline = self._pipeline(splits)
        twice = max(pipeline.rows - self.most_held, 0)
        time = pipeline.rows + twice / 2
        turn = max(time, self.exchange) if pipeline.stages == 2 else time + self.exchange
        return twice > 0, pipeline.turns * turn

    def _pipeline(self, splits: int) -> _Pipeline:
        """Return how columns of so many blocks take the slices of all groups in turn."""
        most = min(self.resident // splits, MOST_BARRIERS)
        if splits == 1:  # nobody waits
            most = max(most, self.slices)
        runs = min(self.problem.groups, max(1, most // self.slices))
        columns, rows = min(self.slices, most), ceil_div(self.rows, splits * self.workers)
        turns = ceil_div(self.slices, columns) * ceil_div(self.problem.groups, runs)
        return _Pipeline(columns, runs, rows, turns, 2 if turns > 1 and 2 * rows <= self.most_held else 1)

    def plan(self, splits: int) -> LaunchPlan:
        """Return the plan with `splits` blocks a slice."""
        columns, runs, rows, _, stages = self._pipeline(splits)
        columns *= runs
        held, block = min(rows, self.most_held), (self.columns, self.workers, 1)
        launch = Launch((columns, splits, 1), block, self.partial + stages * held * self.row, cooperative=splits > 1)
        together = splits * (runs if self.direction == "backward" else 1)
        needed = self._workspace(columns, splits)
        if together > 1 and needed > rt.WORKSPACE_BYTES:
            raise RuntimeError(f"the workspace has {rt.WORKSPACE_BYTES} bytes, {needed} are needed: {launch}")
        name = f"{self.direction}_cooperative"
        variant = name + ("_inner" if self.problem.inner > 1 else "") + NAMES[self.count]
        return _plan(variant, name, self.problem, launch, splits=together, held=held, stages=stages)

    def _workspace(self, columns: int, splits: int) -> int:
        """Return the bytes of a workspace that blocks need which exchange sums."""
        numbers = 2 * splits * QUANTITIES[self.direction] if splits > 1 else 0
        if self.direction == "backward":  # means, and sums over groups
            numbers += 10 if self.problem.groups > 1 or self.problem.masked else 4
        valid = 2 * splits * 4 if self.problem.masked else 0  # numbers of rows
        return PARTIALS + columns * (numbers * self.channels * self.number + valid)
