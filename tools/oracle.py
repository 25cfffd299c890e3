"""Batch normalisation in extended precision, by the formulas, and how far from it a result may be.

The bounds are the only tolerances of the op tests. They come from the data type's unit roundoff, the length of the
sums and the size of the terms, so a wrong divisor, a lost row or a misplaced eps is far outside. NaN always fails.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from bnkernels.runtime.arguments import accumulator

Extended = np.longdouble
SLACK = 12  # roundings on the longest path of one element, with room for those of exp and tanh
PI = "3.14159265358979323846264338327950288"
ALPHA = {"leaky_relu": "0.01", "elu": "1"}
PIECEWISE_LINEAR = ("identity", "relu", "leaky_relu")
# Half the distance from 1 to the next number, and half of the smallest number.
STORED = {"float16": (Extended(2) ** -11, Extended(2) ** -25), "bfloat16": (Extended(2) ** -8, Extended(2) ** -134)}


def erfc(x: np.ndarray) -> np.ndarray:
    """Return the complementary error function: a series of positive terms below 1.5, a continued fraction above."""
    size = np.abs(x)
    small = np.minimum(size, Extended(1.5))
    term = total = 2 * small / np.sqrt(Extended(PI)) * np.exp(-small * small)
    for n in range(1, 80):
        term = term * (2 * small * small / (2 * n + 1))
        total = total + term
    large = np.clip(size, Extended(1.5), 100)
    fraction = large
    for n in range(300, 0, -1):
        fraction = large + Extended(n) / 2 / fraction
    positive = np.where(size < 1.5, 1 - total, np.exp(-large * large) / (np.sqrt(Extended(PI)) * fraction))
    return np.where(x < 0, 2 - positive, positive)


def _gated(z: np.ndarray, activation: str) -> tuple[np.ndarray, np.ndarray]:
    """Return gate and gate' of an activation z gate(z)."""
    if activation == "gelu":
        return erfc(-z / np.sqrt(Extended(2))) / 2, np.exp(-z * z / 2) / np.sqrt(2 * Extended(PI))
    c, cubic = 2 * np.sqrt(2 / Extended(PI)), Extended("0.044715")
    argument, slope = (
        (z, Extended(1)) if activation == "silu" else (c * (z + cubic * z**3), c * (1 + 3 * cubic * z * z))
    )
    return 1 / (1 + np.exp(-argument)), slope / ((1 + np.exp(-argument)) * (1 + np.exp(argument)))


def activate(z: np.ndarray, activation: str, alpha: float | None = None) -> np.ndarray:
    """Return phi(z)."""
    with np.errstate(over="ignore"):
        return {
            "identity": lambda: z,
            "relu": lambda: np.where(z <= 0, 0, z),
            "leaky_relu": lambda: np.where(z <= 0, Extended(ALPHA[activation] if alpha is None else alpha) * z, z),
            "sigmoid": lambda: 1 / (1 + np.exp(-z)),
            "tanh": lambda: np.tanh(z),
            "elu": lambda: np.where(z <= 0, Extended(ALPHA[activation] if alpha is None else alpha) * np.expm1(z), z),
        }.get(activation, lambda: z * _gated(z, activation)[0])()


def derivative(z: np.ndarray, activation: str, alpha: float | None = None) -> np.ndarray:
    """Return phi'(z)."""
    with np.errstate(over="ignore"):
        return {
            "identity": lambda: np.ones_like(z),
            "relu": lambda: np.where(z <= 0, 0, np.ones_like(z)),
            "leaky_relu": lambda: np.where(
                z <= 0, Extended(ALPHA[activation] if alpha is None else alpha), Extended(1)
            ),
            "sigmoid": lambda: activate(z, activation) * (1 - activate(z, activation)),
            "tanh": lambda: 1 - np.tanh(z) ** 2,
            "elu": lambda: np.where(
                z <= 0, Extended(ALPHA[activation] if alpha is None else alpha) * np.exp(z), Extended(1)
            ),
        }.get(activation, lambda: _gated(z, activation)[0] + z * _gated(z, activation)[1])()


class Forward(NamedTuple):
    """The exact forward and what bounds need."""

    mean: np.ndarray
    var: np.ndarray
    rstd: np.ndarray
    xhat: np.ndarray
    z: np.ndarray
    y: np.ndarray
    z_bound: np.ndarray


def unit_roundoff(dtype: np.dtype) -> Extended:
    """Return half the distance from 1 to the next number of the type that data of this type is computed in."""
    return Extended(np.finfo(accumulator(dtype)).eps) / 2


def forward(x, gamma, beta, eps, activation="identity", running=None, residual=None, alpha=None) -> Forward:
    """Return the forward of matrices, with batch statistics or the `running` pair (mean, variance)."""
    u = unit_roundoff(x.dtype)
    exact_x = x.astype(Extended)
    gamma = np.ones(x.shape[1], Extended) if gamma is None else gamma.astype(Extended)
    beta = np.zeros(x.shape[1], Extended) if beta is None else beta.astype(Extended)
    mean, var = (exact_x.mean(0), exact_x.var(0)) if running is None else (a.astype(Extended) for a in running)
    rstd = 1 / np.sqrt(var + Extended(accumulator(x.dtype).type(eps)))
    xhat = (exact_x - mean) * rstd
    z = gamma * xhat + beta
    # The mean is known to about u^2 of the largest value; eps is rounded to the data type before it is added.
    conditioning = u * u * len(x) * np.abs(exact_x).max(0, initial=0) * rstd if running is None else 0
    z_bound = SLACK * (u * (np.abs(gamma * xhat) + np.abs(beta) + np.abs(gamma)) + np.abs(gamma) * conditioning)
    if residual is not None:
        z = z + residual.astype(Extended)
        z_bound = z_bound + u * np.abs(z)
    return Forward(mean, var, rstd, xhat, z, activate(z, activation, alpha), z_bound)


class Backward(NamedTuple):
    """The exact gradients, each with its bound."""

    dx: np.ndarray
    dgamma: np.ndarray
    dbeta: np.ndarray
    dx_bound: np.ndarray
    dgamma_bound: np.ndarray
    dbeta_bound: np.ndarray
    dresidual: np.ndarray
    dresidual_bound: np.ndarray


def backward(dy, x, gamma, beta, eps, activation="identity", running=None, residual=None, alpha=None) -> Backward:
    """Return the gradients of `forward`."""
    u = unit_roundoff(x.dtype)
    f = forward(x, gamma, beta, eps, activation, running, residual, alpha)
    scale = f.rstd if gamma is None else gamma.astype(Extended) * f.rstd
    dy = dy.astype(Extended)
    g = dy * derivative(f.z, activation, alpha)
    # An error of z changes g by at most that error times dy, where phi is curved.
    g_bound = SLACK * u * np.abs(g) + (0 if activation in PIECEWISE_LINEAR else np.abs(dy) * f.z_bound)
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
    return Backward(dx, dgamma, dbeta, dx_bound, dgamma_bound, dbeta_bound, g, g_bound)


def assert_within(actual: np.ndarray, exact: np.ndarray, bound: np.ndarray, what: str) -> None:
    """Fail, with the worst element, unless every |actual - exact| is at most its bound; NaN and infinity fail."""
    assert actual.shape == exact.shape, f"{what}: shape {actual.shape}, expected {exact.shape}"
    error = np.abs(actual.astype(Extended) - exact)
    if actual.dtype.name in STORED:
        relative, least = STORED[actual.dtype.name]
        bound = bound + relative * (np.abs(exact) + bound) + least
    bound = np.broadcast_to(bound, error.shape) + np.finfo(accumulator(actual.dtype)).tiny
    good = error <= bound
    if good.all():
        return
    worst = np.unravel_index(np.argmax(np.where(good, 0, np.nan_to_num(error / bound, nan=np.inf))), error.shape)
    raise AssertionError(
        f"{what}: {np.count_nonzero(~good)} of {good.size} elements are off; worst at {tuple(map(int, worst))}: "
        f"got {actual[worst]!r}, expected {float(exact[worst])!r}, error {float(error[worst]):.3g}, "
        f"allowed {float(bound[worst]):.3g}"
    )
