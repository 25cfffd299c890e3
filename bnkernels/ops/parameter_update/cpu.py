"""CPU kernels of the optimisers' steps.

Formulas:  as in ``cuda/parameter_update.cu``
Arrays:    parameters, gradients and state, P numbers each, float32 or float64; all but the gradients in place
Tasks:     blocks of `BLOCK` parameters
Traffic:   sgd 2 P numbers read and P written, momentum and rmsprop 3 P and 2 P, adam 4 P and 3 P: each once
Numerics:  numbers in the type of the arrays; factors are computed in float64 and rounded
Order:     bits of a parameter depend on no other
"""

from __future__ import annotations

from typing import Any

import numpy as np

from bnkernels.runtime.cpu.language import kernel, part
from bnkernels.runtime.cpu.threads import share

BLOCK = 2**16


def _share(work: Any, parameters: np.ndarray, *others: Any) -> None:
    size = parameters.size
    if parameters.ndim != 1:
        parameters, *others = (a.reshape(-1) if isinstance(a, np.ndarray) else a for a in (parameters, *others))
    if size <= BLOCK:
        work(parameters, *others, 0, 1)
    else:
        share(work, -(-size // BLOCK), size, parameters, *others)


@kernel
def _sgd(parameters, gradients, lr, first, last):
    start = first * BLOCK
    count = min(last * BLOCK, len(parameters)) - start
    p, g = part(parameters, start, count), part(gradients, start, count)
    rate = p.dtype.type(lr)
    for i in range(count):
        p[i] -= rate * g[i]


@kernel
def _momentum(parameters, velocity, gradients, lr, momentum, first, last):
    start = first * BLOCK
    count = min(last * BLOCK, len(parameters)) - start
    p, g, v = part(parameters, start, count), part(gradients, start, count), part(velocity, start, count)
    rate, decay = p.dtype.type(lr), p.dtype.type(momentum)
    for i in range(count):
        new = decay * v[i] + g[i]
        v[i] = new
        p[i] -= rate * new


@kernel
def _rmsprop(parameters, square, gradients, lr, decay, eps, first, last):
    start = first * BLOCK
    count = min(last * BLOCK, len(parameters)) - start
    p, g, s = part(parameters, start, count), part(gradients, start, count), part(square, start, count)
    number = p.dtype.type
    rate, keep, take, added = number(lr), number(decay), number(1.0 - decay), number(eps)
    for i in range(count):
        mean = keep * s[i] + take * g[i] * g[i]
        s[i] = mean
        p[i] -= rate * (g[i] / (np.sqrt(mean) + added))  # before lr: finite / infinite is 0


@kernel
def _adam(parameters, first_moment, second_moment, gradients, factors, first, last):
    start = first * BLOCK
    count = min(last * BLOCK, len(parameters)) - start
    p, g = part(parameters, start, count), part(gradients, start, count)
    m, s = part(first_moment, start, count), part(second_moment, start, count)
    number = p.dtype.type
    lr, beta1, beta2, eps, correction1, root_correction2 = factors
    keep1, take1 = number(beta1), number(1.0 - beta1)
    keep2, take2 = number(beta2), number(1.0 - beta2)
    divisor, added, rate = number(root_correction2), number(eps), number(lr / correction1)
    for i in range(count):
        mean = keep1 * m[i] + take1 * g[i]
        square = keep2 * s[i] + take2 * g[i] * g[i]
        m[i] = mean
        s[i] = square
        p[i] -= rate * (mean / (np.sqrt(square) / divisor + added))  # before lr: finite / infinite is 0


def sgd(parameters: np.ndarray, gradients: np.ndarray, lr: float) -> None:
    """Make a step of plain gradient descent."""
    _share(_sgd, parameters, gradients, lr)


def momentum(parameters: np.ndarray, velocity: np.ndarray, gradients: np.ndarray, lr: float, decay: float) -> None:
    """Make a step with momentum."""
    _share(_momentum, parameters, velocity, gradients, lr, decay)


def rmsprop(
    parameters: np.ndarray, square: np.ndarray, gradients: np.ndarray, lr: float, decay: float, eps: float
) -> None:
    """Make a step of RMSProp."""
    _share(_rmsprop, parameters, square, gradients, lr, decay, eps)


def adam(
    parameters: np.ndarray,
    first: np.ndarray,
    second: np.ndarray,
    gradients: np.ndarray,
    *factors: float,
) -> None:
    """Make a step of Adam; the factors are those of the reference."""
    _share(_adam, parameters, first, second, gradients, factors)
