"""Batch normalisation in extended precision, by the formulas, and how far from it a result may be.

The bounds are the only tolerances of the op tests. They come from the data type's unit roundoff, the length of the
sums and the size of the terms, so a wrong divisor, a lost row or a misplaced eps is far outside. NaN always fails.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

Wide = np.longdouble
SLACK = 12  # roundings on the longest path of one element, with room for those of exp and tanh


def activate(z: np.ndarray, activation: str) -> np.ndarray:
    """Return phi(z)."""
    with np.errstate(over="ignore"):
        return {
            "identity": lambda: z,
            "relu": lambda: np.where(z <= 0, 0, z),
            "sigmoid": lambda: 1 / (1 + np.exp(-z)),
            "tanh": lambda: np.tanh(z),
        }[activation]()


def derivative(z: np.ndarray, activation: str) -> np.ndarray:
    """Return phi'(z)."""
    h = activate(z, activation)
    return {
        "identity": lambda: np.ones_like(z),
        "relu": lambda: np.where(z <= 0, 0, np.ones_like(z)),
        "sigmoid": lambda: h * (1 - h),
        "tanh": lambda: 1 - h * h,
    }[activation]()


class Forward(NamedTuple):
    """The exact forward and what bounds need."""

    mean: np.ndarray
    var: np.ndarray
    rstd: np.ndarray
    xhat: np.ndarray
    z: np.ndarray
    y: np.ndarray
    z_bound: np.ndarray


def unit_roundoff(dtype: np.dtype) -> Wide:
    """Return half the distance from 1 to the next number."""
    return Wide(np.finfo(dtype).eps) / 2


def forward(x, gamma, beta, eps, activation="identity", running=None) -> Forward:
    """Return the forward of arrays of one data type, with batch statistics or the `running` pair (mean, variance)."""
    u = unit_roundoff(x.dtype)
    wide = x.astype(Wide)
    gamma = np.ones(x.shape[1], Wide) if gamma is None else gamma.astype(Wide)
    beta = np.zeros(x.shape[1], Wide) if beta is None else beta.astype(Wide)
    mean, var = (wide.mean(0), wide.var(0)) if running is None else (a.astype(Wide) for a in running)
    rstd = 1 / np.sqrt(var + Wide(x.dtype.type(eps)))
    xhat = (wide - mean) * rstd
    z = gamma * xhat + beta
    # The mean is known to about u^2 of the largest value; eps is rounded to the data type before it is added.
    conditioning = u * u * len(x) * np.abs(wide).max(0, initial=0) * rstd if running is None else 0
    z_bound = SLACK * (u * (np.abs(gamma * xhat) + np.abs(beta) + np.abs(gamma)) + np.abs(gamma) * conditioning)
    return Forward(mean, var, rstd, xhat, z, activate(z, activation), z_bound)


class Backward(NamedTuple):
    """The exact gradients, each with its bound."""

    dx: np.ndarray
    dgamma: np.ndarray
    dbeta: np.ndarray
    dx_bound: np.ndarray
    dgamma_bound: np.ndarray
    dbeta_bound: np.ndarray


def backward(dy, x, gamma, beta, eps, activation="identity", running=None) -> Backward:
    """Return the gradients of `forward`."""
    u = unit_roundoff(x.dtype)
    f = forward(x, gamma, beta, eps, activation, running)
    scale = f.rstd if gamma is None else gamma.astype(Wide) * f.rstd
    dy = dy.astype(Wide)
    g = dy * derivative(f.z, activation)
    # An error of z changes g by at most that error times dy, where phi is curved.
    g_bound = SLACK * u * np.abs(g) + (np.abs(dy) * f.z_bound if activation in ("sigmoid", "tanh") else 0)
    dgamma, dbeta = (g * f.xhat).sum(0), g.sum(0)
    xhat_bound = SLACK * u * (1 + np.abs(f.xhat))
    dbeta_bound = g_bound.sum(0) + SLACK * u * np.abs(g).sum(0)
    dgamma_bound = (g_bound * np.abs(f.xhat) + np.abs(g) * xhat_bound).sum(0) + SLACK * u * np.abs(g * f.xhat).sum(0)
    dx, dx_bound = scale * g, np.abs(scale) * g_bound
    if running is None:
        dx = scale * (g - (dbeta + f.xhat * dgamma) / len(x))
        size = np.abs(g) + (np.abs(dbeta) + np.abs(f.xhat * dgamma)) / len(x)
        through_sums = (dbeta_bound + np.abs(f.xhat) * dgamma_bound + xhat_bound * np.abs(dgamma)) / len(x)
        dx_bound = np.abs(scale) * (g_bound + SLACK * u * size + through_sums)
    else:
        dx_bound = dx_bound + SLACK * u * np.abs(dx)
    return Backward(dx, dgamma, dbeta, dx_bound, dgamma_bound, dbeta_bound)


def assert_within(actual: np.ndarray, exact: np.ndarray, bound: np.ndarray, what: str) -> None:
    """Fail, with the worst element, unless every |actual - exact| is at most its bound; NaN and infinity fail."""
    assert actual.shape == exact.shape, f"{what}: shape {actual.shape}, expected {exact.shape}"
    error = np.abs(actual.astype(Wide) - exact)
    bound = np.broadcast_to(bound, error.shape) + np.finfo(actual.dtype).tiny
    good = error <= bound
    if good.all():
        return
    worst = np.unravel_index(np.argmax(np.where(good, 0, np.nan_to_num(error / bound, nan=np.inf))), error.shape)
    raise AssertionError(
        f"{what}: {np.count_nonzero(~good)} of {good.size} elements are off; worst at {tuple(map(int, worst))}: "
        f"got {actual[worst]!r}, expected {float(exact[worst])!r}, error {float(error[worst]):.3g}, "
        f"allowed {float(bound[worst]):.3g}"
    )
