"""NumPy reference of bias, activation and 16-bit storage around the products of linear layers."""

from __future__ import annotations

import numpy as np

from bnkernels.ops.activations import Activation
from bnkernels.runtime.arguments import accumulator


def _shifted(z: np.ndarray, beta: np.ndarray | None) -> np.ndarray:
    """Return ``z + beta`` in the accumulator's type, always a new array."""
    shifted = z.astype(accumulator(z.dtype))
    if beta is not None:
        shifted += beta
    return shifted


@np.errstate(all="ignore")  # kernels have no warnings either
def forward(z: np.ndarray, beta: np.ndarray | None, phi: Activation, y: np.ndarray) -> None:
    """Write the activations of ``z + beta``; `y` may be `z`."""
    y[...] = phi.forward(np, _shifted(z, beta))


@np.errstate(all="ignore")  # kernels have no warnings either
def backward(
    dy: np.ndarray,
    z: np.ndarray,
    beta: np.ndarray | None,
    phi: Activation,
    dz: np.ndarray | None,
    dbeta: np.ndarray | None,
) -> None:
    """Write the gradients that are wanted; `dz` may be `dy`."""
    g = dy.astype(accumulator(dy.dtype), copy=False)
    if not phi.is_identity:
        shifted = _shifted(z, beta)
        g = phi.backward(np, g, phi.forward(np, shifted) if phi.from_output else shifted)
    if dbeta is not None:
        dbeta[...] = g.sum(0, np.float64)
    if dz is not None:
        dz[...] = g


def single(array: np.ndarray) -> np.ndarray:
    """Return an array of 16-bit numbers in float32."""
    return array.astype(np.float32)


@np.errstate(all="ignore")  # kernels have no warnings either
def round_into(array: np.ndarray, out: np.ndarray) -> None:
    """Round float32 numbers to 16 bits."""
    out[...] = array.astype(out.dtype)
