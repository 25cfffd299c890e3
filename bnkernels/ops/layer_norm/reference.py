"""NumPy reference of layer norm, RMS norm and group norm, on matrices: in float64, rounded at the end."""

from __future__ import annotations

import numpy as np

from bnkernels.ops.activations import Activation
from bnkernels.ops.exact_sums import mean, total
from bnkernels.ops.layer_norm.problem import Problem

FLOAT64 = np.dtype(np.float64)


def _means(a: np.ndarray) -> np.ndarray:
    """Return the mean of every row, (rows, 1)."""
    return mean(a, 1, a.shape[1])


def _centre(x: np.ndarray, statistics: np.ndarray) -> np.ndarray:
    """Write mean and mean_low; return ``x - mean`` in float64.

    Numbers are first shifted by the first of their row, so that the mean of a constant row is that number.
    """
    acc_dtype, x = statistics.dtype, x.astype(FLOAT64)
    shift = x[:, :1] + _means(x - x[:, :1])
    shift = np.where(np.isfinite(shift), shift, _means(x))  # the distance may be out of range
    d = x - shift
    rest = _means(d)
    d -= rest
    high = (shift + rest).astype(acc_dtype)
    statistics[0], statistics[1] = high[:, 0], ((shift - high) + rest)[:, 0]
    return d


def _of_columns(problem: Problem, parameters: np.ndarray | None) -> np.ndarray | None:
    """Return the parameters of all columns, of every row where those of the rows differ."""
    if parameters is None:
        return None
    each = parameters.astype(problem.acc_dtype).reshape(problem.channel_groups, -1, 1)
    each = each.repeat(problem.inner, 2)
    each = (each.swapaxes(1, 2) if problem.channels_last else each).reshape(problem.channel_groups, -1)
    return np.tile(each, (problem.rows // problem.channel_groups, 1)) if problem.channel_groups > 1 else each[0]


def _rows(problem: Problem, array: np.ndarray) -> np.ndarray:
    """Return the matrix: a view, or if channels come last a copy."""
    if problem.channels_last:
        array = _by_group(problem, array)
    return array.reshape(problem.rows, problem.columns)


def _by_group(problem: Problem, array: np.ndarray) -> np.ndarray:
    """Return a view of channels that come last, (examples, groups, positions, channels of a group)."""
    return array.reshape(-1, problem.inner, problem.channel_groups, problem.channels).swapaxes(1, 2)


def _write(problem: Problem, array: np.ndarray, rows: np.ndarray) -> None:
    """Write the rows of the matrix."""
    to = _by_group(problem, array) if problem.channels_last else array
    to[...] = rows.reshape(to.shape)


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
    acc_dtype = problem.acc_dtype
    x, statistics = _rows(problem, x), statistics.reshape(problem.statistics_shape)
    gamma, beta = (_of_columns(problem, array) for array in (gamma, beta))
    d = _centre(x, statistics) if problem.centred else x.astype(FLOAT64)
    rstd = 1 / np.sqrt(_means(d * d).astype(acc_dtype) + acc_dtype.type(eps))
    statistics[-1] = rstd[:, 0]
    d *= rstd
    _write(problem, y, _activated(d, gamma, beta, acc_dtype, phi)[1])


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
    dbeta: np.ndarray | None,
) -> None:
    """Write the gradients; `dx` may be `dy`."""
    acc_dtype = problem.acc_dtype
    dy, x, statistics = _rows(problem, dy), _rows(problem, x), statistics.astype(FLOAT64)
    gamma, beta = (_of_columns(problem, array) for array in (gamma, beta))
    *mean, rstd = statistics.reshape(*problem.statistics_shape, 1)
    xhat = x.astype(FLOAT64)
    for part in mean:
        xhat -= part
    xhat *= rstd
    if phi.is_identity:
        g = dy.astype(FLOAT64)
    else:
        z, h = _activated(xhat, gamma, beta, acc_dtype, phi)
        g = phi.backward(np, dy.astype(acc_dtype, copy=False), h if phi.from_output else z).astype(FLOAT64)
    for gradient, terms in ((dbeta, g), (dgamma, g * xhat)):
        if gradient is not None:
            sums = total(terms.reshape(-1, problem.channel_groups * problem.columns), 0)
            shape = (problem.inner, problem.channels) if problem.channels_last else (problem.channels, problem.inner)
            sums = sums.reshape(problem.channel_groups, *shape)
            sums = sums.swapaxes(1, 2) if problem.channels_last else sums
            gradient.reshape(-1)[...] = total(sums.reshape(-1, problem.inner), 1)[:, 0].astype(acc_dtype)
    if gamma is not None:
        g *= gamma
    slope = _means(g * xhat)
    if problem.centred:
        g -= _means(g)
    xhat *= slope
    g -= xhat
    g *= rstd
    _write(problem, dx, g.astype(np.float32) if dx.dtype.itemsize == 2 else g)
