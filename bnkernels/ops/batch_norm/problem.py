"""Batch norm as data: the passes, their arrays and options, and the view of a tensor as (group, outer, C, inner).

The axes in front of the channels' are taken together as `outer`, those behind as `inner`. A row is one position of a
channel; there are ``outer * inner`` of them. A matrix (N, C) has ``inner = 1``, as has whatever lies channels-last;
NCHW has ``outer = N`` and ``inner = H W``. See ``cuda/lib/reduce/rows.cuh``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property
from typing import NamedTuple

import numpy as np

from bnkernels.ops.activations import Activation
from bnkernels.runtime import seam as rt
from bnkernels.runtime.checks import Argument, shown
from bnkernels.runtime.overlap import Reach
from bnkernels.runtime.replay import ReplayCache

GRADIENTS = ("dx", "dgamma", "dbeta", "dresidual")
PARAMETERS = ("gamma", "beta", "dgamma", "dbeta")
MORE_PLACES = ("mean_low", "rstd", "partial", "barrier_counter", "finished_blocks")
# Bits, as in the kernels.
GIVEN = {"residual": 1, "gamma": 2, "beta": 4, "running_mean": 8, "running_var": 16, "mask": 32}
TENSORS = ("y", "out", "dx", "dresidual", "ddy", "x", "dy", "residual", "ddx", "ddresidual")  # arrays of the shape of x


class Stage(IntEnum):
    """Part of a pass that a launch does, as in ``cuda/lib/reduce/options.cuh``."""

    WHOLE = 0
    COLLECT = 1  # sums over the rows
    APPLY = 2  # the rest, from given sums
    FROZEN = 3  # with running statistics


@dataclass(frozen=True, eq=False)
class Pass:
    """Signature of an op: the names of its arrays, those that it writes first."""

    direction: str  # forward, backward or double_backward
    stage: Stage
    outputs: tuple[str, ...]
    inputs: tuple[str, ...]
    required: tuple[str, ...]  # inputs that must not be None
    updated: tuple[str, ...] = ()
    # One for each op: calls of two ops with the same arrays would be taken for each other.
    calls: ReplayCache = field(default_factory=ReplayCache)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The names of all arrays."""
        return self.outputs + self.updated + self.inputs

    @cached_property
    def written(self) -> int:
        """The number of arrays that are written."""
        return len(self.outputs + self.updated)

    @cached_property
    def in_place(self) -> tuple[str, ...]:
        """The inputs that the first output may be."""
        return tuple(name for name in self.inputs if name in TENSORS) if self.outputs[0] in TENSORS else ()

    @cached_property
    def strided(self) -> tuple[str, ...]:
        """The inputs of the shape of `x`, which may have any strides."""
        return tuple(name for name in self.inputs if name in TENSORS)


FORWARD = Pass(
    *("forward", Stage.WHOLE, ("y", "statistics")),
    inputs=("x", "residual", "mask", "gamma", "beta"),
    required=("x",),
    updated=("running_mean", "running_var"),
)
INFERENCE = Pass(
    *("forward", Stage.FROZEN, ("out",)),
    inputs=("x", "residual", "mask", "gamma", "beta", "running_mean", "running_var"),
    required=("x", "running_mean", "running_var"),
)
MOMENTS = Pass("forward", Stage.COLLECT, ("moments",), inputs=("x", "mask"), required=("x",))
NORMALISE = Pass(
    *("forward", Stage.APPLY, ("out",)),
    inputs=("x", "residual", "mask", "gamma", "beta", "statistics"),
    required=("x", "statistics"),
)
BACKWARD_INPUTS = ("dy", "x", "residual", "mask", "gamma", "beta")
BACKWARD = Pass(
    *("backward", Stage.WHOLE, GRADIENTS),
    inputs=(*BACKWARD_INPUTS, "statistics"),
    required=("dy", "x", "statistics"),
)
INFERENCE_BACKWARD = Pass(
    *("backward", Stage.FROZEN, GRADIENTS),
    inputs=(*BACKWARD_INPUTS, "running_mean", "running_var"),
    required=("dy", "x", "running_mean", "running_var"),
)
GRADIENT_SUMS = Pass(
    *("backward", Stage.COLLECT, ("sums",)),
    inputs=(*BACKWARD_INPUTS, "statistics"),
    required=("dy", "x", "statistics"),
)
INPUT_GRADIENT = Pass(
    *("backward", Stage.APPLY, ("dx", "dresidual")),
    inputs=(*BACKWARD_INPUTS, "statistics", "sums"),
    required=("dy", "x", "statistics", "sums"),
)
DOUBLE_BACKWARD = Pass(
    *("double_backward", Stage.WHOLE, ("ddy", "dx", "dgamma", "dbeta", "dresidual")),
    inputs=("ddx", "dy", "x", "residual", "ddresidual", "ddgamma", "ddbeta", "gamma", "beta", "statistics"),
    required=("dy", "x", "statistics"),
)


class Options(NamedTuple):
    """Numbers of a call. A pass takes no notice of those that are not its own."""

    phi: Activation
    eps: float = 0.0
    momentum: float = 0.0
    unbiased: bool = True
    renorm: tuple[float, float] | None = None
    frozen: bool = False


class Problem(NamedTuple):
    """View of a tensor as (group, outer, C, inner), and what else a launch depends on."""

    groups: int
    outer: int
    channels: int
    inner: int
    dtype: np.dtype
    strides: tuple[tuple[int, int, int], ...] = ()  # outer, channel and inner, in elements, of each tensor given
    options: bool = False  # whether there are groups, a mask, or another option that only some kernels know
    rare: bool = False  # whether an option is among them that only kernels named so know
    group_strides: tuple[int, ...] = ()  # in elements, of each tensor given
    masked: bool = False

    @property
    def rows(self) -> int:
        """The number of values of a channel in a group."""
        return self.outer * self.inner

    @property
    def reach(self) -> int:
        """The farthest that an element of a group lies from the first, in any of its tensors."""
        last = self.outer - 1, self.channels - 1, self.inner - 1
        inputs = (sum(n * abs(stride) for n, stride in zip(last, strides, strict=True)) for strides in self.strides)
        return max(self.rows * self.channels, *inputs, 0)


@dataclass(frozen=True, eq=False)
class Plan:
    """Plan of a call, decided by its signatures alone. There is one of each, so that others can be kept for it."""

    kind: Pass
    runtime: rt.Runtime | None  # None: NumPy
    problem: Problem
    axis: int  # channel axis, counted from the front of a group
    grouped: bool
    masked: bool
    acc_dtype: np.dtype
    outputs: tuple[tuple[int, tuple[int, ...], np.dtype], ...]  # place in `kind.names`, shape and data type
    positions: tuple[int, ...]  # the shape of x without its channels: that of a whole mask
    statistic_rows: int
    reaches: tuple[Reach | None, ...]
    sizes: dict[str, int]  # sizes, strides and codes of the kernel's argument
    copied: tuple[str, ...]  # inputs that no such strides describe

    @cached_property
    def empty(self) -> bool:
        """Whether there is nothing to compute."""
        return 0 in self.positions or not self.problem.channels

    @cached_property
    def tensors(self) -> tuple[int, ...]:
        """The places of the arrays of the shape of `x`."""
        return tuple(place for place, name in enumerate(self.kind.names) if name in TENSORS)

    @cached_property
    def places(self) -> dict[str, int]:
        """The place of every address of a kernel's argument among those of the arrays ``kind.names``.

        Behind these are the addresses of rows of statistics, and those of a workspace: ``MORE_PLACES``.
        """
        names = self.kind.names
        found = {name: place for place, name in enumerate((*names, *MORE_PLACES))}
        if "out" in found:
            found["y"] = found["out"]
        return found | {"mean": found.get("statistics", -1)}

    def members(self, options: Options) -> dict[str, float]:
        """Return the members of a kernel's argument that are no addresses and do not depend on the launch, by name."""
        phi, (r_max, d_max) = options.phi, options.renorm or (1.0, 0.0)
        found = {"momentum": options.momentum, "eps": float(self.acc_dtype.type(options.eps)), "alpha": phi.alpha}
        found |= {"activation": phi.code, "r_max": r_max, "d_max": d_max, "frozen": int(options.frozen)}
        rows = self.problem.rows
        found |= {"divisor": rows - options.unbiased, "correction": options.unbiased}
        found |= {"rows": rows, "inverse_rows": 1 / rows, "inverse_divisor": 1 / max(rows - options.unbiased, 1)}
        return self.sizes | found


def view(x: Argument, axis: int, grouped: bool) -> tuple[Problem, int]:
    """Return the view of `x` with the channels in `axis` of each group, and that axis counted from the front.

    Raises
    ------
    ValueError
        If `x` has fewer than two dimensions, or none of this number.
    """
    if grouped and len(x.shape) < 3:
        raise ValueError(f"x must have the shape (T, N, C, ...), of T groups, got {x.shape}; or pass grouped=False")
    shape = x.shape[grouped:]
    dimensions = len(shape)
    if dimensions < 2:
        raise ValueError(f"{x.name} must have at least two dimensions, such as (N, C), got the shape {shape}")
    if not -dimensions <= axis < dimensions:
        wanted = f"axis must be from {-dimensions} to {dimensions - 1}"
        raise ValueError(f"{wanted} for {x.name} of the shape {shape}, got {shown(axis)}")
    axis %= dimensions
    outer, inner = math.prod(shape[:axis]), math.prod(shape[axis + 1 :])
    return Problem(x.shape[0] if grouped else 1, outer, shape[axis], inner, x.dtype), axis


def element_strides(argument: Argument, axis: int, grouped: bool) -> tuple[int, int, int, int] | None:
    """Return the strides of an array's group, outer, channel and inner axis in elements; None if no such four exist.

    They exist where the axes before the channels', and those behind, each follow one another as in a reshaped view.
    """
    itemsize = argument.dtype.itemsize
    if any(stride % itemsize for stride in argument.strides):
        return None
    group, *steps = ([] if grouped else [0]) + [stride // itemsize for stride in argument.strides]
    shape = argument.shape[grouped:]
    outer, inner = _merged(shape[:axis], steps[:axis]), _merged(shape[axis + 1 :], steps[axis + 1 :])
    return None if outer is None or inner is None else (group, outer, steps[axis], inner)


def mask_strides(mask: Argument, positions: tuple[int, ...], axis: int, grouped: bool) -> tuple[int, int, int] | None:
    """Return the strides of a mask's group, outer and inner axis, 0 where all positions share it; None as above.

    The mask covers the first axes of `positions`; `axis` is that of the channels in a group.
    """
    strides = [*mask.strides, *[0] * (len(positions) - len(mask.strides))]
    front = axis + grouped
    outer = _merged(positions[grouped:front], strides[grouped:front])
    inner = _merged(positions[front:], strides[front:])
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
