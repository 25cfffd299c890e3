"""Base of the norms over trailing axes: their shape, and what follows from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bnkernels.nn.norm import Norm
from bnkernels.runtime import checks as check


class RowNorm(Norm):
    """Base of the norms over the last axes, of `normalized_shape`.

    Attributes
    ----------
    statistic_rows : int
        Number of the rows of the op's statistics.
    """

    statistic_rows = 3
    _in_c_order = True

    def _take_rows(
        self, names: Sequence[str], normalized_shape: int | Sequence[int], options: Mapping[str, Any]
    ) -> None:
        """Check and keep the shape; make the parameters of these names."""
        given = normalized_shape if isinstance(normalized_shape, Sequence) else (normalized_shape,)
        self.normalized_shape = tuple(check.integer("normalized_shape", length, 1) for length in given)
        if not self.normalized_shape:
            raise ValueError("normalized_shape must have at least one axis, got ()")
        self._take(names, self.normalized_shape, options)

    def _call_options(self) -> dict[str, Any]:
        return {"axes": len(self.normalized_shape), "activation": self.activation, "alpha": self.alpha}

    def _statistics_of(self, x: Any) -> tuple[int, ...]:
        return (self.statistic_rows, *x.shape[: -len(self.normalized_shape)])

    def _check(self, x: Any) -> None:
        super()._check(x)
        if x.shape[-len(self.normalized_shape) :] != self.normalized_shape:
            raise ValueError(f"x must have {self.normalized_shape} as its last axes, got the shape {x.shape}")

    def _options(self) -> list[str]:
        shape = self.normalized_shape
        options = [str(shape[0] if len(shape) == 1 else shape)]
        options += [f"eps={self.eps!r}"] if self.eps != 1e-5 else []
        options += ["affine=False"] if self.weight is None else self._without()
        return options + self._last_options()

    def _without(self) -> list[str]:
        """Return the options that say which parameter is missing beside the scale."""
        return []
