"""The NumPy twins of the batch-norm kernels: all in float64, rounded to the data's type at the end.

At 64 x 20 the time is that of the NumPy calls, one to three microseconds each. So: in place wherever it can be, and
never two data types in one call over the whole matrix, which NumPy would convert piece by piece.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from bnkernels.activations import Activation


@lru_cache(maxsize=64)
def _constant(value: float, dtype: np.dtype) -> np.ndarray:
    """Return a number as an array without dimensions: NumPy converts a Python number again on every call."""
    return np.array(value, dtype)


@lru_cache(maxsize=4)
def _small_ones(rows: int) -> np.ndarray:
    return np.ones(rows)


def _sum(a: np.ndarray) -> np.ndarray:
    """Return the sum over the batch of a float64 matrix: a product with ones takes a third of the time of a sum."""
    return (_small_ones(len(a)) if len(a) <= 4096 else np.ones(len(a))).dot(a)


def _mean(a: np.ndarray) -> np.ndarray:
    mean = _sum(a)
    mean /= _constant(len(a), a.dtype)
    return mean


def _moments(x: np.ndarray, statistics: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Write mean and mean_low; return the variance in the type of `x`, and ``x - mean`` in float64.

    Float32 is summed exactly in float64. Float64 has nothing wider: its channels are first shifted by their first
    value, so that a constant channel is exactly zero, and what is left of their mean is subtracted in a second pass.
    """
    single = x.dtype == np.float32
    centred = x.astype(np.float64) if single else x - x[0]
    shift = _mean(centred)
    centred -= shift
    mean, low = statistics[0], statistics[1]
    if single:
        mean[...] = shift
        np.subtract(shift, mean, out=low, casting="same_kind")
    else:
        rest = _mean(centred)
        centred -= rest
        np.add(x[0], shift, out=mean)
        np.add(x[0] - mean, shift + rest, out=low)
    var = _mean(centred * centred)
    return var.astype(x.dtype), centred


def _centred(x: np.ndarray, mean: np.ndarray, low: np.ndarray | None) -> np.ndarray:
    """Return ``x - (mean + low)`` in float64."""
    if x.dtype == np.float32:
        centred = x.astype(np.float64)
        centred -= mean if low is None else np.add(mean, low, dtype=np.float64)
        return centred
    return x - mean if low is None else (x - mean) - low


def _rstd(var: np.ndarray, eps: float) -> np.ndarray:
    rstd = var + _constant(eps, var.dtype)
    np.sqrt(rstd, out=rstd)
    return np.reciprocal(rstd, out=rstd)


def _affine(centred: np.ndarray, scale: np.ndarray, beta: np.ndarray | None, out: np.ndarray) -> np.ndarray:
    """Write ``scale * centred + beta``."""
    np.multiply(centred, scale, out=out, casting="same_kind")
    if beta is not None:
        out += beta
    return out


def _scale(gamma: np.ndarray | None, rstd: np.ndarray) -> np.ndarray:
    return rstd if gamma is None else gamma * rstd


def _activate(phi: Activation, z: np.ndarray) -> None:
    h = phi.forward(np, z)
    if h is not z:
        z[...] = h


def _update(running: np.ndarray | None, new: np.ndarray, momentum: float, unbias: float = 1.0) -> None:
    if running is not None:
        running *= _constant(1 - momentum, new.dtype)
        running += new * _constant(momentum * unbias, new.dtype)


def forward_numpy(
    x: np.ndarray,
    gamma: np.ndarray | None,
    beta: np.ndarray | None,
    running_mean: np.ndarray | None,
    running_var: np.ndarray | None,
    momentum: float,
    eps: float,
    phi: Activation,
    y: np.ndarray,
    statistics: np.ndarray,
) -> None:
    """Write `y`, `statistics` and the running statistics of the training forward."""
    var, centred = _moments(x, statistics)
    statistics[2] = rstd = _rstd(var, eps)
    _update(running_mean, statistics[0], momentum)
    _update(running_var, var, momentum, len(x) / (len(x) - 1))
    _affine(centred, _scale(gamma, rstd), beta, y)
    _activate(phi, y)


def inference_numpy(
    x: np.ndarray,
    gamma: np.ndarray | None,
    beta: np.ndarray | None,
    running_mean: np.ndarray,
    running_var: np.ndarray,
    eps: float,
    phi: Activation,
    y: np.ndarray,
) -> None:
    """Write `y` of the inference forward."""
    _affine(_centred(x, running_mean, None), _scale(gamma, _rstd(running_var, eps)), beta, y)
    _activate(phi, y)


def backward_numpy(
    dy: np.ndarray,
    x: np.ndarray,
    gamma: np.ndarray | None,
    beta: np.ndarray | None,
    mean: np.ndarray,
    mean_low: np.ndarray | None,
    rstd: np.ndarray,
    eps: float,
    phi: Activation,
    y: np.ndarray | None,
    dx: np.ndarray,
    dgamma: np.ndarray,
    dbeta: np.ndarray,
) -> None:
    """Write the gradients; where `mean_low` is None, `mean` and `rstd` are the running mean and variance."""
    frozen = mean_low is None
    if frozen:
        rstd = _rstd(rstd, eps)
    centred, scale = _centred(x, mean, mean_low), _scale(gamma, rstd)
    if phi.code != 0 and y is None:
        y = phi.forward(np, _affine(centred, scale, beta, np.empty_like(x)))
    g = phi.backward(np, dy, y)
    wide = g.astype(np.float64)
    sum_g, sum_g_xhat = _sum(wide), _sum(wide * centred)
    sum_g_xhat *= rstd
    dbeta[...] = sum_g
    dgamma[...] = sum_g_xhat
    if frozen:
        np.multiply(g, scale, out=dx)
        return
    rows = _constant(len(x), wide.dtype)
    sum_g_xhat *= rstd
    sum_g_xhat /= rows
    sum_g /= rows
    centred *= sum_g_xhat
    centred += sum_g
    wide -= centred
    np.multiply(wide, scale, out=dx, casting="same_kind")
