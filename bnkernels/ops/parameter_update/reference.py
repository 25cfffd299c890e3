"""The optimisers' steps on NumPy arrays: the specification of the kernels."""

from __future__ import annotations

import numpy as np


@np.errstate(all="ignore")  # kernels have no warnings either
def sgd(parameters: np.ndarray, gradients: np.ndarray, lr: float) -> None:
    """Make a step of plain gradient descent."""
    parameters -= lr * gradients


@np.errstate(all="ignore")
def momentum(parameters: np.ndarray, velocity: np.ndarray, gradients: np.ndarray, lr: float, decay: float) -> None:
    """Make a step with momentum."""
    velocity *= decay
    velocity += gradients
    parameters -= lr * velocity


@np.errstate(all="ignore")
def rmsprop(
    parameters: np.ndarray, square: np.ndarray, gradients: np.ndarray, lr: float, decay: float, eps: float
) -> None:
    """Make a step of RMSProp."""
    square *= decay
    square += (1 - decay) * gradients * gradients
    root = np.sqrt(square, out=np.empty_like(square))
    root += eps
    np.divide(gradients, root, out=root)  # before lr multiplies: finite / infinite is 0
    root *= lr
    parameters -= root


@np.errstate(all="ignore")
def adam(
    parameters: np.ndarray,
    first: np.ndarray,
    second: np.ndarray,
    gradients: np.ndarray,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    correction1: float,
    root_correction2: float,
) -> None:
    """Make a step of Adam."""
    first *= beta1
    first += (1 - beta1) * gradients
    second *= beta2
    second += (1 - beta2) * gradients * gradients
    root = np.sqrt(second, out=np.empty_like(second))
    root /= root_correction2
    root += eps
    np.divide(first, root, out=root)  # before lr multiplies: finite / infinite is 0
    root *= lr / correction1
    parameters -= root
