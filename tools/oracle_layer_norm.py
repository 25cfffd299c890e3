"""Layer norm and RMS norm in extended precision, by the formulas, with bounds; see ``oracle.py``."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tools import oracle
from tools.oracle import PIECEWISE_LINEAR, SLACK, Extended, unit_roundoff


class Exact(NamedTuple):
    """Output and gradients, each with its bound; statistics of the rows."""

    y: np.ndarray
    y_bound: np.ndarray
    mean: np.ndarray
    rstd: np.ndarray
    dx: np.ndarray
    dx_bound: np.ndarray
    dgamma: np.ndarray
    dgamma_bound: np.ndarray
    dbeta: np.ndarray
    dbeta_bound: np.ndarray


def exact(x, dy, gamma, beta, eps, activation="identity", centred=True) -> Exact:
    """Return the layer norm of a matrix and its gradients; of rows that are not centred the RMS norm."""
    u = unit_roundoff(x.dtype)
    about_0 = None if centred else (np.zeros(len(x)), np.square(x.astype(Extended)).mean(1))
    rows = oracle.forward(x.T, None, None, eps, running=about_0)  # as the channels of a batch norm
    scale = np.ones(x.shape[1], Extended) if gamma is None else gamma.astype(Extended)
    shift = np.zeros(x.shape[1], Extended) if beta is None else beta.astype(Extended)
    xhat, xhat_bound = rows.xhat.T, SLACK * u * (1 + np.abs(rows.xhat.T))
    z = scale * xhat + shift
    bound = np.abs(scale) * rows.z_bound.T + SLACK * u * (np.abs(scale * xhat) + np.abs(shift))
    dy = dy.astype(Extended)
    g = dy * oracle.derivative(z, activation)
    g_bound = SLACK * u * np.abs(g) + (0 if activation in PIECEWISE_LINEAR else np.abs(dy) * bound)
    product_bound = g_bound * np.abs(xhat) + np.abs(g) * xhat_bound + SLACK * u * np.abs(g * xhat)
    # To x the scaled gradients are what those of a batch norm are.
    h, h_bound = scale * g, np.abs(scale) * (g_bound + SLACK * u * np.abs(g))
    mean_h, mean_product = centred * h.mean(1, keepdims=True), (h * xhat).mean(1, keepdims=True)
    through = (h_bound * np.abs(xhat) + np.abs(h) * xhat_bound).mean(1, keepdims=True)
    through = np.abs(xhat) * through + centred * h_bound.mean(1, keepdims=True) + xhat_bound * np.abs(mean_product)
    size = np.abs(h) + np.abs(mean_h) + np.abs(xhat * mean_product)
    rstd = rows.rstd[:, None]
    return Exact(
        *(oracle.activate(z, activation), bound, rows.mean, rows.rstd),
        *(rstd * (h - mean_h - xhat * mean_product), rstd * (h_bound + through + SLACK * u * size)),
        *((g * xhat).sum(0), product_bound.sum(0), g.sum(0), (g_bound + SLACK * u * np.abs(g)).sum(0)),
    )
