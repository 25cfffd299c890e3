"""CPU kernel of a mini-batch.

Formulas:  x_out[n] = x[r], labels_out[n] = labels[r], r = indices[s,n], from the end where it is negative, or without
           indices s N + n; scalars[j] = schedule[s,j]; s = counter[0], which is then one more
Arrays:    x (E, K), labels (E,), indices (S, N), schedule (S, J), x_out (N, K), labels_out (N,), C order; nothing is
           written if there is no such step or row
Tasks:     examples
Traffic:   N (K + 1) numbers and N rows read and written once
Numerics:  none: a copy
"""

from __future__ import annotations

import numpy as np
from numba import types
from numba.core.cgutils import raw_memcpy
from numba.extending import intrinsic
from numba.np.arrayobj import make_array

from bnkernels.ops.mini_batch.reference import no_such_step
from bnkernels.runtime.cpu.language import kernel, part
from bnkernels.runtime.cpu.threads import WORTH_SHARING, share

NO_INDICES, NO_STEP, FINE = np.empty((0, 0), np.int32), -2, -1


@intrinsic
def _copy(typing_context, source, target):
    """Copy an array into another of the same type and size."""

    def generate(context, builder, signature, arguments):
        given, out = (make_array(source)(context, builder, argument) for argument in arguments)
        raw_memcpy(builder, out.data, given.data, given.nitems, given.itemsize)
        return context.get_dummy_value()

    return types.void(source, target), generate


@kernel
def _wrong(x_out, x, schedule, counter, indices, drawn):
    """Return the place of the first row that there is not, `NO_STEP`, or `FINE`."""
    step, batch, examples = np.int64(counter[0]), len(x_out), len(x)
    if step >= len(schedule) or (drawn and step >= len(indices)) or (not drawn and (step + 1) * batch > examples):
        return NO_STEP
    if drawn:
        rows = part(indices, step * batch, batch)
        for n in range(batch):
            if not -examples <= rows[n] < examples:
                return n
    return FINE


@kernel
def _take(x_out, labels_out, scalars, x, labels, schedule, counter, indices, drawn, step, first, last):
    batch, inputs = x_out.shape
    for n in range(first, last):
        row = step * batch + n
        if drawn:
            row = np.int64(part(indices, step * batch, batch)[n])
            if row < 0:
                row += len(x)
        labels_out[n] = labels[row]
        _copy(part(x, row * inputs, inputs), part(x_out, n * inputs, inputs))
    if last == batch:
        for j in range(len(scalars)):
            scalars[j] = schedule[step, j]
        counter[0] += np.uint32(1)


@kernel
def _at_once(x_out, labels_out, scalars, x, labels, schedule, counter, indices, drawn):
    wrong, step = _wrong(x_out, x, schedule, counter, indices, drawn), np.int64(counter[0])
    if wrong == FINE:
        _take(x_out, labels_out, scalars, x, labels, schedule, counter, indices, drawn, step, 0, len(x_out))
    return wrong


def mini_batch(
    x_out: np.ndarray,
    labels_out: np.ndarray,
    scalars: np.ndarray,
    x: np.ndarray,
    labels: np.ndarray,
    schedule: np.ndarray,
    counter: np.ndarray,
    indices: np.ndarray | None,
) -> None:
    """Copy a mini-batch and a row of the schedule, and count; IndexError as the reference."""
    drawn, alone = indices is not None, x_out.size < WORTH_SHARING
    indices = indices if drawn else NO_INDICES
    if alone:
        wrong = _at_once(x_out, labels_out, scalars, x, labels, schedule, counter, indices, drawn)
    else:
        wrong = _wrong(x_out, x, schedule, counter, indices, drawn)
    if wrong == FINE and alone:
        return
    step, batch = int(counter[0]), len(x_out)
    if wrong == NO_STEP:
        raise IndexError(no_such_step(step, batch))
    if wrong != FINE:  # in NumPy's words
        raise IndexError(f"index {indices[step, wrong]} is out of bounds for axis 0 with size {len(x)}")
    share(_take, batch, x_out.size, x_out, labels_out, scalars, x, labels, schedule, counter, indices, drawn, step)
