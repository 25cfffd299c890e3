"""The training step of the question in the documents, from the files of `benchmarks.steps.bench_train_step`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.report.text import ABSENT, origin, spread, table

NORMS = {"batch": "batch norm", "none": "no norm"}
OPTIMIZERS = {"sgd": "SGD", "momentum": "momentum", "adam": "Adam"}
RATIOS = {
    "with / without": "ours: batch norm / no norm",
    "PyTorch with / without": "PyTorch: batch norm / no norm",
    "ours / PyTorch, batch norm": "batch norm: ours / PyTorch",
    "ours / NumPy expression, batch norm": "batch norm: ours / NumPy expression",
    "ours / CuPy expression, batch norm": "batch norm: ours / CuPy expression",
}


Documents = Mapping[str, Mapping[str, Any] | None]  # by place: cpu, cuda


def figures(documents: Documents) -> str:
    """Return the figures of `bench_train_step` in every place."""
    parts = []
    for place, title in (("cpu", "On a CPU"), ("cuda", "On a GPU")):
        document = documents.get(place)
        parts.append(
            f"{title}: {ABSENT}." if document is None else f"{title}, {origin(document)}\n\n{of_place(document)}"
        )
    return "\n\n".join(parts)


def of_place(document: Mapping[str, Any]) -> str:
    """Return the tables of one document: times, ratios, accuracies, targets."""
    used = [name for name in OPTIMIZERS if name in document["ratios"]]
    titles = [OPTIMIZERS[name] for name in used]
    times = {(row["maker"], row["norm"], row["optimizer"]): row["us"] for row in document["rows"]}
    makers = [*dict.fromkeys(row["maker"] for row in document["rows"])]
    rows = [
        [f"{maker}, {title}", *(spread(times[maker, norm, name]) for name in used)]
        for maker in makers
        for norm, title in NORMS.items()
    ]
    rows += [[maker, reason, *[""] * (len(used) - 1)] for maker, reason in document["absent"].items()]
    ratios = [
        [title, *(f"{document['ratios'][name][key]['median']:.2f}" for name in used)]
        for key, title in RATIOS.items()
        if key in document["ratios"][used[0]]
    ]
    protocol = document["protocol"]
    return "\n\n".join(
        [
            f"Microseconds per training step: median (p20 to p80) of {protocol['rounds']} interleaved rounds of "
            f"{protocol['steps_per_round']} steps.",
            table(["µs per step", *titles], rows),
            "Ratios of times, each the median over the rounds:",
            table(["ratio", *titles], ratios),
            *([accuracy(document["accuracy"])] if document["accuracy"] else []),
            *([table(["target", "found", ""], map(target_row, document["targets"]))] if document["targets"] else []),
        ]
    )


def accuracy(found: Mapping[str, Any]) -> str:
    """Return what the trainer's defaults reach."""
    rows = []
    for norm, title in NORMS.items():
        steps = ["never" if count is None else str(count) for count in found[norm]["steps_to_95"]]
        seeds = ", ".join(f"{value:.4f}" for value in found[norm]["seeds"])
        rows.append([title, f"{found[norm]['mean']:.4f}", seeds, ", ".join(steps)])
    return table(["digits, default options", "mean test accuracy", "by seed", "steps to 95 %, by seed"], rows)


def target_row(target: Mapping[str, Any]) -> list[str]:
    """Return the row of one target."""
    outcome = {True: "met", False: "**not met**", None: ABSENT}[target["met"]]
    return [target["target"], ABSENT if target["found"] is None else f"{target['found']:.4g}", outcome]


def answer(documents: Documents) -> str:
    """Return the measured sentence under the question."""
    sentences = []
    for place, title in (("cpu", "On a CPU"), ("cuda", "On a GPU")):
        document = documents.get(place)
        if document is None:
            sentences.append(f"{title}: {ABSENT}.")
            continue
        ratios = document["ratios"]["sgd"]
        if "with / without" not in ratios:
            sentences.append(f"{title}: {ABSENT}.")
            continue
        sentence = (
            f"{title} a step of ours with batch norm takes {ratios['with / without']['median']:.2f} times one without"
        )
        if torch := ratios.get("ours / PyTorch, batch norm"):
            sentence += f" and {torch['median']:.2f} times PyTorch's with batch norm"
        sentences.append(f"{sentence} (64-20-10, SGD; [figures](docs/benchmarks.md)).")
    return " ".join(sentences)
