"""CPU kernel of a mini-batch.

Formulas:  x_out[n] = x[r], labels_out[n] = labels[r], r = rows[n], from the end where it is negative
Arrays:    x (E, K), labels (E,), rows (N,), x_out (N, K), labels_out (N,), C order; nothing is written if a row is
           out of range
Tasks:     examples
Traffic:   N (K + 1) numbers and N rows read and written once
Numerics:  none: a copy
"""

from __future__ import annotations

import numpy as np

from bnkernels.runtime.cpu.language import kernel, part
from bnkernels.runtime.cpu.threads import share


@kernel
def _wrong(rows, examples):
    """Return the place of the first row that there is not, else -1."""
    for n in range(len(rows)):
        if not -examples <= rows[n] < examples:
            return n
    return -1


@kernel
def _take(x, labels, rows, x_out, labels_out, first, last):
    inputs = x.shape[1]
    for n in range(first, last):
        row = np.int64(rows[n])
        if row < 0:
            row += x.shape[0]
        labels_out[n] = labels[row]
        source, target = part(x, row * inputs, inputs), part(x_out, n * inputs, inputs)
        for k in range(inputs):
            target[k] = source[k]


def take(x: np.ndarray, labels: np.ndarray, rows: np.ndarray, x_out: np.ndarray, labels_out: np.ndarray) -> None:
    """Copy these rows; IndexError, and nothing is written, if there is no such row."""
    wrong = _wrong(rows, len(x))
    if wrong >= 0:
        raise IndexError(f"index {rows[wrong]} is out of bounds for axis 0 with size {len(x)}")  # NumPy's words
    share(_take, len(rows), x_out.size, x, labels, rows, x_out, labels_out)
