"""Display of layers: as text, and as a table in Jupyter, with the shapes of their arrays and counts of parameters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def text(owner: Any) -> str:
    """Return the constructor's call that makes such a layer, with shapes and counts in comments."""
    return "\n".join(_lines(owner))


def _lines(owner: Any) -> Iterator[str]:
    name, options = type(owner).__name__, owner._options()
    children = owner.parts_shown
    if not children:
        about = _about(owner)
        yield f"{name}({', '.join(options)})" + (f"  # {about}: {_count(owner)}" if about else "")
        return
    yield f"{name}(  # {_count(owner)}"
    for child in children.values():
        for line in _lines(child):
            call, mark, comment = line.partition("  # ")
            closes = not line.startswith(" ") and call.endswith(")")
            yield f"    {call}{',' if closes else ''}{mark}{comment}"
    yield from (f"    {option}," for option in options)
    yield ")"


def html(owner: Any) -> str:
    """Return a table of the layers, their arrays and their numbers of parameters."""
    from html import escape  # only Jupyter asks, and it is slow to load

    rows = [
        (name, f"{type(one).__name__}({', '.join(one._options())})", _about(one), f"{one.parameter_count:,}")
        for name, one in _leaves(owner, "")
    ]
    head = "".join(f"<th>{column}</th>" for column in ("name", "layer", "arrays", "parameters"))
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    total = f"<tr><td></td><th>{escape(type(owner).__name__)}</th><td></td><th>{owner.parameter_count:,}</th></tr>"
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}{total}</tbody></table>"


def _leaves(owner: Any, name: str) -> Iterator[tuple[str, Any]]:
    if not owner.parts_shown:
        yield name, owner
    for child_name, child in owner.parts_shown.items():
        yield from _leaves(child, f"{name}.{child_name}" if name else child_name)


def _about(owner: Any) -> str:
    """Return names and shapes of the arrays."""
    return ", ".join(f"{name} {array.shape}" for name, array in (owner.parameters | owner.buffers).items())


def _count(owner: Any) -> str:
    return f"{owner.parameter_count:,} parameters"
