"""What the linear batch norms accept: shapes, types and layouts, by signatures; see ``runtime/checks.py``."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from bnkernels.ops.linear_batch_norm.launch import Sizes
from bnkernels.runtime import checks as check
from bnkernels.runtime import registry
from bnkernels.runtime import seam as rt
from bnkernels.runtime.arguments import accumulator

FORWARD_NAMES = ("y", "z", "statistics", "running_mean", "running_var", "x", "weight", "gamma", "beta")
GRADIENTS = ("dx", "dweight", "dgamma", "dbeta")
BACKWARD_NAMES = (*GRADIENTS, "workspace", "dy", "x", "weight", "gamma", "beta", "z", "statistics")
NORMS = ("batch", "layer", None)


def check_norm(norm: Any) -> None:
    """Check the name of a norm."""
    check.one_of("norm", norm, NORMS)


def pack_gradients(out: Any, wanted: tuple[bool, ...]) -> tuple[Any, ...]:
    """Check `out`, None or a tuple with an array for every gradient that is wanted; return it, or as many None."""
    if out is None:
        return (None,) * 4
    if not isinstance(out, tuple) or [array is not None for array in out] != list(wanted):
        expected = ", ".join(name if want else "None" for name, want in zip(GRADIENTS, wanted, strict=True))
        raise TypeError(f"out must be the tuple of arrays ({expected}), got {check.shown(out)}")
    return out


@lru_cache(maxsize=1024)
def checked_forward(norm: str | None, *signatures: check.Signature | None) -> tuple[rt.Runtime | None, Sizes]:
    """Check the arrays of `FORWARD_NAMES`; return their runtime and the sizes."""
    given = dict(zip(FORWARD_NAMES, signatures, strict=True))
    args = check.arguments(given, ("y", "z", "statistics", "running_mean", "running_var", "gamma", "beta"), 5)
    sizes = _checked_inputs(args)
    if norm is None and args["gamma"] is not None:
        raise ValueError("gamma belongs to a norm; with norm=None pass beta alone, the bias")
    for name in ("running_mean", "running_var"):
        if norm != "batch" and args[name] is not None:
            raise ValueError(f"{name} belongs to batch norm; with norm={norm!r} there is none to update")
    if norm == "batch" and sizes.rows == 1:
        raise ValueError("x has one example: one value per neuron has no variance; train on at least two")
    for name in ("running_mean", "running_var"):
        check.contiguous(args[name], (sizes.outputs,), accumulator(sizes.dtype))
    for name in ("y", "z"):
        check.contiguous(args[name], (sizes.rows, sizes.outputs), sizes.dtype)
    check.contiguous(args["statistics"], statistics_shape(norm, sizes), accumulator(sizes.dtype))
    return registry.runtime_of(args["x"].kind), sizes


@lru_cache(maxsize=1024)
def checked_backward(norm: str | None, *signatures: check.Signature | None) -> tuple[rt.Runtime | None, Sizes]:
    """Check the arrays of `BACKWARD_NAMES`; return their runtime and the sizes."""
    given = dict(zip(BACKWARD_NAMES, signatures, strict=True))
    args = check.arguments(given, (*BACKWARD_NAMES[:5], "gamma", "beta", "statistics"), 5)
    sizes = _checked_inputs(args)
    if norm == "layer" and args["statistics"] is None:
        raise ValueError("statistics must be those of the forward, got None; without a norm pass norm=None")
    if args["statistics"] is None and args["gamma"] is not None:
        raise ValueError("gamma belongs to a norm; without statistics pass beta alone, the bias")
    for name in ("dy", "z", "workspace"):
        check.contiguous(args[name], (sizes.rows, sizes.outputs), sizes.dtype)
    check.contiguous(args["statistics"], statistics_shape(norm, sizes), accumulator(sizes.dtype))
    check.contiguous(args["dx"], (sizes.rows, sizes.inputs), sizes.dtype)
    check.contiguous(args["dweight"], (sizes.inputs, sizes.outputs), sizes.dtype)
    for name in ("dgamma", "dbeta"):
        check.contiguous(args[name], (sizes.outputs,), accumulator(sizes.dtype))
    return registry.runtime_of(args["x"].kind), sizes


def statistics_shape(norm: str | None, sizes: Sizes) -> tuple[int, int]:
    """Return the shape of the statistics: of every neuron, or with layer norm of every example."""
    return 3, sizes.rows if norm == "layer" else sizes.outputs


def _checked_inputs(args: dict[str, check.Argument | None]) -> Sizes:
    """Check x, weight, gamma and beta; return the sizes."""
    x, weight = args["x"], args["weight"]
    check.floating(x)
    if len(x.shape) != 2:
        raise ValueError(f"x must have the shape (N, K), got {x.shape}; reshape it to two dimensions")
    if len(weight.shape) != 2:
        raise ValueError(f"weight must have the shape (K, M), got {weight.shape}")
    check.contiguous(x, x.shape, x.dtype)
    check.contiguous(weight, (x.shape[1], weight.shape[1]), x.dtype)
    for name in ("gamma", "beta"):
        check.contiguous(args[name], weight.shape[1:], accumulator(x.dtype))
    return Sizes(*x.shape, weight.shape[1], x.dtype)
