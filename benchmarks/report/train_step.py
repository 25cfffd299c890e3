"""Training steps, from the files of the training-step benchmark."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.report.text import Documents, by_place, missing, paragraphs, spread, table

NORMS = {"batch": "batch norm", "none": "no norm"}
OPTIMIZERS = {"sgd": "SGD", "momentum": "momentum", "adam": "Adam"}
RATIOS = {
    "with / without": "ours, the faster engine: batch norm / no norm",
    "layers, with / without": "ours, layer by layer: batch norm / no norm",
    "PyTorch with / without": "PyTorch: batch norm / no norm",
    "ours / PyTorch, batch norm": "batch norm: ours / PyTorch",
    "ours / PyTorch, no norm": "no norm: ours / PyTorch",
    "ours / NumPy expression, batch norm": "batch norm: ours / NumPy expression",
    "ours / CuPy expression, batch norm": "batch norm: ours / CuPy expression",
}


def figures(documents: Documents) -> str:
    """Return times, ratios and accuracies in every place."""
    return by_place(documents, of_place)


def of_place(document: Mapping[str, Any]) -> str:
    """Return the tables of one document: times and ratios of every network, accuracies."""
    networks = dict.fromkeys(row["network"] for row in document["ratios"])
    return paragraphs(
        "Microseconds per training step: median (p20 to p80) of interleaved rounds of "
        f"{document['protocol']['steps_per_round']} steps; ratios of times, each the median over the rounds.",
        *(of_network(document, network) for network in networks),
        missing(document["absent"]),
        accuracy(document["accuracy"]) if document["accuracy"] else "",
    )


def of_network(document: Mapping[str, Any], network: str) -> str:
    """Return times and ratios of a network."""
    cases = {row["optimizer"]: row for row in document["ratios"] if row["network"] == network}
    used = [name for name in OPTIMIZERS if name in cases]
    titles = [OPTIMIZERS[name] for name in used]
    mine = [row for row in document["rows"] if row["network"] == network]
    times = {(row["maker"], row["norm"], row["optimizer"]): row["us"] for row in mine}
    rows = [
        [f"{maker}, {title}", *(spread(times[maker, norm, name]) for name in used)]
        for maker in dict.fromkeys(row["maker"] for row in mine)
        for norm, title in NORMS.items()
    ]
    first = cases[used[0]]
    ratios = [
        [title, *(f"{cases[name]['ratios'][key]['median']:.3g}" for name in used)]
        for key, title in RATIOS.items()
        if key in first["ratios"]
    ]
    heading = f"## {network}, mini-batches of {first['batch']}"
    return paragraphs(heading, table(["µs per step", *titles], rows), table(["ratio", *titles], ratios))


def accuracy(found: Mapping[str, Any]) -> str:
    """Return what the trainer's defaults reach."""
    rows = []
    for norm, title in NORMS.items():
        steps = ["never" if count is None else str(count) for count in found[norm]["steps_to_95"]]
        seeds = ", ".join(f"{value:.4f}" for value in found[norm]["seeds"])
        rows.append([title, f"{found[norm]['mean']:.4f}", seeds, ", ".join(steps)])
    return table(["digits, default options", "mean test accuracy", "by seed", "steps to 95 %, by seed"], rows)
