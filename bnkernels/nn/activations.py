"""Activations as layers."""

from __future__ import annotations

from typing import Any

from bnkernels.nn.elementwise import activate, activate_backward
from bnkernels.nn.layer import Leaf
from bnkernels.ops.activations import activation_named
from bnkernels.runtime import checks as check
from bnkernels.runtime.registry import runtime_of


class Activation(Leaf):
    """Activation, element by element.

    Parameters
    ----------
    activation : str
        Name: identity, relu, leaky_relu, sigmoid, tanh, gelu, gelu_tanh, silu or elu.
    alpha : float, optional
        Slope of leaky_relu below zero (default 0.01), or factor of elu (default 1).

    Raises
    ------
    TypeError, ValueError
        If there is no such activation, or it has no `alpha`.

    Examples
    --------
    >>> import numpy as np
    >>> ReLU()(np.array([-1.0, 2.0]))
    array([0., 2.])
    """

    def __init__(self, activation: str, alpha: float | None = None) -> None:
        super().__init__()
        self.activation, self.alpha = activation, alpha
        activation_named(activation, alpha)

    def _forward(self, x: Any, training: bool, keep: bool) -> Any:
        z = x if runtime_of(type(x)) is None and x.flags.c_contiguous else x.copy()
        y, saved = activate(z, None, self._phi)
        if keep:
            self._saved = x, saved
        return y

    def _backward(self, dy: Any, in_place: bool) -> Any:
        return activate_backward(dy, self._saved[1], None, self._phi, None, in_place)

    def _options(self) -> list[str]:
        named = type(self) is Activation
        return [repr(self.activation)] * named + ([] if self.alpha is None else [f"alpha={self.alpha!r}"])


class Identity(Activation):
    """Identity."""

    def __init__(self) -> None:
        super().__init__("identity")


class ReLU(Activation):
    """Rectified linear unit, ``max(x, 0)``."""

    def __init__(self) -> None:
        super().__init__("relu")


class LeakyReLU(Activation):
    """Rectified linear unit with a slope below zero.

    Parameters
    ----------
    alpha : float
        Slope.
    """

    def __init__(self, alpha: float = 0.01) -> None:
        super().__init__("leaky_relu", alpha)


class Sigmoid(Activation):
    """Logistic function."""

    def __init__(self) -> None:
        super().__init__("sigmoid")


class Tanh(Activation):
    """Hyperbolic tangent."""

    def __init__(self) -> None:
        super().__init__("tanh")


class GELU(Activation):
    """Gaussian error linear unit.

    Parameters
    ----------
    approximate : {"none", "tanh"}
        Exact, or by the hyperbolic tangent.
    """

    def __init__(self, approximate: str = "none") -> None:
        check.one_of("approximate", approximate, ("none", "tanh"))
        super().__init__("gelu" if approximate == "none" else "gelu_tanh")

    def _options(self) -> list[str]:
        return ["approximate='tanh'"] if self.activation == "gelu_tanh" else []


class SiLU(Activation):
    """Sigmoid linear unit, ``x * sigmoid(x)``, also known as swish."""

    def __init__(self) -> None:
        super().__init__("silu")


class ELU(Activation):
    """Exponential linear unit.

    Parameters
    ----------
    alpha : float
        Negated limit at minus infinity.
    """

    def __init__(self, alpha: float = 1.0) -> None:
        super().__init__("elu", alpha)
