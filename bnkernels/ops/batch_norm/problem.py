"""How batch norm sees a tensor: as (outer, C, inner), the axes before and behind the channels' each taken together.

A row is one position of a channel; there are ``outer * inner`` of them. A matrix (N, C) has ``inner = 1``, as has
whatever lies channels-last; NCHW has ``outer = N`` and ``inner = H W``. See ``cuda/lib/reduce/rows.cuh``.
"""

from __future__ import annotations

import math
from enum import IntEnum
from typing import NamedTuple

import numpy as np

from bnkernels.ops.activations import Activation
from bnkernels.runtime import seam as rt
from bnkernels.runtime.checks import Argument, shown


class Layout(NamedTuple):
    """The sizes of a tensor, and which of its axes holds the channels, counted from the front."""

    outer: int
    channels: int
    inner: int
    axis: int

    @property
    def rows(self) -> int:
        """The number of values of a channel."""
        return self.outer * self.inner


class Stage(IntEnum):
    """What a launch does, as in ``cuda/lib/reduce/masked_rows.cuh``."""

    WHOLE = 0
    COLLECT = 1
    APPLY = 2
    FROZEN = 3


class Options(NamedTuple):
    """The numbers of a call; a stage takes no notice of those that are not its own."""

    phi: Activation
    eps: float = 0.0
    momentum: float = 0.0
    unbiased: bool = True
    renorm: tuple[float, float] | None = None


class Plan(NamedTuple):
    """What a call's signatures decide."""

    runtime: rt.Runtime | None
    grouped: bool
    groups: int
    layout: Layout  # of one group
    shapes: dict[str, tuple[int, ...]]  # of the arrays that are like x, of parameters, of what goes by channel
    dtypes: dict[str, np.dtype]
    empty: bool
    statistic_rows: int
    narrow: bool  # whether gamma and beta are of the data's 16 bits
    launch: rt.Launch | None = None
    strides: tuple[int, ...] = ()
    copied: tuple[str, ...] = ()  # inputs that no four strides describe


def layout_of(x: Argument, axis: int) -> Layout:
    """Return the layout of `x` with the channels in `axis`; check both.

    Raises
    ------
    ValueError
        If `x` has fewer than two dimensions, or none of this number.
    """
    dimensions = len(x.shape)
    if dimensions < 2:
        raise ValueError(f"{x.name} must have at least two dimensions, such as (N, C), got the shape {x.shape}")
    if not -dimensions <= axis < dimensions:
        wanted = f"axis must be from {-dimensions} to {dimensions - 1}"
        raise ValueError(f"{wanted} for {x.name} of the shape {x.shape}, got {shown(axis)}")
    axis %= dimensions
    return Layout(math.prod(x.shape[:axis]), x.shape[axis], math.prod(x.shape[axis + 1 :]), axis)


def element_strides(argument: Argument, axis: int) -> tuple[int, int, int] | None:
    """Return the strides of an array's outer, channel and inner axis in elements; None if no such three exist.

    They exist where the axes before the channels', and those behind, each follow one another as in a reshaped view.
    """
    itemsize = argument.dtype.itemsize
    if any(stride % itemsize for stride in argument.strides):
        return None
    steps = [stride // itemsize for stride in argument.strides]
    outer = _merged(argument.shape[:axis], steps[:axis])
    inner = _merged(argument.shape[axis + 1 :], steps[axis + 1 :])
    return None if outer is None or inner is None else (outer, steps[axis], inner)


def mask_strides(mask: Argument, shape: tuple[int, ...], layout: Layout, grouped: bool) -> tuple[int, int, int] | None:
    """Return the strides of a mask's group, outer and inner axis, 0 where all positions share it; None as above.

    The mask covers the first axes of `shape` without the channels'; `layout` is that of one group.
    """
    strides = [*mask.strides, *[0] * (len(shape) - 1 - len(mask.strides))]
    axis = layout.axis + grouped
    positions = shape[:axis] + shape[axis + 1 :]
    outer = _merged(positions[grouped:axis], strides[grouped:axis])
    inner = _merged(positions[axis:], strides[axis:])
    return None if outer is None or inner is None else (strides[0] if grouped else 0, outer, inner)


def _merged(shape: tuple[int, ...], strides: list[int]) -> int | None:
    """Return the one stride with which these axes can be walked through in C order, or None."""
    merged = None
    for extent, stride in zip(reversed(shape), reversed(strides), strict=True):
        if extent == 1:
            continue
        if merged is None:
            merged, reach = stride, extent * stride
        elif stride == reach:
            reach = extent * stride
        else:
            return None
    return 0 if merged is None else merged
