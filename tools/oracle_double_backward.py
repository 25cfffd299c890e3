"""The double backward of batch norm in extended precision, by its formulas, with the bounds of `tools.oracle`.

The kernel and the NumPy path take the sums apart in different ways. So a bound must hold for every order of evaluation:
beside each value goes its size, the same formula of absolute values, and the bound is a few roundings of that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tools import oracle
from tools.oracle import SLACK, Extended

OUTPUTS = ("ddy", "dx", "dgamma", "dbeta", "dresidual")


@dataclass(frozen=True)
class Sized:
    """A value, and what it would be if nothing cancelled."""

    value: Any
    size: Any

    def __add__(self, other: Sized) -> Sized:
        """Return the sum."""
        return Sized(self.value + other.value, self.size + other.size)

    def __sub__(self, other: Sized) -> Sized:
        """Return the difference."""
        return Sized(self.value - other.value, self.size + other.size)

    def __mul__(self, other: Sized) -> Sized:
        """Return the product."""
        return Sized(self.value * other.value, self.size * other.size)

    def sum(self) -> Sized:
        """Return the sum over the batch."""
        return Sized(self.value.sum(0), self.size.sum(0))

    def mean(self) -> Sized:
        """Return the mean over the batch."""
        return Sized(self.value.mean(0), self.size.mean(0))


def exactly(array: np.ndarray | None, absent: float = 0.0) -> Sized:
    """Return an input as it is."""
    value = np.array(absent, Extended) if array is None else array.astype(Extended)
    return Sized(value, np.abs(value))


def second_derivative(z: np.ndarray, activation: str, alpha: float | None = None) -> np.ndarray:
    """Return phi''(z)."""
    phi = oracle.activate(z, activation, alpha)
    if activation in oracle.PIECEWISE_LINEAR:
        return np.zeros_like(z)
    if activation == "sigmoid":
        return phi * (1 - phi) * (1 - 2 * phi)
    if activation == "tanh":
        return -2 * phi * (1 - phi * phi)
    if activation == "elu":
        return np.where(z <= 0, oracle.derivative(z, activation, alpha), 0)
    gate, density = oracle._gated(z, activation)
    if activation == "gelu":
        return density * (2 - z * z)
    c, cubic = 2 * np.sqrt(2 / Extended(oracle.PI)), Extended("0.044715")
    slope, curve = (1, 0) if activation == "silu" else (c * (1 + 3 * cubic * z * z), 6 * c * cubic * z)
    with np.errstate(over="ignore"):
        flat = density / slope  # the sigmoid's own derivative
    return 2 * density + z * (flat * (1 - 2 * gate) * slope * slope + flat * curve)


def double_backward(
    arrays: dict, eps: float, activation: str = "identity", alpha: float | None = None, frozen: bool = False
) -> dict:
    """Return value and bound of every output, of matrices and vectors by name; any may be None.

    The statistics are those of the mini-batch, also where they are `frozen`.
    """
    x, dy, gamma = arrays["x"], exactly(arrays["dy"]), exactly(arrays["gamma"], 1.0)
    u = oracle.unit_roundoff(x.dtype)
    f = oracle.forward(x, arrays["gamma"], arrays["beta"], eps, activation, None, arrays["residual"], alpha)
    rstd, xhat = Sized(f.rstd, f.rstd), Sized(f.xhat, 1 + np.abs(f.xhat))
    slope, bend = oracle.derivative(f.z, activation, alpha), second_derivative(f.z, activation, alpha)
    # An error of z moves phi' and phi'' by at most two of it, where phi is curved.
    moved = 0 if activation in oracle.PIECEWISE_LINEAR else 2 * f.z_bound / (SLACK * u)
    slope, bend = Sized(slope, np.abs(slope) + moved), Sized(bend, np.abs(bend) + moved)
    ddx, ddgamma, ddbeta, ddresidual = (exactly(arrays[name]) for name in ("ddx", "ddgamma", "ddbeta", "ddresidual"))
    ddx = ddx * exactly(np.ones_like(x))

    def project(a: Sized) -> Sized:
        if frozen:
            return a
        return a - a.mean() - xhat * (a * xhat).mean()

    scale, g = gamma * rstd, dy * slope
    w = scale * project(ddx) + ddgamma * xhat + ddbeta + ddresidual
    q, e = w * dy * bend, (ddx * project(g)).sum()
    h = gamma * q + ddgamma * g
    if not frozen:
        h = h - scale * (ddx * (g * xhat).mean() + g * (ddx * xhat).mean())
    share = exactly(np.array(0 if frozen else 1 / Extended(len(x))))
    dx = rstd * (project(h) - xhat * (scale * e * share))
    found = (w * slope, dx, (q * xhat).sum() + rstd * e, q.sum(), q)
    return {name: (result.value, SLACK * u * result.size) for name, result in zip(OUTPUTS, found, strict=True)}
