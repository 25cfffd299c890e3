"""Activations of the CPU kernels: of a line of numbers in place, by code and alpha as in ``activation.cuh``.

One loop an activation, without branches inside, so that it vectorises. The array forms in ``activations.py`` are the
reference; here everything is computed in the type of the line.
"""

import math

from bnkernels.runtime.cpu.language import cast, device, inner
from bnkernels.runtime.cpu.mathematics import (
    exp,
    expm1,
    keep_where,
    maximum,
    normal,
    select,
    sigmoid,
    tanh,
)

LINEAR, SIGMOID, TANH, ELU, SILU, GELU_TANH, GELU = range(7)
_A = 2 * math.sqrt(2 / math.pi)  # gelu_tanh(z) = z sigmoid(z (a + b z^2))
_B = 0.044715 * _A

# Gates: h = z gate(z), with the derivative of the gate, its density. At infinity that is 0, and beats infinite z.


@device
def _where_dense(density, value):
    zero = cast(0.0, density)
    return select(density == zero, zero, value)


@device
def _gelu_tanh_gate(z):
    """Return the gate, its density, and the derivative of what the gate's sigmoid is of."""
    square = z * z
    gate, fall = sigmoid(z * (cast(_B, z) * square + cast(_A, z)))
    slope = cast(3 * _B, z) * square + cast(_A, z)
    return gate, _where_dense(fall, fall * slope), slope


@device
def _times_gate(z, gate):
    zero = cast(0.0, z)
    return select(gate == zero, zero, z) * gate


@device
def _gate_derivative(z, gate, density):
    zero = cast(0.0, z)
    return gate + select(density == zero, zero, z) * density


@device
def _elu(z, alpha):
    zero = cast(0.0, z)
    return maximum(z, zero) + alpha * expm1(select(z <= zero, z, zero))


@device
def _elu_slope(z, alpha):
    return select(z <= cast(0.0, z), alpha * exp(z), cast(1.0, z))


@device
def _silu_second(z):
    gate, density = sigmoid(z)
    return _where_dense(density, density * (cast(2.0, z) + z * (cast(1.0, z) - (gate + gate))))


@device
def _gelu_tanh_second(z):
    gate, density, slope = _gelu_tanh_gate(z)
    bend = (cast(1.0, z) - (gate + gate)) * slope + cast(6 * _B, z) * z / slope  # gate'' / gate'
    return _where_dense(density, density * (cast(2.0, z) + z * bend))


@device
def _gelu_second(z):
    _, density = normal(z)
    return _where_dense(density, density * (cast(2.0, z) - z * z))


@device
def _leaky_slope(z, alpha):
    return select(z <= cast(0.0, z), alpha, cast(1.0, z))


@inner
def activate(code, alpha, z):
    """Write phi(z) over z."""
    zero, one, slope = z.dtype.type(0), z.dtype.type(1), z.dtype.type(alpha)
    if code == LINEAR:
        if slope == zero:
            for i in range(len(z)):
                z[i] = maximum(z[i], zero)
        elif slope != one:
            for i in range(len(z)):
                z[i] *= _leaky_slope(z[i], slope)
    elif code == SIGMOID:
        for i in range(len(z)):
            z[i] = sigmoid(z[i])[0]
    elif code == TANH:
        for i in range(len(z)):
            z[i] = tanh(z[i])
    elif code == ELU:
        for i in range(len(z)):
            z[i] = _elu(z[i], slope)
    elif code == SILU:
        for i in range(len(z)):
            z[i] = _times_gate(z[i], sigmoid(z[i])[0])
    elif code == GELU_TANH:
        for i in range(len(z)):
            z[i] = _times_gate(z[i], _gelu_tanh_gate(z[i])[0])
    elif code == GELU:
        for i in range(len(z)):
            z[i] = _times_gate(z[i], normal(z[i])[0])


@inner
def differentiate(code, alpha, z, g):
    """Multiply g by phi'(z)."""
    zero, one, slope = z.dtype.type(0), z.dtype.type(1), z.dtype.type(alpha)
    if code == LINEAR:
        if slope == zero:
            for i in range(len(z)):
                g[i] = keep_where(not (z[i] <= zero), g[i])
        elif slope != one:
            for i in range(len(z)):
                g[i] *= _leaky_slope(z[i], slope)
    elif code == SIGMOID:
        for i in range(len(z)):
            g[i] *= sigmoid(z[i])[1]
    elif code == TANH:
        for i in range(len(z)):
            h = tanh(z[i])
            g[i] *= one - h * h
    elif code == ELU:
        for i in range(len(z)):
            g[i] *= _elu_slope(z[i], slope)
    elif code == SILU:
        for i in range(len(z)):
            gate, density = sigmoid(z[i])
            g[i] *= _gate_derivative(z[i], gate, density)
    elif code == GELU_TANH:
        for i in range(len(z)):
            gate, density, _ = _gelu_tanh_gate(z[i])
            g[i] *= _gate_derivative(z[i], gate, density)
    elif code == GELU:
        for i in range(len(z)):
            gate, density = normal(z[i])
            g[i] *= _gate_derivative(z[i], gate, density)


@inner
def second(code, alpha, z, out):
    """Write phi''(z) to out, which may be z; 0 at the kinks of piecewise linear activations."""
    zero, one, slope = z.dtype.type(0), z.dtype.type(1), z.dtype.type(alpha)
    if code == LINEAR:
        for i in range(len(z)):
            out[i] = select(z[i] == z[i], zero, z[i])
    elif code == SIGMOID:
        for i in range(len(z)):
            gate, density = sigmoid(z[i])
            out[i] = density * (one - (gate + gate))
    elif code == TANH:
        for i in range(len(z)):
            h = tanh(z[i])
            out[i] = -(h + h) * (one - h * h)
    elif code == ELU:
        for i in range(len(z)):
            out[i] = select(z[i] > zero, zero, slope * exp(z[i]))
    elif code == SILU:
        for i in range(len(z)):
            out[i] = _silu_second(z[i])
    elif code == GELU_TANH:
        for i in range(len(z)):
            out[i] = _gelu_tanh_second(z[i])
    elif code == GELU:
        for i in range(len(z)):
            out[i] = _gelu_second(z[i])
