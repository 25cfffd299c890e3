"""Reference of batch norm: the kernels' formulas in NumPy, in float64, on arrays (groups, rows, C)."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from bnkernels.ops.activations import Activation
from bnkernels.ops.batch_norm.problem import Options, Plan, Stage
from bnkernels.ops.exact_sums import mean, total

DOUBLE = np.dtype(np.float64)


@np.errstate(all="ignore")  # as kernels do, which have no warnings
def run(plan: Plan, arrays: dict[str, Any], options: Options) -> None:
    """Write what a pass writes."""
    {"forward": _forward, "backward": _backward, "double_backward": _double_backward}[plan.kind.direction](
        plan, arrays, options
    )


class _Normalisation(NamedTuple):
    """Normalisation ``scale * (x - mean - mean_low) + shift``, each array (groups, 1, C)."""

    mean: np.ndarray
    mean_low: np.ndarray
    rstd: np.ndarray
    r: np.ndarray
    d: np.ndarray
    scale: np.ndarray
    shift: np.ndarray


class _Moments(NamedTuple):
    """Moments of the valid rows, each array (groups, 1, C) in float64, the mean in two parts."""

    count: np.ndarray
    mean: np.ndarray
    mean_low: np.ndarray
    m2: np.ndarray


def _moved(plan: Plan, array: np.ndarray) -> np.ndarray:
    """Return a view with the groups first, though there be one, and the channels last."""
    return np.moveaxis(array if plan.grouped else array[None], plan.axis + 1, -1)


def _rows(plan: Plan, array: np.ndarray | None, valid: np.ndarray | None) -> np.ndarray | None:
    """Return an input as (groups, rows, C) in the accumulator's type, 0 where it is invalid."""
    if array is None:
        return None
    rows = _moved(plan, array).reshape(plan.problem.groups, plan.problem.rows, plan.problem.channels)
    rows = rows.astype(plan.acc_dtype, copy=False)
    return rows if valid is None else np.where(valid, rows, rows.dtype.type(0))


def _bring_back(plan: Plan, rows: np.ndarray, valid: np.ndarray | None, out: np.ndarray | None) -> None:
    """Write an output, 0 where it is invalid."""
    if out is None:
        return
    moved = _moved(plan, out)
    moved[...] = (rows if valid is None else np.where(valid, rows, rows.dtype.type(0))).reshape(moved.shape)


def _valid(plan: Plan, mask: np.ndarray | None) -> np.ndarray | None:
    """Return the mask as (groups, rows, 1)."""
    if mask is None:
        return None
    positions = plan.positions if plan.grouped else (1, *plan.positions)
    mask = mask if plan.grouped else mask[None]
    mask = mask.reshape(mask.shape + (1,) * (len(positions) - mask.ndim))
    return np.broadcast_to(mask, positions).reshape(plan.problem.groups, plan.problem.rows, 1)


def _count(plan: Plan, valid: np.ndarray | None) -> np.ndarray:
    """Return the number of valid rows, (groups, 1, 1)."""
    if valid is None:
        return np.full((plan.problem.groups, 1, 1), float(plan.problem.rows))
    return valid.sum(1, keepdims=True, dtype=DOUBLE)


def _by_group(plan: Plan, array: np.ndarray | None, absent: float = 0.0) -> np.ndarray:
    """Return gamma, beta or running statistics as (groups or 1, 1, C) in the accumulator's type."""
    if array is None:
        return np.full((1, 1, plan.problem.channels), absent, plan.acc_dtype)
    return array.reshape(-1, 1, plan.problem.channels).astype(plan.acc_dtype)


def _moments(plan: Plan, x: np.ndarray, valid: np.ndarray | None) -> _Moments:
    """Return the moments of the valid rows.

    A constant channel has exactly its number as mean, and no squares: numbers are first shifted by its first valid row,
    and what rounding leaves of the mean is taken in a second pass.
    """
    count = _count(plan, valid)
    divisor, x = np.maximum(count, 1), x.astype(DOUBLE)
    at = 0 if valid is None else valid.argmax(1)[:, None]
    first = x[:, :1] if valid is None else np.take_along_axis(x, np.broadcast_to(at, (len(x), 1, x.shape[2])), 1)
    weight = 1.0 if valid is None else valid.astype(DOUBLE)
    shift = first + mean((x - first) * weight, 1, divisor)
    shift = np.where(np.isfinite(shift), shift, mean(x * weight, 1, divisor))  # the distance may be out of range
    centred = (x - shift) * weight
    rest = mean(centred, 1, divisor)
    centred -= rest
    if valid is not None:
        centred *= weight
    high = (shift + rest).astype(plan.acc_dtype).astype(DOUBLE)
    low = (shift - high) + rest
    centred *= centred
    return _Moments(np.broadcast_to(count, high.shape), high, low, total(centred, 1))


def _normalise(plan: Plan, arrays: dict[str, Any], mean: Any, low: Any, rstd: Any, r: Any, d: Any) -> _Normalisation:
    """Form scale and shift as the kernels do, in the accumulator's type."""
    gamma, beta = _by_group(plan, arrays["gamma"], 1.0), _by_group(plan, arrays["beta"])
    return _Normalisation(mean, low, rstd, r, d, gamma * rstd * r, gamma * d + beta)


def _given(plan: Plan, arrays: dict[str, Any], options: Options) -> _Normalisation:
    """Return the normalisation with given statistics, or running ones."""
    dtype = plan.acc_dtype
    one, zero = np.ones((), dtype), np.zeros((), dtype)
    if plan.kind.stage == Stage.FROZEN:
        mean, var = (_by_group(plan, arrays[name]) for name in ("running_mean", "running_var"))
        return _normalise(plan, arrays, mean, zero, 1 / np.sqrt(var + dtype.type(options.eps)), one, zero)
    rows = arrays["statistics"].reshape(plan.problem.groups, plan.statistic_rows, 1, plan.problem.channels)
    parts = [rows[:, i] for i in range(plan.statistic_rows)]
    return _normalise(plan, arrays, *(parts if len(parts) == 5 else [*parts, one, zero]))


def _concluded(plan: Plan, arrays: dict[str, Any], options: Options, moments: _Moments) -> _Normalisation:
    """Return the normalisation that moments make, renormalised or not; write statistics and running statistics."""
    dtype = plan.acc_dtype
    some = moments.count > 0
    var = (moments.m2 / np.maximum(moments.count, 1)).astype(dtype)
    rstd = np.where(some, 1 / np.sqrt(var + dtype.type(options.eps)), 0).astype(dtype)
    r, d = np.ones_like(rstd), np.zeros_like(rstd)
    if options.renorm is not None:
        r_max, d_max = options.renorm
        running = 1 / np.sqrt(_by_group(plan, arrays["running_var"]) + dtype.type(options.eps))
        distance = moments.mean - _by_group(plan, arrays["running_mean"]) + moments.mean_low
        r = np.where(some, np.clip(running / rstd, 1 / r_max, r_max), 1).astype(dtype)
        d = np.where(some, np.clip(distance * running, -d_max, d_max), 0).astype(dtype)
    rows = (moments.mean, moments.mean_low, rstd, r, d)[: plan.statistic_rows]
    arrays["statistics"][...] = np.concatenate(rows, 1).reshape(arrays["statistics"].shape)
    _update(arrays["running_mean"], options.momentum, moments.mean + moments.mean_low, some)
    divisor = moments.count - options.unbiased
    unbiased = moments.m2 / np.maximum(divisor, 1)
    _update(arrays["running_var"], options.momentum, unbiased, some & (divisor > 0))
    mean, low = moments.mean.astype(dtype), moments.mean_low.astype(dtype)
    return _normalise(plan, arrays, mean, low, rstd, r, d)


def _update(running: np.ndarray | None, momentum: float, new: np.ndarray, where: np.ndarray) -> None:
    """Move a running statistic where there is something new."""
    if running is not None:
        moved = (1 - momentum) * running.astype(DOUBLE) + momentum * new.reshape(running.shape)
        running[...] = np.where(where.reshape(running.shape), moved, running)


def _centred(x: np.ndarray, of: _Normalisation, valid: np.ndarray | None) -> np.ndarray:
    centred = x.astype(DOUBLE)
    centred -= of.mean
    centred -= of.mean_low
    if valid is not None:
        centred *= valid
    return centred


def _before_activation(centred: np.ndarray, of: _Normalisation, residual: np.ndarray | None) -> np.ndarray:
    """Return the argument of the activation; the same in both passes."""
    z = np.multiply(centred, of.scale, out=np.empty(centred.shape, of.scale.dtype), casting="same_kind")
    z += of.shift
    if residual is not None:
        z += residual
    return z


def _forward(plan: Plan, arrays: dict[str, Any], options: Options) -> None:
    """Write what a stage of the forward writes."""
    stage, valid = plan.kind.stage, _valid(plan, arrays["mask"])
    x = _rows(plan, arrays["x"], valid)
    if stage in (Stage.WHOLE, Stage.COLLECT):
        moments = _moments(plan, x, valid)
        if stage == Stage.COLLECT:
            arrays["moments"][...] = np.concatenate(moments, 1)[0]
            return
        of = _concluded(plan, arrays, options, moments)
    else:
        of = _given(plan, arrays, options)
    # In the whole pass too as the backward forms it: from the statistics as they are kept.
    z = _before_activation(_centred(x, of, valid), of, _rows(plan, arrays["residual"], valid))
    _bring_back(plan, options.phi.forward(np, z), valid, arrays["y" if "y" in arrays else "out"])


def _gradient(phi: Activation, dy: np.ndarray, centred: np.ndarray, of: _Normalisation, residual: Any) -> np.ndarray:
    """Return the gradient before the activation, in float64."""
    if phi.is_identity:
        return dy.astype(DOUBLE)
    z = _before_activation(centred, of, residual)
    return phi.backward(np, dy, phi.forward(np, z) if phi.from_output else z).astype(DOUBLE)


def _backward(plan: Plan, arrays: dict[str, Any], options: Options) -> None:
    """Write what a stage of the backward writes."""
    stage, valid = plan.kind.stage, _valid(plan, arrays["mask"])
    dy, x, residual = (_rows(plan, arrays[name], valid) for name in ("dy", "x", "residual"))
    of = _given(plan, arrays, options)
    centred = _centred(x, of, valid)
    g = _gradient(options.phi, dy, centred, of, residual)  # 0 where dy is
    if stage == Stage.APPLY:
        *sums, count = arrays["sums"].astype(DOUBLE)
        mean_g, mean_g_xhat = (one / np.maximum(count, 1) for one in sums)
    else:
        count, products = _count(plan, valid), g * centred
        sum_g, sum_products = total(g, 1), total(products, 1)
        sum_g_xhat, divisor = sum_products * of.rstd, np.maximum(count, 1)
        mean_g, mean_g_xhat = mean(g, 1, divisor, sum_g), mean(products, 1, divisor, sum_products) * of.rstd
    if stage == Stage.COLLECT:
        arrays["sums"][...] = np.concatenate((sum_g, sum_g_xhat, np.broadcast_to(count, sum_g.shape)), 1)[0]
        return
    if stage in (Stage.WHOLE, Stage.FROZEN):
        arrays["dgamma"][...] = (of.r * sum_g_xhat + of.d * sum_g).sum((0, 1))
        arrays["dbeta"][...] = sum_g.sum((0, 1))
    _bring_back(plan, g, valid, arrays["dresidual"])
    if stage != Stage.FROZEN:
        centred *= mean_g_xhat * of.rstd
        g -= centred
        g -= mean_g
    g *= of.scale
    _bring_back(plan, g, valid, arrays["dx"])


def _double_backward(plan: Plan, arrays: dict[str, Any], options: Options) -> None:
    """Write the gradients of the backward: as ``cuda/batch_norm_double_backward.cu``, with the same names.

    The kernel takes apart the sums that depend on sums; here they are written as they stand.
    """
    phi, rows = options.phi, plan.problem.rows
    ddx, dy, x, residual, ddresidual = (_rows(plan, arrays[name], None) for name in plan.kind.strided)
    of = _given(plan, arrays, options)
    centred = _centred(x, of, None)
    # Rounded as the forward rounds it: on the same side of a kink.
    z = _before_activation(centred, of, residual).astype(DOUBLE)
    taken = phi.forward(np, z.copy()) if phi.from_output else z
    ddgamma, ddbeta, gamma = (
        _by_group(plan, arrays[name], absent).astype(DOUBLE)
        for name, absent in (("ddgamma", 0.0), ("ddbeta", 0.0), ("gamma", 1.0))
    )
    rstd, dy = of.rstd.astype(DOUBLE), dy.astype(DOUBLE)
    scale, xhat = gamma * rstd, centred * rstd

    def project(a: np.ndarray) -> np.ndarray:
        """Return P a: a, and what passes through the mean and the variance."""
        if options.frozen:
            return a
        return a - total(a, 1) / rows - xhat * (total(a * xhat, 1) / rows)

    g = phi.backward(np, dy, taken)
    w, h, e = ddgamma * xhat + ddbeta, ddgamma * g, np.zeros((1, 1, plan.problem.channels))
    if ddresidual is not None:
        w += ddresidual
    if ddx is not None:
        v = ddx.astype(DOUBLE)
        w += scale * project(v)
        if not options.frozen:
            h -= scale * (v * (total(g * xhat, 1) / rows) + g * (total(v * xhat, 1) / rows))
        e = total(v * project(g), 1)
    q = np.zeros(z.shape) if phi.is_piecewise_linear else w * (dy * phi.second(np, z))
    h += gamma * q
    arrays["dgamma"][...] = (total(q * xhat, 1) + rstd * e)[0, 0]
    arrays["dbeta"][...] = total(q, 1)[0, 0]
    through_scale = 0 if options.frozen else xhat * (scale * e / rows)
    _bring_back(plan, rstd * (project(h) - through_scale), None, arrays["dx"])
    _bring_back(plan, phi.backward(np, w, taken), None, arrays["ddy"])
    _bring_back(plan, q, None, arrays["dresidual"])


@np.errstate(all="ignore")  # as kernels do, which have no warnings
def merge(
    statistics: np.ndarray,
    merged: np.ndarray,
    moments: np.ndarray,
    running_mean: np.ndarray | None,
    running_var: np.ndarray | None,
    momentum: float,
    unbiased: bool,
    eps: float,
) -> None:
    """Write the statistics and the moments of all parts together, and update the running statistics."""
    dtype = moments.dtype
    given = np.where(moments[:, :1] > 0, moments, 0).astype(DOUBLE)  # an empty part counts by its count alone
    counts, highs, lows, m2s = given[:, 0], given[:, 1], given[:, 2], given[:, 3]
    count = counts.sum(0)
    divisor, some = np.maximum(count, 1), count > 0
    first = highs[(counts > 0).argmax(0), np.arange(len(count))]  # all means are taken from here: equal ones stay exact
    shift = (counts * ((highs - first) + lows)).sum(0) / divisor
    high = (first + shift).astype(dtype)
    low = (first - high) + shift
    distances = ((highs - high) + lows) - low
    m2 = (m2s + np.where(counts > 0, counts * distances**2, 0)).sum(0)
    rstd = np.where(some, 1 / np.sqrt((m2 / divisor).astype(dtype) + dtype.type(eps)), 0)
    merged[...] = count, high, low, m2
    statistics[...] = high, low, rstd
    _update(running_mean, momentum, high.astype(DOUBLE) + low, some)
    _update(running_var, momentum, m2 / np.maximum(count - unbiased, 1), some & (count - unbiased > 0))
