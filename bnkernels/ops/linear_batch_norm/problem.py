"""Problem of the linear layers with a norm: a product (N, K) times (K, M), and the checks of the arrays."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from bnkernels.runtime import checks as check
from bnkernels.runtime.arguments import accumulator
from bnkernels.runtime.operands import Operands

GRADIENTS = ("dx", "dweight", "dgamma", "dbeta")
NORMS = ("batch", "layer", None)
PRECISIONS = ("tf32x3", None)


class Problem(NamedTuple):
    """(N, K) times (K, M), and the data type."""

    rows: int
    inputs: int
    outputs: int
    dtype: np.dtype

    @property
    def acc_dtype(self) -> np.dtype:
        """The data type of the accumulator."""
        return accumulator(self.dtype)

    def statistics_shape(self, norm: str | None) -> tuple[int, int]:
        """Return the shape of the statistics: of every neuron, or with layer norm of every example."""
        return 3, self.rows if norm == "layer" else self.outputs


def check_norm(norm: Any) -> None:
    """Check the name of a norm."""
    check.one_of("norm", norm, NORMS)


def check_precision(precision: Any) -> None:
    """Check the name of an arithmetic of products."""
    check.one_of("precision", precision, PRECISIONS)


Arguments = dict[str, check.Argument | None]


def _forward(args: Arguments, norm: str | None, precision: str | None) -> Problem:
    problem = _inputs(args, precision)
    if norm is None and args["gamma"] is not None:
        raise ValueError("gamma belongs to a norm; with norm=None pass beta alone, the bias")
    for name in ("running_mean", "running_var"):
        if norm != "batch" and args[name] is not None:
            raise ValueError(f"{name} belongs to batch norm; with norm={norm!r} there is none to update")
    if norm == "batch" and problem.rows == 1:
        raise ValueError("x has one example: one value per neuron has no variance; train on at least two")
    for name in ("running_mean", "running_var"):
        check.contiguous(args[name], (problem.outputs,), problem.acc_dtype)
    for name in ("y", "z"):
        check.contiguous(args[name], (problem.rows, problem.outputs), problem.dtype)
    check.contiguous(args["statistics"], problem.statistics_shape(norm), problem.acc_dtype)
    return problem


def _backward(args: Arguments, norm: str | None, precision: str | None) -> Problem:
    problem = _inputs(args, precision)
    if norm == "layer" and args["statistics"] is None:
        raise ValueError("statistics must be those of the forward, got None; without a norm pass norm=None")
    if args["statistics"] is None and args["gamma"] is not None:
        raise ValueError("gamma belongs to a norm; without statistics pass beta alone, the bias")
    for name in ("dy", "z", "workspace"):
        check.contiguous(args[name], (problem.rows, problem.outputs), problem.dtype)
    check.contiguous(args["statistics"], problem.statistics_shape(norm), problem.acc_dtype)
    check.contiguous(args["dx"], (problem.rows, problem.inputs), problem.dtype)
    check.contiguous(args["dweight"], (problem.inputs, problem.outputs), problem.dtype)
    for name in ("dgamma", "dbeta"):
        check.contiguous(args[name], (problem.outputs,), problem.acc_dtype)
    return problem


def _inputs(args: Arguments, precision: str | None) -> Problem:
    """Check x, weight, gamma and beta."""
    x, weight = args["x"], args["weight"]
    check.floating(x)
    if precision is not None and x.dtype != np.float32:
        raise ValueError(f"precision='{precision}' is for float32 data, got {x.dtype.name}; pass precision=None")
    if len(x.shape) != 2:
        raise ValueError(f"x must have the shape (N, K), got {x.shape}; reshape it to two dimensions")
    if len(weight.shape) != 2:
        raise ValueError(f"weight must have the shape (K, M), got {weight.shape}")
    check.contiguous(x, x.shape, x.dtype)
    check.contiguous(weight, (x.shape[1], weight.shape[1]), x.dtype)
    for name in ("gamma", "beta"):
        check.contiguous(args[name], weight.shape[1:], accumulator(x.dtype))
    return Problem(*x.shape, weight.shape[1], x.dtype)


FORWARD = Operands(
    *("y z statistics running_mean running_var", "x weight gamma beta", _forward),
    optional="y z statistics running_mean running_var gamma beta",
)
BACKWARD = Operands(
    *("dx dweight dgamma dbeta workspace", "dy x weight gamma beta z statistics", _backward),
    optional="dx dweight dgamma dbeta workspace gamma beta statistics",
)
