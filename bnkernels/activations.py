"""The activations that follow a normalisation: their names, their codes in the kernels, and their NumPy forms.

Each has a forward, ``h = phi(z)``, and a backward, ``dz = dh * phi'(z)``, formed from `h`. They work on NumPy and on
CuPy arrays; the kernels compute the same from the codes. NaN passes through all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


class Activation(NamedTuple):
    """One activation: the kernels' code for it and its two functions of arrays, each called with the array module."""

    code: int
    forward: Callable[[Any, Any], Any]  # (xp, z) -> h; may overwrite z
    backward: Callable[[Any, Any, Any], Any]  # (xp, dh, h) -> dz; overwrites neither


def _sigmoid(xp: Any, z: Any) -> Any:
    decay = xp.exp(-xp.abs(z))  # never overflows
    return xp.where(z >= 0, 1, decay) / (1 + decay)


_ZERO = np.zeros((), np.float32)  # NumPy takes an array without dimensions much faster than a Python number


def _relu(xp: Any, z: Any) -> Any:
    return xp.maximum(z, _ZERO if xp is np else 0, out=z)


def _relu_backward(xp: Any, dh: Any, h: Any) -> Any:
    dz = dh.copy()
    zero = _ZERO if xp is np else 0
    xp.putmask(dz, h <= zero, zero)
    return dz


ACTIVATIONS: dict[str, Activation] = {
    "identity": Activation(0, lambda xp, z: z, lambda xp, dh, h: dh),
    "relu": Activation(1, _relu, _relu_backward),
    "sigmoid": Activation(2, _sigmoid, lambda xp, dh, h: dh * (h * (1 - h))),
    "tanh": Activation(3, lambda xp, z: xp.tanh(z, out=z), lambda xp, dh, h: dh * (1 - h * h)),
}


def activation_named(name: str) -> Activation:
    """Return the activation of this name.

    Parameters
    ----------
    name : str
        One of the keys of `ACTIVATIONS`: identity, relu, sigmoid, tanh.

    Returns
    -------
    Activation
        Its code in the kernels and its array functions.

    Raises
    ------
    ValueError
        If there is no such activation.

    Examples
    --------
    >>> activation_named("relu").code
    1
    """
    try:
        return ACTIVATIONS[name]
    except (KeyError, TypeError):
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}; got {name!r}") from None
