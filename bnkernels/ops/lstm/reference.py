"""NumPy reference of the steps of an LSTM: float64 within a step, rounded to the data's type behind it.

A step begins with the products of its input and of the hidden state before it with the weights. Examples beyond their
length do not enter the statistics; their outputs and gradients are 0.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from bnkernels.ops.exact_sums import mean
from bnkernels.ops.lstm.problem import Backward, Forward, Problem, at

FLOAT64 = np.dtype(np.float64)


def forward(runtime: None, run: Forward) -> Callable[[int], None]:
    """Return what computes a step."""
    return lambda t: _forward_step(run, t)


class BackwardSteps:
    """The backward of a sequence, a step at a time."""

    def __init__(self, run: Backward) -> None:
        self._run, self._sums = run, np.zeros(run.problem.sums_length)

    def steps(self) -> Callable[[int], None]:
        """Return what computes a step."""
        return lambda t: _backward_step(self._run, self._sums, t)

    def finish(self) -> np.ndarray:
        """Return the gradients of bias and norms, one behind the other."""
        return self._sums


def backward(runtime: None, run: Backward) -> BackwardSteps:
    """Return the steps of a backward."""
    return BackwardSteps(run)


def _sigmoid(a: np.ndarray) -> np.ndarray:
    decay = np.exp(-np.abs(a))
    return np.where(a >= 0, 1, decay) / (1 + decay)


def _valid(run: Forward | Backward, t: int) -> np.ndarray:
    """Return which examples a step has, (N, 1)."""
    if run.lengths is None:
        return np.ones((run.problem.rows, 1), bool)
    return (run.lengths > t)[:, None]


def _last(run: Forward | Backward, t: int) -> np.ndarray:
    """Return which examples end with a step, (N, 1)."""
    if run.lengths is None:
        return np.full((run.problem.rows, 1), t == len(run.counts) - 1)
    return (run.lengths == t + 1)[:, None]


def _place(problem: Problem, part: str) -> slice | int:
    """Return where the rstd of a part of a step lies."""
    if problem.norm == "layer":
        return "xhc".index(part)
    columns = problem.columns
    return {"x": slice(columns), "h": slice(columns, 2 * columns), "c": slice(2 * columns, None)}[part]


def _centre(a: np.ndarray, axis: int, count: int) -> np.ndarray:
    """Return numbers less their mean, exactly 0 where all are equal, and the mean."""
    first = a[:1] if axis == 0 else a[:, :1]
    shift = first + mean(a - first, axis, count)
    shift = np.where(np.isfinite(shift), shift, mean(a, axis, count))  # the distance may be out of range
    d = a - shift
    rest = mean(d, axis, count)
    return d - rest, shift + rest


def _normalise(run: Forward, t: int, part: str, raw: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Return the normalised numbers of a part, in float64; keep rstd and population statistics."""
    problem, a, count = run.problem, raw.astype(FLOAT64), run.counts[t]
    row = min(t, problem.tracked - 1)
    if problem.norm == "batch" and not problem.live:
        mean_, var = (run.running[2 * "xhc".index(part) + moment][row].astype(FLOAT64) for moment in (0, 1))
        d = a - mean_
    else:
        axis = 0 if problem.live else 1
        some = a[valid[:, 0]] if problem.live else a
        d, mean_ = _centre(some, axis, some.shape[axis])
        var = mean(d * d, axis, some.shape[axis])
        if problem.live:
            whole = np.zeros_like(a)
            whole[valid[:, 0]] = d
            d = whole
            if t < problem.tracked and count > 1:
                _update(run, "xhc".index(part), t, mean_[0], var[0] * (count / (count - 1)))
    rstd = 1 / np.sqrt(var + run.eps)
    at(run.rstd, t)[_place(problem, part)] = rstd.reshape(-1)
    return d * rstd


def _update(run: Forward, part: int, t: int, *new: np.ndarray) -> None:
    """Move the population statistics of a step towards those of the mini-batch."""
    for running, value in zip(run.running[2 * part : 2 * part + 2], new, strict=True):
        running[t] = (1 - run.momentum) * running[t].astype(FLOAT64) + run.momentum * value


@np.errstate(all="ignore")  # kernels have no warnings either
def _forward_step(run: Forward, t: int) -> None:
    problem, valid, last = run.problem, _valid(run, t), _last(run, t)
    x_part, h_part = at(run.x_part, t), at(run.h_part, t)
    gamma_x, gamma_h, gamma_c, beta_c = run.norms
    if problem.norm:
        x_hat = _normalise(run, t, "x", x_part, valid)
        h_hat = _normalise(run, t, "h", h_part, valid)
        x_part[...], h_part[...] = x_hat, h_hat
        a = gamma_x * x_hat + gamma_h * h_hat
    else:
        a = x_part.astype(FLOAT64) + h_part
    if run.bias is not None:
        a += run.bias
    i, f, g, o = np.split(a, 4, axis=1)
    i, f, g, o = _sigmoid(i), _sigmoid(f), np.tanh(g), _sigmoid(o)
    at(run.gates, t)[...] = np.concatenate((i, f, g, o), axis=1)
    before = run.c0 if t == 0 else at(run.cells, t - 1)
    z = c = f * before + i * g
    if problem.norm:
        c_hat = _normalise(run, t, "c", c, valid)
        at(run.c_hat, t)[...] = c_hat
        z = gamma_c * c_hat + beta_c
    h = o * np.tanh(z)
    np.copyto(at(run.cells, t), c, casting="same_kind", where=valid)
    run.y[t] = np.where(valid, h, 0)
    np.copyto(run.h_n, h, casting="same_kind", where=last)
    np.copyto(run.c_n, c, casting="same_kind", where=last)


def _through_norm(run: Backward, t: int, part: str, g: np.ndarray, hat: np.ndarray) -> np.ndarray:
    """Return the gradient of what was normalised, from that of the normalised numbers."""
    problem, rstd = run.problem, at(run.rstd, t)[_place(run.problem, part)].astype(FLOAT64)
    if problem.norm == "layer":
        rstd = rstd[:, None]
        g = g - mean(g, 1, g.shape[1]) - hat * mean(g * hat, 1, g.shape[1])
    elif problem.live:
        g = g - mean(g, 0, run.counts[t]) - hat * mean(g * hat, 0, run.counts[t])
    return g * rstd


@np.errstate(all="ignore")  # kernels have no warnings either
def _backward_step(run: Backward, sums: np.ndarray, t: int) -> None:
    problem, valid, last = run.problem, _valid(run, t), _last(run, t)
    columns, units = problem.columns, problem.units
    gamma_x, gamma_h, gamma_c, beta_c = run.norms
    i, f, g, o = np.split(at(run.gates, t).astype(FLOAT64), 4, axis=1)
    c, before = run.cells[t].astype(FLOAT64), run.c0 if t == 0 else run.cells[t - 1]
    c_hat = run.c_hat[t] if problem.norm else None
    tanh = np.tanh(c if c_hat is None else gamma_c.astype(FLOAT64) * c_hat + beta_c)
    dh = np.where(last, 0 if run.dh_n is None else run.dh_n, run.dh).astype(FLOAT64)
    if run.dy is not None:
        dh += run.dy[t]
    dz = np.where(valid, dh * o * (1 - tanh * tanh), 0)
    dc = np.where(last, 0 if run.dc_n is None else run.dc_n, run.dc).astype(FLOAT64)
    if problem.norm:
        c_hat = np.where(valid, c_hat, 0)
        sums[3 * columns : 3 * columns + units] += (dz * c_hat).sum(0)
        sums[3 * columns + units :] += dz.sum(0)
        dc += _through_norm(run, t, "c", dz * gamma_c, c_hat)
    else:
        dc += dz
    da = [dc * g * i * (1 - i), dc * before * f * (1 - f), dc * i * (1 - g * g), dh * tanh * o * (1 - o)]
    da = np.where(valid, np.concatenate(da, axis=1), 0)
    sums[:columns] += da.sum(0)
    np.copyto(run.dc, dc * f, casting="same_kind", where=valid)
    if not problem.norm:
        run.dx_part[t] = da
        return
    for number, (part, gamma, hat, out) in enumerate(
        (("x", gamma_x, run.x_hat[t], run.dx_part[t]), ("h", gamma_h, run.h_hat[t], run.dh_part[t])), 1
    ):
        hat = np.where(valid, hat.astype(FLOAT64), 0)
        sums[number * columns : (number + 1) * columns] += (da * hat).sum(0)
        out[...] = np.where(valid, _through_norm(run, t, part, da * gamma, hat), 0)
