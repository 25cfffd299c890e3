"""Problem of layer norm, RMS norm and group norm: a matrix whose rows are normalised, and the checks of the arrays."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from bnkernels.runtime import checks as check
from bnkernels.runtime.arguments import accumulator
from bnkernels.runtime.operands import Operands
from bnkernels.runtime.seam import ceil_div
from bnkernels.runtime.workspace import MOST_SPLITS

VECTOR = 16  # bytes, as in cuda/lib/reduce/vector_rows.cuh
FULL = 2  # shape of rows all of whose threads have as many whole vectors, as in vector_rows.cuh; 1: whole vectors
IN_ACCUMULATOR_TYPE, IN_STORAGE_TYPE = 1, 2  # type of scale and shift, as in vector_rows.cuh
MOST_PARTIALS = 2 * MOST_SPLITS  # sums of a column


class Problem(NamedTuple):
    """A matrix (rows, columns) of a data type; scale and shift may be of that type too, instead of the accumulator's.

    Layer norm centres the rows, RMS norm does not. In group norm the rows of an example are its groups of channels, of
    which `inner` columns share one: neighbours, or if channels come last the same one of every position.
    """

    rows: int
    columns: int
    dtype: np.dtype
    params_in_storage_type: bool = False
    centred: bool = True
    channel_groups: int = 1
    inner: int = 1
    channels_last: bool = False

    @property
    def adjacent(self) -> int:
        """The channels of a row that are neighbours in every position, 0 where those of all rows are not."""
        return self.channels if self.channels_last else 0

    @property
    def acc_dtype(self) -> np.dtype:
        """The data type of the accumulator."""
        return accumulator(self.dtype)

    @property
    def params_dtype(self) -> np.dtype:
        """The data type of scale and shift, and of their gradients."""
        return self.dtype if self.params_in_storage_type else self.acc_dtype

    @property
    def channels(self) -> int:
        """The channels of a row."""
        return self.columns // self.inner

    @property
    def statistics_shape(self) -> tuple[int, int]:
        """The shape of the statistics: rows mean, mean_low and rstd, or rstd alone."""
        return (3 if self.centred else 1), self.rows

    @property
    def count(self) -> int:
        """The numbers of a vector."""
        return VECTOR // self.dtype.itemsize

    @property
    def vectors(self) -> int:
        """The vectors of a row, the last of which may be a part."""
        return ceil_div(self.columns, self.count)


Arguments = dict[str, check.Argument | None]
Shape = tuple[int, ...]


class Checked(NamedTuple):
    """A problem, and the shapes of its statistics and of its parameters."""

    problem: Problem
    statistics: Shape
    parameters: Shape


Rows = Callable[..., Checked]


def _forward(args: Arguments, *options: int, rows: Rows) -> Checked:
    checked = rows(args, *options)
    check.contiguous(args["y"], args["x"].shape, checked.problem.dtype)
    return checked


def _backward(args: Arguments, *options: int, rows: Rows) -> Checked:
    checked, workspace = rows(args, *options), args["workspace"]
    problem = checked.problem
    for name in ("dx", "dy"):
        check.contiguous(args[name], args["x"].shape, problem.dtype)
    for name in ("dgamma", "dbeta"):
        check.contiguous(args.get(name), checked.parameters, problem.params_dtype)
    if workspace is not None:
        wanted = max(MOST_PARTIALS, 4 * problem.channel_groups) * problem.columns
        if len(workspace.shape) != 1 or workspace.shape[0] < wanted:
            raise ValueError(f"workspace must have one axis of at least {wanted} numbers, got {workspace.shape}")
        check.contiguous(workspace, workspace.shape, problem.acc_dtype)
    return checked


def _trailing(args: Arguments, axes: int, *, centred: bool = True) -> Checked:
    """Check x, gamma, beta and statistics of a norm over the last axes."""
    x = args["x"]
    check.floating(x)
    if len(x.shape) < axes or 0 in x.shape[-axes:]:
        wanted = "(..., C), C at least 1," if axes == 1 else f"(..., *S), S of {axes} axes, each at least 1 long,"
        raise ValueError(f"x must have the shape {wanted} got {x.shape}: there is nothing to normalise")
    leading, last = x.shape[:-axes], x.shape[-axes:]
    return _of_rows(args, math.prod(leading), math.prod(last), leading, last, centred=centred)


def _channel_groups(args: Arguments, groups: int, *, last: bool = False) -> Checked:
    """Check the same of a norm over groups of channels, in axis 1 or the last, and all positions."""
    x = args["x"]
    check.floating(x)
    if len(x.shape) < 2 or 0 in x.shape[1:]:
        wanted = "(N, ..., C)" if last else "(N, C, ...)"
        raise ValueError(f"x must have the shape {wanted}, no axis empty but N, got {x.shape}: nothing to normalise")
    channels = x.shape[-1 if last else 1]
    if channels % groups:
        raise ValueError(f"groups must divide the {channels} channels of x, got {groups}")
    inner = math.prod(x.shape[1:]) // channels
    if last and channels // groups * inner >= 2**31:
        raise ValueError(
            f"x has {channels // groups * inner} numbers in a group, 2^31 or more: pass channels in axis 1, with axis=1"
        )
    sizes, more = (x.shape[0] * groups, channels // groups * inner), {"channels_last": last and inner > 1}
    return _of_rows(args, *sizes, (x.shape[0], groups), (channels,), channel_groups=groups, inner=inner, **more)


def _of_rows(args: Arguments, rows: int, columns: int, leading: Shape, of_parameters: Shape, **more: Any) -> Checked:
    """Check the layouts and the types of x, gamma, beta and statistics."""
    x, vectors = args["x"], [args.get(name) for name in ("gamma", "beta")]
    check.contiguous(x, x.shape, x.dtype)
    in_storage_type = x.dtype.itemsize == 2 and any(one is not None and one.dtype == x.dtype for one in vectors)
    problem = Problem(rows, columns, x.dtype, in_storage_type, **more)
    for one in vectors:
        check.contiguous(one, of_parameters, problem.params_dtype)
    of_statistics = problem.statistics_shape[0], *leading
    check.contiguous(args["statistics"], of_statistics, problem.acc_dtype)
    return Checked(problem, of_statistics, of_parameters)


def _operands(rows: Rows, optional: str = "gamma beta") -> tuple[Operands, Operands]:
    """Return the operands of forward and backward, which have the parameters `optional`."""
    gradients = " ".join(f"d{name}" for name in optional.split())
    return (
        Operands(
            *("y statistics", f"x {optional}", partial(_forward, rows=rows)),
            optional=f"y statistics {optional}",
            in_place="x",
        ),
        Operands(
            *(f"dx {gradients} workspace", f"dy x {optional} statistics", partial(_backward, rows=rows)),
            optional=f"dx {gradients} workspace {optional}",
            in_place="dy",
        ),
    )


FORWARD, BACKWARD = _operands(_trailing)
RMS_FORWARD, RMS_BACKWARD = _operands(partial(_trailing, centred=False), "gamma")
GROUP_FORWARD, GROUP_BACKWARD = _operands(_channel_groups)
LAST_GROUP_FORWARD, LAST_GROUP_BACKWARD = _operands(partial(_channel_groups, last=True))
