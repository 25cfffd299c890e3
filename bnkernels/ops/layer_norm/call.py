"""Calls of layer norm, RMS norm and group norm: arrays checked, a launch planned and made; or the same on the CPU."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from bnkernels.ops.activations import Activation
from bnkernels.ops.layer_norm import reference
from bnkernels.ops.layer_norm.launch import choose_backward, choose_forward, partial_sums
from bnkernels.ops.layer_norm.problem import FULL, IN_ACCUMULATOR_TYPE, IN_STORAGE_TYPE, VECTOR, Problem
from bnkernels.runtime import checks as check
from bnkernels.runtime.arguments import addresses, empty, pack
from bnkernels.runtime.cpu import kernels
from bnkernels.runtime.operands import Operands
from bnkernels.runtime.replay import Call
from bnkernels.runtime.seam import Launch, LaunchPlan, Runtime, ceil_div
from bnkernels.runtime.workspace import PARTIALS, barrier_counters

CPU = "bnkernels.ops.layer_norm.cpu"
Sizes = tuple[str, int]


def forward(
    operands: Operands, call: Call, out: Any, sizes: Sizes, phi: Activation, eps: float, x: Any, gamma: Any, beta: Any
) -> tuple[Any, Any]:
    """Check the arrays and write `y` and `statistics`; operands without `beta` do not take one.

    `sizes` are the name and the value of the option that says over what is normalised.
    """
    y, statistics = check.pack_outputs(out, ("y", "statistics"))
    given = {"y": y, "statistics": statistics, "x": x, "gamma": gamma, "beta": beta}
    options = (check.integer(*sizes, 1),)
    runtime, (problem, shape, _) = operands.check(*(given[name] for name in operands.names), options=options)
    if y is None:
        y, statistics = empty(runtime, x.shape, x), empty(runtime, shape, x, problem.acc_dtype)
    if problem.rows == 0:
        return y, statistics
    if runtime is None:
        arguments = problem, x, gamma, beta, eps, phi, y, statistics
        if cpu := kernels(CPU):
            call.compute(cpu.forward(*arguments), (y, statistics, x, gamma, beta))
        else:
            reference.forward(*arguments)
        return y, statistics
    plan = choose_forward(problem, runtime.limits(x))
    names = "x gamma beta y statistics".split()
    members = dict(zip(names, addresses(runtime, x, gamma, beta, y, statistics), strict=True)) | {"eps": eps}
    call.launch(runtime, *plan[:2], *_prepared(runtime, plan, problem, phi, members, x), x)
    return y, statistics


def backward(operands: Operands, call: Call, out: Any, sizes: Sizes, phi: Activation, *arrays: Any) -> tuple[Any, ...]:
    """Check dy, x, gamma, beta, statistics and workspace; write the gradients, without `beta` that of it neither."""
    dy, x, gamma, beta, statistics, workspace = arrays
    outputs = tuple(name for name in ("dx", "dgamma", "dbeta") if name in operands.names)
    found = dict(zip(outputs, check.pack_outputs(out, outputs), strict=True))
    given = {"dy": dy, "x": x, "gamma": gamma, "beta": beta, "statistics": statistics, "workspace": workspace} | found
    options = (check.integer(*sizes, 1),)
    runtime, (problem, _, shape) = operands.check(*(given[name] for name in operands.names), options=options)
    if out is None:
        vectors = {name: empty(runtime, shape, x, problem.params_dtype) for name in outputs[1:]}
        found = {"dx": empty(runtime, x.shape, x)} | vectors
    results, dx, dgamma, dbeta = tuple(found.values()), found["dx"], found["dgamma"], found.get("dbeta")
    if problem.rows == 0:
        for gradient in results[1:]:
            gradient[...] = 0
        return results
    if runtime is None:
        arguments = problem, dy, x, gamma, beta, statistics, phi, dx, dgamma, dbeta
        if cpu := kernels(CPU):
            call.compute(cpu.backward(*arguments), (*results, dy, x, gamma, beta, statistics))
        else:
            reference.backward(*arguments)
        return results
    plan = choose_backward(problem, runtime.limits(x), not phi.is_piecewise_linear)
    own = workspace is None and (partials := partial_sums(plan, problem))
    if own:
        workspace = empty(runtime, (partials,), x, problem.acc_dtype)
    names = "dy x gamma beta statistics dx dgamma dbeta partial".split()
    pointers = addresses(runtime, dy, x, gamma, beta, statistics, dx, dgamma, dbeta, workspace)
    members = dict(zip(names, pointers, strict=True))
    call.launch(runtime, *plan[:2], *_prepared(runtime, plan, problem, phi, members, x), x, replayable=not own)
    return results


def _prepared(
    runtime: Runtime, plan: LaunchPlan, problem: Problem, phi: Activation, members: dict[str, Any], x: Any
) -> tuple[Launch, np.ndarray]:
    """Return the launch of a kernel that is compiled for this call, and its argument of `members` and what follows."""
    codes = _codes(plan, problem, phi, members)
    workspace = runtime.workspace(x) if plan.launch.cooperative else 0
    members = members | codes | {"rows": problem.rows, "columns": problem.columns, "alpha": phi.alpha}
    members |= {"half_share": 0.5 / problem.columns, "part": ceil_div(problem.vectors, plan.splits) * problem.count}
    members |= {"barrier_counter": barrier_counters(workspace), "exchange": workspace + PARTIALS}
    slope = {"alpha": int(phi.alpha)} if phi.is_piecewise_linear and phi.alpha in (0, 1) else {}
    launch = dataclasses.replace(plan.launch, constants=tuple((codes | slope).items()))
    return launch, pack(plan.arguments, *(members[name] for name in plan.arguments.names))


def _codes(plan: LaunchPlan, problem: Problem, phi: Activation, members: dict[str, Any]) -> dict[str, int]:
    """Return the last members of the argument, for whose values a kernel is compiled."""
    names, width = plan.arguments.names, plan.launch.block[0]
    adjacent = problem.adjacent
    names_of = ("dy", "x", "y", "dx", "gamma", "beta") if problem.inner == 1 or adjacent else ("dy", "x", "y", "dx")
    by_vectors = [members[name] for name in names_of if name in members]
    shape = (adjacent or problem.columns) % problem.count == 0 and all(place % VECTOR == 0 for place in by_vectors)
    if shape and "width" in names and plan.held * width == problem.vectors:
        shape = FULL
    kind = IN_STORAGE_TYPE if problem.params_in_storage_type else IN_ACCUMULATOR_TYPE
    given = {"scaled": members["gamma"] and kind, "shifted": members["beta"] and kind}
    codes = {"activation": phi.code, "shape": int(shape), **given, "centred": int(problem.centred)}
    codes |= {"channel_groups": problem.channel_groups, "inner": problem.inner, "adjacent": adjacent}
    codes |= {"width": width, "held": plan.held}
    codes |= {"stages": plan.stages, "threads": plan.launch.threads, "at_once": plan.at_once}
    return {name: code for name, code in codes.items() if name in names}
