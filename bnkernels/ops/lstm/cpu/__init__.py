"""LSTM on the CPU, compiled by Numba: how its blocks of examples, or strips of units, are shared among threads."""

from __future__ import annotations

from typing import Any

import numpy as np

from bnkernels.ops.lstm.cpu.backward import backward_blocks, backward_products, backward_sequence, backward_strips
from bnkernels.ops.lstm.cpu.forward import forward_blocks, forward_strips
from bnkernels.ops.lstm.cpu.parts import HEIGHT, STRIP
from bnkernels.ops.lstm.problem import Forward, Saved
from bnkernels.runtime.arguments import addresses
from bnkernels.runtime.cpu.language import LIKE
from bnkernels.runtime.cpu.threads import share, threads_for
from bnkernels.runtime.seam import Runtime, ceil_div


def forward(
    runtime: Runtime | None, run: Forward, x: np.ndarray, h0: np.ndarray, weight_ih: np.ndarray, weight_hh: np.ndarray
) -> None:
    """Compute all steps."""
    problem, used = run.problem, len(run.counts)
    like, rows, units = LIKE[problem.dtype.name], problem.rows, problem.units
    bias = np.zeros(problem.columns, problem.dtype) if run.bias is None else run.bias
    weights = np.ascontiguousarray(weight_ih.T), np.ascontiguousarray(weight_hh.T)
    made = run.gates, run.x_part, run.h_part, run.cells, run.c_hat, run.rstd, run.y, run.h_n, run.c_n
    pointers = addresses(None, x, h0, run.c0, *weights, bias, *run.norms, *made, run.lengths)
    sizes = used, rows, problem.inputs, units, int(len(run.cells) > 1), int(len(run.x_part) > 1)
    size = rows * problem.columns * (2 if problem.norm else 1)
    given = like, pointers
    if problem.norm != "batch":
        share(forward_blocks, ceil_div(rows, HEIGHT), used * size, *given, run.eps, run.momentum, sizes)
    else:
        strips, counts = ceil_div(units, STRIP), np.array(run.counts, np.float64)
        given += addresses(None, *run.running), run.eps, run.momentum, sizes
        at_once = used if threads_for(strips, size) == 1 else 1  # threads wait for one another behind every step
        for t in range(0, used, at_once):
            of_steps = (t, t + at_once), *addresses(None, counts), problem.live, problem.tracked
            share(forward_strips, strips, size, *given, *of_steps)
    run.y[used:] = 0


def backward(runtime: Runtime | None, saved: Saved, dy: Any, dh_n: Any, dc_n: Any, wanted: tuple) -> np.ndarray:
    """Compute all steps backwards, and the gradients of all but bias and norms; return the sums for those."""
    dx, dh0, dc0, dweight_ih, dweight_hh = wanted
    problem, used, x = saved.problem, len(saved.counts), saved.x
    like, rows, units = LIKE[problem.dtype.name], problem.rows, problem.units
    batch, blocks = problem.norm == "batch", ceil_div(rows, HEIGHT)
    parts = 1 if batch else blocks  # that are added in the end
    dx_part = np.empty((rows, problem.columns), problem.dtype)
    dh_part = np.empty_like(dx_part) if problem.norm else dx_part
    of_weights = [
        gradient if parts == 1 else np.empty((parts, *gradient.shape), gradient.dtype)
        for gradient in (dweight_ih, dweight_hh)
    ]
    sums = np.zeros((parts, problem.sums_length))
    kept = saved.gates, saved.x_hat, saved.h_hat, saved.c_hat, saved.cells, saved.rstd
    if problem.norm is None:
        kept = saved.gates, None, None, None, saved.cells, None
    arrays = x, saved.h0, saved.c0, saved.weight_ih, saved.weight_hh, saved.y, *saved.norms, *kept
    arrays += dy, dh_n, dc_n, dh0, dc0, dx, dx_part, dh_part, *of_weights, sums, saved.lengths
    pointers, sizes = addresses(None, *arrays), (used, rows, problem.inputs, units)
    size = rows * problem.columns * (2 if problem.norm else 1)
    strips, counts = ceil_div(units, STRIP), np.array(saved.counts, np.float64)
    if not batch:
        share(backward_blocks, blocks, used * size, like, pointers, sizes)
    elif threads_for(max(strips, blocks), size) == 1:
        backward_sequence(like, pointers, sizes, *addresses(None, counts), problem.live)
    else:
        for t in range(used - 1, -1, -1):
            share(backward_strips, strips, size, like, pointers, sizes, t, counts[t], problem.live)
            share(backward_products, blocks, size, like, pointers, sizes, t)
    if parts > 1:
        for gradient, partial in zip((dweight_ih, dweight_hh), of_weights, strict=True):
            partial.sum(0, out=gradient)
    if dx is not None:
        dx[used:] = 0
    return sums.sum(0)
