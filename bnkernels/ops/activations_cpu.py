"""Activations of the CPU kernels: in place on a line of numbers, by code and alpha as in ``activation.cuh``."""

import numpy as np

from bnkernels.runtime.cpu.language import kernel


@kernel
def activate(code, alpha, z):
    """Write phi(z) over z."""
    zero, one = z.dtype.type(0), z.dtype.type(1)
    if code == 0:
        if alpha == one:
            return
        if alpha == zero:
            for i in range(len(z)):
                z[i] = zero if z[i] <= zero else z[i]
        else:
            for i in range(len(z)):
                z[i] = alpha * z[i] if z[i] <= zero else z[i]
    elif code == 1:
        for i in range(len(z)):
            z[i] = one / (one + np.exp(-z[i]))
    elif code == 2:
        for i in range(len(z)):
            z[i] = np.tanh(z[i])


@kernel
def differentiate(code, alpha, z, g):
    """Multiply g by phi'(z)."""
    zero, one = z.dtype.type(0), z.dtype.type(1)
    if code == 0:
        if alpha == one:
            return
        for i in range(len(z)):
            below = zero if alpha == zero else alpha * g[i]
            g[i] = below if z[i] <= zero else g[i]
    elif code == 1:
        for i in range(len(z)):
            h = one / (one + np.exp(-z[i]))
            g[i] *= h * (one - h)
    elif code == 2:
        for i in range(len(z)):
            h = np.tanh(z[i])
            g[i] *= one - h * h
