"""The NumPy twins of the batch-norm kernels: sums in float64, the rest in the data's type. Arguments are checked.

In place wherever it can be: at 64 x 20 the time is that of the NumPy calls, one to three microseconds each.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from bnkernels.activations import Activation


@lru_cache(maxsize=4)
def _small_ones(rows: int) -> np.ndarray:
    return np.ones(rows)


def _sum(a: np.ndarray) -> np.ndarray:
    """Return the sum over the batch of a float64 matrix; a product with ones takes a third of the time of ``a.sum(0)``."""
    return np.dot(_small_ones(len(a)) if len(a) <= 4096 else np.ones(len(a)), a)


def _moments(x: np.ndarray, statistics: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Write mean and mean_low; return the variance in the type of `x`, and ``x - mean`` in float64.

    Float32 is summed exactly in float64. Float64 has nothing wider: its channels are first shifted by their first
    value, so that a constant channel is exactly zero, and what is left of their mean is subtracted in a second pass.
    """
    single = x.dtype == np.float32
    centred = x.astype(np.float64) if single else x - x[0]
    shift = _sum(centred)
    shift /= len(x)
    centred -= shift
    mean, low = statistics[0], statistics[1]
    if single:
        mean[...] = shift
        np.subtract(shift, mean, out=low, casting="same_kind")
    else:
        rest = _sum(centred)
        rest /= len(x)
        centred -= rest
        np.add(x[0], shift, out=mean)
        np.add(x[0] - mean, shift + rest, out=low)
    var = _sum(centred * centred)
    var /= len(x)
    return var.astype(x.dtype), centred


def _centred(x: np.ndarray, mean: np.ndarray, low: np.ndarray | None) -> np.ndarray:
    """Return ``x - (mean + low)`` in float64."""
    if x.dtype == np.float32:
        centred = x.astype(np.float64)
        centred -= mean if low is None else np.add(mean, low, dtype=np.float64)
        return centred
    return x - mean if low is None else (x - mean) - low


def _rstd(var: np.ndarray, eps: float) -> np.ndarray:
    rstd = var + var.dtype.type(eps)
    np.sqrt(rstd, out=rstd)
    return np.reciprocal(rstd, out=rstd)


def _affine(
    centred: np.ndarray, scale: np.ndarray, beta: np.ndarray | None, out: np.ndarray | None = None
) -> np.ndarray:
    """Return ``scale * centred + beta`` in the type of `scale`."""
    z = np.multiply(centred, scale, out=out)
    if beta is not None:
        z += beta
    return z


def _scale(gamma: np.ndarray | None, rstd: np.ndarray) -> np.ndarray:
    return rstd if gamma is None else gamma * rstd


def _activate(phi: Activation, z: np.ndarray) -> None:
    h = phi.forward(np, z)
    if h is not z:
        z[...] = h


def _update(running: np.ndarray | None, new: np.ndarray, momentum: float, unbias: float = 1.0) -> None:
    if running is not None:
        running *= 1 - momentum
        running += new * (momentum * unbias)


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
    _affine(centred.astype(x.dtype), _scale(gamma, rstd), beta, out=y)
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
    _affine(_centred(x, running_mean, None).astype(x.dtype), _scale(gamma, _rstd(running_var, eps)), beta, out=y)
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
    wide, scale = _centred(x, mean, mean_low), _scale(gamma, rstd)
    centred = wide.astype(x.dtype)
    if phi.code != 0 and y is None:
        y = phi.forward(np, _affine(centred, scale, beta))
    g = phi.backward(np, dy, y)
    wide *= g
    sum_g, sum_g_xhat = _sum(g.astype(np.float64)), _sum(wide)
    sum_g_xhat *= rstd
    dbeta[...] = sum_g
    dgamma[...] = sum_g_xhat
    if frozen:
        np.multiply(g, scale, out=dx)
        return
    sum_g_xhat *= rstd
    sum_g_xhat /= len(x)
    sum_g /= len(x)
    centred *= sum_g_xhat.astype(x.dtype)
    centred += sum_g.astype(x.dtype)
    np.subtract(g, centred, out=centred)
    np.multiply(centred, scale, out=dx)
