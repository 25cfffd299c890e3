"""The time steps of an LSTM: products by a library, and between them what a step does.

The inputs of all steps are one product, and so are the gradients of each weight, behind the last step. Within the loop
a step is one product with the recurrent weights, and one kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

from bnkernels.ops.lstm.problem import Backward, Forward, Saved, at
from bnkernels.runtime.arguments import empty
from bnkernels.runtime.seam import Runtime


@np.errstate(all="ignore")  # kernels have no warnings either
def multiply(runtime: Runtime | None, a: Any, b: Any, out: Any) -> None:
    """Write the product of two matrices."""
    (np if runtime is None else runtime.xp).matmul(a, b, out=out)


def forward(
    runtime: Runtime | None, kernels: ModuleType, run: Forward, x: Any, h0: Any, weight_ih: Any, weight_hh: Any
) -> None:
    """Compute all steps."""
    problem, used, weight = run.problem, len(run.counts), weight_hh.T
    many = (used * problem.rows, problem.columns)
    multiply(runtime, x[:used].reshape(-1, problem.inputs), weight_ih.T, run.x_part[:used].reshape(many))
    step = kernels.forward(run)
    for t in range(used):
        multiply(runtime, h0 if t == 0 else run.y[t - 1], weight, at(run.h_part, t))
        step(t)
    run.y[used:] = 0


def backward(
    runtime: Runtime | None, kernels: ModuleType, run: Backward, saved: Saved, wanted: tuple
) -> Callable[[], Any]:
    """Compute all steps backwards, and the gradients of `dx`, `dh0`, `dweight_ih` and `dweight_hh`.

    Returns what gives the gradients of bias and norms.
    """
    dx, dh0, dweight_ih, dweight_hh = wanted
    problem, used = run.problem, len(run.counts)
    step, finish = kernels.backward(run)
    for t in range(used - 1, -1, -1):
        step(t)
        multiply(runtime, run.dh_part[t], saved.weight_hh, run.dh if t else dh0)
    of_x, of_h = (array[:used].reshape(-1, problem.columns) for array in (run.dx_part, run.dh_part))
    multiply(runtime, of_x.T, saved.x[:used].reshape(-1, problem.inputs), dweight_ih)
    multiply(runtime, run.dh_part[0].T, saved.h0, dweight_hh)
    if used > 1:
        more = empty(runtime, dweight_hh.shape, dweight_hh)
        before = saved.y[: used - 1].reshape(-1, problem.units)
        multiply(runtime, of_h[problem.rows :].T, before, more)
        dweight_hh += more
    if dx is not None:
        multiply(runtime, of_x, saved.weight_ih, dx[:used].reshape(-1, problem.inputs))
        dx[used:] = 0
    return finish
