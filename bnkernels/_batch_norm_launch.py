"""Launch choice of the batch-norm kernels: pure functions of shape and data type.

A block owns a slice of neighbouring channels for the whole mini-batch: `width` threads side by side, one per channel,
times `lanes` threads that share the channel's rows. So no block waits for another.
"""

from __future__ import annotations

import numpy as np

from bnkernels._runtime import Launch, ceil_div

WIDTH = 32  # channels of a slice: 128 bytes of float32, four whole memory sectors per row
MAX_LANES = 64  # every thread merges the partial results of all lanes itself
HELD = (4, 16)  # rows that a thread can hold in registers: the variants held4 and held16
INFERENCE_ROWS = 8  # rows per thread of the inference kernel, which has no reason to keep blocks few


def _threads(dtype: np.dtype, values: int | None) -> int:
    """Return the most threads of a block: what the kernel's ``__launch_bounds__`` allow without spilling."""
    return 512 if dtype.itemsize == 4 or values == HELD[0] else 256


def _grid_and_block(rows: int, channels: int, dtype: np.dtype, values: int | None) -> tuple[tuple, tuple]:
    """Return grid and block for threads that hold `values` rows each (None: any number of rows)."""
    width = min(channels, WIDTH)
    lanes = min(ceil_div(rows, values or 1), _threads(dtype, values) // width, MAX_LANES)
    return (ceil_div(channels, width), 1, 1), (width, lanes, 1)


def _choose(rows: int, channels: int, dtype: np.dtype, planes: int) -> tuple[str, Launch]:
    """Return the first variant whose threads can hold all rows, with `planes` shared values per thread."""
    for values in (*HELD, None):
        grid, block = _grid_and_block(rows, channels, dtype, values)
        if values is None or values * block[1] >= rows:
            break
    variant = "streamed" if values is None else f"held{values}"
    return variant, Launch(grid, block, planes * block[0] * block[1] * dtype.itemsize)


def forward_launch(rows: int, channels: int, dtype: np.dtype) -> tuple[str, Launch]:
    """Return variant and launch of the training forward for at least one row and one channel.

    Examples
    --------
    >>> forward_launch(64, 20, np.dtype("float32"))
    ('held4', Launch(grid=(1, 1, 1), block=(20, 16, 1), shared_bytes=3840))
    """
    return _choose(rows, channels, dtype, planes=3)


def backward_launch(rows: int, channels: int, dtype: np.dtype) -> tuple[str, Launch]:
    """Return variant and launch of the training backward for at least one row and one channel.

    Examples
    --------
    >>> backward_launch(64, 20, np.dtype("float32"))
    ('backward_held4', Launch(grid=(1, 1, 1), block=(20, 16, 1), shared_bytes=2560))
    """
    variant, launch = _choose(rows, channels, dtype, planes=2)
    return f"backward_{variant}", launch


def inference_backward_launch(rows: int, channels: int, dtype: np.dtype) -> tuple[str, Launch]:
    """Return variant and launch of the backward for running statistics."""
    grid, block = _grid_and_block(rows, channels, dtype, None)
    return "inference_backward", Launch(grid, block, 2 * block[0] * block[1] * dtype.itemsize)


def inference_launch(rows: int, channels: int) -> Launch:
    """Return the launch of the inference forward, whose blocks share the rows freely."""
    width = min(channels, WIDTH)
    lanes = min(ceil_div(rows, INFERENCE_ROWS), 512 // width)
    return Launch((ceil_div(channels, width), min(ceil_div(rows, lanes * INFERENCE_ROWS), 65535), 1), (width, lanes, 1))
