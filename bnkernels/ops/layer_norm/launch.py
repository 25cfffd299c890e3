"""With which launch layer norm runs: a pure function of sizes and limits.

The thresholds follow from what the kernels of ``cuda/layer_norm_*.cu`` hold on the chip; none has been tuned.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from bnkernels.runtime.arguments import accumulator
from bnkernels.runtime.seam import Launch, Limits, ceil_div
from bnkernels.runtime.workspace import MOST_BLOCKS, most_shared, resident

MIN_BLOCKS = 2  # resident blocks of a multiprocessor, promised by the launch bounds of the kernels
THREADS, WARP, VECTOR = 256, 32, 16  # of a block, of a warp; bytes of a unit, as in cuda/lib/reduce/vector_rows.cuh
ALONE = 4  # units of a thread up to which a warp has a row for itself: no barriers
MOST_PARTIALS = 2 * MOST_BLOCKS  # sums of a column
SMALL = 2**14  # elements up to which one block has the gradients sooner than several that must meet


class Rows(NamedTuple):
    """A matrix (rows, columns) of a data type."""

    rows: int
    columns: int
    dtype: np.dtype

    @property
    def count(self) -> int:
        """The numbers of a unit."""
        return VECTOR // self.dtype.itemsize

    @property
    def units(self) -> int:
        """The units of a row, the last of which may be a part."""
        return ceil_div(self.columns, self.count)


class Choice(NamedTuple):
    """A launch, the units of a row that a thread keeps on the chip, and those that a backward sums at a time."""

    launch: Launch
    held: int
    chunk: int = 0


def _power(number: int) -> int:
    """Return the next power of two."""
    return 1 << (number - 1).bit_length()


@lru_cache(maxsize=1024)
def choose_forward(matrix: Rows, limits: Limits) -> Choice:
    """Return the launch of a forward: up to 128 units a team within a warp for every row, then up to the whole block.

    Examples
    --------
    >>> h200 = Limits(132, 227 * 1024, 228 * 1024, True)
    >>> choose_forward(Rows(64, 20, np.dtype("float32")), h200).launch
    Launch(grid=(2, 1, 1), block=(8, 32, 1), shared_bytes=4160, cooperative=False)
    """
    width = min(WARP, _power(matrix.units))
    if matrix.units > ALONE * WARP:
        width = min(THREADS, _power(ceil_div(matrix.units, ALONE)))
    teams = THREADS // width
    of_thread, scratch = ceil_div(matrix.units, width), _scratch(matrix.dtype)
    rows = of_thread * THREADS * VECTOR
    held = of_thread if rows + scratch <= most_shared(limits, MIN_BLOCKS) else 0
    grid = (ceil_div(matrix.rows, teams), 1, 1)
    return Choice(Launch(grid, (width, teams, 1), scratch + THREADS * VECTOR * held), held)


@lru_cache(maxsize=1024)
def choose_backward(matrix: Rows, limits: Limits) -> Choice:
    """Return the launch of a backward: as many threads for a row as it has units, since each sums its own columns.

    Two blocks share a multiprocessor, or where its shared memory does not hold the sums of two, one has it alone. They
    meet at the end, where there is more than one. Where they cannot, or there is little to do, there is one.

    Examples
    --------
    >>> h200 = Limits(132, 227 * 1024, 228 * 1024, True)
    >>> choose_backward(Rows(8192, 1024, np.dtype("float32")), h200).launch
    Launch(grid=(256, 1, 1), block=(256, 1, 1), shared_bytes=24640, cooperative=True)
    """
    width = min(THREADS, _power(matrix.units))
    teams = THREADS // width
    of_thread, scratch = ceil_div(matrix.units, width), _scratch(matrix.dtype)
    row = 2 * THREADS * VECTOR  # of a unit of every thread
    sums = 4 * matrix.count * THREADS * accumulator(matrix.dtype).itemsize
    most = most_shared(limits, MIN_BLOCKS)
    if scratch + sums > most:
        most = most_shared(limits, 1)
    held = of_thread if scratch + (row + sums) * of_thread <= most else 0
    summed = min(of_thread, (most - scratch - row * held) // sums)
    if summed < 1:
        raise ValueError(f"the device gives a block {limits.shared_bytes} bytes of shared memory, {sums} are needed")
    shared = scratch + row * held + sums * summed
    blocks = min(ceil_div(matrix.rows, teams), resident(limits, THREADS, shared, MIN_BLOCKS), MOST_BLOCKS)
    if matrix.rows * matrix.columns <= SMALL or not limits.cooperative:
        blocks = 1
    return Choice(Launch((blocks, 1, 1), (width, teams, 1), shared, cooperative=blocks > 1), held, summed * width)


def _scratch(dtype: np.dtype) -> int:
    """Return the bytes of a pair for every warp of a block."""
    return THREADS // WARP * 2 * accumulator(dtype).itemsize
