"""Options that several layers have: their checks, and their text."""

from __future__ import annotations

from typing import Any


def check_type(layer: Any, x: Any, *names: str) -> None:
    """Check that an input has one of the data types that a layer takes."""
    if str(x.dtype) not in names:
        raise TypeError(
            f"x must be {' or '.join(names)} for this {type(layer).__name__}, got {x.dtype}; convert it with "
            f"x.astype('{names[0]}'), or the layer with .astype('{x.dtype}')"
        )


def activation_options(layer: Any) -> list[str]:
    """Return the options of an activation, as text."""
    options = [] if layer.activation == "identity" else [f"activation={layer.activation!r}"]
    return options if layer.alpha is None else [*options, f"alpha={layer.alpha!r}"]
