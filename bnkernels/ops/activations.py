"""The activations that follow a normalisation: their names, their codes in the kernels, and their NumPy forms.

Each has a forward, ``h = phi(z)``, a backward, ``dz = dh * phi'(z)``, and a second derivative, ``phi''(z)``. They work
on NumPy and on CuPy arrays; the kernels compute the same from code and alpha (``activation.cuh``). NaN passes
through all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from bnkernels.runtime import checks as check


class Activation(NamedTuple):
    """An activation: its code and alpha in the kernels, and its functions of arrays, called with the array module."""

    code: int
    alpha: float  # 0 where the kernels have no use for it
    from_output: bool  # whether the backward takes phi's output; else its input
    forward: Callable[[Any, Any], Any]  # (xp, z) -> h; may overwrite z where from_output
    backward: Callable[[Any, Any, Any], Any]  # (xp, dh, h or z) -> dz; overwrites neither
    second: Callable[[Any, Any], Any]  # (xp, z) -> phi''(z), best in float64; does not overwrite z

    @property
    def is_identity(self) -> bool:
        """Whether phi(z) = z, so that nothing of the forward is needed."""
        return self.code == 0 and self.alpha == 1

    @property
    def is_piecewise_linear(self) -> bool:
        """Whether phi'' is 0 wherever it exists."""
        return self.code == 0


# exp(x^2) (1 + 2x) erfc(x) for x >= 0 as a polynomial of (x - 3.75) / (x + 3.75); see cuda/lib/numbers/activation.cuh.
ERFC = (
    1.2375126308378275,
    -0.14024059858554697,
    0.0035854154854790257,
    0.0822767384901452,
    -0.10880393014244462,
    0.09230432116037748,
    -0.05869339857664934,
    0.028362277418956406,
    -0.009746579683265262,
    0.0017556258528952954,
    0.000293714378044958,
    -0.0002901540805408417,
    5.164652974177416e-05,
    2.238423915508223e-05,
    -1.1438048033346894e-05,
    -9.73559896736775e-07,
    1.7419821586224816e-06,
    -5.721823060322409e-08,
    -2.4857126248016745e-07,
    2.3263508708859127e-08,
    3.197926671666804e-08,
    -3.744210080962021e-09,
    -2.6231073471334755e-09,
    3.1114333809799285e-10,
)
SIGMOID_OF = 2 * math.sqrt(2 / math.pi)  # gelu_tanh(z) = z sigmoid(z (a + b z^2)), with a, and b = 0.044715 a
_ZERO = np.zeros((), np.float32)  # NumPy takes an array without dimensions much faster than a Python number


def _sigmoid(xp: Any, z: Any) -> Any:
    decay = xp.exp(-xp.abs(z))  # never overflows
    return xp.where(z >= 0, 1, decay) / (1 + decay)


def _flat(xp: Any, z: Any) -> Any:
    return xp.where(xp.isnan(z), z, z.dtype.type(0))


def _relu(xp: Any, z: Any) -> Any:
    return xp.maximum(z, _ZERO if xp is np else 0, out=z)


def _relu_backward(xp: Any, dh: Any, h: Any) -> Any:
    dz = dh.copy()
    zero = _ZERO if xp is np else 0
    xp.putmask(dz, h <= zero, zero)
    return dz


def _leaky_relu(alpha: float) -> tuple[Callable, Callable]:
    def scaled(xp: Any, value: Any, z: Any) -> Any:
        below = value * value.dtype.type(alpha) if alpha else xp.zeros_like(value)  # not NaN for minus infinity
        return xp.where(z <= 0, below, value)

    return lambda xp, z: scaled(xp, z, z), scaled, _flat


def _elu(alpha: float) -> tuple[Callable, Callable]:
    def forward(xp: Any, z: Any) -> Any:
        return xp.where(z <= 0, z.dtype.type(alpha) * xp.expm1(xp.minimum(z, 0)), z)

    def backward(xp: Any, dh: Any, z: Any) -> Any:
        return dh * xp.where(z <= 0, z.dtype.type(alpha) * xp.exp(xp.minimum(z, 0)), 1)

    def second(xp: Any, z: Any) -> Any:
        return xp.where(z > 0, 0, z.dtype.type(alpha) * xp.exp(xp.minimum(z, 0)))

    return forward, backward, second


def _erfc(xp: Any, z: Any) -> Any:
    """Return the complementary error function of float64 numbers, which NumPy does not have."""
    x = xp.minimum(xp.abs(z), 28)  # beyond, erfc is 0
    t = (x - 3.75) / (x + 3.75)
    total = xp.full_like(t, ERFC[-1])
    for coefficient in ERFC[-2::-1]:
        total *= t
        total += coefficient
    total *= xp.exp(-x * x) / (1 + 2 * x)
    return xp.where(z < 0, 2 - total, total)


# Gates: h = z gate(z), and phi' = gate + z gate'; in float64. At infinity the gate is 0 or 1 and gate' is 0.


def _silu_gate(xp: Any, z: Any) -> tuple[Any, Any]:
    decay = xp.exp(-xp.abs(z))
    above = 1 / (1 + decay)
    return xp.where(z < 0, decay, 1) * above, decay * above * above


def _gelu_tanh_gate(xp: Any, z: Any) -> tuple[Any, Any]:
    z = xp.clip(z, -50, 50)  # where the gate has long been 0 or 1
    square = z * z
    gate, density = _silu_gate(xp, z * (SIGMOID_OF + 0.044715 * SIGMOID_OF * square))
    return gate, density * (SIGMOID_OF + 3 * 0.044715 * SIGMOID_OF * square)


def _gelu_gate(xp: Any, z: Any) -> tuple[Any, Any]:
    z = xp.clip(z, -50, 50)
    return _erfc(xp, z * -math.sqrt(0.5)) / 2, xp.exp(z * z / -2) / math.sqrt(2 * math.pi)


# Second derivatives. A sigmoid s has s'' = s' (1 - 2 s); a gate makes phi'' = 2 gate' + z gate''.


def _sigmoid_second(xp: Any, z: Any) -> Any:
    gate, density = _silu_gate(xp, z)
    return density * (1 - 2 * gate)


def _tanh_second(xp: Any, z: Any) -> Any:
    h = xp.tanh(z)
    return -2 * h * (1 - h * h)


def _silu_second(xp: Any, z: Any) -> Any:
    gate, density = _silu_gate(xp, z)
    return density * (2 + xp.where(density == 0, 0, z) * (1 - 2 * gate))


def _gelu_tanh_second(xp: Any, z: Any) -> Any:
    z = xp.clip(z, -50, 50)
    gate, density = _gelu_tanh_gate(xp, z)
    slope = SIGMOID_OF + 3 * 0.044715 * SIGMOID_OF * z * z
    bend = (1 - 2 * gate) * slope + 6 * 0.044715 * SIGMOID_OF * z / slope  # gate'' / gate'
    return density * (2 + z * bend)


def _gelu_second(xp: Any, z: Any) -> Any:
    z = xp.clip(z, -50, 50)
    return xp.exp(z * z / -2) / math.sqrt(2 * math.pi) * (2 - z * z)


def _gated(gate_of: Callable[[Any, Any], tuple[Any, Any]], second: Callable) -> tuple[Callable, Callable, Callable]:
    def forward(xp: Any, z: Any) -> Any:
        z64 = z.astype(np.float64)
        gate, _ = gate_of(xp, z64)
        return (xp.where(gate == 0, 0, z64) * gate).astype(z.dtype)

    def backward(xp: Any, dh: Any, z: Any) -> Any:
        z64 = z.astype(np.float64)
        gate, density = gate_of(xp, z64)
        return (dh * (gate + xp.where(density == 0, 0, z64) * density)).astype(dh.dtype)

    return forward, backward, second


# By name: the code, the default of alpha (None where there is none), whether the backward takes the output, and the
# three functions, or what makes them of alpha.
_TABLE: dict[str, tuple[int, float | None, bool, Any]] = {
    "identity": (0, None, True, (lambda xp, z: z, lambda xp, dh, h: dh, _flat)),
    "relu": (0, None, True, (_relu, _relu_backward, _flat)),
    "leaky_relu": (0, 0.01, False, _leaky_relu),
    "sigmoid": (1, None, True, (_sigmoid, lambda xp, dh, h: dh * (h * (1 - h)), _sigmoid_second)),
    "tanh": (2, None, True, (lambda xp, z: xp.tanh(z, out=z), lambda xp, dh, h: dh * (1 - h * h), _tanh_second)),
    "gelu": (6, None, False, _gated(_gelu_gate, _gelu_second)),
    "gelu_tanh": (5, None, False, _gated(_gelu_tanh_gate, _gelu_tanh_second)),
    "silu": (4, None, False, _gated(_silu_gate, _silu_second)),
    "elu": (3, 1.0, False, _elu),
}
ACTIVATIONS = tuple(_TABLE)


@lru_cache(maxsize=256)
def _made(name: str, alpha: float | None) -> Activation:
    code, default, from_output, functions = _TABLE[name]
    if default is None:
        if alpha is not None:
            takers = " and ".join(known for known, row in _TABLE.items() if row[1] is not None)
            raise ValueError(f"alpha is an option of {takers}, not of {name}; got {alpha!r}")
        return Activation(code, float(name == "identity"), from_output, *functions)
    if alpha is None:
        alpha = default
    return Activation(code, alpha, from_output, *functions(alpha))


def activation_named(name: str, alpha: float | None = None) -> Activation:
    """Return the activation of this name.

    Parameters
    ----------
    name : str
        One of `ACTIVATIONS`: identity, relu, leaky_relu, sigmoid, tanh, gelu, gelu_tanh, silu, elu.
    alpha : float, optional
        For leaky_relu the slope below zero, by default 0.01; for elu what it tends to, negated, by default 1.

    Returns
    -------
    Activation
        Its code and alpha in the kernels and its array functions.

    Raises
    ------
    TypeError
        If `alpha` is no number.
    ValueError
        If there is no such activation, `alpha` is not finite, or the activation has none.

    Examples
    --------
    >>> activation_named("elu").alpha
    1.0
    """
    if type(name) is not str or name not in _TABLE:
        check.one_of("activation", name, _TABLE)
    return _made(name, None if alpha is None else check.number("alpha", alpha, None))
