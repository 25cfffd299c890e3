"""A call of a batch-norm op: `run` checks its arrays, and launches the kernel or computes with NumPy.

What depends on the signatures of the arrays alone is cached, their checks and the plan; and so is what a plan and
options decide, the argument of the kernel but for its addresses. Masks, groups,
renormalisation and parameters of 16 bits are options of one plan, see `Pass` and `Problem`.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np

from bnkernels.ops.batch_norm import reference
from bnkernels.ops.batch_norm.launch import VECTOR, choose
from bnkernels.ops.batch_norm.problem import (
    DOUBLE_BACKWARD,
    FORWARD,
    GIVEN,
    PARAMETERS,
    TENSORS,
    Options,
    Pass,
    Plan,
    Problem,
    Stage,
    element_strides,
    mask_strides,
    view,
)
from bnkernels.runtime import checks as check
from bnkernels.runtime import overlap, registry
from bnkernels.runtime.arguments import Template, accumulator, addresses, empty
from bnkernels.runtime.cpu import kernels
from bnkernels.runtime.replay import NEW, Call
from bnkernels.runtime.seam import LaunchPlan, Limits
from bnkernels.runtime.workspace import PARTIALS, barrier_counters

AXES = "group", "outer", "channel", "inner"
# Members that take few values: of all kernels, of those that reduce rows, and of those with options.
CONSTANTS, OF_BLOCK = ("activation", "given"), ("width", "workers", "full")
OF_OPTIONS = "stage", "statistic_rows", "params_in_storage_type"
VALUES = re.compile(r"_registers(\d+)_")  # rows that a thread of the kernel keeps


def run(
    kind: Pass, arrays: tuple, axis: Any, options: Options, call: Call = NEW, grouped: Any = False
) -> tuple[Any, ...]:
    """Check the arrays of a call and compute; return its outputs, made new where they are None.

    Parameters
    ----------
    kind : Pass
        The pass.
    arrays : tuple
        Arrays ``kind.names``.
    axis, grouped : int, bool
        Axis of the channels, and whether the first axis numbers mini-batches; not checked yet.
    options : Options
        Numbers of the call.
    call : Call
        Result of ``kind.calls.replay``.

    Returns
    -------
    tuple of arrays
        Those that the pass returns.
    """
    plan, places = checked(kind, arrays, axis, options, grouped)
    runtime = plan.runtime
    made = [place for place, *_ in plan.outputs if arrays[place] is None]
    if made or plan.copied:
        arrays = _completed(plan, arrays)
        places = addresses(runtime, *arrays)
    outputs = tuple([arrays[place] for place, *_ in plan.outputs])
    if plan.empty:
        for array in outputs:
            array[...] = 0
    elif runtime is not None:
        _launch(plan, arrays, places, options, call)
    elif cpu := kernels("bnkernels.ops.batch_norm.cpu"):
        # A copy is of this call.
        call.compute(cpu.prepare(plan, options)((*places, 0)), arrays, replayable=not plan.copied)
    else:
        reference.run(plan, dict(zip(kind.names, arrays, strict=True)), options)
    return outputs


def checked(
    kind: Pass, arrays: tuple, axis: Any, options: Options, grouped: Any = False
) -> tuple[Plan, tuple[int, ...]]:
    """Check the arrays of a call; return its plan, and their addresses. Nothing is computed or written."""
    axis, grouped = check.integer("axis", axis), check.boolean("grouped", grouped)
    plan = _planned(kind, axis, grouped, options.renorm is not None, *check.signatures(arrays))
    runtime, written = plan.runtime, kind.written
    if runtime is not None:
        check.one_device(runtime, kind.names, arrays)
    places = addresses(runtime, *arrays)
    if any(places[:written]):
        overlap.check_outputs(runtime, kind.names, arrays, places, plan.reaches, written, kind.in_place)
    return plan, places


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
    front, rare = axis + grouped, rows == 5 or in_storage_type or by_stage
    positions = x.shape[:front] + x.shape[front + 1 :]
    sizes = {"groups": problem.groups, "outer": problem.outer, "channels": problem.channels, "inner": problem.inner}
    sizes |= {"stage": int(kind.stage), "statistic_rows": rows, "params_in_storage_type": int(in_storage_type)}
    sizes["given"] = sum(bit for name, bit in GIVEN.items() if args.get(name) is not None)
    strides, copied = {}, ()
    if problem.channels and 0 not in positions:
        strides, copied = _strides(args, kind, problem, axis, grouped, positions)
        sizes |= {f"{name}_{axis}": steps[axis] for name, steps in strides.items() for axis in steps}
    along_inner = problem.inner > 1 and strides.get("mask", {}).get("inner", 0) != 0  # the mask of a channel differs
    of_tensors = [tuple(steps.values()) for name, steps in strides.items() if name != "mask"]
    return Plan(
        kind,
        registry.runtime_of(x.kind),
        problem._replace(
            strides=tuple(steps[1:] for steps in of_tensors),
            options=rare or masked or grouped,
            rare=rare or along_inner,
            masked=masked,
            group_strides=tuple(steps[0] for steps in of_tensors),
        ),
        axis,
        grouped,
        masked,
        accumulator(x.dtype),
        outputs,
        positions,
        rows,
        tuple(map(overlap.reach, signatures)),
        sizes,
        copied,
    )


def _check_arrays(
    args: dict[str, check.Argument | None],
    kind: Pass,
    axis: int,
    group: tuple[int, ...],
    rows: int,
    in_storage_type: bool,
) -> tuple[tuple[int, tuple[int, ...], np.dtype], ...]:
    """Check shape, data type and layout of every array; return place, shape and type of those that the op returns."""
    x, front = args["x"], axis + len(group)
    channels, acc_dtype = x.shape[front], accumulator(x.dtype)
    shapes = {"moments": (4, channels), "sums": (3, channels), "statistics": (*group, rows, channels)}
    shapes |= {name: (*group, channels) for name in ("running_mean", "running_var")}
    outputs = []
    for place, (name, argument) in enumerate(args.items()):
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
            outputs.append((place, shape, dtype))
    return tuple(outputs)


def _check_mask(mask: check.Argument, positions: tuple[int, ...]) -> None:
    """Check for a boolean mask over the positions of a channel, or over the first axes of these."""
    if mask.dtype != np.bool_:
        raise TypeError(f"mask must be bool, True where valid, got {mask.dtype}; convert it with mask.astype(bool)")
    if not mask.shape or mask.shape != positions[: len(mask.shape)]:
        raise ValueError(
            f"mask must have the shape {positions}, that of x without its channels, or of the first axes of that, got "
            f"{mask.shape}"
        )


def _strides(
    args: dict[str, check.Argument | None],
    kind: Pass,
    problem: Problem,
    axis: int,
    grouped: bool,
    positions: tuple[int, ...],
) -> tuple[dict[str, dict[str, int]], tuple[str, ...]]:
    """Return the strides of the inputs by name and axis, and which are to be copied first, since none describe them."""
    found, copied = {}, []
    for name in kind.strided:
        if args[name] is None:
            continue
        strides = element_strides(args[name], axis, grouped)
        if strides is None:
            copied.append(name)
            strides = problem.rows * problem.channels, problem.channels * problem.inner, problem.inner, 1
        found[name] = dict(zip(AXES, strides, strict=True))
    if args.get("mask") is not None:
        strides = mask_strides(args["mask"], positions, axis, grouped)
        if strides is None:
            copied.append("mask")
            strides = problem.rows, problem.inner, 1
        found["mask"] = dict(zip(("group", "outer", "inner"), strides, strict=True))
    return found, tuple(copied)


def _completed(plan: Plan, arrays: tuple) -> tuple:
    """Return the arrays with new outputs, and with copies of inputs that no strides describe."""
    found, names = list(arrays), plan.kind.names
    x = arrays[names.index("x")]
    for place, shape, dtype in plan.outputs:
        if found[place] is None:
            found[place] = empty(plan.runtime, shape, x, dtype)
    for name in plan.copied:
        place = names.index(name)
        found[place] = _copy(plan, name, found[place])
    return tuple(found)


def _copy(plan: Plan, name: str, array: Any) -> Any:
    """Return an input in C order: the mask over all positions of a channel."""
    if name == "mask":
        array = array.reshape(array.shape + (1,) * (len(plan.positions) - len(array.shape)))
        xp = np if plan.runtime is None else plan.runtime.xp
        array = xp.broadcast_to(array, plan.positions)
    return np.ascontiguousarray(array) if plan.runtime is None else plan.runtime.contiguous(array)


@lru_cache(maxsize=1024)
def _chosen(plan: Plan, options: Options, limits: Limits, alignment: int) -> tuple[LaunchPlan, Template]:
    """Return the launch, and its argument without addresses."""
    chosen = choose(plan.kind, plan.problem, limits, alignment)
    width, workers, _ = chosen.launch.block
    values = VALUES.search(chosen.kernel)
    full = plan.problem.channels % width == 0 and values and plan.problem.rows == int(values[1]) * workers
    members = plan.members(options) | {"width": width, "workers": workers, "full": bool(full)}
    members |= {"held": chosen.held, "stages": chosen.stages, "masked": int(plan.masked)}
    launch = replace(chosen.launch, constants=_constants(chosen, members))
    return chosen._replace(launch=launch), Template(chosen.arguments, members, plan.places)


def _constants(chosen: LaunchPlan, members: dict[str, float]) -> tuple[tuple[str, int], ...]:
    """Return the members that a kernel is compiled for: they take few values."""
    cooperative, layout = "cooperative" in chosen.kernel, chosen.arguments.names
    if not cooperative and "given" not in layout:
        return ()
    options = "_options" in chosen.kernel
    names = CONSTANTS + (OF_BLOCK if chosen.launch.shared_bytes else ()) + (OF_OPTIONS if options else ())
    known = [(name, int(members[name])) for name in (*names, "masked") if name in layout]
    if (options or cooperative) and members["groups"] == 1:
        known.append(("groups", 1))
    if members["alpha"] in (0, 1):
        known.append(("alpha", int(members["alpha"])))
    if cooperative and "residual_outer" not in members:
        known.append(("residual", 0))
    return tuple(known)


def _launch(plan: Plan, arrays: tuple, places: tuple[int, ...], options: Options, call: Call) -> None:
    """Launch the kernel."""
    runtime, names = plan.runtime, plan.kind.names
    x = arrays[names.index("x")]
    bits = VECTOR
    for tensor in plan.tensors:
        bits |= places[tensor]
    chosen, template = _chosen(plan, options, runtime.limits(x), bits & -bits)  # the lowest bit: the alignment
    workspace, row = (0, 0, 0), plan.problem.channels * plan.acc_dtype.itemsize
    if chosen.splits > 1:
        start = runtime.workspace(x)  # it begins with counters of blocks that never wait
        workspace = start + PARTIALS, barrier_counters(start), start
    start = places[names.index("statistics")] if "statistics" in names else 0
    arguments = template.filled((*places, start + row, start + 2 * row, *workspace, 0))
    replayable = not plan.copied and chosen.splits == 1  # copies are of this call, the workspace is of the stream
    call.launch(runtime, *chosen[:3], arguments, x, replayable)
