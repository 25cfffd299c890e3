"""Base of the norms over trailing axes: their shape, the arrays that they write, and the checks of what comes in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from bnkernels.nn.norm import Norm
from bnkernels.nn.options import activation_options
from bnkernels.ops.activations import activation_named
from bnkernels.runtime import checks as check
from bnkernels.runtime.arguments import accumulator, empty
from bnkernels.runtime.registry import runtime_of


class RowNorm(Norm):
    """Base of the norms over the last axes, of `normalized_shape`.

    Attributes
    ----------
    statistic_rows : int
        Number of the rows of the op's statistics.
    """

    statistic_rows = 3

    def _take_shape(self, normalized_shape: int | Sequence[int], activation: str, alpha: float | None) -> None:
        """Check and keep the shape and the activation."""
        given = normalized_shape if isinstance(normalized_shape, Sequence) else (normalized_shape,)
        self.normalized_shape = tuple(check.integer("normalized_shape", length, 1) for length in given)
        if not self.normalized_shape:
            raise ValueError("normalized_shape must have at least one axis, got ()")
        self.activation, self.alpha = activation, alpha
        activation_named(activation, alpha)

    def _call_options(self) -> dict[str, Any]:
        return {"axes": len(self.normalized_shape), "activation": self.activation, "alpha": self.alpha}

    def _new_outputs(self, x: Any) -> tuple[Any, Any]:
        """Return new arrays: with ``out=`` calls are replayed, for freed memory comes back at the same addresses."""
        runtime, dtype = runtime_of(type(x)), accumulator(x.dtype)
        shape = (self.statistic_rows, *x.shape[: -len(self.normalized_shape)])
        if runtime is None:
            return np.empty(x.shape, x.dtype), np.empty(shape, dtype)
        return empty(runtime, x.shape, x), empty(runtime, shape, x, dtype)

    def _check(self, x: Any) -> None:
        super()._check(x)
        if x.shape[-len(self.normalized_shape) :] != self.normalized_shape:
            raise ValueError(f"x must have {self.normalized_shape} as its last axes, got the shape {x.shape}")

    def _taken(self, x: Any) -> Any:
        x = super()._taken(x)
        check.contiguous(check.Argument("x", *check.signature(x)), x.shape, x.dtype)
        return x

    def _taken_dy(self, dy: Any) -> Any:
        dy = super()._taken_dy(dy)
        check.contiguous(check.Argument("dy", *check.signature(dy)), dy.shape, dy.dtype)
        return dy

    def _options(self) -> list[str]:
        shape = self.normalized_shape
        options = [str(shape[0] if len(shape) == 1 else shape)]
        options += [f"eps={self.eps!r}"] if self.eps != 1e-5 else []
        options += ["affine=False"] if self.weight is None else self._without()
        dtypes = [f"dtype='{array.dtype}'" for array in [self.weight] if array is not None]
        return options + activation_options(self) + dtypes

    def _without(self) -> list[str]:
        """Return the options that say which parameter is missing beside the scale."""
        return []
