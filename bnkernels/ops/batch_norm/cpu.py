"""Fast path of batch norm on NumPy: matrices of float32 or float64, in training and inference, without a mask.

All is computed in float64 and rounded to the data's type at the end. At 64 x 20 the time is that of the NumPy calls,
one to three microseconds each. So: in place wherever it can be, and never two data types in one call over the whole
matrix, which NumPy would convert piece by piece. The forward of a larger matrix goes through the cache in blocks of
rows, once for each sum and once for the result. Everything else is computed by ``reference.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

from bnkernels.ops.activations import Activation
from bnkernels.ops.batch_norm import reference
from bnkernels.ops.batch_norm.problem import Options, Plan, Stage

SINGLE, DOUBLE = np.dtype(np.float32), np.dtype(np.float64)
BLOCK = 2**14  # elements worked on at a time beyond this size: their float64 stays in the cache


@np.errstate(all="ignore")  # as kernels do, which have no warnings
def run(plan: Plan, arrays: dict[str, Any], options: Options, saved: dict[str, Any] | None = None) -> None:
    """Write what a pass over matrices writes; a small forward leaves in `saved` what its backward takes from there."""
    if plan.kind.direction == "backward":
        if plan.kind.stage == Stage.FROZEN or arrays["x"].size > BLOCK:
            reference.run(plan, arrays, options)
        else:
            _backward(arrays, options.phi, saved or {})
    elif plan.kind.stage == Stage.FROZEN:
        _inference(arrays, options)
    else:
        _forward(arrays, options, saved)


class _Sums:
    """Sums and means over a batch of `rows`, of float64 matrices."""

    def __init__(self, rows: int) -> None:
        self.rows = np.array(float(rows))  # NumPy takes an array without dimensions much faster than a Python number
        self.ones = np.ones(rows)

    def sum(self, a: np.ndarray) -> np.ndarray:
        """Return the sum over the batch: a product with ones takes a third of the time of a sum."""
        return self.ones.dot(a)

    def mean(self, a: np.ndarray) -> np.ndarray:
        """Return the mean over the batch."""
        mean = self.sum(a)
        mean /= self.rows
        return mean


_sums = lru_cache(maxsize=16)(_Sums)


@lru_cache(maxsize=64)
def _scalars(rows: int, momentum: float, divisor: float, eps: float, double: bool) -> tuple[np.ndarray, ...]:
    """Return eps and the weights of the old mean, of the new mean, and of the new, biased variance."""
    values = eps, 1 - momentum, momentum, momentum * rows / divisor
    return tuple(np.array(value, DOUBLE if double else SINGLE) for value in values)


def _moments(x: np.ndarray, statistics: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Write mean and mean_low; return the variance in the type of `x`, and ``x - mean`` in float64.

    Float32 is summed exactly in float64. Float64 has no wider type: its channels are first shifted by their first
    value, so that the mean of a constant channel is that value, and a second pass about the mean finds what is left of
    it. Not about the first value: that may be an outlier, next to which all others lose their digits.
    """
    over_batch = _sums(len(x))
    mean, low = statistics[0], statistics[1]
    if x.dtype == SINGLE:
        centred = x.astype(DOUBLE)
        exact = over_batch.mean(centred)
        centred -= exact
        mean[...] = exact
        low[...] = exact - mean
    else:
        centred = x - x[0]
        np.add(x[0], over_batch.mean(centred), out=mean)
        np.subtract(x, mean, out=centred)
        low[...] = over_batch.mean(centred)
        centred -= low
    var = over_batch.mean(centred * centred)
    return var.astype(x.dtype), centred


def _blocks(x: np.ndarray) -> list[slice]:
    """Return the blocks of rows that a large matrix is worked on in."""
    step = max(1, BLOCK // x.shape[1])
    return [slice(start, start + step) for start in range(0, len(x), step)]


def _moments_in_blocks(x: np.ndarray, statistics: np.ndarray) -> np.ndarray:
    """Write mean and mean_low of a large matrix; return the variance. Float64 is shifted as in `_moments`."""
    mean, low = statistics[0], statistics[1]
    if x.dtype == SINGLE:
        exact = _mean_of_blocks(x, lambda rows: x[rows].astype(DOUBLE))
        mean[...] = exact
        low[...] = exact - mean
    else:
        np.add(x[0], _mean_of_blocks(x, lambda rows: x[rows] - x[0]), out=mean)
        low[...] = _mean_of_blocks(x, lambda rows: x[rows] - mean)
    return _mean_of_blocks(x, lambda rows: np.square(_centred(x[rows], mean, low))).astype(x.dtype)


def _mean_of_blocks(x: np.ndarray, values: Callable[[slice], np.ndarray]) -> np.ndarray:
    """Return the mean over the batch of what `values` makes of each block of rows."""
    blocks = (values(rows) for rows in _blocks(x))
    return sum(_sums(len(block)).sum(block) for block in blocks) / len(x)


def _centred(x: np.ndarray, mean: np.ndarray, low: np.ndarray | None) -> np.ndarray:
    """Return ``x - (mean + low)`` in float64."""
    if x.dtype == DOUBLE:
        return x - mean if low is None else (x - mean) - low
    exact = mean.astype(DOUBLE)
    if low is not None:
        exact += low
    centred = x.astype(DOUBLE)
    centred -= exact
    return centred


def _rstd(var: np.ndarray, eps: np.ndarray) -> np.ndarray:
    rstd = var + eps
    np.sqrt(rstd, out=rstd)
    return np.reciprocal(rstd, out=rstd)


def _affine(
    centred: np.ndarray,
    scale: np.ndarray,
    beta: np.ndarray | None,
    residual: np.ndarray | None,
    out: np.ndarray,
) -> np.ndarray:
    """Write ``scale * centred + beta + residual``; `out` may be the residual."""
    z = out if residual is None else np.empty_like(out)
    np.multiply(centred, scale, out=z, casting="same_kind")
    if beta is not None:
        z += beta
    return out if residual is None else np.add(z, residual, out=out)


def _scale(gamma: np.ndarray | None, rstd: np.ndarray) -> np.ndarray:
    return rstd if gamma is None else gamma * rstd


def _activate(phi: Activation, z: np.ndarray) -> None:
    h = phi.forward(np, z)
    if h is not z:
        z[...] = h


def _forward(arrays: dict[str, Any], options: Options, saved: dict[str, Any] | None) -> None:
    """Write the output, the statistics and the running statistics."""
    x, statistics, residual, beta, phi = *(arrays[n] for n in ("x", "statistics", "residual", "beta")), options.phi
    large = x.size > BLOCK
    var, centred = (_moments_in_blocks(x, statistics), None) if large else _moments(x, statistics)
    divisor = float(len(x) - options.unbiased)
    small, keep, take, take_var = _scalars(len(x), options.momentum, divisor, options.eps, x.dtype == DOUBLE)
    statistics[2] = rstd = _rstd(var, small)
    running_mean, running_var = arrays["running_mean"], arrays["running_var"]
    if running_mean is not None:
        running_mean *= keep
        running_mean += take * statistics[0]
    if running_var is not None:
        running_var *= keep
        var *= take_var
        running_var += var
    scale = _scale(arrays["gamma"], rstd)
    if large:
        _write_blocks(x, residual, (statistics[0], statistics[1]), scale, beta, phi, arrays["y"])
    else:
        _activate(phi, _affine(centred, scale, beta, residual, arrays["y"]))
        if saved is not None:
            saved |= {"centred": centred, "y": arrays["y"]}


def _inference(arrays: dict[str, Any], options: Options) -> None:
    """Write the output."""
    x = arrays["x"]
    scale = _scale(arrays["gamma"], _rstd(arrays["running_var"], x.dtype.type(options.eps)))
    mean = arrays["running_mean"], None
    _write_blocks(x, arrays["residual"], mean, scale, arrays["beta"], options.phi, arrays["out"])


def _write_blocks(
    x: np.ndarray,
    residual: np.ndarray | None,
    mean: tuple[np.ndarray, np.ndarray | None],
    scale: np.ndarray,
    beta: np.ndarray | None,
    phi: Activation,
    out: np.ndarray,
) -> None:
    """Write the output, block by block."""
    for rows in _blocks(x):
        added = None if residual is None else residual[rows]
        _activate(phi, _affine(_centred(x[rows], *mean), scale, beta, added, out[rows]))


def _backward(arrays: dict[str, Any], phi: Activation, saved: dict[str, Any]) -> None:
    """Write the gradients of a small matrix."""
    dy, x, dresidual, (mean, mean_low, rstd) = (arrays[name] for name in ("dy", "x", "dresidual", "statistics"))
    over_batch, scale = _sums(len(x)), _scale(arrays["gamma"], rstd)
    centred, y = saved.pop("centred", None), saved.pop("y", None)
    if centred is None:
        centred = _centred(x, mean, mean_low)
    if phi.is_identity:
        g = dy.astype(DOUBLE)
    elif phi.from_output and y is not None:
        g = phi.backward(np, dy, y).astype(DOUBLE)
    else:
        z = _affine(centred, scale, arrays["beta"], arrays["residual"], np.empty_like(dy))
        g = phi.backward(np, dy, phi.forward(np, z) if phi.from_output else z).astype(DOUBLE)
    sum_g, sum_g_xhat = over_batch.sum(g), over_batch.sum(g * centred)
    sum_g_xhat *= rstd
    arrays["dbeta"][...] = sum_g
    arrays["dgamma"][...] = sum_g_xhat
    if dresidual is not None:
        dresidual[...] = g
    sum_g_xhat *= rstd
    sum_g_xhat /= over_batch.rows
    sum_g /= over_batch.rows
    centred *= sum_g_xhat
    g -= centred
    g -= sum_g
    np.multiply(g, scale, out=arrays["dx"], casting="same_kind")
