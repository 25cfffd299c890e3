"""What a call of a batch-norm op needs: its checks and its plan, both cached by signature, and the running of it.

The ops plan and run on every call. A layer, whose own arrays never change, plans once for every signature of its input.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from bnkernels.ops.activations import Activation
from bnkernels.ops.batch_norm.cooperative import VECTOR, Spread, Tensor, choose_spread, spread_arguments
from bnkernels.ops.batch_norm.cpu import Kept, backward_numpy, forward_numpy
from bnkernels.ops.batch_norm.launch import (
    HELD,
    backward_launch,
    forward_launch,
    inference_backward_launch,
    inference_launch,
)
from bnkernels.ops.batch_norm.matrices import backward_host, forward_host, inference_host
from bnkernels.ops.batch_norm.problem import Layout, element_strides, layout_of
from bnkernels.runtime import checks as check
from bnkernels.runtime import registry
from bnkernels.runtime import seam as rt
from bnkernels.runtime.arguments import accumulator, addresses, arguments_type, empty, pack, suffix
from bnkernels.runtime.replay import NEW, Call, ReplayCache

SIZES = "outer channels inner"
X_STRIDES = "x_outer x_channel x_inner residual_outer residual_channel residual_inner"
FORWARD = arguments_type(
    "x residual gamma beta y statistics running_mean running_var",
    f"{SIZES} {X_STRIDES}",
    "momentum divisor eps alpha",
    "activation",
)
INFERENCE = arguments_type(
    "x residual gamma beta y running_mean running_var", f"{SIZES} {X_STRIDES}", "eps alpha", "activation"
)
BACKWARD = arguments_type(
    "dy x residual gamma beta mean mean_low rstd dx dgamma dbeta dresidual",
    f"{SIZES} dy_outer dy_channel dy_inner {X_STRIDES}",
    "eps alpha",
    "activation",
)


class Plan(NamedTuple):
    """What a call's signatures decide: who runs it, and for a device which kernel, how, and with which sizes."""

    runtime: rt.Runtime | None
    layout: Layout
    shape: tuple[int, ...]
    wide: np.dtype  # the type of parameters and statistics
    empty: bool  # whether there is nothing to compute
    twin: bool  # whether the NumPy twins take the arrays as they are
    kernel: str | None = None
    launch: rt.Launch | None = None
    sizes: tuple[int, ...] = ()
    copied: tuple[str, ...] = ()  # inputs that no three strides describe
    tensor: Tensor | None = None  # for the choice of a spread kernel, which the device decides as well


FORWARD_CALLS, INFERENCE_CALLS = ReplayCache(), ReplayCache()
BACKWARD_CALLS, INFERENCE_BACKWARD_CALLS = ReplayCache(), ReplayCache()
# The arrays of each op, those that it writes first.
FORWARD_NAMES = ("y", "statistics", "running_mean", "running_var", "x", "residual", "gamma", "beta")
INFERENCE_NAMES = ("out", "x", "residual", "gamma", "beta", "running_mean", "running_var")
BACKWARD_NAMES = (
    *("dx", "dgamma", "dbeta", "dresidual", "dy", "x", "residual", "gamma", "beta"),
    *("statistics", "running_mean", "running_var"),
)
OPTIONAL = ("gamma", "beta", "residual")
GRADIENTS = ("dx", "dgamma", "dbeta", "dresidual")


def _checked(
    names: tuple[str, ...], written: int, signatures: tuple, axis: Any, optional: tuple[str, ...]
) -> tuple[dict, Layout]:
    """Check all arrays of an op, of which the first are `written`, against `x`; return them and the layout."""
    args = check.arguments(dict(zip(names, signatures, strict=True)), (*OPTIONAL, *optional), written)
    x = args["x"]
    check.floating(x)
    layout = layout_of(x, axis)
    wide, channels = accumulator(x.dtype), layout.channels
    for name, argument in args.items():
        if name in ("dy", "residual", "ddx", "ddresidual"):
            check.like(argument, x.shape, x.dtype)
        elif name in ("y", "out", "dx", "dresidual", "ddy"):
            check.contiguous(argument, x.shape, x.dtype)
        elif name != "x":
            check.contiguous(argument, (3, channels) if name == "statistics" else (channels,), wide)
    return args, layout


def _planned(args: dict, layout: Layout, inputs: tuple[str, ...], choose: Callable[..., tuple[str, rt.Launch]]) -> Plan:
    """Return the plan of a call whose arrays have been checked."""
    x = args["x"]
    runtime = registry.runtime_of(x.kind)
    twin = runtime is None and layout == (*x.shape, 1, 1) and x.dtype.itemsize > 2
    plan = Plan(runtime, layout, x.shape, accumulator(x.dtype), 0 in x.shape, twin)
    if runtime is None or plan.empty:
        return plan
    sizes, copied, given = [layout.outer, layout.channels, layout.inner], [], []
    for name in inputs:
        strides = (0, 0, 0) if args[name] is None else element_strides(args[name], layout.axis)
        if strides is None:
            copied.append(name)
            strides = layout.channels * layout.inner, layout.inner, 1
        sizes += strides
        if args[name] is not None:
            given.append(strides)
    variant, launch = choose(layout.outer, layout.channels, x.dtype, layout.inner)
    kernel = f"bnk_batch_norm_{variant}_{suffix(x.dtype)}"
    tensor = Tensor(layout.outer, layout.channels, layout.inner, x.dtype, tuple(given))
    if variant.endswith(f"registers{HELD}") or "inference" in variant or not tensor.may_spread:
        tensor = None
    return plan._replace(kernel=kernel, launch=launch, sizes=tuple(sizes), copied=tuple(copied), tensor=tensor)


@lru_cache(maxsize=1024)
def plan_forward(axis: Any, *signatures: check.Signature | None) -> Plan:
    """Check the signatures of the arrays FORWARD_NAMES; plan the training forward."""
    optional = ("running_mean", "running_var", "y", "statistics")
    args, layout = _checked(FORWARD_NAMES, 4, signatures, axis, optional)
    if layout.rows == 1:
        raise ValueError(
            f"x has the shape {args['x'].shape}: one value per channel has no variance; train on at least two "
            "examples, or use batch_norm_inference"
        )

    def choose(*sizes: Any) -> tuple[str, rt.Launch]:
        variant, launch = forward_launch(*sizes)
        return f"forward_{variant}", launch

    return _planned(args, layout, ("x", "residual"), choose)


@lru_cache(maxsize=1024)
def plan_inference(axis: Any, *signatures: check.Signature | None) -> Plan:
    """Check the signatures of the arrays INFERENCE_NAMES; plan the inference forward."""
    args, layout = _checked(INFERENCE_NAMES, 1, signatures, axis, ("out",))
    return _planned(args, layout, ("x", "residual"), lambda *sizes: ("inference", inference_launch(*sizes)))


@lru_cache(maxsize=1024)
def plan_backward(axis: Any, *signatures: check.Signature | None) -> Plan:
    """Check the signatures of the arrays BACKWARD_NAMES; plan the backward of training."""
    args, layout = _checked(BACKWARD_NAMES, 4, signatures, axis, (*GRADIENTS, "running_mean", "running_var"))
    return _planned(args, layout, ("dy", "x", "residual"), backward_launch)


@lru_cache(maxsize=1024)
def plan_inference_backward(axis: Any, *signatures: check.Signature | None) -> Plan:
    """Check the signatures of the arrays BACKWARD_NAMES; plan the backward of inference, without `statistics`."""
    args, layout = _checked(BACKWARD_NAMES, 4, signatures, axis, (*GRADIENTS, "statistics"))
    return _planned(args, layout, ("dy", "x", "residual"), inference_backward_launch)


def _sources(plan: Plan, **inputs: Any) -> tuple[Any, ...]:
    """Return the inputs, those that the kernels cannot walk through copied."""
    if not plan.copied:
        return tuple(inputs.values())
    return tuple(plan.runtime.contiguous(array) if name in plan.copied else array for name, array in inputs.items())


def _spread(plan: Plan, direction: str, x: Any, data: int) -> Spread | None:
    """Return how a spread kernel would run, or None; `data` are the addresses of all data, or-ed."""
    if plan.tensor is None or data % VECTOR:
        return None
    return choose_spread(direction, plan.tensor, plan.runtime.limits(x))


def _spread_launch(
    plan: Plan, spread: Spread, pointers: tuple[int, ...], scalars: tuple[float, ...], code: int, x: Any
) -> tuple[str, str, rt.Launch, np.ndarray]:
    """Return source, kernel, launch and argument of a spread kernel."""
    workspace = plan.runtime.workspace(x) if spread.launch.cooperative else 0
    arguments = spread_arguments(spread, plan.tensor, pointers, workspace, scalars, code)
    kernel = f"bnk_batch_norm_{spread.variant}_{suffix(plan.tensor.dtype)}"
    return f"batch_norm_{spread.direction}_cooperative", kernel, spread.launch, arguments


def run_forward(
    plan: Plan,
    arrays: tuple,
    momentum: float,
    eps: float,
    phi: Activation,
    unbiased: bool = True,
    call: Call = NEW,
) -> tuple[Any, Any, Kept | None]:
    """Run the training forward on the arrays FORWARD_NAMES.

    Returns `y`, `statistics`, and from NumPy what its backward may otherwise compute again. `call` is
    what `ReplayCache.replay` returned.
    """
    y, statistics, running_mean, running_var, x, residual, gamma, beta = arrays
    runtime, layout, kept = plan.runtime, plan.layout, None
    divisor = float(layout.rows - unbiased)  # of the squares, for the running variance
    if y is None:
        y, statistics = empty(runtime, plan.shape, x), empty(runtime, (3, layout.channels), x, plan.wide)
    if plan.empty:
        statistics[...] = 0
    elif plan.twin:
        vectors = gamma, beta, running_mean, running_var
        kept = forward_numpy(x, residual, *vectors, momentum, divisor, eps, phi, y, statistics)
    elif runtime is None:
        vectors = gamma, beta, running_mean, running_var
        kept = forward_host(layout, x, residual, vectors, momentum, divisor, eps, phi, y, statistics)
    else:
        check.one_device(runtime, FORWARD_NAMES, arrays)
        sources = _sources(plan, x=x, residual=residual)
        pointers = addresses(runtime, *sources, gamma, beta, y, statistics, running_mean, running_var)
        spread = _spread(plan, "forward", x, pointers[0] | pointers[1] | pointers[4])
        if spread is not None:
            made = _spread_launch(plan, spread, pointers, (momentum, divisor, eps, phi.alpha), phi.code, x)
        else:
            arguments = pack(FORWARD[plan.wide], *pointers, *plan.sizes, momentum, divisor, eps, phi.alpha, phi.code)
            made = "batch_norm_forward", plan.kernel, plan.launch, arguments
        call.launch(runtime, *made, x, replayable=not plan.copied)
    return y, statistics, kept


def run_inference(plan: Plan, arrays: tuple, eps: float, phi: Activation, call: Call = NEW) -> Any:
    """Run the inference forward on the arrays INFERENCE_NAMES; return the output."""
    out, x, residual, gamma, beta, running_mean, running_var = arrays
    runtime = plan.runtime
    if out is None:
        out = empty(runtime, plan.shape, x)
    if plan.empty:
        return out
    if runtime is None:
        inference_host(plan.layout, x, residual, (gamma, beta, running_mean, running_var), eps, phi, out)
    else:
        check.one_device(runtime, INFERENCE_NAMES, arrays)
        sources = _sources(plan, x=x, residual=residual)
        pointers = addresses(runtime, *sources, gamma, beta, out, running_mean, running_var)
        arguments = pack(INFERENCE[plan.wide], *pointers, *plan.sizes, eps, phi.alpha, phi.code)
        made = "batch_norm_forward", plan.kernel, plan.launch, arguments
        call.launch(runtime, *made, x, replayable=not plan.copied)
    return out


def run_backward(
    plan: Plan,
    arrays: tuple,
    eps: float,
    phi: Activation,
    kept: Kept | None = None,
    call: Call = NEW,
) -> tuple[Any, ...]:
    """Run either backward on the arrays BACKWARD_NAMES; return the gradients, the residual's too where there is one."""
    dx, dgamma, dbeta, dresidual, dy, x, residual, gamma, beta, statistics, running_mean, running_var = arrays
    # In the places of mean and rstd, both ways take running statistics.
    rows = (running_mean, None, running_var)
    runtime, wide = plan.runtime, plan.wide
    if statistics is not None and runtime is None:
        rows = (statistics[0], statistics[1], statistics[2])
    if dx is None:
        vector = (plan.layout.channels,)
        dx = empty(runtime, plan.shape, x)
        dgamma, dbeta = empty(runtime, vector, x, wide), empty(runtime, vector, x, wide)
        dresidual = None if residual is None else empty(runtime, plan.shape, x)
    if plan.empty:
        dgamma[...] = 0
        dbeta[...] = 0
    elif plan.twin:
        backward_numpy(dy, x, residual, gamma, beta, *rows, eps, phi, kept, dx, dgamma, dbeta, dresidual)
    elif runtime is None:
        outputs = dx, dgamma, dbeta, dresidual
        backward_host(plan.layout, (dy, x, residual), (gamma, beta, *rows), eps, phi, kept, outputs)
    else:
        check.one_device(runtime, BACKWARD_NAMES, arrays)
        sources = _sources(plan, dy=dy, x=x, residual=residual)
        before = addresses(runtime, *sources, gamma, beta)
        after = addresses(runtime, dx, dgamma, dbeta, dresidual)
        if statistics is None:
            rows = addresses(runtime, *rows)
        else:  # to slice an array costs more than all of this
            mean, row = runtime.pointer(statistics), plan.layout.channels * wide.itemsize
            rows = mean, mean + row, mean + 2 * row
        pointers = (*before, *rows, *after)
        spread = _spread(plan, "backward", x, before[0] | before[1] | before[2] | after[0] | after[3])
        if spread is not None:
            made = _spread_launch(plan, spread, pointers, (phi.alpha,), phi.code, x)
        else:
            arguments = pack(BACKWARD[wide], *pointers, *plan.sizes, eps, phi.alpha, phi.code)
            made = "batch_norm_backward", plan.kernel, plan.launch, arguments
        call.launch(runtime, *made, x, replayable=not plan.copied)
    return (dx, dgamma, dbeta) if residual is None else (dx, dgamma, dbeta, dresidual)
