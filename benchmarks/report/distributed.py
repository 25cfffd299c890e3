"""Ranks: synchronised batch norm beside PyTorch's collectives, and the model of many ranks."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import Any

from benchmarks.distributed import model
from benchmarks.distributed.rank import OURS, PYTORCH
from benchmarks.harness.timing import results_folder
from benchmarks.report.text import ABSENT, figure, origin, paragraphs, spread, table

SHOWN = (2, 8, 64, 1024, 10000)


def page(document: Mapping[str, Any] | None, folder: str) -> str:
    """Return tables and picture; `folder` leads from the page to the results."""
    if document is None:
        return f"Ranks: {ABSENT}."
    cores = document["cores"]
    load = f" The machine is shared: its load was {document['load']:g} at the start."
    return paragraphs(
        "## A layer, forward and backward",
        layers(document),
        f"{origin(document)} The sizes are of the mini-batch of all ranks. More than {cores} ranks share the {cores} "
        f"cores, so that some wait for a core.{load} `torch.nn.SyncBatchNorm` refuses CPU tensors; the composite makes "
        "its collectives with PyTorch's ops, without autograd. Bytes are those that a rank brings to the forward and "
        "the backward.",
        "## A model of many ranks",
        f"![predicted time of a step]({folder}/{results_folder(document).name}/distributed.svg)",
        scale(document),
        "How far the model is from what was measured:",
        validation(document),
        f"Fitted: {figure(model.fit(document).a)} µs a round of messages, "
        f"{1e-3 / model.fit(document).b:.3g} GB/s. What it assumes: `benchmarks/distributed/model.py`.",
    )


def layers(document: Mapping[str, Any]) -> str:
    """Return the times of the layers."""
    rows = {(row["ranks"], row["shape"], row["provider"]): row for row in document["layers"]}
    lines = []
    for ranks, shape in dict.fromkeys(key[:2] for key in rows):
        ours, theirs = rows[ranks, shape, OURS], rows.get((ranks, shape, PYTORCH))
        ratio = "" if theirs is None else f"{ours['us']['median'] / theirs['us']['median']:.2f}"
        sent = [exchanged(row) if row else ABSENT for row in (ours, theirs)]
        times = [spread(row["us"]) if row else ABSENT for row in (ours, theirs)]
        lines.append([f"{ranks}, {shape.replace('x', ' x ')}", sent[0], sent[1], *times, ratio])
    head = ["ranks, mini-batch", "collectives, bytes", "theirs", "µs", "PyTorch's ops over gloo", "ours / theirs"]
    return table(head, lines)


def exchanged(row: Mapping[str, Any]) -> str:
    """Return number and bytes of the collectives of a layer and step."""
    return f"{row['collectives']}, {' + '.join(map(str, row['bytes']))}"


def scale(document: Mapping[str, Any]) -> str:
    """Return what the model predicts, and up to how many ranks synchronising costs little."""
    machine, parts = model.fit(document), []
    for name, network in model.networks(document).items():
        lines = []
        for way in model.WAYS:
            times = [model.predict(machine, network, way, ranks) / network.work for ranks in SHOWN]
            last = "" if way == "ghost batches" else f"{model.breaking(machine, network, way):,}"
            lines.append([way, *(f"{time:.3g}" for time in times), last])
        head = [
            f"{name}: step / work, **predicted**",
            *(f"{ranks:,} ranks" for ranks in SHOWN),
            "at most 1.1 of ghost",
        ]
        parts.append(table(head, lines))
    return paragraphs(*parts)


def validation(document: Mapping[str, Any]) -> str:
    """Return predicted and measured steps."""
    rows = model.validation(document)
    lines = []
    for row in rows:
        where, ratio = f"{row['network']}, {row['ranks']} ranks, {row['way']}", row["predicted"] / row["measured"]
        lines.append([where, figure(row["measured"]), figure(row["predicted"]), f"{ratio:.2f}"])
    off = median(abs(row["predicted"] / row["measured"] - 1) for row in rows)
    return paragraphs(
        table(["", "µs measured", "predicted", "predicted / measured"], lines),
        f"Half of the predictions are within {off:.0%}.",
    )
