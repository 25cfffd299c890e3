"""Launch choice of layer norm, RMS norm and group norm: a pure function of problem and limits.

The thresholds follow from what the kernels of ``cuda/layer_norm_*.cu`` hold on the chip; none has been tuned. What one
block cannot hold is for `long_rows`.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import product

from bnkernels.ops.layer_norm import long_rows
from bnkernels.ops.layer_norm.problem import MOST_PARTIALS, VECTOR, Problem
from bnkernels.runtime.arguments import arguments_type, suffix
from bnkernels.runtime.occupancy import WARP, most_shared, resident
from bnkernels.runtime.seam import Launch, LaunchPlan, Limits, ceil_div
from bnkernels.runtime.workspace import MOST_BARRIERS, MOST_SPLITS

ARGUMENTS = {
    "forward": arguments_type(
        "x gamma beta y statistics",
        "rows columns",
        "eps alpha half_share",
        "activation shape scaled shifted centred channel_groups inner width held adjacent",
    ),
    "forward_cooperative": arguments_type(
        "x gamma beta y statistics exchange barrier_counter",
        "rows columns part",
        "eps alpha",
        "activation shape scaled shifted centred channel_groups inner held stages adjacent",
    ),
    "backward": arguments_type(
        "dy x gamma beta statistics dx dgamma dbeta partial barrier_counter",
        "rows columns",
        "alpha half_share",
        "activation shape scaled shifted centred channel_groups inner width held stages threads adjacent",
    ),
    "backward_cooperative": arguments_type(
        "dy x gamma beta statistics dx dgamma dbeta partial exchange barrier_counter",
        "rows columns part",
        "alpha half_share",
        "activation shape scaled shifted centred channel_groups inner held stages at_once adjacent",
    ),
}
MIN_BLOCKS = 1  # resident blocks of a multiprocessor, promised by the launch bounds of the kernels
MOST_THREADS = 512  # threads of a block, as in these launch bounds
THREADS = 256  # threads of a block of the forward that has several rows
FEW_HELD = 4  # vectors of a thread up to which a warp has a row for itself: no barriers
# Vectors of a thread, by the size of a number: held by the forward, summed by the backward; their MOST_HELD.
MOST_HELD = {2: 4, 4: 8, 8: 8}
MOST_SUMMED = {2: 2, 4: 4, 8: 2}
MOST_HELD_SUMMED = {2: 2, 4: 3, 8: 4}  # the MOST_HELD of the backward of long rows
SMALL = 2**14  # elements up to which one block is faster than several and a grid barrier


def _power(number: int) -> int:
    """Return the next power of two."""
    return 1 << (number - 1).bit_length()


@lru_cache(maxsize=1024)
def choose_forward(problem: Problem, limits: Limits) -> LaunchPlan:
    """Return the launch of a forward: up to 128 vectors, a part of a warp for every row; then up to 16 warps.

    Rows that the registers of a block cannot hold are shared by several blocks, in shared memory.

    Examples
    --------
    >>> import numpy as np
    >>> h200 = Limits(132, 227 * 1024, 228 * 1024, True)
    >>> choose_forward(Problem(64, 20, np.dtype("float32")), h200).launch
    Launch(grid=(2, 1, 1), block=(8, 32, 1), shared_bytes=96, cooperative=False)
    """
    width = min(WARP, _power(problem.vectors))
    if problem.vectors > FEW_HELD * WARP:
        width = min(THREADS, _power(ceil_div(problem.vectors, FEW_HELD)))
    most = MOST_HELD[problem.dtype.itemsize]
    if problem.vectors > most * MOST_THREADS:
        return _shared_rows("forward", problem, limits, problem.vectors, MOST_BARRIERS, _variant(problem))
    if problem.vectors > most * THREADS:
        width = MOST_THREADS
    of_thread, rows = ceil_div(problem.vectors, width), max(THREADS // width, 1)
    launch = Launch(
        (ceil_div(problem.rows, rows), 1, 1), (width, rows, 1), 3 * width * rows // WARP * problem.acc_dtype.itemsize
    )
    return _plan("forward", problem, launch, _variant(problem), held=of_thread)


@lru_cache(maxsize=1024)
def choose_backward(problem: Problem, limits: Limits, curved: bool = False) -> LaunchPlan:
    """Return the launch of a backward: each thread of a row sums the columns of two vectors, of more in long rows.

    A block has a multiprocessor to itself. Where its shared memory does not hold two rows of every worker, it holds
    the one being worked on, or a block of half as many threads has fewer rows. A grid barrier precedes the last sums.
    For a small problem, or on a device without cooperative launches, there is one block. Rows that a block cannot hold
    are shared by several, whose groups have pairs of partial sums. A block has rows of one group of channels only; a
    block that has all of them waits for no other. Where channels come last a block has half as many threads, for places
    and parameters number by number take registers.

    Examples
    --------
    >>> import numpy as np
    >>> h200 = Limits(132, 227 * 1024, 228 * 1024, True)
    >>> choose_backward(Problem(8192, 1024, np.dtype("float32")), h200).launch
    Launch(grid=(132, 1, 1), block=(128, 4, 1), shared_bytes=131328, cooperative=True)
    """
    most, available = MOST_SUMMED[problem.dtype.itemsize], most_shared(limits, MIN_BLOCKS)
    sizes = (MOST_THREADS, MOST_THREADS // 2)[problem.channels_last :]
    for threads, stages, wanted in product(sizes, (2, 1), (2, 1)):
        width = min(threads, _power(ceil_div(problem.vectors, wanted)))
        held = ceil_div(problem.vectors, width)
        shared = _shared(problem, threads, held, stages)
        if held <= most and shared <= available:
            break
    else:
        held, most = MOST_HELD_SUMMED[problem.dtype.itemsize], MOST_PARTIALS // 4 if limits.cooperative else 1
        return _shared_rows("backward", problem, limits, held, most, _variant(problem, curved))
    rows, groups = threads // width, problem.channel_groups
    most_blocks = min(resident(limits, threads, shared, MIN_BLOCKS), MOST_SPLITS) // groups
    blocks = max(1, min(ceil_div(problem.rows // groups, rows), most_blocks))  # for each group of channels
    if problem.rows * problem.columns <= SMALL or not limits.cooperative:
        blocks = 1
    launch = Launch((groups * blocks, 1, 1), (width, rows, 1), shared, cooperative=blocks > 1)
    return _plan("backward", problem, launch, _variant(problem, curved), held=held, stages=stages)


def partial_sums(plan: LaunchPlan, problem: Problem) -> int:
    """Return the numbers that the blocks of a backward leave in memory: of channels, or in groups pairs of columns."""
    if plan.source.endswith("cooperative"):
        return 4 * plan.launch.grid[0] * problem.columns
    return 2 * plan.launch.blocks * problem.channels if plan.launch.cooperative else 0


def _shared(problem: Problem, threads: int, held: int, stages: int) -> int:
    """Return the shared memory of a block of the backward, in bytes."""
    number = problem.acc_dtype.itemsize
    sums = 2 * problem.count * 2 * number  # pairs, of the columns of a vector
    return 4 * number * threads // WARP + threads * held * (2 * VECTOR * stages + sums)


def _shared_rows(
    direction: str, problem: Problem, limits: Limits, most_held: int, most_groups: int, variant: str
) -> LaunchPlan:
    """Return the plan of rows that several blocks share."""
    chosen = long_rows.share(direction, problem, limits, most_held, most_groups)
    launch = long_rows.launch_of(direction, problem, limits, chosen)
    more = {"splits": chosen.splits, "held": chosen.held, "stages": chosen.stages, "at_once": chosen.at_once}
    return _plan(f"{direction}_cooperative", problem, launch, variant, **more)


def _variant(problem: Problem, curved: bool | None = None) -> str:
    activation = "" if curved is None else "curved_" if curved else "linear_"
    return f"{activation}last_" if problem.channels_last else activation


def _plan(struct: str, problem: Problem, launch: Launch, variant: str, **more: int) -> LaunchPlan:
    source = f"layer_norm_{struct}"
    kernel = f"bnk_{source}_{variant}{suffix(problem.dtype)}"
    return LaunchPlan(source, kernel, launch, ARGUMENTS[struct][problem.acc_dtype], **more)
