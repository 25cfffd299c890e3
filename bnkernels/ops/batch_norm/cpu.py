"""The NumPy twins of the batch-norm kernels, on matrices: all in float64, rounded to the data's type at the end.

At 64 x 20 the time is that of the NumPy calls, one to three microseconds each. So: in place wherever it can be, and
never two data types in one call over the whole matrix, which NumPy would convert piece by piece. A larger matrix goes
through the cache in blocks of rows, once for each sum and once for the result.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from bnkernels.ops.activations import Activation

SINGLE, DOUBLE = np.dtype(np.float32), np.dtype(np.float64)
BLOCK = 2**14  # elements worked on at a time beyond this size: their float64 stays in the cache


class Kept(NamedTuple):
    """What the forward knows and the backward would compute again: the output and ``x - mean`` in float64."""

    y: np.ndarray
    centred: np.ndarray


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

    Float32 is summed exactly in float64. Float64 has nothing wider: its channels are first shifted by their first
    value, so that the mean of a constant channel is that value, and a second pass about the mean finds what is left of
    it. Not about the first value: that may be an outlier, next to which all others lose their digits.
    """
    over_batch = _sums(len(x))
    mean, low = statistics[0], statistics[1]
    if x.dtype == SINGLE:
        centred = x.astype(DOUBLE)
        wide = over_batch.mean(centred)
        centred -= wide
        mean[...] = wide
        low[...] = wide - mean
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
        wide = _mean_of_blocks(x, lambda rows: x[rows].astype(DOUBLE))
        mean[...] = wide
        low[...] = wide - mean
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
    wide = mean.astype(DOUBLE)
    if low is not None:
        wide += low
    centred = x.astype(DOUBLE)
    centred -= wide
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


def _rows(array: np.ndarray | None, rows: slice) -> np.ndarray | None:
    return None if array is None else array[rows]


def _scale(gamma: np.ndarray | None, rstd: np.ndarray) -> np.ndarray:
    return rstd if gamma is None else gamma * rstd


def _activate(phi: Activation, z: np.ndarray) -> None:
    h = phi.forward(np, z)
    if h is not z:
        z[...] = h


@np.errstate(all="ignore")  # as kernels do, which have no warnings
def forward_numpy(
    x: np.ndarray,
    residual: np.ndarray | None,
    gamma: np.ndarray | None,
    beta: np.ndarray | None,
    running_mean: np.ndarray | None,
    running_var: np.ndarray | None,
    momentum: float,
    divisor: float,
    eps: float,
    phi: Activation,
    y: np.ndarray,
    statistics: np.ndarray,
) -> Kept | None:
    """Write `y`, `statistics` and the running statistics of the training forward."""
    large = x.size > BLOCK
    var, centred = (_moments_in_blocks(x, statistics), None) if large else _moments(x, statistics)
    small, keep, take, take_var = _scalars(len(x), momentum, divisor, eps, x.dtype == DOUBLE)
    statistics[2] = rstd = _rstd(var, small)
    if running_mean is not None:
        running_mean *= keep
        running_mean += take * statistics[0]
    if running_var is not None:
        running_var *= keep
        var *= take_var
        running_var += var
    scale = _scale(gamma, rstd)
    if large:
        for rows in _blocks(x):
            centred = _centred(x[rows], statistics[0], statistics[1])
            _activate(phi, _affine(centred, scale, beta, _rows(residual, rows), y[rows]))
        return None
    _activate(phi, _affine(centred, scale, beta, residual, y))
    return Kept(y, centred)


@np.errstate(all="ignore")  # as kernels do, which have no warnings
def inference_numpy(
    x: np.ndarray,
    residual: np.ndarray | None,
    gamma: np.ndarray | None,
    beta: np.ndarray | None,
    running_mean: np.ndarray,
    running_var: np.ndarray,
    eps: float,
    phi: Activation,
    y: np.ndarray,
) -> None:
    """Write `y` of the inference forward."""
    scale = _scale(gamma, _rstd(running_var, x.dtype.type(eps)))
    for rows in _blocks(x):
        centred = _centred(x[rows], running_mean, None)
        _activate(phi, _affine(centred, scale, beta, _rows(residual, rows), y[rows]))


def _before_activation(
    dy: np.ndarray,
    x: np.ndarray,
    residual: np.ndarray | None,
    mean: np.ndarray,
    mean_low: np.ndarray | None,
    scale: np.ndarray,
    beta: np.ndarray | None,
    phi: Activation,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the gradient before the activation, whose input is computed again, and ``x - mean``, in float64."""
    centred = _centred(x, mean, mean_low)
    return _gradient(phi, dy, centred, scale, beta, residual), centred


def _gradient(
    phi: Activation,
    dy: np.ndarray,
    centred: np.ndarray,
    scale: np.ndarray,
    beta: np.ndarray | None,
    residual: np.ndarray | None,
) -> np.ndarray:
    """Return the gradient before the activation in float64."""
    if phi.is_identity:
        return dy.astype(DOUBLE)
    z = _affine(centred, scale, beta, residual, np.empty_like(dy))
    return phi.backward(np, dy, phi.forward(np, z) if phi.from_output else z).astype(DOUBLE)


@np.errstate(all="ignore")  # as kernels do, which have no warnings
def backward_numpy(
    dy: np.ndarray,
    x: np.ndarray,
    residual: np.ndarray | None,
    gamma: np.ndarray | None,
    beta: np.ndarray | None,
    mean: np.ndarray,
    mean_low: np.ndarray | None,
    rstd: np.ndarray,
    eps: float,
    phi: Activation,
    kept: Kept | None,
    dx: np.ndarray,
    dgamma: np.ndarray,
    dbeta: np.ndarray,
    dresidual: np.ndarray | None,
) -> None:
    """Write the gradients; where `mean_low` is None, `mean` and `rstd` are the running mean and variance."""
    frozen = mean_low is None
    if frozen:
        rstd = _rstd(rstd, x.dtype.type(eps))
    scale, large = _scale(gamma, rstd), x.size > BLOCK
    if large:
        count = len(x)
        known = (mean, mean_low, scale, beta, phi)
        blocks = _blocks(x)
        sum_g = sum_g_xhat = np.zeros(x.shape[1])
        for rows in blocks:
            g, centred = _before_activation(dy[rows], x[rows], _rows(residual, rows), *known)
            of_block = _sums(len(g))
            sum_g, sum_g_xhat = sum_g + of_block.sum(g), sum_g_xhat + of_block.sum(g * centred)
    else:
        over_batch = _sums(len(x))
        count = over_batch.rows
        if kept is None:
            g, centred = _before_activation(dy, x, residual, mean, mean_low, scale, beta, phi)
        elif phi.from_output:
            g, centred = phi.backward(np, dy, kept.y).astype(DOUBLE), kept.centred
        else:
            g, centred = _gradient(phi, dy, kept.centred, scale, beta, residual), kept.centred
        sum_g, sum_g_xhat = over_batch.sum(g), over_batch.sum(g * centred)
    sum_g_xhat *= rstd
    dbeta[...] = sum_g
    dgamma[...] = sum_g_xhat
    if frozen:
        sum_g = sum_g_xhat = None  # the statistics do not depend on x
    else:
        sum_g_xhat *= rstd
        sum_g_xhat /= count
        sum_g /= count
    if large:
        for rows in blocks:
            g, centred = _before_activation(dy[rows], x[rows], _rows(residual, rows), *known)
            _write_dx(g, centred, sum_g, sum_g_xhat, scale, dx[rows], _rows(dresidual, rows))
    else:
        _write_dx(g, centred, sum_g, sum_g_xhat, scale, dx, dresidual)


def _write_dx(
    g: np.ndarray,
    centred: np.ndarray,
    mean_g: np.ndarray | None,
    slope: np.ndarray | None,
    scale: np.ndarray,
    dx: np.ndarray,
    dresidual: np.ndarray | None,
) -> None:
    """Write ``scale * (g - mean_g - slope * centred)``, without what is None, and `g`, which is used up."""
    if dresidual is not None:
        dresidual[...] = g
    if mean_g is not None:
        g -= centred * slope
        g -= mean_g
    np.multiply(g, scale, out=dx, casting="same_kind")
