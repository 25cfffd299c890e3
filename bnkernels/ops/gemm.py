"""Tiles of the kernels' matrix products, as ``cuda/lib/gemm/`` makes them: a block owns `width` columns at a time."""

from __future__ import annotations

import numpy as np

from bnkernels.runtime.seam import ceil_div

MIN_BLOCKS = 1  # resident blocks of a multiprocessor, promised by the launch bounds of the kernels
THREADS, STAGE_VECTORS = 256, 2048  # as in cuda/lib/gemm/{matrix,product}.cuh
TENSOR_ROWS, TENSOR_PITCH = 256, 72  # 16-bit numbers, as in cuda/lib/gemm/tensor_product.cuh
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


def shared_numbers(width: int, acc_dtype: np.dtype, buffers: int) -> int:
    """Return the numbers that a product keeps in shared memory: so many stages of both factors, or all partial sums."""
    own = columns(acc_dtype)
    left = STAGE_VECTORS * own
    stage = left + left // (8 * SUBWARPS[0]) * width  # the fewest rows have the most terms
    tensor = (TENSOR_ROWS + max(width, 8)) * TENSOR_PITCH // 2 if acc_dtype.itemsize == 4 else 0
    return max(buffers * max(stage, tensor), left + THREADS * own)


def buffers_and_bytes(width: int, acc_dtype: np.dtype, most: int, beside: int, instead: int = 0) -> tuple[int, int]:
    """Return how many buffers stages have, two if these fit, and the shared memory of a block with them.

    Parameters
    ----------
    width : int
        Columns that a block owns at a time.
    acc_dtype : dtype
        Type of the sums.
    most : int
        Bytes that a block may take.
    beside, instead : int
        Numbers that a block keeps during the products, and at other times.
    """
    for buffers in (2, 1):
        needed = max(beside + shared_numbers(width, acc_dtype, buffers), instead) * acc_dtype.itemsize
        if needed <= most:
            break
    return buffers, needed
