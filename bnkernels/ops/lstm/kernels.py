"""Steps of an LSTM by the kernels ``cuda/lstm_*.cu``: a launch each, or a whole sequence in one.

The arguments of all steps are made at once.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np

from bnkernels.ops.lstm.launch import choose, choose_sequence
from bnkernels.ops.lstm.problem import NORM_NAMES, RUNNING_NAMES, Backward, Forward, Problem
from bnkernels.ops.matmul.op import add_rows
from bnkernels.runtime.arguments import addresses, empty, pack
from bnkernels.runtime.seam import LaunchPlan, Runtime
from bnkernels.runtime.workspace import barrier_counters


def forward(runtime: Runtime, run: Forward) -> Callable[[int], None]:
    """Return what computes a step."""
    problem, used = run.problem, len(run.counts)
    plan, steps, counts = choose("forward", problem), np.arange(used), np.array(run.counts)
    members = _places(runtime, steps, _arrays_of_steps(run)) | _members(runtime, run)
    members["before"] = _before(runtime, steps, run.c0, run.cells)
    members |= {"step": steps, "count": counts, "inverse_count": 1 / counts}
    if problem.tracked:
        rows = np.minimum(steps, problem.tracked - 1)
        members |= _places(runtime, rows, dict(zip(RUNNING_NAMES, run.running, strict=True)))
        members["moving"] = problem.live & (steps < problem.tracked) & (counts > 1)
    return _launcher(runtime, plan, members | {"held": plan.held}, used, run.y)


def forward_sequence(runtime: Runtime, run: Forward, h0: Any, weight_hh: Any) -> bool:
    """Compute all steps in one launch, products too; return whether there is such a launch."""
    problem = run.problem
    plan = choose_sequence("forward", problem, runtime.limits(run.y))
    if plan is None:
        return False
    of_steps, counts = _arrays_of_steps(run), _counts(runtime, run.counts, run.y)
    running = dict(zip(RUNNING_NAMES, run.running, strict=True))
    arrays = of_steps | running | {"before": run.c0, "weight_hh": weight_hh, "h0": h0, "counts": counts}
    members = _fixed(runtime, arrays) | _members(runtime, run) | {"steps": len(run.counts), "tracked": problem.tracked}
    pitches = {f"{name}_pitch": of_steps[name] for name in ("gates", "h_part", "rstd")} | {"state_pitch": run.cells}
    members |= {name: _pitch(array, problem) for name, array in pitches.items()} | {"held": plan.held}
    _launch(runtime, plan, members, run.y)
    return True


def _arrays_of_steps(run: Forward) -> dict[str, Any]:
    arrays = {"x_part": run.x_part, "h_part": run.h_part, "gates": run.gates, "cells": run.cells}
    return arrays | {"c_hat": run.c_hat, "rstd": run.rstd, "h": run.y}


def _members(runtime: Runtime, run: Forward) -> dict[str, Any]:
    """Return what all steps of a forward have in common."""
    fixed = {"bias": run.bias, "h_n": run.h_n, "c_n": run.c_n, "lengths": run.lengths}
    members = _fixed(runtime, fixed | dict(zip(NORM_NAMES, run.norms, strict=True))) | _sizes(run.problem, run.counts)
    return members | {"eps": run.eps, "momentum": run.momentum, "chosen": run.longest}


class BackwardKernels:
    """The backward of a sequence: a step at a time, or all in one launch."""

    def __init__(self, runtime: Runtime, run: Backward) -> None:
        problem, used, like = run.problem, len(run.counts), run.dx_part
        self._runtime, self._run, layer = runtime, run, problem.norm == "layer"
        self._da = empty(runtime, run.dx_part.shape, like) if layer else None
        self._dz = empty(runtime, (used, problem.rows, problem.units), like) if layer else None
        self._sums = None if layer else empty(runtime, (used, problem.sums_length), like)
        arrays = {"dy": run.dy, "gates": run.gates, "dx_part": run.dx_part}
        arrays |= {"da": self._da, "dz": self._dz, "sums": self._sums}
        if problem.norm:
            arrays |= {"c_hat": run.c_hat, "x_hat": run.x_hat, "h_hat": run.h_hat, "rstd": run.rstd}
            arrays |= {"dh_part": run.dh_part}
        else:
            arrays |= {"cells": run.cells}
        fixed = {"dh": run.dh, "dh_n": run.dh_n, "dc_n": run.dc_n, "dc": run.dc, "lengths": run.lengths}
        self._arrays, fixed = arrays, fixed | dict(zip(NORM_NAMES, run.norms, strict=True))
        self._members = _fixed(runtime, fixed) | _sizes(problem, run.counts)

    def steps(self) -> Callable[[int], None]:
        """Return what computes a step."""
        run, runtime = self._run, self._runtime
        plan, steps = choose("backward", run.problem), np.arange(len(run.counts))
        members = self._members | _places(runtime, steps, self._arrays)
        members["before"] = _before(runtime, steps, run.c0, run.cells)
        members |= {"step": steps, "inverse_count": 1 / np.array(run.counts), "held": plan.held}
        return _launcher(runtime, plan, members, len(steps), run.dx_part)

    def sequence(self, weight_hh: Any) -> bool:
        """Compute all steps in one launch, recurrent products too; return whether there is such a launch."""
        run, runtime = self._run, self._runtime
        plan = choose_sequence("backward", run.problem, runtime.limits(run.dx_part))
        if plan is None:
            return False
        counts = _counts(runtime, run.counts, run.dx_part)
        arrays = self._arrays | {"before": run.c0, "states": run.cells, "weight_hh": weight_hh, "counts": counts}
        members = self._members | _fixed(runtime, arrays) | {"steps": len(run.counts), "held": plan.held}
        members |= {"rstd_pitch": _pitch(run.rstd, run.problem), "sums_pitch": run.problem.sums_length}
        _launch(runtime, plan, members, run.dx_part)
        return True

    def finish(self) -> Any:
        """Return the gradients of bias and norms, one behind the other."""
        if self._sums is None:
            return _sums_over_examples(self._runtime, self._run, self._da, self._dz)
        return _column_sums(self._runtime, self._run.problem, self._sums)


def backward(runtime: Runtime, run: Backward) -> BackwardKernels:
    """Return the kernels of a backward."""
    return BackwardKernels(runtime, run)


def _counts(runtime: Runtime, counts: tuple[int, ...], like: Any) -> Any:
    """Return the examples of every step, on the device."""
    if counts[0] > counts[-1]:
        return runtime.on_device(np.array(counts, like.dtype), like)
    found = empty(runtime, (len(counts),), like)
    found[...] = counts[0]  # without a copy from the host, which a CUDA graph could not capture
    return found


def _pitch(array: Any, problem: Problem) -> int:
    """Return the elements from step to step, 0 where there is one step only, or none."""
    return 0 if array is None or len(array) == 1 else array.strides[0] // problem.dtype.itemsize


def _launch(runtime: Runtime, plan: LaunchPlan, members: dict[str, Any], like: Any) -> None:
    """Launch a sequence."""
    if plan.launch.cooperative:
        members["barrier_counter"] = barrier_counters(runtime.workspace(like))
    arguments = pack(plan.arguments, *(members.get(name, 0) for name in plan.arguments.names))
    runtime.launch(*plan[:3], arguments, like)


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


def _sizes(problem: Problem, counts: tuple[int, ...]) -> dict[str, Any]:
    return {"rows": problem.rows, "units": problem.units, "end": len(counts) - 1, "live": problem.live}


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


def _column_sums(runtime: Runtime, problem: Problem, matrix: Any) -> Any:
    """Return the sums of the columns of a matrix."""
    out = empty(runtime, (1, matrix.shape[1]), matrix)
    add_rows(runtime, matrix, out, capturable=problem.capturable)
    return out[0]


@np.errstate(all="ignore")  # kernels have no warnings either
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
        sums[start : start + width] = _column_sums(runtime, problem, matrix.reshape(-1, width))
        start += width
    return sums
