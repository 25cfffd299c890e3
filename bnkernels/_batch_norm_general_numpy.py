"""The NumPy twins of the general batch-norm kernels: their formulas, in float64, on arrays (groups, rows, C)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from bnkernels._runtime import accumulator
from bnkernels.activations import Activation

if TYPE_CHECKING:
    from bnkernels._batch_norm_general import Options, Plan

WHOLE, COLLECT, APPLY, FROZEN = range(4)  # stages of a pass
DOUBLE = np.dtype(np.float64)


class _Normalisation(NamedTuple):
    """How channels are normalised, each array (groups, 1, C): ``scale * (x - mean - mean_low) + shift``."""

    mean: np.ndarray
    mean_low: np.ndarray
    rstd: np.ndarray
    r: np.ndarray
    d: np.ndarray
    scale: np.ndarray
    shift: np.ndarray


class _Moments(NamedTuple):
    """Of the valid rows, each array (groups, 1, C) in float64; with the mean in two parts."""

    count: np.ndarray
    mean: np.ndarray
    mean_low: np.ndarray
    m2: np.ndarray


def _moved(plan: Plan, array: np.ndarray) -> np.ndarray:
    """Return a view with the groups first, though there be one, and the channels last."""
    return np.moveaxis(array if plan.grouped else array[None], plan.layout.axis + 1, -1)


def _rows(plan: Plan, array: np.ndarray | None, valid: np.ndarray) -> np.ndarray:
    """Return an input as (groups, rows, C) in the accumulator's type, 0 where it is absent or invalid."""
    if array is None:
        return np.zeros((), accumulator(plan.dtypes["x"]))
    rows = _moved(plan, array).reshape(plan.groups, plan.layout.rows, plan.layout.channels)
    with np.errstate(invalid="ignore"):  # a NaN that signals
        return np.where(valid, rows, rows.dtype.type(0)).astype(accumulator(array.dtype), copy=False)


def _bring_back(plan: Plan, rows: np.ndarray, valid: np.ndarray, out: np.ndarray | None) -> None:
    """Write an output, 0 where it is invalid."""
    if out is None:
        return
    moved = _moved(plan, out)
    with np.errstate(over="ignore"):  # too large for 16 bits is infinity, as in the kernels
        moved[...] = np.where(valid, rows, 0).reshape(moved.shape)


def _valid(plan: Plan, mask: np.ndarray | None) -> np.ndarray:
    """Return the mask as (groups, rows, 1)."""
    if mask is None:
        return np.ones((plan.groups, plan.layout.rows, 1), bool)
    positions = _moved(plan, np.empty(plan.shapes["x"], bool)).shape[:-1]
    mask = mask if plan.grouped else mask[None]
    mask = mask.reshape(mask.shape + (1,) * (len(positions) - mask.ndim))
    return np.broadcast_to(mask, positions).reshape(plan.groups, plan.layout.rows, 1)


def _by_group(plan: Plan, array: np.ndarray | None, absent: float = 0.0) -> np.ndarray:
    """Return gamma, beta or running statistics as (groups or 1, 1, C) in the accumulator's type."""
    wide = accumulator(plan.dtypes["x"])
    if array is None:
        return np.full((1, 1, plan.layout.channels), absent, wide)
    return array.reshape(-1, 1, plan.layout.channels).astype(wide)


def _moments(x: np.ndarray, valid: np.ndarray) -> _Moments:
    """Return the moments of the valid rows; a constant channel has exactly its number as mean, and no squares."""
    count = np.broadcast_to(valid.sum(1, keepdims=True).astype(DOUBLE), (len(x), 1, x.shape[2]))
    divisor = np.maximum(count, 1)
    first = np.take_along_axis(x, np.broadcast_to(valid, x.shape).argmax(1)[:, None], 1)  # the first valid row
    centred = np.where(valid, x.astype(DOUBLE) - first, 0)
    shift = centred.sum(1, keepdims=True) / divisor
    centred = np.where(valid, centred - shift, 0)
    rest = centred.sum(1, keepdims=True) / divisor  # what rounding left
    centred = np.where(valid, centred - rest, 0)
    mean = (first + (shift + rest)).astype(x.dtype)
    # In this order every difference is exact, or as small as what it is added to.
    low = (first.astype(DOUBLE) - mean) + (shift + rest)
    return _Moments(count, mean.astype(DOUBLE), low, (centred * centred).sum(1, keepdims=True))


def _normalise(plan: Plan, arrays: dict[str, Any], mean: Any, low: Any, rstd: Any, r: Any, d: Any) -> _Normalisation:
    """Form scale and shift as the kernels do, in the accumulator's type."""
    gamma, beta = _by_group(plan, arrays["gamma"], 1.0), _by_group(plan, arrays["beta"])
    return _Normalisation(mean, low, rstd, r, d, gamma * rstd * r, gamma * d + beta)


def _given(plan: Plan, stage: int, arrays: dict[str, Any], options: Options) -> _Normalisation:
    """Return the normalisation with given statistics, or running ones."""
    wide = accumulator(plan.dtypes["x"])
    one, zero = np.ones((), wide), np.zeros((), wide)
    if stage == FROZEN:
        mean, var = (_by_group(plan, arrays[name]) for name in ("running_mean", "running_var"))
        return _normalise(plan, arrays, mean, zero, 1 / np.sqrt(var + wide.type(options.eps)), one, zero)
    rows = arrays["statistics"].reshape(plan.groups, plan.statistic_rows, 1, plan.layout.channels)
    parts = [rows[:, i] for i in range(plan.statistic_rows)]
    return _normalise(plan, arrays, *(parts if len(parts) == 5 else [*parts, one, zero]))


def _concluded(plan: Plan, arrays: dict[str, Any], options: Options, moments: _Moments) -> _Normalisation:
    """Return the normalisation that moments make, renormalised or not; write statistics and running statistics."""
    wide = accumulator(plan.dtypes["x"])
    some = moments.count > 0
    var = (moments.m2 / np.maximum(moments.count, 1)).astype(wide)
    with np.errstate(divide="ignore"):
        rstd = np.where(some, 1 / np.sqrt(var + wide.type(options.eps)), 0).astype(wide)
    r, d = np.ones_like(rstd), np.zeros_like(rstd)
    if options.renorm is not None:
        r_max, d_max = options.renorm
        running = 1 / np.sqrt(_by_group(plan, arrays["running_var"]) + wide.type(options.eps))
        distance = moments.mean - _by_group(plan, arrays["running_mean"]) + moments.mean_low
        with np.errstate(divide="ignore", invalid="ignore"):
            r = np.where(some, np.clip(running / rstd, 1 / r_max, r_max), 1).astype(wide)
        d = np.where(some, np.clip(distance * running, -d_max, d_max), 0).astype(wide)
    rows = (moments.mean, moments.mean_low, rstd, r, d)[: plan.statistic_rows]
    arrays["statistics"][...] = np.concatenate(rows, 1).reshape(plan.shapes["statistics"])
    _update(arrays["running_mean"], options.momentum, moments.mean, some)
    divisor = moments.count - options.unbiased
    unbiased = moments.m2 / np.maximum(divisor, 1)
    _update(arrays["running_var"], options.momentum, unbiased, some & (divisor > 0))
    mean, low = moments.mean.astype(wide), moments.mean_low.astype(wide)
    return _normalise(plan, arrays, mean, low, rstd, r, d)


def _update(running: np.ndarray | None, momentum: float, new: np.ndarray, where: np.ndarray) -> None:
    """Move a running statistic where there is something new."""
    if running is not None:
        moved = (1 - momentum) * running.astype(DOUBLE) + momentum * new.reshape(running.shape)
        running[...] = np.where(where.reshape(running.shape), moved, running)


def _centred(x: np.ndarray, of: _Normalisation) -> np.ndarray:
    return (x.astype(DOUBLE) - of.mean) - of.mean_low


def _before_activation(centred: np.ndarray, of: _Normalisation, residual: np.ndarray, wide: np.dtype) -> np.ndarray:
    """Return what the activation sees; the same in both passes."""
    return (of.scale * centred + of.shift).astype(wide) + residual


def forward_host(plan: Plan, stage: int, arrays: dict[str, Any], options: Options) -> None:
    """Write what the stage of the forward writes."""
    valid = _valid(plan, arrays.get("mask"))
    x = _rows(plan, arrays["x"], valid)
    if stage in (WHOLE, COLLECT):
        moments = _moments(x, valid)
        if stage == COLLECT:
            arrays["moments"][...] = np.concatenate(moments, 1)[0]
            return
        of = _concluded(plan, arrays, options, moments)
    else:
        of = _given(plan, stage, arrays, options)
    z = _before_activation(_centred(x, of), of, _rows(plan, arrays["residual"], valid), x.dtype)
    _bring_back(plan, options.phi.forward(np, z), valid, arrays["y" if "y" in arrays else "out"])


def _gradient(phi: Activation, dy: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Return the gradient before the activation, in float64."""
    return phi.backward(np, dy, phi.forward(np, z) if phi.from_output else z).astype(DOUBLE)


def backward_host(plan: Plan, stage: int, arrays: dict[str, Any], options: Options) -> None:
    """Write what the stage of the backward writes."""
    valid = _valid(plan, arrays["mask"])
    dy, x, residual = (_rows(plan, arrays[name], valid) for name in ("dy", "x", "residual"))
    of = _given(plan, stage, arrays, options)
    centred = np.where(valid, _centred(x, of), 0)
    g = np.where(valid, _gradient(options.phi, dy, _before_activation(centred, of, residual, x.dtype)), 0)
    if stage == APPLY:
        sum_g, sum_g_xhat, count = arrays["sums"].astype(DOUBLE)
    else:
        sum_g, sum_g_xhat = g.sum(1, keepdims=True), (g * centred).sum(1, keepdims=True) * of.rstd
        count = np.maximum(valid.sum(1, keepdims=True), 1)
    if stage == COLLECT:
        counts = np.broadcast_to(valid.sum(1, keepdims=True), sum_g.shape)
        arrays["sums"][...] = np.concatenate((sum_g, sum_g_xhat, counts), 1)[0]
        return
    if stage in (WHOLE, FROZEN):
        arrays["dgamma"][...] = (of.r * sum_g_xhat + of.d * sum_g).sum((0, 1))
        arrays["dbeta"][...] = sum_g.sum((0, 1))
    through = 0.0 if stage == FROZEN else (sum_g + centred * of.rstd * sum_g_xhat) / count
    _bring_back(plan, of.scale * (g - through), valid, arrays["dx"])
    _bring_back(plan, g, valid, arrays["dresidual"])


def merge_host(
    moments: np.ndarray,
    statistics: np.ndarray,
    merged: np.ndarray,
    running_mean: np.ndarray | None,
    running_var: np.ndarray | None,
    momentum: float,
    unbiased: bool,
    eps: float,
) -> None:
    """Write the statistics and the moments of all parts together, and update the running statistics."""
    dtype = moments.dtype
    given = np.where(moments[:, :1] > 0, moments, 0).astype(DOUBLE)  # of an empty part nothing but the count counts
    counts, highs, lows, m2s = given[:, 0], given[:, 1], given[:, 2], given[:, 3]
    count = counts.sum(0)
    divisor, some = np.maximum(count, 1), count > 0
    first = highs[(counts > 0).argmax(0), np.arange(len(count))]  # all means are taken from here: equal ones stay exact
    shift = (counts * ((highs - first) + lows)).sum(0) / divisor
    mean = (first + shift).astype(dtype)
    low = (first - mean) + shift
    distances = ((highs - mean) + lows) - low
    m2 = (m2s + np.where(counts > 0, counts * distances**2, 0)).sum(0)
    with np.errstate(divide="ignore"):
        rstd = np.where(some, 1 / np.sqrt((m2 / divisor).astype(dtype) + dtype.type(eps)), 0)
    merged[...] = count, mean, low, m2
    statistics[...] = mean, low, rstd
    _update(running_mean, momentum, mean.astype(DOUBLE), some)
    _update(running_var, momentum, m2 / np.maximum(count - unbiased, 1), some & (count - unbiased > 0))
