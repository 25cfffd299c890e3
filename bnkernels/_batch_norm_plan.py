"""What a call of a batch-norm op needs: its checks and its plan, both cached by signature, and the running of it.

The ops plan and run on every call. A layer, whose own arrays never change, plans once for every signature of its input.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

from bnkernels import _check as check
from bnkernels import _runtime as rt
from bnkernels._batch_norm_launch import backward_launch, forward_launch, inference_backward_launch, inference_launch
from bnkernels._batch_norm_numpy import Kept, backward_numpy, forward_numpy, inference_numpy
from bnkernels.activations import Activation

FORWARD = rt.arguments_type(
    "x gamma beta y statistics running_mean running_var",
    "rows channels row_stride channel_stride",
    "momentum eps",
    "activation",
)
INFERENCE = rt.arguments_type(
    "x gamma beta y running_mean running_var", "rows channels row_stride channel_stride", "eps", "activation"
)
BACKWARD = rt.arguments_type(
    "dy x gamma beta mean mean_low rstd dx dgamma dbeta",
    "rows channels dy_row_stride dy_channel_stride x_row_stride x_channel_stride",
    "eps",
    "activation",
)


class Plan(NamedTuple):
    """What a call's signatures decide: who runs it, and for a device which kernel, how, and with which sizes."""

    runtime: rt.Runtime | None
    shape: tuple[int, int]
    kernel: str | None = None
    launch: rt.Launch | None = None
    sizes: tuple[int, ...] = ()

    @property
    def empty(self) -> bool:
        """Whether there is nothing to compute."""
        return 0 in self.shape


# The arrays of each op, those that it writes first.
FORWARD_NAMES = ("y", "statistics", "running_mean", "running_var", "x", "gamma", "beta")
INFERENCE_NAMES = ("out", "x", "gamma", "beta", "running_mean", "running_var")
BACKWARD_NAMES = ("dx", "dgamma", "dbeta", "dy", "x", "gamma", "beta", "statistics", "running_mean", "running_var")


@lru_cache(maxsize=1024)
def plan_forward(*signatures: check.Signature | None) -> Plan:
    """Check the signatures of the arrays FORWARD_NAMES; plan the training forward."""
    optional = ("gamma", "beta", "running_mean", "running_var", "y", "statistics")
    args = check.arguments(dict(zip(FORWARD_NAMES, signatures, strict=True)), optional)
    x = args["x"]
    rows, channels = check.matrix(x)
    for name in ("gamma", "beta", "running_mean", "running_var"):
        check.contiguous(args[name], (channels,), x.dtype)
    check.contiguous(args["y"], (rows, channels), x.dtype)
    check.contiguous(args["statistics"], (3, channels), x.dtype)
    if rows == 1:
        raise ValueError(
            f"x has the shape {x.shape}: one value per channel has no variance; train on at least two examples, or "
            "use batch_norm_inference"
        )
    runtime = rt.runtime_of(x.kind)
    if runtime is None or 0 in x.shape:
        return Plan(runtime, x.shape)
    variant, launch = forward_launch(rows, channels, x.dtype)
    kernel = f"bnk_batch_norm_forward_{variant}_{rt.SUFFIX[x.dtype]}"
    return Plan(runtime, x.shape, kernel, launch, (rows, channels, *x.element_strides))


@lru_cache(maxsize=1024)
def plan_inference(*signatures: check.Signature | None) -> Plan:
    """Check the signatures of the arrays INFERENCE_NAMES; plan the inference forward."""
    args = check.arguments(dict(zip(INFERENCE_NAMES, signatures, strict=True)), ("gamma", "beta", "out"))
    x = args["x"]
    rows, channels = check.matrix(x)
    for name in ("gamma", "beta", "running_mean", "running_var"):
        check.contiguous(args[name], (channels,), x.dtype)
    check.contiguous(args["out"], (rows, channels), x.dtype)
    runtime = rt.runtime_of(x.kind)
    if runtime is None or 0 in x.shape:
        return Plan(runtime, x.shape)
    kernel = f"bnk_batch_norm_inference_{rt.SUFFIX[x.dtype]}"
    return Plan(runtime, x.shape, kernel, inference_launch(rows, channels), (rows, channels, *x.element_strides))


@lru_cache(maxsize=1024)
def plan_backward(*signatures: check.Signature | None) -> Plan:
    """Check the signatures of the arrays BACKWARD_NAMES; plan the backward: of training where `statistics` is given."""
    given = dict(zip(BACKWARD_NAMES, signatures, strict=True))
    frozen = given["running_mean"] is not None or given["running_var"] is not None
    optional = ("statistics",) if frozen else ("running_mean", "running_var")
    args = check.arguments(given, ("gamma", "beta", "dx", "dgamma", "dbeta", *optional))
    x, dy = args["x"], args["dy"]
    rows, channels = check.matrix(x)
    check.like(dy, (rows, channels), x.dtype)
    check.contiguous(args["statistics"], (3, channels), x.dtype)
    for name in ("gamma", "beta", "running_mean", "running_var", "dgamma", "dbeta"):
        check.contiguous(args[name], (channels,), x.dtype)
    check.contiguous(args["dx"], (rows, channels), x.dtype)
    runtime = rt.runtime_of(x.kind)
    if runtime is None or 0 in x.shape:
        return Plan(runtime, x.shape)
    variant, launch = (inference_backward_launch if frozen else backward_launch)(rows, channels, x.dtype)
    kernel = f"bnk_batch_norm_{variant}_{rt.SUFFIX[x.dtype]}"
    return Plan(runtime, x.shape, kernel, launch, (rows, channels, *dy.element_strides, *x.element_strides))


def run_forward(
    plan: Plan, arrays: tuple, momentum: float, eps: float, phi: Activation
) -> tuple[Any, Any, Kept | None]:
    """Run the training forward on the arrays FORWARD_NAMES.

    Returns `y`, `statistics`, and from NumPy what its backward may otherwise compute again.
    """
    y, statistics, running_mean, running_var, x, gamma, beta = arrays
    runtime, kept = plan.runtime, None
    if y is None:
        y, statistics = rt.empty(runtime, plan.shape, x), rt.empty(runtime, (3, plan.shape[1]), x)
    if plan.empty:
        statistics[...] = 0
    elif runtime is None:
        kept = forward_numpy(x, gamma, beta, running_mean, running_var, momentum, eps, phi, y, statistics)
    else:
        check.one_device(runtime, FORWARD_NAMES, arrays)
        pointers = rt.addresses(runtime, x, gamma, beta, y, statistics, running_mean, running_var)
        arguments = rt.pack(FORWARD[x.dtype], *pointers, *plan.sizes, momentum, eps, phi.code)
        runtime.launch("batch_norm_forward", plan.kernel, plan.launch, arguments, x)
    return y, statistics, kept


def run_inference(plan: Plan, arrays: tuple, eps: float, phi: Activation) -> Any:
    """Run the inference forward on the arrays INFERENCE_NAMES; return the output."""
    out, x, gamma, beta, running_mean, running_var = arrays
    runtime = plan.runtime
    if out is None:
        out = rt.empty(runtime, plan.shape, x)
    if plan.empty:
        return out
    if runtime is None:
        inference_numpy(x, gamma, beta, running_mean, running_var, eps, phi, out)
    else:
        check.one_device(runtime, INFERENCE_NAMES, arrays)
        pointers = rt.addresses(runtime, x, gamma, beta, out, running_mean, running_var)
        arguments = rt.pack(INFERENCE[x.dtype], *pointers, *plan.sizes, eps, phi.code)
        runtime.launch("batch_norm_forward", plan.kernel, plan.launch, arguments, x)
    return out


def run_backward(
    plan: Plan, arrays: tuple, eps: float, phi: Activation, kept: Kept | None = None
) -> tuple[Any, Any, Any]:
    """Run either backward on the arrays BACKWARD_NAMES; return the three gradients."""
    dx, dgamma, dbeta, dy, x, gamma, beta, statistics, running_mean, running_var = arrays
    # The kernels take the rows of the statistics, or the running ones in the places of mean and rstd.
    rows = (running_mean, None, running_var) if statistics is None else (statistics[0], statistics[1], statistics[2])
    runtime = plan.runtime
    if dx is None:
        dx = rt.empty(runtime, plan.shape, x)
        dgamma, dbeta = rt.empty(runtime, plan.shape[1:], x), rt.empty(runtime, plan.shape[1:], x)
    if plan.empty:
        dgamma[...] = 0
        dbeta[...] = 0
    elif runtime is None:
        backward_numpy(dy, x, gamma, beta, *rows, eps, phi, kept, dx, dgamma, dbeta)
    else:
        check.one_device(runtime, BACKWARD_NAMES, arrays)
        pointers = rt.addresses(runtime, dy, x, gamma, beta, *rows, dx, dgamma, dbeta)
        arguments = rt.pack(BACKWARD[x.dtype], *pointers, *plan.sizes, eps, phi.code)
        runtime.launch("batch_norm_backward", plan.kernel, plan.launch, arguments, x)
    return dx, dgamma, dbeta
