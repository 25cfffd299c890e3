"""One optimiser step over all parameters of a network at once: SGD, momentum, Adam. In place, one launch."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from bnkernels import _check as check
from bnkernels import _runtime as rt

ARGUMENTS = rt.arguments_type(
    "parameters gradients first second", "size", "lr beta1 beta2 rest1 rest2 eps correction1 correction2", ""
)
THREADS = 256
MAX_BLOCKS = 1024  # several per multiprocessor of the largest GPU; threads stride over the rest


def sgd_update(parameters: Any, gradients: Any, *, lr: float) -> None:
    """Subtract `lr` times the gradients from the parameters, in place.

    Parameters
    ----------
    parameters : array, shape (P,), float32 or float64
        Updated in place; contiguous.
    gradients : array, shape (P,), dtype of `parameters`
        Contiguous. Never written.
    lr : float
        Learning rate, per step.

    Raises
    ------
    TypeError
        If an argument is not an array of the right kind or data type, or arrays of NumPy and CuPy are mixed.
    ValueError
        If a shape, layout or value is wrong, or arrays overlap.

    Examples
    --------
    >>> import numpy as np
    >>> p = np.array([1.0, 2.0])
    >>> sgd_update(p, np.array([1.0, -1.0]), lr=0.5)
    >>> p
    array([0.5, 2.5])
    """
    lr = check.number("lr", lr, 0)
    runtime = _checked(parameters=parameters, gradients=gradients)
    if runtime is not None:
        _launch(runtime, "sgd", (parameters, gradients, None, None), (lr, 0, 0, 0, 0, 0, 1, 1))
    else:
        parameters -= lr * gradients


def momentum_update(parameters: Any, gradients: Any, velocity: Any, *, lr: float, momentum: float = 0.9) -> None:
    """Add the gradients to the decayed velocity and subtract `lr` times it from the parameters, in place.

    Parameters
    ----------
    parameters : array, shape (P,), float32 or float64
        Updated in place; contiguous.
    gradients : array, shape (P,), dtype of `parameters`
        Contiguous. Never written.
    velocity : array, shape (P,), dtype of `parameters`
        Updated in place; starts at 0.
    lr : float
        Learning rate, per step.
    momentum : float
        What is left of the velocity after a step, between 0 and 1.

    Raises
    ------
    TypeError
        If an argument is not an array of the right kind or data type, or arrays of NumPy and CuPy are mixed.
    ValueError
        If a shape, layout or value is wrong, or arrays overlap.

    Examples
    --------
    >>> import numpy as np
    >>> p, v = np.array([1.0]), np.array([2.0])
    >>> momentum_update(p, np.array([1.0]), v, lr=0.5, momentum=0.5)
    >>> p, v
    (array([0.]), array([2.]))
    """
    lr, momentum = check.number("lr", lr, 0), check.number("momentum", momentum, 0, 1)
    runtime = _checked(parameters=parameters, velocity=velocity, gradients=gradients)
    if runtime is not None:
        _launch(runtime, "momentum", (parameters, gradients, velocity, None), (lr, momentum, 0, 0, 0, 0, 1, 1))
    else:
        velocity *= momentum
        velocity += gradients
        parameters -= lr * velocity


def adam_update(
    parameters: Any,
    gradients: Any,
    first: Any,
    second: Any,
    *,
    step: int,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
) -> None:
    """Make one Adam step, in place.

    Parameters
    ----------
    parameters : array, shape (P,), float32 or float64
        Updated in place; contiguous.
    gradients : array, shape (P,), dtype of `parameters`
        Contiguous. Never written.
    first, second : array, shape (P,), dtype of `parameters`
        Decayed means of the gradients and of their squares, updated in place; both start at 0.
    step : int
        The number of this step, from 1.
    lr : float
        Learning rate, per step.
    beta1, beta2 : float
        What is left of `first` and `second` after a step, at least 0 and less than 1.
    eps : float
        Added to the root of `second`, in the units of the gradients.

    Raises
    ------
    TypeError
        If an argument is not an array of the right kind or data type, or arrays of NumPy and CuPy are mixed.
    ValueError
        If a shape, layout or value is wrong, or arrays overlap.

    References
    ----------
    .. [1] D. P. Kingma and J. Ba, "Adam", 2015, arXiv:1412.6980, algorithm 1.

    Examples
    --------
    >>> import numpy as np
    >>> p, first, second = np.array([1.0]), np.zeros(1), np.zeros(1)
    >>> adam_update(p, np.array([5.0]), first, second, step=1, lr=0.25)
    >>> p.round(6)
    array([0.75])
    """
    lr, eps = check.number("lr", lr, 0), check.number("eps", eps, 0)
    below_one = float(np.nextafter(1, 0))
    beta1, beta2 = check.number("beta1", beta1, 0, below_one), check.number("beta2", beta2, 0, below_one)
    step = check.number("step", step, 1)
    runtime = _checked(parameters=parameters, first=first, second=second, gradients=gradients)
    correction1, correction2 = 1 - beta1**step, 1 - beta2**step
    if runtime is not None:
        scalars = (lr, beta1, beta2, 1 - beta1, 1 - beta2, eps, correction1, correction2)
        _launch(runtime, "adam", (parameters, gradients, first, second), scalars)
    else:
        first *= beta1
        first += (1 - beta1) * gradients
        second *= beta2
        second += (1 - beta2) * gradients * gradients
        root = np.sqrt(second / correction2)
        root += eps
        parameters -= (lr / correction1) * first / root


def parameter_update_launch(size: int) -> rt.Launch:
    """Return the launch for at least one parameter.

    Examples
    --------
    >>> parameter_update_launch(1530)
    Launch(grid=(6, 1, 1), block=(256, 1, 1), shared_bytes=0, cooperative=False)
    """
    return rt.Launch((min(rt.ceil_div(size, THREADS), MAX_BLOCKS), 1, 1), (THREADS, 1, 1))


def _checked(**arrays: Any) -> rt.Runtime | None:
    """Check the arrays, of which all but the last, the gradients, are written."""
    names, values = tuple(arrays), tuple(arrays.values())
    runtime = _check_signatures(names, *map(check.signature, values))
    if runtime is not None:
        check.one_device(runtime, names, values)
    check.no_overlap(runtime, names, values, written=len(names) - 1)
    return runtime


@lru_cache(maxsize=1024)
def _check_signatures(names: tuple[str, ...], *signatures: check.Signature | None) -> rt.Runtime | None:
    args = check.arguments(dict(zip(names, signatures, strict=True)))
    parameters = args["parameters"]
    if parameters.dtype not in rt.SUFFIX:
        raise TypeError(f"parameters must be float32 or float64, got {parameters.dtype}")
    if len(parameters.shape) != 1:
        raise ValueError(f"parameters must be one flat array, got the shape {parameters.shape}; pass a flat view")
    for argument in args.values():
        check.contiguous(argument, parameters.shape, parameters.dtype)
    return rt.runtime_of(parameters.kind)


def _launch(runtime: rt.Runtime, rule: str, arrays: tuple, scalars: tuple[float, ...]) -> None:
    parameters = arrays[0]
    if parameters.size == 0:
        return
    arguments = rt.pack(ARGUMENTS[parameters.dtype], *rt.addresses(runtime, *arrays), parameters.size, *scalars)
    name = f"bnk_parameter_update_{rule}_{rt.SUFFIX[parameters.dtype]}"
    runtime.launch("parameter_update", name, parameter_update_launch(parameters.size), arguments, parameters)
