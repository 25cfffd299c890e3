"""What all tables of the documents are made of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

ABSENT = "not yet measured"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table; all columns but the first are figures."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))


def origin(document: Mapping[str, Any]) -> str:
    """Return the sentence that says where figures come from."""
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items() if version)
    threads = f", {document['threads']} thread" if document.get("place", "cpu") == "cpu" else ""
    return f"{document['device']}{threads}; {versions}; commit {document['commit']}, {document['date']}."


def spread(us: Mapping[str, Any], prefix: str = "") -> str:
    """Return a cell: median (p20 to p80) in microseconds, from the entries of these names behind a prefix."""
    median, p20, p80 = (us[prefix + quantile] for quantile in ("median", "p20", "p80"))
    return f"{figure(median)} ({figure(p20)} to {figure(p80)})"


def figure(value: float) -> str:
    """Return a time to three digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
