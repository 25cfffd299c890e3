"""NumPy reference of layer norm, on matrices: float64 throughout, rounded to the data's type at the end.

Sums are products with ones, which take a third of the time, and all that can be is in place.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from bnkernels.ops.activations import Activation
from bnkernels.ops.layer_norm.problem import Problem

FLOAT64 = np.dtype(np.float64)


@lru_cache(maxsize=64)
def _ones(count: int) -> np.ndarray:
    return np.ones(count)


def _means(a: np.ndarray) -> np.ndarray:
    """Return the mean of every row of a float64 matrix."""
    means = a.dot(_ones(a.shape[1]))
    means /= a.shape[1]
    return means


def _centre(x: np.ndarray, statistics: np.ndarray) -> np.ndarray:
    """Write mean and mean_low; return ``x - mean`` in float64.

    Float64 is first shifted by the first value of its row, so that the mean of a constant row is that value.
    """
    mean, low = statistics[0], statistics[1]
    if x.dtype != FLOAT64:
        d = x.astype(FLOAT64)
        exact = _means(d)
        mean[...] = exact
        low[...] = exact - mean
        d -= exact[:, None]
        return d
    d = x - x[:, :1]
    np.add(x[:, 0], _means(d), out=mean)
    np.subtract(x, mean[:, None], out=d)
    low[...] = _means(d)
    d -= low[:, None]
    return d


def _activated(
    xhat: np.ndarray, gamma: np.ndarray | None, beta: np.ndarray | None, acc_dtype: np.dtype, phi: Activation
) -> tuple[np.ndarray, np.ndarray]:
    """Return the input of the activation, which may be used up, and its output, in the accumulator's type."""
    z = np.empty(xhat.shape, acc_dtype)
    if gamma is None:
        z[...] = xhat
    else:
        np.multiply(xhat, gamma, out=z, casting="same_kind")
    if beta is not None:
        z += beta
    return z, phi.forward(np, z)


@np.errstate(all="ignore")  # kernels have no warnings either
def forward(
    problem: Problem,
    x: np.ndarray,
    gamma: np.ndarray | None,
    beta: np.ndarray | None,
    eps: float,
    phi: Activation,
    y: np.ndarray,
    statistics: np.ndarray,
) -> None:
    """Write `y` and `statistics`."""
    acc_dtype, shape = problem.acc_dtype, (problem.rows, problem.columns)
    x, y, statistics = x.reshape(shape), y.reshape(shape), statistics.reshape(3, -1)
    d = _centre(x, statistics)
    statistics[2] = rstd = 1 / np.sqrt(_means(d * d).astype(acc_dtype) + acc_dtype.type(eps))
    d *= rstd[:, None]
    y[...] = _activated(d, gamma, beta, acc_dtype, phi)[1]


@np.errstate(all="ignore")  # kernels have no warnings either
def backward(
    problem: Problem,
    dy: np.ndarray,
    x: np.ndarray,
    gamma: np.ndarray | None,
    beta: np.ndarray | None,
    statistics: np.ndarray,
    phi: Activation,
    dx: np.ndarray,
    dgamma: np.ndarray,
    dbeta: np.ndarray,
) -> None:
    """Write the gradients; `dx` may be `dy`."""
    acc_dtype, shape = problem.acc_dtype, (problem.rows, problem.columns)
    dy, x, dx, statistics = dy.reshape(shape), x.reshape(shape), dx.reshape(shape), statistics.reshape(3, -1)
    mean, low, rstd = statistics.astype(FLOAT64)[:, :, None]
    xhat = x - mean
    xhat -= low
    xhat *= rstd
    if phi.is_identity:
        g = dy.astype(FLOAT64)
    else:
        z, h = _activated(xhat, gamma, beta, acc_dtype, phi)
        g = phi.backward(np, dy.astype(acc_dtype, copy=False), h if phi.from_output else z).astype(FLOAT64)
    rows = _ones(len(x))
    dbeta[...], dgamma[...] = rows.dot(g), rows.dot(g * xhat)
    if gamma is not None:
        g *= gamma
    slope = _means(g * xhat)
    g -= _means(g)[:, None]
    xhat *= slope[:, None]
    g -= xhat
    g *= rstd
    dx[...] = g.astype(np.float32) if dx.dtype.itemsize == 2 else g
