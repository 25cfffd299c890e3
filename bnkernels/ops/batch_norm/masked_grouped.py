"""Batch norm beyond the usual: masks, groups, renormalisation, 16-bit parameters, and the stages of a pass as ops.

One pair of kernels serves all of it (``cuda/batch_norm_*_masked_grouped.cu``): a `Stage` says which
part of a pass a launch is. Here are its checks, cached by signature, its plan, and the running of it. Arrays go by the
names that the ops give them; those that are written come first.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from bnkernels.ops.batch_norm.launch import general_launch
from bnkernels.ops.batch_norm.problem import Options, Plan, Stage, element_strides, layout_of, mask_strides
from bnkernels.ops.batch_norm.reference import backward_host, forward_host
from bnkernels.runtime import checks as check
from bnkernels.runtime import overlap, registry
from bnkernels.runtime.arguments import accumulator, arguments_type, empty, pack, suffix
from bnkernels.runtime.workspace import PARTIALS

AXES = "group", "outer", "channel", "inner"


def _strides(*names: str) -> str:
    """Return the members of an argument struct that hold the strides of these arrays, and of the mask."""
    of_arrays = [f"{name}_{axis}" for name in names for axis in AXES]
    return " ".join([*of_arrays, "mask_group", "mask_outer", "mask_inner"])


SIZES, CODES = "groups outer channels inner", "activation stage statistic_rows params_in_storage_type"
FORWARD = arguments_type(
    "x residual mask gamma beta y statistics moments running_mean running_var",
    f"{SIZES} {_strides('x', 'residual')}",
    "momentum correction eps alpha r_max d_max",
    CODES,
)
BACKWARD = arguments_type(
    "dy x residual mask gamma beta statistics running_mean running_var dx dgamma dbeta dresidual sums partial "
    "finished_blocks",
    f"{SIZES} {_strides('dy', 'x', 'residual')}",
    "eps alpha",
    CODES,
)
GRADIENTS = "dx", "dgamma", "dbeta", "dresidual"
LIKE_X = ("y", "out", "dx", "dresidual", "x", "dy", "residual")


def is_narrow(x: Any, *parameters: Any) -> bool:
    """Tell whether a parameter is of 16 bits, as the data are."""
    dtype = getattr(x, "dtype", None)
    given = [getattr(array, "dtype", None) for array in parameters if array is not None]
    return getattr(dtype, "itemsize", 0) == 2 and dtype in given


@lru_cache(maxsize=1024)
def _plan(
    stage: Stage, axis: int, grouped: bool, renormalised: bool, names: tuple[str, ...], written: int, *signatures: Any
) -> Plan:
    """Check the signatures of the arrays of these names, of which the first are written, and plan the call."""
    needed = _needed(stage, names, renormalised)
    args = check.arguments(dict(zip(names, signatures, strict=True)), tuple(set(names) - set(needed)), written)
    x = args["x"]
    check.floating(x)
    if grouped and len(x.shape) < 3:
        raise ValueError(f"x must have the shape (T, N, C, ...), of T groups, got {x.shape}; or pass grouped=False")
    one = check.Argument("x", x.kind, x.dtype, x.shape[grouped:], x.strides[grouped:])
    layout = layout_of(one, axis)
    group, channels, wide = x.shape[:grouped], layout.channels, accumulator(x.dtype)
    narrow = x.dtype.itemsize == 2 and x.dtype in [args[n].dtype for n in ("gamma", "beta") if args.get(n)]
    parameter = x.dtype if narrow else wide
    rows = 5 if renormalised or (_reads_statistics(stage, names) and args["statistics"].shape[-2:-1] == (5,)) else 3
    shapes = dict.fromkeys(LIKE_X, x.shape) | {"moments": (4, channels), "sums": (3, channels)}
    shapes |= dict.fromkeys(("gamma", "beta", "dgamma", "dbeta"), (channels,))
    shapes |= {name: (*group, channels) for name in ("running_mean", "running_var")}
    shapes["statistics"] = (*group, rows, channels)
    dtypes = dict.fromkeys(shapes, wide) | dict.fromkeys(LIKE_X, x.dtype)
    dtypes |= dict.fromkeys(("gamma", "beta", "dgamma", "dbeta"), parameter)
    for name, argument in args.items():
        if name == "mask":
            _check_mask(argument, x, layout.axis + grouped)
        elif name in ("x", "dy", "residual"):
            check.like(argument, x.shape, x.dtype)
        else:
            check.contiguous(argument, shapes[name], dtypes[name])
    if stage == Stage.WHOLE and "dy" not in names and layout.rows == 1 and args["mask"] is None:
        raise ValueError(
            f"x has the shape {x.shape}: one value per channel has no variance; train on at least two examples, or "
            "use batch_norm_inference"
        )
    groups = x.shape[0] if grouped else 1
    plan = Plan(registry.runtime_of(x.kind), grouped, groups, layout, shapes, dtypes, 0 in x.shape, rows, narrow)
    return plan if plan.runtime is None or plan.empty else _with_launch(plan, stage, args)


def _needed(stage: Stage, names: tuple[str, ...], renormalised: bool) -> tuple[str, ...]:
    """Return the names of the arrays that must not be None."""
    needed = ["x", *(("dy",) if "dy" in names else ())]
    if stage == Stage.FROZEN or renormalised:
        needed += ["running_mean", "running_var"]
    elif _reads_statistics(stage, names):
        needed.append("statistics")
    if stage == Stage.APPLY and "dy" in names:
        needed.append("sums")
    return tuple(needed)


def _reads_statistics(stage: Stage, names: tuple[str, ...]) -> bool:
    return stage == Stage.APPLY or ("dy" in names and stage != Stage.FROZEN)


def _positions(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    """Return a shape without the axis of the channels."""
    return shape[:axis] + shape[axis + 1 :]


def _check_mask(mask: check.Argument | None, x: check.Argument, axis: int) -> None:
    """Check for a boolean mask over the positions of a channel, or over the first axes of these."""
    if mask is None:
        return
    if mask.dtype != np.bool_:
        raise TypeError(f"mask must be bool, True where valid, got {mask.dtype}; convert it with mask.astype(bool)")
    positions = _positions(x.shape, axis)
    if not mask.shape or mask.shape != positions[: len(mask.shape)]:
        raise ValueError(
            f"mask must have the shape {positions}, that of x without its channels, or of the first axes of that, got "
            f"{mask.shape}"
        )


def _with_launch(plan: Plan, stage: Stage, args: dict[str, Any]) -> Plan:
    """Return the plan of a call whose arrays have been checked, for a device."""
    grouped, layout, dtype = plan.grouped, plan.layout, plan.dtypes["x"]
    strides: list[int] = []
    copied = []
    inputs = ("dy", "x", "residual") if "dy" in args else ("x", "residual")
    for name in inputs:
        argument = args.get(name)
        found: tuple[int, ...] | None = (0, 0, 0, 0)
        if argument is not None:
            one = check.Argument(name, argument.kind, dtype, argument.shape[grouped:], argument.strides[grouped:])
            of_group = element_strides(one, layout.axis)
            first = argument.strides[0] // dtype.itemsize if grouped else 0
            found = of_group and (first, *of_group)
            if found is None or (grouped and argument.strides[0] % dtype.itemsize):
                copied.append(name)
                found = layout.rows * layout.channels, layout.channels * layout.inner, layout.inner, 1
        strides += found
    mask = args.get("mask")
    of_mask: tuple[int, ...] | None = (0, 0, 0)
    if mask is not None:
        of_mask = mask_strides(mask, args["x"].shape, layout, grouped)
        if of_mask is None:
            copied.append("mask")
            of_mask = layout.rows, layout.inner, 1
    backward = "dy" in args
    reduces = stage in (Stage.WHOLE, Stage.COLLECT) or (backward and stage == Stage.FROZEN)
    launch = general_launch(plan.groups, layout.outer, layout.channels, layout.inner, dtype, backward, reduces)
    return plan._replace(launch=launch, strides=(*strides, *of_mask), copied=tuple(copied))


def run(
    stage: Stage,
    arrays: dict[str, Any],
    outputs: tuple[str, ...],
    options: Options,
    axis: int,
    grouped: bool = False,
) -> tuple[Any, ...]:
    """Check a call, run it, and return its `outputs`, those of them that are None made new."""
    names, given = tuple(arrays), tuple(arrays.values())
    updated = ("running_mean", "running_var") if stage == Stage.WHOLE else ()
    written = sum(name in (*outputs, *updated) for name in names)  # which are the first ones
    plan = _plan(stage, axis, grouped, options.renorm is not None, names, written, *check.signatures(given))
    if any(array is not None for array in given[:written]):
        in_place = ("dy", "x", "residual") if names[0] in LIKE_X else ()
        overlap.check_outputs(plan.runtime, names, given, written, in_place)
    x = arrays["x"]
    for name in outputs:
        if arrays[name] is None:
            arrays[name] = empty(plan.runtime, plan.shapes[name], x, plan.dtypes[name])
    if plan.empty:
        for name in outputs:
            arrays[name][...] = 0
    elif plan.runtime is None:
        host = backward_host if "dy" in arrays else forward_host
        host(plan, stage, arrays, options)
    else:
        check.one_device(plan.runtime, names, tuple(arrays.values()))
        _run_on_device(plan, stage, arrays, options)
    return tuple(arrays[name] for name in outputs)


def _run_on_device(plan: Plan, stage: Stage, arrays: dict[str, Any], options: Options) -> None:
    """Launch the kernel."""
    runtime, layout, x = plan.runtime, plan.layout, arrays["x"]
    direction, layouts = ("backward", BACKWARD) if "dy" in arrays else ("forward", FORWARD)
    given = arrays | {name: _copy(plan, name, arrays) for name in plan.copied}
    values = {name: runtime.pointer(array) for name, array in given.items() if array is not None}
    values["y"] = values.get("y", values.get("out", 0))
    record = layouts[plan.dtypes["gamma"] if not plan.narrow else np.dtype(np.float32)]
    if direction == "backward" and plan.launch.grid[1] > 1:
        workspace = runtime.workspace(x)  # it begins with counters of blocks that never wait
        values |= {"finished_blocks": workspace, "partial": workspace + PARTIALS}
    r_max, d_max = options.renorm or (1.0, 0.0)
    scalars = {
        "momentum": options.momentum,
        "correction": float(options.unbiased),
        "eps": options.eps,
        "alpha": options.phi.alpha,
        "r_max": r_max,
        "d_max": d_max,
        "activation": options.phi.code,
        "stage": int(stage),
        "statistic_rows": plan.statistic_rows,
        "params_in_storage_type": int(plan.narrow),
    }
    sizes = (plan.groups, layout.outer, layout.channels, layout.inner, *plan.strides)
    names = record.names
    first_size = names.index("groups")
    packed = [values.get(name, 0) for name in names[:first_size]]
    packed += [*sizes, *(scalars[name] for name in names[first_size + len(sizes) :])]
    kernel = f"bnk_batch_norm_{direction}_masked_grouped_{suffix(plan.dtypes['x'])}"
    runtime.launch(f"batch_norm_{direction}_masked_grouped", kernel, plan.launch, pack(record, *packed), x)


def _copy(plan: Plan, name: str, arrays: dict[str, Any]) -> Any:
    """Return an input in C order: the mask over all positions of a channel."""
    array = arrays[name]
    if name == "mask":
        positions = _positions(plan.shapes["x"], plan.layout.axis + plan.grouped)
        array = array.reshape(array.shape + (1,) * (len(positions) - len(array.shape)))
        array = plan.runtime.xp.broadcast_to(array, positions)
    return plan.runtime.contiguous(array)
