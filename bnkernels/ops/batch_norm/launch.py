"""Launch choice of the batch-norm kernels: pure functions of shape and data type.

A block owns a slice of neighbouring channels for the whole mini-batch: `width` threads side by side, one per channel,
times `lanes` threads that share the channel's rows. So no block waits for another.
"""

from __future__ import annotations

import numpy as np

from bnkernels.runtime.arguments import accumulator
from bnkernels.runtime.seam import MAX_GRID, Launch, ceil_div

WIDTH = 32  # channels of a slice: 128 bytes of float32, four whole memory sectors per row
SECTOR = 32  # bytes that memory moves at once
THREADS = 512  # of a block, at most: what the kernels' launch bounds say
SERIAL_LANES = 64  # that every thread merges itself, as in cuda/lib/reduce/rows.cuh
HELD = 4  # rows that each thread should have: enough to keep its loads in flight, and few in a row to add up
FEW_BLOCKS = 132  # fewer leave multiprocessors of a large device without work
INFERENCE_ROWS = 8  # rows per thread of the inference kernel, which has no reason to keep blocks few


def _held_more(dtype: np.dtype) -> int:
    """Return the rows that a thread can hold in the same registers: 16, or 8 of float64."""
    return 8 if dtype.itemsize == 8 else 16


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


def _lanes(wanted: int, width: int) -> int:
    """Return how many lanes a block has: as many as wanted and possible, above 64 a power of two, for equal groups."""
    lanes = min(wanted, THREADS // width)
    return lanes if lanes <= SERIAL_LANES else 1 << (lanes.bit_length() - 1)


def _choose(outer: int, channels: int, inner: int, dtype: np.dtype, planes: int) -> tuple[str, Launch]:
    """Return the first variant whose threads can hold all rows, with `planes` shared values per thread."""
    rows, width = outer * inner, slice_width(channels, inner, dtype)
    lanes = _lanes(ceil_div(rows, HELD), width)
    more = _held_more(dtype)
    if inner == 1 and HELD * lanes >= rows:
        variant = f"registers{HELD}"
    else:
        variant = f"registers{more}" if more * lanes >= rows else "two_pass"
    shared = planes * width * lanes * accumulator(dtype).itemsize
    return variant, Launch((ceil_div(channels, width), 1, 1), (width, lanes, 1), shared)


def forward_launch(outer: int, channels: int, dtype: np.dtype, inner: int = 1) -> tuple[str, Launch]:
    """Return variant and launch of the training forward for at least one row and one channel.

    Examples
    --------
    >>> forward_launch(64, 20, np.dtype("float32"))
    ('registers4', Launch(grid=(1, 1, 1), block=(20, 16, 1), shared_bytes=3840, cooperative=False))
    """
    return _choose(outer, channels, inner, dtype, planes=3)


def backward_launch(outer: int, channels: int, dtype: np.dtype, inner: int = 1) -> tuple[str, Launch]:
    """Return variant and launch of the training backward for at least one row and one channel.

    Examples
    --------
    >>> backward_launch(64, 20, np.dtype("float32"))
    ('backward_registers4', Launch(grid=(1, 1, 1), block=(20, 16, 1), shared_bytes=2560, cooperative=False))
    """
    variant, launch = _choose(outer, channels, inner, dtype, planes=2)
    return f"backward_{variant}", launch


def inference_backward_launch(outer: int, channels: int, dtype: np.dtype, inner: int = 1) -> tuple[str, Launch]:
    """Return variant and launch of the backward for running statistics."""
    width = slice_width(channels, inner, dtype)
    lanes = _lanes(outer * inner, width)
    shared = 2 * width * lanes * accumulator(dtype).itemsize
    return "inference_backward", Launch((ceil_div(channels, width), 1, 1), (width, lanes, 1), shared)


def double_backward_launch(outer: int, channels: int, dtype: np.dtype, inner: int = 1) -> tuple[str, Launch]:
    """Return variant and launch of the double backward, whose rows are streamed at any length.

    Examples
    --------
    >>> variant, launch = double_backward_launch(64, 20, np.dtype("float32"))
    >>> launch.block, launch.shared_bytes
    ((20, 16, 1), 12800)
    """
    width = slice_width(channels, inner, dtype)
    lanes = _lanes(ceil_div(outer * inner, HELD), width)
    shared = 10 * width * lanes * accumulator(dtype).itemsize
    return "double_backward", Launch((ceil_div(channels, width), 1, 1), (width, lanes, 1), shared)


def general_launch(
    groups: int, outer: int, channels: int, inner: int, dtype: np.dtype, backward: bool, reduces: bool
) -> Launch:
    """Return the launch of a general kernel, which `reduces` the rows of a channel or leaves them to any block.

    A block owns fewer channels where there are few: down to a sector, so that no byte that memory moves is wasted.

    Examples
    --------
    >>> general_launch(100, 64, 512, 1, np.dtype("float32"), backward=True, reduces=True).grid  # 17 for 100 groups
    (16, 17, 1)
    """
    width, rows = slice_width(channels, inner, dtype), outer * inner
    while width * dtype.itemsize > SECTOR and ceil_div(channels, width) * groups < FEW_BLOCKS:
        width //= 2
    slices, lanes = ceil_div(channels, width), _lanes(ceil_div(rows, HELD), width)
    planes = 3 if backward else 4
    together, tiles = min(groups, MAX_GRID[1]), 1
    if backward and reduces:  # these blocks add up what they found, and few are added faster
        together = min(groups, max(1, ceil_div(2 * FEW_BLOCKS, slices)))
    if not reduces:
        tiles = min(ceil_div(rows, lanes * INFERENCE_ROWS), MAX_GRID[2])
    shared = planes * width * lanes * accumulator(dtype).itemsize
    return Launch((slices, together, tiles), (width, lanes, 1), shared)


def inference_launch(outer: int, channels: int, dtype: np.dtype, inner: int = 1) -> Launch:
    """Return the launch of the inference forward, whose blocks share the rows freely."""
    rows, width = outer * inner, slice_width(channels, inner, dtype)
    lanes = min(ceil_div(rows, INFERENCE_ROWS), THREADS // width)
    tiles = min(ceil_div(rows, lanes * INFERENCE_ROWS), 65535)
    return Launch((ceil_div(channels, width), tiles, 1), (width, lanes, 1))
