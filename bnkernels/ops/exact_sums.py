"""Sums of the NumPy references: of float64 numbers, to about twice their digits, and means that do not overflow."""

from __future__ import annotations

import numpy as np

SMALL = 2.0**-64  # unit in which no sum overflows that fits into a memory


def total(a: np.ndarray, axis: int) -> np.ndarray:
    """Return the float64 sum over an axis, which stays with length 1.

    Halves are added, with what each addition loses (Knuth, The Art of Computer Programming 2, 4.2.2, theorem B): the
    order is the same for all columns.
    """
    rows, rest = np.moveaxis(a, axis, 0), 0.0
    while len(rows) > 1:
        half = len(rows) // 2
        first, second = rows[:half], rows[half : 2 * half]
        both = first + second
        back = both - first
        rest = rest + ((first - (both - back)) + (second - back)).sum(0, keepdims=True)
        rows = np.concatenate((both, rows[2 * half :]))
    return np.moveaxis(np.where(np.isfinite(rows), rows + rest, rows), 0, axis)


def mean(a: np.ndarray, axis: int, count: np.ndarray | float, known: np.ndarray | None = None) -> np.ndarray:
    """Return ``total(a, axis) / count``, finite where the numbers are, of at most `count`; `known` is that total."""
    found = (total(a, axis) if known is None else known) / count
    if np.isfinite(found).all():
        return found
    return np.where(np.isfinite(found), found, total(a * SMALL, axis) / count / SMALL)
