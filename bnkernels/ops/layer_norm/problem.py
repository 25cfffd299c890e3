"""Problem of layer norm: a matrix whose rows are normalised, and the checks of the arrays."""

from __future__ import annotations

import math
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
    """A matrix (rows, columns) of a data type; scale and shift may be of that type too, instead of the accumulator's."""

    rows: int
    columns: int
    dtype: np.dtype
    params_in_storage_type: bool = False

    @property
    def acc_dtype(self) -> np.dtype:
        """The data type of the accumulator."""
        return accumulator(self.dtype)

    @property
    def params_dtype(self) -> np.dtype:
        """The data type of scale and shift, and of their gradients."""
        return self.dtype if self.params_in_storage_type else self.acc_dtype

    @property
    def count(self) -> int:
        """The numbers of a vector."""
        return VECTOR // self.dtype.itemsize

    @property
    def vectors(self) -> int:
        """The vectors of a row, the last of which may be a part."""
        return ceil_div(self.columns, self.count)


Arguments = dict[str, check.Argument | None]


def _forward(args: Arguments, axes: int) -> Problem:
    problem = _rows(args, axes)
    check.contiguous(args["y"], args["x"].shape, problem.dtype)
    return problem


def _backward(args: Arguments, axes: int) -> Problem:
    problem, workspace = _rows(args, axes), args["workspace"]
    for name in ("dx", "dy"):
        check.contiguous(args[name], args["x"].shape, problem.dtype)
    for name in ("dgamma", "dbeta"):
        check.contiguous(args[name], args["x"].shape[-axes:], problem.params_dtype)
    if workspace is not None:
        wanted = MOST_PARTIALS * problem.columns
        if len(workspace.shape) != 1 or workspace.shape[0] < wanted:
            raise ValueError(f"workspace must have one axis of at least {wanted} numbers, got {workspace.shape}")
        check.contiguous(workspace, workspace.shape, problem.acc_dtype)
    return problem


def _rows(args: Arguments, axes: int) -> Problem:
    """Check x, gamma, beta and statistics."""
    x = args["x"]
    check.floating(x)
    if len(x.shape) < axes or 0 in x.shape[-axes:]:
        wanted = "(..., C), C at least 1," if axes == 1 else f"(..., *S), S of {axes} axes, each at least 1 long,"
        raise ValueError(f"x must have the shape {wanted} got {x.shape}: there is nothing to normalise")
    check.contiguous(x, x.shape, x.dtype)
    vectors = [args[name] for name in ("gamma", "beta")]
    in_storage_type = x.dtype.itemsize == 2 and any(one is not None and one.dtype == x.dtype for one in vectors)
    problem = Problem(math.prod(x.shape[:-axes]), math.prod(x.shape[-axes:]), x.dtype, in_storage_type)
    for one in vectors:
        check.contiguous(one, x.shape[-axes:], problem.params_dtype)
    check.contiguous(args["statistics"], (3, *x.shape[:-axes]), problem.acc_dtype)
    return problem


FORWARD = Operands("y statistics", "x gamma beta", _forward, optional="y statistics gamma beta", in_place="x")
BACKWARD = Operands(
    *("dx dgamma dbeta workspace", "dy x gamma beta statistics", _backward),
    optional="dx dgamma dbeta workspace gamma beta",
    in_place="dy",
)
