"""Time of a layer against the number of threads, cut by example and by neuron, from the file of that benchmark."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.harness.timing import results_folder
from benchmarks.report.text import ABSENT, figure, origin, paragraphs, table


def page(document: Mapping[str, Any] | None, folder: str) -> str:
    """Return picture and times; `folder` leads from the page to the results."""
    if document is None:
        return f"Time against the number of threads: {ABSENT}."
    rows, cores = document["rows"], document["cores"]
    counts = sorted({row["threads"] for row in rows})
    times = {(row["shape"], row["partition"], row["threads"]): row["us"]["median"] for row in rows}
    cases = dict.fromkeys((row["shape"], row["partition"]) for row in rows)
    lines = [
        [f"{shape.replace('x', ' x ')}, {way}", *(figure(times[shape, way, count]) for count in counts)]
        for shape, way in cases
    ]
    return paragraphs(
        f"![time of a layer against the number of threads]({folder}/{results_folder(document).name}/partition.png)",
        table(["µs per layer, threads:", *map(str, counts)], lines),
        f"{origin(document)} With more than {cores} threads some wait for a core.",
    )
