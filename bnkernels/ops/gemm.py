"""Tiles of the kernels' matrix products, as ``cuda/lib/gemm/`` makes them: a block owns `width` columns at a time."""

from __future__ import annotations

import numpy as np

from bnkernels.runtime.seam import ceil_div

MIN_BLOCKS = 1  # resident blocks of a multiprocessor, promised by the launch bounds of the kernels
THREADS, TILE_K = 256, 32  # PRODUCT_THREADS and TILE_K of cuda/lib/gemm/matrix.cuh
MOST_ROWS, MOST_NEURONS = 512, 1024  # beyond, a library's product is faster than what a launch costs
COLUMN_TILES = (1, 2, 4, 8)  # tiles per block; a tile has the columns of one thread
SUBWARPS = (8, 16, 32)  # threads that share the rows of a tile


def columns(acc_dtype: np.dtype) -> int:
    """Return the columns that a thread multiplies, COLUMNS of cuda/lib/gemm/product.cuh."""
    return 16 // acc_dtype.itemsize


def tile_width(owned: int, blocks: int, acc_dtype: np.dtype) -> int:
    """Return the fewest columns that a block may own at a time for `blocks` to own all at once, or the most."""
    widths = [tiles * columns(acc_dtype) for tiles in COLUMN_TILES]
    return next((width for width in widths if ceil_div(owned, width) <= blocks), widths[-1])


def pitch(length: int) -> int:
    """Return the numbers from one column in shared memory to the next."""
    return ceil_div(length, 4) * 4 + 4


def shared_numbers(width: int, acc_dtype: np.dtype) -> int:
    """Return the numbers that a product keeps in shared memory: TILE_K of both factors, or all partial sums.

    Those of ordinary arithmetic, which older GPUs use for every type; tensor cores need less.
    """
    factors = max(TILE_K * (8 * threads + 4 + width) for threads in SUBWARPS)
    return max(factors, *(THREADS // threads * columns(acc_dtype) * (8 * threads + 4) for threads in SUBWARPS))
