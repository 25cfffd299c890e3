"""Bias and activation of arrays of any shape, forward and backward, on the CPU in one pass."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from bnkernels.ops.activations import Activation
from bnkernels.ops.linear_batch_norm.op import on_cpu
from bnkernels.runtime.registry import runtime_of
from bnkernels.runtime.seam import Runtime


def activate(z: Any, bias: Any, phi: Activation) -> tuple[Any, Any]:
    """Return ``phi(z + bias)`` for the last axis, and what the backward takes; `z`, C-ordered, may be written over."""
    runtime = runtime_of(type(z))
    if runtime is None:
        h = np.empty_like(z)
        rows = (z, h) if z.ndim == 2 else (_matrix(z), _matrix(h))
        on_cpu().forward(rows[0], bias, phi, rows[1])
        return h, z
    if bias is not None:
        z += bias
    wide = z.astype(np.float32) if z.dtype.itemsize == 2 else z
    h = _on(runtime, phi.forward(runtime.xp, wide), z)
    return h.astype(z.dtype, copy=False), h if phi.from_output else wide


def activate_backward(dh: Any, saved: Any, bias: Any, phi: Activation, dbias: Any, in_place: bool) -> Any:
    """Write the gradient of the bias; return that of `z`, in the place of `dh` if that is allowed and helps."""
    runtime = runtime_of(type(dh))
    if runtime is None:
        dh = dh if in_place or dh.flags.c_contiguous else dh.copy()
        dz = dh if in_place else np.empty_like(dh)
        rows = (dh, saved, dz) if dh.ndim == 2 else map(_matrix, (dh, saved, dz))
        given, of_forward, result = rows
        on_cpu().backward(given, of_forward, bias, phi, result, dbias)
        return dz
    dz = _on(runtime, phi.backward(runtime.xp, dh.astype(saved.dtype, copy=False), saved), dh)
    if dbias is not None:
        _matrix(dz).sum(axis=0, out=dbias)
    dz = dz.astype(dh.dtype, copy=False)
    return dz.copy() if dz is dh and not in_place else dz


def _on(runtime: Runtime, array: Any, like: Any) -> Any:
    """Return an array of the runtime's type: `numpy.where` forgets the emulator's."""
    return array if type(array) is type(like) else runtime.on_device(array, like)


def _matrix(array: Any) -> Any:
    """Return a C-ordered array as one of two dimensions."""
    shape = array.shape or (1,)
    return array.reshape(math.prod(shape[:-1]), shape[-1])
