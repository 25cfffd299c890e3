"""Brings arrays of any data type and channel axis to the NumPy twins, which compute on (rows, C) matrices.

A matrix of float32 or float64 goes in as it is. Anything else is copied: 16-bit numbers to float32, in which the
kernels compute them too, and the channels to the last axis. Results go back the same way, rounded once more.
"""

from __future__ import annotations

import numpy as np

from bnkernels.ops.activations import Activation
from bnkernels.ops.batch_norm.cpu import Kept, backward_numpy, forward_numpy, inference_numpy
from bnkernels.ops.batch_norm.problem import Layout
from bnkernels.runtime.arguments import accumulator


def _is_matrix(array: np.ndarray, layout: Layout) -> bool:
    return array.ndim == 2 and layout.axis == 1 and array.dtype.itemsize != 2


def _matrix(array: np.ndarray | None, layout: Layout) -> np.ndarray | None:
    """Return the rows of an input."""
    if array is None or _is_matrix(array, layout):
        return array
    rows = np.moveaxis(array, layout.axis, -1).reshape(layout.rows, layout.channels)
    return rows.astype(accumulator(array.dtype), copy=False)


def _target(out: np.ndarray | None, layout: Layout) -> np.ndarray | None:
    """Return what a twin shall write: the output itself, or the rows that become it."""
    if out is None or _is_matrix(out, layout):
        return out
    return np.empty((layout.rows, layout.channels), accumulator(out.dtype))


def _bring_back(rows: np.ndarray | None, out: np.ndarray | None, layout: Layout) -> None:
    """Write an output, unless the twin has done so."""
    if out is None or rows is out:
        return
    moved = np.moveaxis(out, layout.axis, -1)
    moved[...] = rows.reshape(moved.shape)


@np.errstate(all="ignore")  # as kernels do, which have no warnings
def forward_host(
    layout: Layout,
    x: np.ndarray,
    residual: np.ndarray | None,
    vectors: tuple[np.ndarray | None, ...],
    momentum: float,
    divisor: float,
    eps: float,
    phi: Activation,
    y: np.ndarray,
    statistics: np.ndarray,
) -> Kept | None:
    """Write `y`, `statistics` and the running statistics; `vectors` are gamma, beta and the running statistics."""
    target = _target(y, layout)
    rows, extra = _matrix(x, layout), _matrix(residual, layout)
    kept = forward_numpy(rows, extra, *vectors, momentum, divisor, eps, phi, target, statistics)
    _bring_back(target, y, layout)
    return kept


@np.errstate(all="ignore")  # as kernels do, which have no warnings
def inference_host(
    layout: Layout,
    x: np.ndarray,
    residual: np.ndarray | None,
    vectors: tuple[np.ndarray | None, ...],
    eps: float,
    phi: Activation,
    y: np.ndarray,
) -> None:
    """Write `y` of the inference forward."""
    target = _target(y, layout)
    inference_numpy(_matrix(x, layout), _matrix(residual, layout), *vectors, eps, phi, target)
    _bring_back(target, y, layout)


@np.errstate(all="ignore")  # as kernels do, which have no warnings
def backward_host(
    layout: Layout,
    inputs: tuple[np.ndarray | None, ...],
    vectors: tuple[np.ndarray | None, ...],
    eps: float,
    phi: Activation,
    kept: Kept | None,
    outputs: tuple[np.ndarray | None, ...],
) -> None:
    """Write the gradients `outputs`: dx, dgamma, dbeta, dresidual; `inputs` are dy, x and the residual."""
    dx, dgamma, dbeta, dresidual = outputs
    targets = _target(dx, layout), _target(dresidual, layout)
    rows = (_matrix(array, layout) for array in inputs)
    backward_numpy(*rows, *vectors, eps, phi, kept, targets[0], dgamma, dbeta, targets[1])
    _bring_back(targets[0], dx, layout)
    _bring_back(targets[1], dresidual, layout)
