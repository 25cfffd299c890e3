"""Problem of layer norm and RMS norm: a matrix whose rows are normalised, and the checks of the arrays."""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

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

    Layer norm centres the rows, RMS norm does not.
    """

    rows: int
    columns: int
    dtype: np.dtype
    params_in_storage_type: bool = False
    centred: bool = True

    @property
    def acc_dtype(self) -> np.dtype:
        """The data type of the accumulator."""
        return accumulator(self.dtype)

    @property
    def params_dtype(self) -> np.dtype:
        """The data type of scale and shift, and of their gradients."""
        return self.dtype if self.params_in_storage_type else self.acc_dtype

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


def _forward(args: Arguments, axes: int, *, centred: bool = True) -> Problem:
    problem = _rows(args, axes, centred)
    check.contiguous(args["y"], args["x"].shape, problem.dtype)
    return problem


def _backward(args: Arguments, axes: int, *, centred: bool = True) -> Problem:
    problem, workspace = _rows(args, axes, centred), args["workspace"]
    for name in ("dx", "dy"):
        check.contiguous(args[name], args["x"].shape, problem.dtype)
    for name in ("dgamma", "dbeta"):
        check.contiguous(args.get(name), args["x"].shape[-axes:], problem.params_dtype)
    if workspace is not None:
        wanted = MOST_PARTIALS * problem.columns
        if len(workspace.shape) != 1 or workspace.shape[0] < wanted:
            raise ValueError(f"workspace must have one axis of at least {wanted} numbers, got {workspace.shape}")
        check.contiguous(workspace, workspace.shape, problem.acc_dtype)
    return problem


def _rows(args: Arguments, axes: int, centred: bool) -> Problem:
    """Check x, gamma, beta and statistics."""
    x = args["x"]
    check.floating(x)
    if len(x.shape) < axes or 0 in x.shape[-axes:]:
        wanted = "(..., C), C at least 1," if axes == 1 else f"(..., *S), S of {axes} axes, each at least 1 long,"
        raise ValueError(f"x must have the shape {wanted} got {x.shape}: there is nothing to normalise")
    check.contiguous(x, x.shape, x.dtype)
    vectors = [args.get(name) for name in ("gamma", "beta")]
    in_storage_type = x.dtype.itemsize == 2 and any(one is not None and one.dtype == x.dtype for one in vectors)
    sizes = math.prod(x.shape[:-axes]), math.prod(x.shape[-axes:])
    problem = Problem(*sizes, x.dtype, in_storage_type, centred)
    for one in vectors:
        check.contiguous(one, x.shape[-axes:], problem.params_dtype)
    check.contiguous(args["statistics"], (problem.statistics_shape[0], *x.shape[:-axes]), problem.acc_dtype)
    return problem


FORWARD = Operands("y statistics", "x gamma beta", _forward, optional="y statistics gamma beta", in_place="x")
BACKWARD = Operands(
    *("dx dgamma dbeta workspace", "dy x gamma beta statistics", _backward),
    optional="dx dgamma dbeta workspace gamma beta",
    in_place="dy",
)
RMS_FORWARD = Operands(
    *("y statistics", "x gamma", partial(_forward, centred=False)),
    optional="y statistics gamma",
    in_place="x",
)
RMS_BACKWARD = Operands(
    *("dx dgamma workspace", "dy x gamma statistics", partial(_backward, centred=False)),
    optional="dx dgamma workspace gamma",
    in_place="dy",
)
