"""Flat arrays: many arrays as views of one, so that one launch updates all of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

ALIGNMENT = 64  # bytes at whose multiples every view starts, enough for the vector loads of any library


def flat_views(
    shapes: Mapping[str, tuple[int, ...]], dtype: Any, xp: Any
) -> tuple[dict[str, int], Any, dict[str, Any]]:
    """Return the start of each of these arrays in a flat array of zeros, the flat array, and the views in it."""
    step = ALIGNMENT // np.dtype(dtype).itemsize
    starts, size = {}, 0
    for name, shape in shapes.items():
        starts[name] = size
        size += -(-math.prod(shape) // step) * step  # padding is zero, and its gradient too
    flat = xp.zeros(size, dtype)
    views = {
        name: flat[starts[name] : starts[name] + math.prod(shape)].reshape(shape) for name, shape in shapes.items()
    }
    return starts, flat, views
