"""The batch-norm kernels that spread over the whole device: when they can run, with which launch, and their arguments.

They move 16 bytes at a time and keep what they read in shared memory, so that every byte is read once. Up to G blocks
share a slice of channels and wait for one another; see ``cooperative_slices.cuh``. The choice is a pure function of
shape, data type, strides and the limits of the device. Its thresholds follow from sizes of the hardware; none has
been tuned.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from bnkernels.runtime import seam as rt
from bnkernels.runtime.arguments import arguments_type, pack
from bnkernels.runtime.occupancy import most_shared, resident
from bnkernels.runtime.seam import Launch, Limits, ceil_div
from bnkernels.runtime.workspace import MOST_BARRIERS, MOST_SPLITS, PARTIALS, barrier_counters

MIN_BLOCKS = 2  # resident blocks of a multiprocessor, promised by the launch bounds of the kernels
VECTOR = 16  # bytes that one access moves, as in cuda/lib/numbers/vector.cuh
FAN_IN = 8  # partial results that one thread merges, as in cuda/lib/reduce/cooperative_slices.cuh
WIDTHS = (128, 64, 32)  # bytes of a row that a block owns: from a line of the cache down to a sector of memory
SMALL = 64 * 1024  # bytes of data up to which one launch of few blocks takes no longer
EXCHANGED = 1 / 4  # bytes that a block may read of the others, for a byte of data; they come from the L2 cache
QUANTITIES = {"forward": 3, "backward": 2}  # partial results of a channel
PLANES = {"forward": 1, "backward": 2}  # arrays that are kept in shared memory

SIZES = "outer channels inner"
STRIDES = "x_outer x_channel residual_outer residual_channel held"
ARGUMENTS = {
    "forward": arguments_type(
        "x residual gamma beta y statistics running_mean running_var partial barrier_counter",
        f"{SIZES} {STRIDES}",
        "momentum divisor eps alpha",
        "activation",
    )[np.dtype(np.float32)],
    "backward": arguments_type(
        "dy x residual gamma beta mean mean_low rstd dx dgamma dbeta dresidual partial barrier_counter",
        f"{SIZES} dy_outer dy_channel {STRIDES}",
        "alpha",
        "activation",
    )[np.dtype(np.float32)],
}


class Spread(NamedTuple):
    """A choice: the variant, its launch, and how many rows of 16 bytes a thread keeps in shared memory."""

    variant: str
    launch: Launch
    held: int

    @property
    def direction(self) -> str:
        """Which of the two passes it is."""
        return self.variant.partition("_")[0]


class Tensor(NamedTuple):
    """What the choice asks of the tensor: (outer, C, inner), its data type, the strides of the inputs in elements."""

    outer: int
    channels: int
    inner: int
    dtype: np.dtype
    strides: tuple[tuple[int, int, int], ...]

    @property
    def count(self) -> int:
        """The numbers in 16 bytes."""
        return VECTOR // self.dtype.itemsize

    @property
    def may_spread(self) -> bool:
        """Whether the tensor is large enough, and all rows are whole vectors, provided that the arrays begin at one."""
        size = self.outer * self.channels * self.inner * self.dtype.itemsize
        if self.dtype.itemsize > 4 or size <= SMALL:
            return False
        contiguous = 1 if self.inner == 1 else 2  # the axis whose neighbours lie side by side
        along = self.channels if self.inner == 1 else self.inner
        return along % self.count == 0 and all(
            given[contiguous] == 1
            and all(stride % self.count == 0 for axis, stride in enumerate(given) if axis != contiguous)
            for given in (self._without_single(strides) for strides in self.strides)
        )

    def _without_single(self, strides: tuple[int, int, int]) -> tuple[int, int, int]:
        """Return the strides, 0 for an axis of one index."""
        sizes = (self.outer, self.channels, self.inner)
        return tuple(0 if size == 1 else stride for size, stride in zip(sizes, strides, strict=True))


@lru_cache(maxsize=1024)
def choose_spread(direction: str, tensor: Tensor, limits: Limits) -> Spread | None:
    """Return how the spread kernel of a direction would run, or None where the others are to be taken.

    They are taken for float64, for tensors that do not lie in rows of 16 bytes, for small ones (`Tensor.may_spread`),
    for those whose threads would have less than a row each, and for a device whose shared memory holds no row.

    Examples
    --------
    >>> h200 = Limits(132, 227 * 1024, 228 * 1024, True)
    >>> matrix = Tensor(8192, 1024, 1, np.dtype("float32"), ((1024, 1, 1),))
    >>> choose_spread("forward", matrix, h200).launch.grid  # 16 groups take the 32 slices in turn
    (16, 16, 1)
    """
    widths = [tensor.dtype.itemsize] if tensor.inner > 1 else [min(w, _row(tensor)) for w in WIDTHS]
    blocks = [_Block(direction, tensor, width, limits) for width in widths]
    blocks = [block for block in blocks if block.most_held > 0 and block.rows >= block.lanes]
    if not blocks:
        return None
    alone = [block for block in blocks if block.keeps_all(1)]
    for block in alone:  # the widest that keeps half of the device busy
        if 2 * block.slices >= limits.sms or block is alone[-1]:
            return block.spread(1, block.slices)
    if not limits.cooperative:
        return None
    for block in blocks:  # the widest that exchanges little
        together = block.together()
        if block.keeps_all(together) and block.exchanged(together) <= EXCHANGED * block.read(together):
            break
    return block.spread(together, min(block.slices, block.resident // together, MOST_BARRIERS))


def _row(tensor: Tensor) -> int:
    """Return the bytes of an example."""
    return tensor.channels * tensor.dtype.itemsize


class _Block:
    """A block that owns `width` bytes of channels."""

    def __init__(self, direction: str, tensor: Tensor, width: int, limits: Limits) -> None:
        self.direction = direction
        self.inner = tensor.inner > 1
        self.channels = width // tensor.dtype.itemsize
        columns = max(1, self.channels // tensor.count)
        # Eight channels a thread take more registers in the backward: launch bounds of its kernels.
        threads = 192 if direction == "backward" and not self.inner and tensor.count == 8 else 256
        self.columns, self.lanes = columns, threads // columns
        self.rows = tensor.outer * tensor.inner // (tensor.count if self.inner else 1)
        self.slices = ceil_div(tensor.channels, self.channels)
        self.partial = QUANTITIES[direction] * self.channels * self.lanes * 4
        self.row = PLANES[direction] * columns * self.lanes * VECTOR  # bytes of a row of all threads
        most = most_shared(limits, MIN_BLOCKS)  # while one waits for its data or for other blocks, the other works
        self.resident = resident(limits, self.columns * self.lanes, most, MIN_BLOCKS)
        self.most_held = (most - self.partial) // self.row

    def rows_of_thread(self, together: int) -> int:
        """Return the rows of a thread, at most, if so many blocks share a slice."""
        return ceil_div(self.rows, together * self.lanes)

    def keeps_all(self, together: int) -> bool:
        """Tell whether all rows stay on the chip."""
        return self.rows_of_thread(together) <= self.most_held

    def together(self) -> int:
        """Return how many blocks share a slice: enough to keep it on the chip, and to have work for all."""
        most = min(self.resident, MOST_SPLITS, FAN_IN * self.lanes, self.rows // self.lanes)
        together = 1
        while 2 * together <= most and (2 * together * self.slices <= self.resident or not self.keeps_all(together)):
            together *= 2
        return together

    def exchanged(self, together: int) -> int:
        """Return the bytes that a block reads of the others: all their partial results."""
        return together * QUANTITIES[self.direction] * self.channels * 4

    def read(self, together: int) -> int:
        """Return the bytes of the data that a block reads."""
        return self.rows_of_thread(together) * self.row

    def spread(self, together: int, groups: int) -> Spread:
        """Return the choice with so many blocks for a slice, and so many groups of them."""
        held = min(self.rows_of_thread(together), self.most_held)
        variant = f"{self.direction}_cooperative" + ("_inner" if self.inner else "")
        grid, block = (groups, together, 1), (self.columns, self.lanes, 1)
        launch = Launch(grid, block, self.partial + held * self.row, cooperative=together > 1)
        needed = PARTIALS + 2 * groups * together * QUANTITIES[self.direction] * self.channels * 4
        if needed > rt.WORKSPACE_BYTES:
            raise RuntimeError(f"the workspace has {rt.WORKSPACE_BYTES} bytes, {needed} are needed: {launch}")
        return Spread(variant, launch, held)


def spread_arguments(
    spread: Spread, tensor: Tensor, pointers: tuple[int, ...], workspace: int, scalars: tuple[float, ...], code: int
) -> np.ndarray:
    """Return the argument of a spread kernel.

    Parameters
    ----------
    pointers : tuple of int
        Those of the argument before `partial`.
    workspace : int
        The stream's; 0 if no block shares a slice.
    scalars : tuple of float
        As in the argument.
    code : int
        Of the activation.
    """
    direction = spread.direction
    strides = [stride for given in tensor.strides for stride in given[:2]]
    strides += [0] * (2 * (PLANES[direction] + 1) - len(strides))  # no residual
    return pack(
        ARGUMENTS[direction],
        *pointers,
        workspace and workspace + PARTIALS,
        workspace and barrier_counters(workspace),
        *tensor[:3],
        *strides,
        spread.held,
        *scalars,
        code,
    )
