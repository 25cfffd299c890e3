"""A call of a batch-norm op: `plan` checks its arrays, `run` launches the kernel or computes with NumPy.

What depends on the signatures of the arrays alone is cached: their checks, and the plan. Masks, groups,
renormalisation and parameters of 16 bits are options of one plan, see `Pass` and `Problem`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from bnkernels.ops.batch_norm import reference
from bnkernels.ops.batch_norm.launch import VECTOR, choose
from bnkernels.ops.batch_norm.problem import (
    DOUBLE_BACKWARD,
    FORWARD,
    PARAMETERS,
    TENSORS,
    Options,
    Pass,
    Plan,
    Stage,
    element_strides,
    mask_strides,
    view,
)
from bnkernels.runtime import checks as check
from bnkernels.runtime import overlap, registry
from bnkernels.runtime.arguments import accumulator, empty, host_pointer, pack
from bnkernels.runtime.cpu import kernels
from bnkernels.runtime.replay import NEW, Call
from bnkernels.runtime.workspace import PARTIALS, barrier_counters

AXES = "group", "outer", "channel", "inner"


def plan(
    kind: Pass, arrays: tuple, axis: Any, grouped: Any = False, renorm: Any = None, *, apart: bool = False
) -> Plan:
    """Check the arrays ``kind.names``, and unless they are known to lie `apart` their overlaps; plan the call."""
    found = _planned(
        *(kind, check.integer("axis", axis), check.boolean("grouped", grouped), renorm is not None),
        *check.signatures(arrays),
    )
    if not apart and any(array is not None for array in arrays[: kind.written]):
        overlap.check_outputs(found.runtime, kind.names, arrays, kind.written, kind.in_place)
    return found


@lru_cache(maxsize=1024)
def _planned(kind: Pass, axis: int, grouped: bool, renormalised: bool, *signatures: check.Signature | None) -> Plan:
    """Check the signatures of the arrays ``kind.names``; return the plan."""
    given = dict(zip(kind.names, signatures, strict=True))
    running = ("running_mean", "running_var") if renormalised else ()
    optional = tuple(name for name in kind.names if name not in kind.required and name not in running)
    args = check.arguments(given, optional, kind.written)
    x = args["x"]
    check.floating(x)
    problem, axis = view(x, axis, grouped)
    in_storage_type, rows = False, 3
    if kind is not DOUBLE_BACKWARD:  # it knows no options
        given_types = [args[name].dtype for name in ("gamma", "beta") if args.get(name)]
        in_storage_type = x.dtype.itemsize == 2 and x.dtype in given_types
        rows = 5 if renormalised or ("statistics" in kind.inputs and args["statistics"].shape[-2:-1] == (5,)) else 3
    outputs = _check_arrays(args, kind, axis, x.shape[:grouped], rows, in_storage_type)
    masked = args.get("mask") is not None
    if kind is FORWARD and problem.rows == 1 and not masked:
        raise ValueError(
            f"x has the shape {x.shape}: one value per channel has no variance; train on at least two examples, or "
            "use batch_norm_inference"
        )
    by_stage = kind.stage in (Stage.COLLECT, Stage.APPLY)
    more = masked or grouped or rows == 5 or in_storage_type or by_stage
    problem = problem._replace(masked_grouped=more)
    front = axis + grouped
    positions = x.shape[:front] + x.shape[front + 1 :]
    members = {"groups": problem.groups, "outer": problem.outer, "channels": problem.channels, "inner": problem.inner}
    members |= {"stage": int(kind.stage), "statistic_rows": rows, "params_in_storage_type": int(in_storage_type)}
    runtime, acc_dtype = registry.runtime_of(x.kind), accumulator(x.dtype)
    found = Plan(kind, runtime, problem, axis, grouped, acc_dtype, outputs, positions, rows, members)
    return found if found.empty else _with_strides(found, args)


def _check_arrays(
    args: dict[str, check.Argument | None],
    kind: Pass,
    axis: int,
    group: tuple[int, ...],
    rows: int,
    in_storage_type: bool,
) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Check shape, data type and layout of every array; return shape and data type of those that the op returns."""
    x, front = args["x"], axis + len(group)
    channels, acc_dtype = x.shape[front], accumulator(x.dtype)
    shapes = {"moments": (4, channels), "sums": (3, channels), "statistics": (*group, rows, channels)}
    shapes |= {name: (*group, channels) for name in ("running_mean", "running_var")}
    outputs = {}
    for name, argument in args.items():
        if name == "mask":
            if argument is not None:
                _check_mask(argument, x.shape[:front] + x.shape[front + 1 :])
            continue
        shape, dtype = shapes.get(name, (channels,)), acc_dtype
        if name in TENSORS:
            shape, dtype = x.shape, x.dtype
        elif name in PARAMETERS and in_storage_type:
            dtype = x.dtype
        (check.like if name in kind.strided else check.contiguous)(argument, shape, dtype)
        if name in kind.outputs and (name != "dresidual" or args["residual"] is not None):
            outputs[name] = shape, dtype
    return outputs


def _check_mask(mask: check.Argument, positions: tuple[int, ...]) -> None:
    """Check for a boolean mask over the positions of a channel, or over the first axes of these."""
    if mask.dtype != np.bool_:
        raise TypeError(f"mask must be bool, True where valid, got {mask.dtype}; convert it with mask.astype(bool)")
    if not mask.shape or mask.shape != positions[: len(mask.shape)]:
        raise ValueError(
            f"mask must have the shape {positions}, that of x without its channels, or of the first axes of that, got "
            f"{mask.shape}"
        )


def _with_strides(found: Plan, args: dict[str, check.Argument | None]) -> Plan:
    """Return the plan with the strides of the inputs, for a kernel."""
    problem, members, copied, given = found.problem, found.members, [], []
    for name in found.kind.strided:
        if args[name] is None:
            continue
        strides = element_strides(args[name], found.axis, found.grouped)
        if strides is None:
            copied.append(name)
            strides = problem.rows * problem.channels, problem.channels * problem.inner, problem.inner, 1
        members |= {f"{name}_{axis}": stride for axis, stride in zip(AXES, strides, strict=True)}
        given.append(strides[1:])
    if args.get("mask") is not None:
        strides = mask_strides(args["mask"], found.positions, found.axis, found.grouped)
        if strides is None:
            copied.append("mask")
            strides = problem.rows, problem.inner, 1
        members |= dict(zip(("mask_group", "mask_outer", "mask_inner"), strides, strict=True))
    return found._replace(problem=problem._replace(strides=tuple(given)), members=members, copied=tuple(copied))


def run(found: Plan, arrays: tuple, options: Options, call: Call = NEW) -> tuple[Any, ...]:
    """Run a call on its arrays; return its outputs, made new where they are None.

    Parameters
    ----------
    found : Plan
        Plan of the call, from `plan`.
    arrays : tuple
        Arrays ``found.kind.names``.
    options : Options
        Numbers of the call.
    call : Call
        Result of ``found.kind.calls.replay``.

    Returns
    -------
    tuple of arrays
        Those of ``found.outputs``.
    """
    given = dict(zip(found.kind.names, arrays, strict=True))
    for name, (shape, dtype) in found.outputs.items():
        if given[name] is None:
            given[name] = empty(found.runtime, shape, given["x"], dtype)
    outputs = tuple([given[name] for name in found.outputs])
    if found.empty:
        for array in outputs:
            array[...] = 0
    elif found.runtime is None and (cpu := kernels("bnkernels.ops.batch_norm.cpu")) is None:
        reference.run(found, given, options)
    elif found.runtime is None:
        work = cpu.work(found, _members(found, given, options))
        call.compute(work, given["x"], replayable=not found.copied)  # a copy is of this call
    else:
        check.one_device(found.runtime, found.kind.names, arrays)
        _launch(found, given, options, call)
    return outputs


def _members(found: Plan, given: dict[str, Any], options: Options) -> dict[str, Any]:
    """Return the members of a kernel's argument that do not depend on the launch, by name."""
    for name in found.copied:
        given[name] = _copy(found, name, given[name])
    pointer = host_pointer if found.runtime is None else found.runtime.pointer
    members = {name: pointer(array) for name, array in given.items() if array is not None}
    members |= found.members
    if "out" in members:
        members["y"] = members["out"]
    if found.kind.stage == Stage.FROZEN:
        members |= {"mean": members["running_mean"], "rstd": members["running_var"]}
    elif "statistics" in members:
        start, row = members["statistics"], found.problem.channels * found.acc_dtype.itemsize
        members |= {"mean": start, "mean_low": start + row, "rstd": start + 2 * row}
    phi, (r_max, d_max) = options.phi, options.renorm or (1.0, 0.0)
    members |= {
        "momentum": options.momentum,
        "eps": float(found.acc_dtype.type(options.eps)),
        "alpha": phi.alpha,
        "activation": phi.code,
    }
    members |= {"divisor": found.problem.rows - options.unbiased, "correction": options.unbiased}
    return members | {"r_max": r_max, "d_max": d_max}


def _launch(found: Plan, given: dict[str, Any], options: Options, call: Call) -> None:
    """Launch the kernel, its argument packed by the names of its members."""
    runtime, x, members = found.runtime, given["x"], _members(found, given, options)
    aligned = not any(members.get(name, 0) % VECTOR for name in TENSORS)
    chosen = choose(found.kind, found.problem, runtime.limits(x) if aligned else None)
    if chosen.splits > 1:
        start = runtime.workspace(x)  # it begins with counters of blocks that never wait
        members |= {"partial": start + PARTIALS, "barrier_counter": barrier_counters(start), "finished_blocks": start}
    members["held"] = chosen.held
    arguments = pack(chosen.arguments, *[members.get(name, 0) for name in chosen.arguments.names])
    replayable = not found.copied and chosen.splits == 1  # copies are of this call, the workspace is of the stream
    call.launch(runtime, chosen.source, chosen.kernel, chosen.launch, arguments, x, replayable)


def _copy(found: Plan, name: str, array: Any) -> Any:
    """Return an input in C order: the mask over all positions of a channel."""
    if name == "mask":
        array = array.reshape(array.shape + (1,) * (len(found.positions) - len(array.shape)))
        xp = np if found.runtime is None else found.runtime.xp
        array = xp.broadcast_to(array, found.positions)
    return np.ascontiguousarray(array) if found.runtime is None else found.runtime.contiguous(array)
