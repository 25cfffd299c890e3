"""Statistics of a norm by name: a view of the array that its forward returns."""

from __future__ import annotations

from typing import Any

import numpy as np

from bnkernels.runtime import checks as check
from bnkernels.runtime.registry import runtime_of

RSTD = 2  # row of statistics that have a mean


class Statistics:
    """Mean, variance and reciprocal deviation, named, of the `statistics` that the forward of a norm returns.

    Parameters
    ----------
    array : array, shape (3, ...) or (5, ...), or of groups (T, 3, C), or without a mean (1, ...)
        Statistics of `batch_norm_forward`, `layer_norm_forward`, `linear_batch_norm_forward` or `rms_norm_forward`.
    eps : float
        Number that was added to the variance.
    grouped : bool
        Whether they are of groups, whose number comes first in the shape.

    Attributes
    ----------
    array : array
        All rows; what a backward takes.

    Examples
    --------
    >>> from bnkernels import batch_norm_forward
    >>> y, statistics = batch_norm_forward(np.array([[1.0], [5.0]]), eps=0.25)
    >>> Statistics(statistics, eps=0.25).var
    array([4.])
    """

    def __init__(self, array: Any, eps: float = 1e-5, *, grouped: bool = False) -> None:
        first = int(check.boolean("grouped", grouped))
        if array.ndim <= first or array.shape[first] not in (1, 3, 5):
            raise ValueError(f"array must have 3 or 5 rows, the mean first, or 1 of rstd, got the shape {array.shape}")
        self.array, self.eps, self._first = array, check.epsilon(eps, array), first

    def _row(self, number: int) -> Any:
        if self.array.shape[self._first] == 1:
            return None if number < RSTD else self.array[0]
        return self.array[:, number] if self._first else self.array[number]

    @property
    def mean(self) -> Any:
        """Mean, a view; None if it was not subtracted, as in RMS norm, whose `var` is the mean square."""
        return self._row(0)

    @property
    def mean_low(self) -> Any:
        """Rest of the mean, a view: ``mean + mean_low`` is the mean to about twice the precision of `mean`."""
        return self._row(1)

    @property
    def rstd(self) -> Any:
        """Reciprocal standard deviation, a view: ``1 / sqrt(var + eps)``."""
        return self._row(RSTD)

    @property
    def var(self) -> Any:
        """Biased variance, computed from `rstd`: a variance far below `eps` is lost in it."""
        runtime = runtime_of(type(self.array))
        xp = np if runtime is None else runtime.xp
        with np.errstate(divide="ignore"):
            return xp.maximum(1 / (self.rstd * self.rstd) - self.array.dtype.type(self.eps), 0)

    def __iter__(self) -> Any:
        yield from (self.mean, self.var, self.rstd)

    def __repr__(self) -> str:
        return f"Statistics(mean={self.mean}, var={self.var}, rstd={self.rstd})"
