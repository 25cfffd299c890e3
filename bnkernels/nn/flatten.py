"""Flattening of images and sequences to rows, as a layer."""

from __future__ import annotations

import math
from typing import Any

from bnkernels.nn.layer import Leaf


class Flatten(Leaf):
    """Flattening to (N, features), in front of a `Linear`.

    Output and gradient are views of C-ordered arrays, and else copies.

    Examples
    --------
    >>> import numpy as np
    >>> layer = Flatten()
    >>> y = layer(np.zeros((2, 3, 4, 4)))
    >>> y.shape, layer.backward(y).shape
    ((2, 48), (2, 3, 4, 4))
    """

    def _check(self, x: Any) -> None:
        if not x.shape:
            raise ValueError("x must have a batch in its first axis, got the shape ()")

    def _forward(self, x: Any, training: bool, keep: bool) -> Any:
        if keep:
            self._saved = (x,)
        return x.reshape(len(x), math.prod(x.shape[1:]))

    def _backward(self, dy: Any, in_place: bool) -> Any:
        return dy.reshape(self._saved[0].shape)

    def _output(self) -> tuple[Any, tuple[int, ...]]:
        x = self._saved[0]
        return x.dtype, (len(x), math.prod(x.shape[1:]))
