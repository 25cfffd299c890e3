"""Launch choice of layer norm: a pure function of problem and limits.

The thresholds follow from what the kernels of ``cuda/layer_norm_*.cu`` hold on the chip; none has been tuned.
"""

from __future__ import annotations

from functools import lru_cache

from bnkernels.ops.layer_norm.problem import VECTOR, Problem
from bnkernels.runtime.arguments import arguments_type, suffix
from bnkernels.runtime.occupancy import WARP, most_shared, resident
from bnkernels.runtime.seam import Launch, LaunchPlan, Limits, ceil_div
from bnkernels.runtime.workspace import MOST_SPLITS

ARGUMENTS = {
    "forward": arguments_type("x gamma beta y statistics", "rows columns", "eps alpha", "activation aligned16 held"),
    "backward": arguments_type(
        "dy x gamma beta statistics dx dgamma dbeta partial barrier_counter",
        "rows columns chunk",
        "alpha",
        "activation aligned16 held",
    ),
}
MIN_BLOCKS = 2  # resident blocks of a multiprocessor, promised by the launch bounds of the kernels
THREADS = 256  # per block
ALONE = 4  # vectors of a thread up to which a warp has a row for itself: no barriers
SMALL = 2**14  # elements up to which one block is faster than several and a grid barrier


def _power(number: int) -> int:
    """Return the next power of two."""
    return 1 << (number - 1).bit_length()


@lru_cache(maxsize=1024)
def choose_forward(problem: Problem, limits: Limits) -> LaunchPlan:
    """Return the launch of a forward: up to 128 vectors, a part of a warp for every row; then up to the whole block.

    Examples
    --------
    >>> import numpy as np
    >>> h200 = Limits(132, 227 * 1024, 228 * 1024, True)
    >>> choose_forward(Problem(64, 20, np.dtype("float32")), h200).launch
    Launch(grid=(2, 1, 1), block=(8, 32, 1), shared_bytes=4160, cooperative=False)
    """
    width = min(WARP, _power(problem.vectors))
    if problem.vectors > ALONE * WARP:
        width = min(THREADS, _power(ceil_div(problem.vectors, ALONE)))
    rows = THREADS // width
    of_thread, scratch = ceil_div(problem.vectors, width), _scratch(problem)
    rows_bytes = of_thread * THREADS * VECTOR
    held = of_thread if rows_bytes + scratch <= most_shared(limits, MIN_BLOCKS) else 0
    grid = (ceil_div(problem.rows, rows), 1, 1)
    launch = Launch(grid, (width, rows, 1), scratch + THREADS * VECTOR * held)
    return _plan("forward", problem, launch, held)


@lru_cache(maxsize=1024)
def choose_backward(problem: Problem, limits: Limits) -> LaunchPlan:
    """Return the launch of a backward: as many threads for a row as it has vectors, since each sums its own columns.

    Two blocks share a multiprocessor, or where its shared memory does not hold the sums of two, one has it alone. A
    grid barrier precedes their last sums. For a small problem, or on a device without cooperative launches, there is
    one block.

    Examples
    --------
    >>> import numpy as np
    >>> h200 = Limits(132, 227 * 1024, 228 * 1024, True)
    >>> choose_backward(Problem(8192, 1024, np.dtype("float32")), h200).launch
    Launch(grid=(256, 1, 1), block=(256, 1, 1), shared_bytes=24640, cooperative=True)
    """
    width = min(THREADS, _power(problem.vectors))
    rows = THREADS // width
    of_thread, scratch = ceil_div(problem.vectors, width), _scratch(problem)
    row = 2 * THREADS * VECTOR  # bytes of a vector of every thread, for both inputs
    sums = 4 * problem.count * THREADS * problem.acc_dtype.itemsize
    most = most_shared(limits, MIN_BLOCKS)
    if scratch + sums > most:
        most = most_shared(limits, 1)
    held = of_thread if scratch + (row + sums) * of_thread <= most else 0
    summed = min(of_thread, (most - scratch - row * held) // sums)
    if summed < 1:
        raise ValueError(f"the device gives a block {limits.shared_bytes} bytes of shared memory, {sums} are needed")
    shared = scratch + row * held + sums * summed
    blocks = min(ceil_div(problem.rows, rows), resident(limits, THREADS, shared, MIN_BLOCKS), MOST_SPLITS)
    if problem.rows * problem.columns <= SMALL or not limits.cooperative:
        blocks = 1
    launch = Launch((blocks, 1, 1), (width, rows, 1), shared, cooperative=blocks > 1)
    return _plan("backward", problem, launch, held, summed * width)


def _plan(direction: str, problem: Problem, launch: Launch, held: int, chunk: int = 0) -> LaunchPlan:
    source = f"layer_norm_{direction}"
    arguments = ARGUMENTS[direction][problem.acc_dtype]
    kernel = f"bnk_{source}_{suffix(problem.dtype)}"
    return LaunchPlan(source, kernel, launch, arguments, held=held, chunk=chunk)


def _scratch(problem: Problem) -> int:
    """Return the bytes of a pair for every warp of a block."""
    return THREADS // WARP * 2 * problem.acc_dtype.itemsize
