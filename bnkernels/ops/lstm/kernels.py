"""Steps of an LSTM by the kernels ``cuda/lstm_*.cu``: the arguments of all steps are made at once, then launched."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np

from bnkernels.ops.lstm.launch import choose
from bnkernels.ops.lstm.problem import NORM_NAMES, RUNNING_NAMES, Backward, Forward, Problem
from bnkernels.runtime.arguments import addresses, empty
from bnkernels.runtime.seam import LaunchPlan, Runtime


def forward(runtime: Runtime, run: Forward) -> Callable[[int], None]:
    """Return what computes a step."""
    problem, used = run.problem, len(run.counts)
    plan, steps = choose("forward", problem), np.arange(used)
    of_step = {"x_part": run.x_part, "h_part": run.h_part, "gates": run.gates, "cells": run.cells, "c_hat": run.c_hat}
    of_step |= {"rstd": run.rstd, "h": run.y}
    fixed = {"bias": run.bias, "h_n": run.h_n, "c_n": run.c_n, "lengths": run.lengths}
    fixed |= dict(zip(NORM_NAMES, run.norms, strict=True))
    members = _places(runtime, steps, of_step) | _fixed(runtime, fixed)
    members["before"] = _before(runtime, steps, run.c0, run.cells)
    members |= _sizes(problem, plan, steps) | {"eps": run.eps, "momentum": run.momentum}
    counts = np.array(run.counts)
    members |= {"count": counts, "inverse_count": 1 / counts, "chosen": run.longest}
    if problem.tracked:
        rows = np.minimum(steps, problem.tracked - 1)
        members |= _places(runtime, rows, dict(zip(RUNNING_NAMES, run.running, strict=True)))
        members["moving"] = problem.live & (steps < problem.tracked) & (counts > 1)
    return _launcher(runtime, plan, members, used, run.y)


def backward(runtime: Runtime, run: Backward) -> tuple[Callable[[int], None], Callable[[], Any]]:
    """Return what computes a step, and what returns the gradients of bias and norms in the end."""
    problem, used, like = run.problem, len(run.counts), run.dx_part
    plan, steps = choose("backward", problem), np.arange(used)
    layer = problem.norm == "layer"
    da = empty(runtime, run.dx_part.shape, like) if layer else None
    dz = empty(runtime, (used, problem.rows, problem.units), like) if layer else None
    sums = None if layer else empty(runtime, (used, problem.sums_length), like)
    of_step = {"dy": run.dy, "gates": run.gates, "dx_part": run.dx_part, "da": da, "dz": dz, "sums": sums}
    if problem.norm:
        of_step |= {"c_hat": run.c_hat, "x_hat": run.x_hat, "h_hat": run.h_hat, "rstd": run.rstd}
        of_step |= {"dh_part": run.dh_part}
    else:
        of_step |= {"cells": run.cells}
    fixed = {"dh": run.dh, "dh_n": run.dh_n, "dc_n": run.dc_n, "dc": run.dc, "lengths": run.lengths}
    fixed |= dict(zip(NORM_NAMES, run.norms, strict=True))
    members = _places(runtime, steps, of_step) | _fixed(runtime, fixed)
    members["before"] = _before(runtime, steps, run.c0, run.cells)
    members |= _sizes(problem, plan, steps) | {"inverse_count": 1 / np.array(run.counts)}

    def finish() -> Any:
        if layer:
            return _sums_over_examples(runtime, run, da, dz)
        return _column_sums(runtime, sums)

    return _launcher(runtime, plan, members, used, like), finish


def _places(runtime: Runtime, rows: np.ndarray, arrays: dict[str, Any]) -> dict[str, Any]:
    """Return the address of a row of each array, or of the only one of an array that has one; 0 for None."""
    found: dict[str, Any] = {}
    for name, array in arrays.items():
        (base,) = addresses(runtime, array)
        pitch = 0 if array is None or len(array) == 1 else array.strides[0]
        found[name] = base + rows * pitch
    return found


def _fixed(runtime: Runtime, arrays: dict[str, Any]) -> dict[str, int]:
    return dict(zip(arrays, addresses(runtime, *arrays.values()), strict=True))


def _before(runtime: Runtime, steps: np.ndarray, c0: Any, cells: Any) -> np.ndarray:
    """Return the addresses of the cells before every step."""
    found = _places(runtime, steps - 1, {"before": cells})["before"]
    (found[0],) = addresses(runtime, c0)
    return found


def _sizes(problem: Problem, plan: LaunchPlan, steps: np.ndarray) -> dict[str, Any]:
    sizes = {"rows": problem.rows, "units": problem.units, "step": steps, "end": len(steps) - 1}
    return sizes | {"live": problem.live, "held": plan.held}


def _launcher(runtime: Runtime, plan: LaunchPlan, members: dict[str, Any], used: int, like: Any) -> Callable:
    """Return what launches a step; each has a buffer of ctypes, as `pack` makes it, for its argument."""
    records = np.zeros(used, plan.arguments)
    for name in plan.arguments.names:
        if name in members:
            records[name] = members[name]
    kind, packed = ctypes.c_char * plan.arguments.itemsize, records.tobytes()

    def step(t: int) -> None:
        block = kind.from_buffer_copy(packed, t * plan.arguments.itemsize)
        runtime.launch(*plan[:3], np.ndarray((), plan.arguments, block), like)

    return step


def _column_sums(runtime: Runtime, matrix: Any) -> Any:
    """Return the sums of the columns of a matrix, by a product."""
    ones, out = (empty(runtime, shape, matrix) for shape in ((1, len(matrix)), (1, matrix.shape[1])))
    ones[...] = 1
    runtime.xp.matmul(ones, matrix, out=out)
    return out[0]


def _sums_over_examples(runtime: Runtime, run: Backward, da: Any, dz: Any) -> Any:
    """Return the gradients of bias and norms from those of gates and cells, with layer norm.

    `dx_part`, whose products have been taken, is overwritten.
    """
    problem, used, xp = run.problem, len(run.counts), runtime.xp
    columns, units = problem.columns, problem.units
    sums, start = empty(runtime, (problem.sums_length,), da), 0
    space = run.dx_part.reshape(-1)
    of_gates = (da, None, columns), (da, run.x_hat, columns), (da, run.h_hat, columns)
    for gradient, hat, width in (*of_gates, (dz, run.c_hat, units), (dz, None, units)):
        matrix = gradient
        if hat is not None:
            matrix = space[: gradient.size].reshape(gradient.shape)
            xp.multiply(gradient, hat[:used], out=matrix)
        sums[start : start + width] = _column_sums(runtime, matrix.reshape(-1, width))
        start += width
    return sums
