"""Launch choice of batch norm: which kernel, with which grid and argument, as a pure function of pass and problem.

`choose` answers. A one-block kernel owns a slice of neighbouring channels for the whole mini-batch: `width` threads
side by side, one per channel, times `workers` threads that share the channel's rows; no block waits for another. Plain
ones keep their rows in registers, or read them twice (two_pass); a masked_grouped one knows every option. A cooperative
kernel moves 16 bytes at a time and keeps what it read in shared memory, so that every byte is read once: up to `splits`
blocks share a slice and wait for one another, see ``cooperative_slices.cuh``. The thresholds follow from sizes of the
hardware; none has been tuned.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from bnkernels.ops.batch_norm.problem import Pass, Problem, Stage
from bnkernels.runtime import seam as rt
from bnkernels.runtime.arguments import accumulator, arguments_type, suffix
from bnkernels.runtime.occupancy import most_shared, resident
from bnkernels.runtime.seam import MAX_GRID, Launch, LaunchPlan, Limits, ceil_div
from bnkernels.runtime.workspace import MOST_BARRIERS, MOST_SPLITS, PARTIALS

WIDTH = 32  # channels of a slice: 128 bytes of float32, four whole memory sectors per row
SECTOR = 32  # bytes that memory moves at once
THREADS = 512  # most threads per block: the launch bounds of the kernels
SERIAL_WORKERS = 64  # that every thread merges itself, as in cuda/lib/reduce/rows.cuh
REGISTERS = 4  # rows that each thread should have: enough to keep its loads in flight, and few in a row to add up
FEW_BLOCKS = 132  # fewer leave multiprocessors of a large device without work
INFERENCE_ROWS = 8  # rows per thread of the inference kernel, which has no reason to keep blocks few
MIN_BLOCKS = 2  # cooperative blocks that are resident on a multiprocessor, as their launch bounds promise
VECTOR = 16  # bytes that one access moves, as in cuda/lib/numbers/vector.cuh
FAN_IN = 8  # partial results that one thread merges, as in cuda/lib/reduce/cooperative_slices.cuh
WIDTHS = (128, 64, 32)  # bytes of a row that a cooperative block owns: from a cache line down to a sector of memory
SMALL = 64 * 1024  # bytes of data up to which one launch of few blocks takes no longer
EXCHANGED = 1 / 4  # bytes that a block may read of the others, for a byte of data; they come from the L2 cache
QUANTITIES = {"forward": 3, "backward": 2}  # partial results of a channel
PLANES = {"forward": 1, "backward": 2}  # arrays that a cooperative kernel keeps in shared memory


def _strides(names: str, axes: str) -> str:
    return " ".join(f"{name}_{axis}" for name in names.split() for axis in axes.split())


SIZES, AXES = "outer channels inner", "outer channel inner"
CODES = "activation stage statistic_rows params_in_storage_type"
DOUBLE = "ddx dy x residual ddresidual"
ARGUMENTS = {
    "forward": arguments_type(
        "x residual gamma beta y statistics running_mean running_var",
        f"{SIZES} {_strides('x residual', AXES)}",
        "momentum divisor eps alpha",
        "activation",
    ),
    "inference": arguments_type(
        "x residual gamma beta y running_mean running_var",
        f"{SIZES} {_strides('x residual', AXES)}",
        "eps alpha",
        "activation",
    ),
    "backward": arguments_type(
        "dy x residual gamma beta mean mean_low rstd dx dgamma dbeta dresidual",
        f"{SIZES} {_strides('dy x residual', AXES)}",
        "eps alpha",
        "activation",
    ),
    "double_backward": arguments_type(
        f"{DOUBLE} ddgamma ddbeta gamma beta statistics ddy dx dgamma dbeta dresidual",
        f"{SIZES} {_strides(DOUBLE, AXES)}",
        "alpha",
        "activation",
    ),
    "forward_masked_grouped": arguments_type(
        "x residual mask gamma beta y statistics moments running_mean running_var",
        f"groups {SIZES} {_strides('x residual', f'group {AXES}')} mask_group mask_outer mask_inner",
        "momentum correction eps alpha r_max d_max",
        CODES,
    ),
    "backward_masked_grouped": arguments_type(
        "dy x residual mask gamma beta statistics running_mean running_var dx dgamma dbeta dresidual sums "
        "partial finished_blocks",
        f"groups {SIZES} {_strides('dy x residual', f'group {AXES}')} mask_group mask_outer mask_inner",
        "eps alpha",
        CODES,
    ),
    "forward_cooperative": arguments_type(
        "x residual gamma beta y statistics running_mean running_var partial barrier_counter",
        f"{SIZES} {_strides('x residual', 'outer channel')} held",
        "momentum divisor eps alpha",
        "activation",
    ),
    "backward_cooperative": arguments_type(
        "dy x residual gamma beta mean mean_low rstd dx dgamma dbeta dresidual partial barrier_counter",
        f"{SIZES} {_strides('dy x residual', 'outer channel')} held",
        "alpha",
        "activation",
    ),
}


@lru_cache(maxsize=1024)
def choose(kind: Pass, problem: Problem, limits: Limits | None) -> LaunchPlan:
    """Return the kernel of a pass and its launch.

    Parameters
    ----------
    kind : Pass
        The pass.
    problem : Problem
        A tensor with at least one row and one channel.
    limits : Limits or None
        Limits of the device where all data begin at a multiple of 16 bytes; else None: no cooperative kernel.

    Examples
    --------
    >>> from bnkernels.ops.batch_norm.problem import FORWARD
    >>> plan = choose(FORWARD, Problem(1, 64, 20, 1, np.dtype("float32")), None)
    >>> plan.kernel, plan.launch.block
    ('bnk_batch_norm_forward_registers4_f32', (20, 16, 1))
    """
    if problem.masked_grouped:
        return masked_grouped(kind, problem)
    plain = one_block(kind, problem)
    if limits is None or f"_registers{REGISTERS}_" in plain.kernel or not in_vectors(kind, problem):
        return plain
    return cooperative(kind, problem, limits) or plain


def _plan(variant: str, struct: str, problem: Problem, launch: Launch, **more: int) -> LaunchPlan:
    source = f"batch_norm_{'forward' if struct == 'inference' else struct}"
    kernel = f"bnk_batch_norm_{variant}_{suffix(problem.dtype)}"
    return LaunchPlan(source, kernel, launch, ARGUMENTS[struct][accumulator(problem.dtype)], **more)


# ---- one block a slice ----------------------------------------------------------------------------------------------


def slice_width(channels: int, inner: int, dtype: np.dtype) -> int:
    """Return how many channels a block owns.

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


def variant_of(problem: Problem, workers: int) -> str:
    """Return the first training kernel whose threads can keep all rows in registers, or that reads them twice."""
    most = 8 if problem.dtype.itemsize == 8 else 16  # in the same registers
    if problem.inner == 1 and problem.rows <= REGISTERS * workers:
        return f"registers{REGISTERS}"
    return f"registers{most}" if problem.rows <= most * workers else "two_pass"


def one_block(kind: Pass, problem: Problem) -> LaunchPlan:
    """Return the plain kernel of a pass, whose blocks own their channels alone, or in inference share rows freely."""
    rows, width = problem.rows, slice_width(problem.channels, problem.inner, problem.dtype)
    slices, frozen = ceil_div(problem.channels, width), kind.stage == Stage.FROZEN
    if frozen and kind.direction == "forward":
        workers = min(ceil_div(rows, INFERENCE_ROWS), THREADS // width)
        tiles = min(ceil_div(rows, workers * INFERENCE_ROWS), MAX_GRID[1])
        return _plan("inference", "inference", problem, Launch((slices, tiles, 1), (width, workers, 1)))
    workers = _workers(rows if frozen else ceil_div(rows, REGISTERS), width)
    variant, planes = kind.direction, 10  # shared values of a thread
    if frozen:
        variant, planes = "inference_backward", 2
    elif variant != "double_backward":
        variant, planes = f"{variant}_{variant_of(problem, workers)}", QUANTITIES[variant]
    shared = planes * width * workers * accumulator(problem.dtype).itemsize
    return _plan(variant, kind.direction, problem, Launch((slices, 1, 1), (width, workers, 1), shared))


def masked_grouped(kind: Pass, problem: Problem) -> LaunchPlan:
    """Return the kernel that knows every option. It reduces the rows of a channel, or leaves them to any block.

    A block owns fewer channels where there are few: down to a sector, so that no byte that memory moves is wasted.

    Examples
    --------
    >>> from bnkernels.ops.batch_norm.problem import BACKWARD
    >>> masked_grouped(BACKWARD, Problem(100, 64, 512, 1, np.dtype("float32"))).launch.grid  # 17 for 100 groups
    (16, 17, 1)
    """
    dtype, rows, groups = problem.dtype, problem.rows, problem.groups
    backward, width = kind.direction == "backward", slice_width(problem.channels, problem.inner, dtype)
    while width * dtype.itemsize > SECTOR and ceil_div(problem.channels, width) * groups < FEW_BLOCKS:
        width //= 2
    slices, workers = ceil_div(problem.channels, width), _workers(ceil_div(rows, REGISTERS), width)
    together, tiles, splits = min(groups, MAX_GRID[1]), 1, 1
    if kind.stage == Stage.APPLY or (kind.stage == Stage.FROZEN and not backward):
        tiles = min(ceil_div(rows, workers * INFERENCE_ROWS), MAX_GRID[2])
    elif backward:  # these blocks add up what they found, and few are added faster
        together = splits = min(groups, max(1, ceil_div(2 * FEW_BLOCKS, slices)))
    shared = (3 if backward else 4) * width * workers * accumulator(dtype).itemsize
    launch, name = Launch((slices, together, tiles), (width, workers, 1), shared), f"{kind.direction}_masked_grouped"
    return _plan(name, name, problem, launch, splits=splits)


# ---- several blocks a slice -----------------------------------------------------------------------------------------


def in_vectors(kind: Pass, problem: Problem) -> bool:
    """Return whether the tensor is large enough, and all rows are whole vectors if the arrays begin at one."""
    size, count = problem.rows * problem.channels * problem.dtype.itemsize, VECTOR // problem.dtype.itemsize
    if kind.stage != Stage.WHOLE or kind.direction not in PLANES or problem.dtype.itemsize > 4 or size <= SMALL:
        return False
    shape = problem.outer, problem.channels, problem.inner
    along = 1 if problem.inner == 1 else 2  # the axis whose neighbours lie side by side
    if shape[along] % count:
        return False
    for strides in problem.strides:
        for axis, (extent, stride) in enumerate(zip(shape, strides, strict=True)):
            if extent > 1 and (stride != 1 if axis == along else stride % count):
                return False
    return True


def cooperative(kind: Pass, problem: Problem, limits: Limits) -> LaunchPlan | None:
    """Return the cooperative kernel for what lies in vectors, or None where the plain ones are to be taken.

    They are taken where threads would have less than a row each, and for a device whose shared memory holds no row.

    Examples
    --------
    >>> from bnkernels.ops.batch_norm.problem import FORWARD
    >>> h200 = Limits(132, 227 * 1024, 228 * 1024, True)
    >>> matrix = Problem(1, 8192, 1024, 1, np.dtype("float32"), ((1024, 1, 1),))
    >>> cooperative(FORWARD, matrix, h200).launch.grid  # 16 groups of 16 blocks take the 32 slices in turn
    (16, 16, 1)
    """
    size = problem.dtype.itemsize
    widths = [size] if problem.inner > 1 else [min(width, problem.channels * size) for width in WIDTHS]
    blocks = [_Block(kind.direction, problem, width, limits) for width in widths]
    blocks = [block for block in blocks if block.most_held > 0 and block.rows >= block.workers]
    if not blocks:
        return None
    alone = [block for block in blocks if block.keeps_all(1)]
    for block in alone:  # the widest that keeps half of the device busy
        if 2 * block.slices >= limits.sms or block is alone[-1]:
            return block.plan(1, block.slices)
    if not limits.cooperative:
        return None
    for block in blocks:  # the widest that exchanges little
        splits = block.splits()
        if block.keeps_all(splits) and block.exchanged(splits) <= EXCHANGED * block.read(splits):
            break
    return block.plan(splits, min(block.slices, block.resident // splits, MOST_BARRIERS))


class _Block:
    """Block of a cooperative kernel that owns `width` bytes of channels."""

    def __init__(self, direction: str, problem: Problem, width: int, limits: Limits) -> None:
        self.direction, self.problem = direction, problem
        inner, size = problem.inner > 1, problem.dtype.itemsize
        count = VECTOR // size
        self.channels = width // size
        self.columns = max(1, self.channels // count)
        # Eight channels a thread take more registers in the backward: launch bounds of its kernels.
        self.workers = (192 if direction == "backward" and not inner and count == 8 else 256) // self.columns
        self.rows = problem.rows // (count if inner else 1)
        self.slices = ceil_div(problem.channels, self.channels)
        self.partial = QUANTITIES[direction] * self.channels * self.workers * 4
        self.row = PLANES[direction] * self.columns * self.workers * VECTOR  # bytes of a row of all threads
        most = most_shared(limits, MIN_BLOCKS)  # while one waits for its data or for other blocks, the other works
        self.resident = resident(limits, self.columns * self.workers, most, MIN_BLOCKS)
        self.most_held = (most - self.partial) // self.row

    def rows_of_thread(self, splits: int) -> int:
        """Return the rows of a thread, at most, with so many blocks a slice."""
        return ceil_div(self.rows, splits * self.workers)

    def keeps_all(self, splits: int) -> bool:
        """Return whether all rows stay on the chip."""
        return self.rows_of_thread(splits) <= self.most_held

    def splits(self) -> int:
        """Return how many blocks share a slice: enough to keep it on the chip, and to have work for all."""
        most = min(self.resident, MOST_SPLITS, FAN_IN * self.workers, self.rows // self.workers)
        splits = 1
        while 2 * splits <= most and (2 * splits * self.slices <= self.resident or not self.keeps_all(splits)):
            splits *= 2
        return splits

    def exchanged(self, splits: int) -> int:
        """Return the bytes that a block reads of the others: all their partial results."""
        return splits * QUANTITIES[self.direction] * self.channels * 4

    def read(self, splits: int) -> int:
        """Return the bytes of the data that a block reads."""
        return self.rows_of_thread(splits) * self.row

    def plan(self, splits: int, groups: int) -> LaunchPlan:
        """Return the choice with so many blocks a slice, and so many groups of them."""
        held = min(self.rows_of_thread(splits), self.most_held)
        block = (self.columns, self.workers, 1)
        launch = Launch((groups, splits, 1), block, self.partial + held * self.row, cooperative=splits > 1)
        needed = PARTIALS + 2 * groups * self.exchanged(splits)
        if needed > rt.WORKSPACE_BYTES:
            raise RuntimeError(f"the workspace has {rt.WORKSPACE_BYTES} bytes, {needed} are needed: {launch}")
        name = f"{self.direction}_cooperative"
        variant = f"{name}_inner" if self.problem.inner > 1 else name
        return _plan(variant, name, self.problem, launch, splits=splits, held=held)
