"""The time steps of an LSTM: in one launch, or by products and between them what a step does.

The inputs of all steps are one product, and so are the gradients of each weight, behind the last step. Where there is a
loop, a step of it is one product with the recurrent weights, and one kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from bnkernels.ops.lstm import kernels, reference
from bnkernels.ops.lstm.problem import Backward, Forward, Problem, Saved, at
from bnkernels.ops.matmul.op import multiply
from bnkernels.runtime.arguments import empty
from bnkernels.runtime.seam import Runtime


def forward(runtime: Runtime | None, run: Forward, x: Any, h0: Any, weight_ih: Any, weight_hh: Any) -> None:
    """Compute all steps."""
    problem, used, weight = run.problem, len(run.counts), weight_hh.T
    rows, product = used * problem.rows, _product(runtime, problem)
    product(x[:used].reshape(rows, -1), weight_ih.T, run.x_part[:used].reshape(rows, -1))
    if runtime is None or not kernels.forward_sequence(runtime, run, h0, weight_hh):
        step = (reference if runtime is None else kernels).forward(runtime, run)
        for t in range(used):
            product(h0 if t == 0 else run.y[t - 1], weight, at(run.h_part, t))
            step(t)
    run.y[used:] = 0


def backward(runtime: Runtime | None, saved: Saved, dy: Any, dh_n: Any, dc_n: Any, wanted: tuple) -> Any:
    """Compute all steps backwards, and the gradients of all but bias and norms; return the sums for those."""
    dx, dh0, dc0, dweight_ih, dweight_hh = wanted
    problem, used, x = saved.problem, len(saved.counts), saved.x
    product = _product(runtime, problem)
    dx_part = empty(runtime, (used, problem.rows, problem.columns), x)
    dh_part = empty(runtime, dx_part.shape, x) if problem.norm else dx_part
    kept = saved.gates, saved.x_hat, saved.h_hat, saved.c_hat, saved.cells, saved.rstd
    given = problem, saved.counts, saved.lengths, dy, dh_n, dc_n, saved.c0, saved.norms
    run = Backward(*given, *kept, dh0, dc0, dx_part, dh_part)
    work = (reference if runtime is None else kernels).backward(runtime, run)
    if runtime is None or not work.sequence(saved.weight_hh):
        step = work.steps()
        for t in range(used - 1, -1, -1):
            step(t)
            product(dh_part[t], saved.weight_hh, dh0)
    rows = used * problem.rows
    of_x, of_h = dx_part.reshape(rows, -1), dh_part.reshape(rows, -1)
    product(of_x.T, x[:used].reshape(rows, -1), dweight_ih)
    product(dh_part[0].T, saved.h0, dweight_hh)
    if used > 1:
        more = empty(runtime, dweight_hh.shape, x)
        product(of_h[problem.rows :].T, saved.y[: used - 1].reshape(-1, problem.units), more)
        dweight_hh += more
    if dx is not None:
        product(of_x, saved.weight_ih, dx[:used].reshape(rows, -1))
        dx[used:] = 0
    return work.finish()


def _product(runtime: Runtime | None, problem: Problem) -> Callable[[Any, Any, Any], None]:
    """Return what writes the product of two matrices to a third."""
    return partial(multiply, runtime, capturable=problem.capturable)
