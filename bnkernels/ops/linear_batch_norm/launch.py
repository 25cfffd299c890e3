"""Which linear batch norms run as one kernel, and with which launch: a pure function of sizes and limits.

The thresholds follow from what the kernels of ``cuda/linear_batch_norm_*.cu`` hold on the chip; none has been tuned.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from bnkernels.runtime.arguments import accumulator
from bnkernels.runtime.seam import Launch, Limits, ceil_div
from bnkernels.runtime.workspace import most_shared, resident

MIN_BLOCKS = 1  # resident blocks of a multiprocessor, promised by the launch bounds of the kernels
THREADS, TILE_K = 256, 32  # PRODUCT_THREADS and TILE_K of cuda/lib/gemm/matrix.cuh
MOST_ROWS, MOST_NEURONS = 512, 1024  # beyond, a library's product is faster than what a launch costs
TEAMS = (1, 2, 4, 8)  # of a block: so many times as many columns as a thread multiplies


class Sizes(NamedTuple):
    """(N, K) times (K, M), and the type of the data."""

    rows: int
    inputs: int
    outputs: int
    dtype: np.dtype

    @property
    def columns(self) -> int:
        """The columns that a thread multiplies, COLUMNS of cuda/lib/gemm/product.cuh."""
        return 16 // accumulator(self.dtype).itemsize

    def product_numbers(self, width: int) -> int:
        """Return how many numbers a product keeps in shared memory: TILE_K of both factors, or all partial sums.

        Those of ordinary arithmetic, which older GPUs use for every type; tensor cores need less.
        """
        lanes = (8, 16, 32)
        factors = max(TILE_K * (8 * lane + 4 + width) for lane in lanes)
        return max(factors, *(THREADS // lane * self.columns * (8 * lane + 4) for lane in lanes))


def pitch(length: int) -> int:
    """Return how far it is from a row of a tile to the next."""
    return ceil_div(length, 4) * 4 + 4


@lru_cache(maxsize=1024)
def choose(
    direction: str, sizes: Sizes, limits: Limits, input_gradient: bool = True, norm: str | None = "batch"
) -> tuple[Launch, int] | None:
    """Return the launch and how many neurons a block owns at a time, or None where library products are to be taken.

    They are taken for more than 512 examples or 1024 inputs or outputs, where something is empty, and where the device
    cannot do what the kernel needs. A block owns as few neurons, or for layer norm examples, as leave no multiprocessor
    more than one block.

    Examples
    --------
    >>> h200 = Limits(132, 227 * 1024, 228 * 1024, True)
    >>> choose("forward", Sizes(64, 64, 20, np.dtype("float32")), h200)
    (Launch(grid=(5, 1, 1), block=(256, 1, 1), shared_bytes=35904, cooperative=False), 4)
    >>> choose("forward", Sizes(1024, 64, 20, np.dtype("float32")), h200) is None
    True
    """
    rows, inputs, outputs, dtype = sizes
    if not (0 < rows <= MOST_ROWS and 0 < inputs <= MOST_NEURONS and 0 < outputs <= MOST_NEURONS):
        return None
    layer, backward = norm == "layer", direction == "backward"
    owned, length = (rows, outputs) if layer else (outputs, rows)  # a block's rows, and how long they are
    widths = [teams * sizes.columns for teams in TEAMS]
    width = next((width for width in widths if ceil_div(owned, width) <= limits.sms), widths[-1])
    longest = max(length, rows) if backward else length
    tile, product = width * pitch(longest), sizes.product_numbers(width)
    numbers = max(2 * tile, product) if backward else tile + product
    shared = numbers * accumulator(dtype).itemsize
    if shared > most_shared(limits, MIN_BLOCKS):
        return None
    blocks = ceil_div(owned, width)
    if backward:
        second = outputs if layer else inputs * input_gradient  # owned after the meeting
        blocks = min(max(blocks, ceil_div(second, width)), resident(limits, THREADS, shared, MIN_BLOCKS))
    together = backward and (layer or input_gradient) and blocks > 1
    if together and not limits.cooperative:
        return None
    return Launch((blocks, 1, 1), (THREADS, 1, 1), shared, cooperative=together), width
