"""The NumPy twins of the layer-norm kernels, on matrices: all in float64, rounded to the data's type at the end."""

from __future__ import annotations

import numpy as np

from bnkernels.activations import Activation

WIDE = np.dtype(np.float64)


@np.errstate(over="ignore", invalid="ignore")  # as kernels do, which have no warnings
def forward_numpy(
    x: np.ndarray,
    gamma: np.ndarray | None,
    beta: np.ndarray | None,
    eps: float,
    phi: Activation,
    y: np.ndarray,
    statistics: np.ndarray,
) -> None:
    """Write `y` and `statistics` (3, N)."""
    kind = statistics.dtype
    first = x[:, :1].astype(WIDE)  # shifted by it, a constant row has exactly that mean
    d = x - first
    shift = d.mean(1)
    statistics[0] = first[:, 0] + shift
    d = x - statistics[0][:, None].astype(WIDE)
    statistics[1] = d.mean(1)
    d -= statistics[1][:, None]
    var = np.square(d).mean(1)
    statistics[2] = 1 / np.sqrt(var.astype(kind) + kind.type(eps))
    _round(phi.forward(np, _affine(d, statistics[2], gamma, beta, kind)), y)


@np.errstate(over="ignore", invalid="ignore")
def backward_numpy(
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
    kind = statistics.dtype
    mean, low, rstd = statistics.astype(WIDE)[:, :, None]
    d = (x - mean) - low
    g = dy.astype(WIDE)
    if not phi.is_identity:
        z = _affine(d, statistics[2], gamma, beta, kind)
        g = phi.backward(np, dy.astype(kind), phi.forward(np, z) if phi.from_output else z).astype(WIDE)
    xhat = d * rstd
    dgamma[...], dbeta[...] = (g * xhat).sum(0), g.sum(0)
    if gamma is not None:
        g *= gamma
    g -= g.mean(1, keepdims=True) + xhat * (g * xhat).mean(1, keepdims=True)
    _round(g * rstd, dx)


def _affine(
    d: np.ndarray, rstd: np.ndarray, gamma: np.ndarray | None, beta: np.ndarray | None, kind: np.dtype
) -> np.ndarray:
    z = d * rstd[:, None]
    if gamma is not None:
        z *= gamma
    if beta is not None:
        z += beta
    return z.astype(kind, copy=False)


def _round(values: np.ndarray, out: np.ndarray) -> None:
    """Round as kernels do: to 16 bits from float32."""
    out[...] = values.astype(np.float32, copy=False) if out.dtype.itemsize == 2 else values
