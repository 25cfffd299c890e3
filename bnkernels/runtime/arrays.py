"""Types of arrays in the signatures of the ops: NumPy arrays in give NumPy arrays out, CuPy arrays CuPy arrays."""

from __future__ import annotations

from typing import Any, Protocol, TypeVar


class AnyArray(Protocol):
    """A NumPy or a CuPy array."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Lengths of the axes."""

    @property
    def dtype(self) -> Any:
        """Data type."""


Array = TypeVar("Array", bound=AnyArray)
