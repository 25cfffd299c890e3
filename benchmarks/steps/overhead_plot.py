"""The pictures of the overhead figure, drawn from ``overhead.csv`` and nothing else."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bnkernels.train.checkpoint import write_atomically
from bnkernels.train.plots import require_matplotlib

# Relative times over units, read off the plot to +-0.1: five fully connected layers, batch 128, GTX 1070, TensorFlow
# around 1.0. Source: github.com/MycChiu/fast-LayerNorm-TF, images/benchmark_ratio_nb_unit.png.
PUBLISHED = {
    "batch": {32: 3.1, 64: 3.25, 128: 2.9, 256: 1.8, 512: 1.6, 1024: 1.3},
    "layer": {32: 2.9, 64: 2.6, 128: 2.5, 256: 3.0, 512: 2.2, 1024: 1.5},
}
PUBLISHED_NOTE = "grey: published elsewhere, not measured here (TensorFlow 1.0, GTX 1070; read off a plot, ±0.1)"

OURS = "bnkernels fused"
# Okabe and Ito's colours, distinct in every kind of colour vision; ours is the black one and the thickest.
COLOURS = {
    "bnkernels fused": "#000000",
    "bnkernels": "#009E73",
    "NumPy expression": "#E69F00",
    "CuPy expression": "#E69F00",
    "PyTorch": "#D55E00",
    "PyTorch, fused optimiser": "#8C564B",
    "PyTorch, compiled": "#CC79A7",
    "PyTorch, CUDA graph": "#7F3C8D",
    "JAX jit": "#0072B2",
    "JAX scan": "#56B4E9",
}
NORMS = {"batch": ("batch norm", "-", "o"), "layer": ("layer norm", "--", "s")}  # title, line, marker
AXES = {
    "units": ("units of each layer", "batch size 128"),
    "batch": ("batch size", "128 units per layer"),
}
PLACES = {"cpu": "CPU, one thread", "cuda": "GPU"}

Row = dict[str, str]


def plot(folder: Path) -> list[Path]:
    """Draw the pictures of a run beside its CSV.

    Parameters
    ----------
    folder : Path
        With ``overhead.csv``.

    Returns
    -------
    list of Path
        ``overhead_units.png`` and ``overhead_batch.png``, as far as the axis has a measured ratio.

    Raises
    ------
    ImportError
        If Matplotlib is not installed.
    FileNotFoundError
        If there is no CSV.
    """
    require_matplotlib()
    with (folder / "overhead.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    written = []
    for axis in AXES:
        mine = [row for row in rows if row["axis"] == axis]
        if any(row["ratio_median"] for row in mine):
            path = folder / f"overhead_{axis}.png"
            write_atomically(path, draw(axis, mine))
            written.append(path)
    return written


def draw(axis: str, rows: Sequence[Row]) -> bytes:
    """Draw one axis: a panel per norm, a line per framework with a band from p20 to p80.

    Parameters
    ----------
    axis : {'units', 'batch'}
        Quantity of the horizontal axis.
    rows : sequence of mappings
        Rows of the CSV, at least one with a ratio.

    Returns
    -------
    bytes
        A PNG image of 1600 x 800 pixels.
    """
    from matplotlib.figure import Figure  # no pyplot: no global state, no window, no backend to choose

    figure = Figure(figsize=(8, 4), dpi=200, layout="constrained", facecolor="white")
    label, held = AXES[axis]
    figure.suptitle(
        f"Time of a training step relative to no normalisation: 5 fully connected layers, {held}, Adam, float32\n"
        f"{rows[0]['device']} ({PLACES[rows[0]['place']]})",
        fontsize=10,
    )
    panels = figure.subplots(1, 2, sharey=True)
    values = sorted({int(row["value"]) for row in rows if row["ratio_median"]})
    for axes, norm in zip(panels, NORMS, strict=True):
        _panel(axes, [row for row in rows if row["norm"] == norm], norm, PUBLISHED if axis == "units" else {})
        axes.set_xscale("log", base=2)
        axes.set_xticks(values, [str(value) for value in values], fontsize=9)
        axes.minorticks_off()
        axes.set_xlabel(label)
    panels[0].set_ylabel("time with / time without")
    bottom, top = panels[0].get_ylim()
    panels[0].set_ylim(min(0.8, bottom), top + 0.1 * (top - bottom))  # room for the names of those missing
    lines = [line for axes in reversed(panels) for line in axes.get_lines() if not line.get_label().startswith("_")]
    by_name = {line.get_label(): line for line in lines}  # the last one wins: that of batch norm, where there is one
    names = sorted(by_name, key=lambda name: [*COLOURS, name].index(name))
    handles = [by_name[name] for name in names]
    place = {"loc": "outside lower center", "ncols": min(4, len(names)), "fontsize": 8, "frameon": False}
    note = PUBLISHED_NOTE if axis == "units" else None
    figure.legend(handles, names, title=note, title_fontsize=8, **place).get_title().set_color("#777777")
    image = io.BytesIO()
    figure.savefig(image, format="png", metadata={"Software": None})  # the same rows, the same bytes
    return image.getvalue()


def _panel(axes: Any, rows: Sequence[Row], norm: str, published: dict[str, dict[int, float]]) -> None:
    """Draw one norm, with the names of those that cannot do it."""
    title, line, marker = NORMS[norm]
    axes.set_title(title, fontsize=10)
    axes.axhline(1, color="#555555", linewidth=1, linestyle=":")
    below = {"xytext": (3, -3), "textcoords": "offset points", "va": "top", "fontsize": 8, "color": "#555555"}
    axes.annotate("no normalisation", (0, 1), xycoords=("axes fraction", "data"), **below)
    if norm in published:
        points = published[norm]
        axes.plot(points.keys(), points.values(), color="#B0B0B0", linewidth=1, marker=".")
    measured = [row for row in rows if row["ratio_median"]]
    missing = [row["framework"] for row in rows if row["status"] == "not supported yet"]
    for name in dict.fromkeys(row["framework"] for row in measured):
        mine = sorted((row for row in measured if row["framework"] == name), key=lambda row: int(row["value"]))
        x = [int(row["value"]) for row in mine]
        median, low, high = ([float(row[f"ratio_{q}"]) for row in mine] for q in ("median", "p20", "p80"))
        colour, width = COLOURS.get(name, "#999999"), 2 if name == OURS else 1.3
        axes.fill_between(x, low, high, color=colour, alpha=0.13, linewidth=0)
        axes.plot(x, median, color=colour, linestyle=line, linewidth=width, marker=marker, markersize=4, label=name)
    axes.grid(alpha=0.25)
    words = [f"{', '.join(dict.fromkeys(missing))}: not supported yet"] if missing else []
    words += [] if measured else ["not measured"]
    axes.text(0.98, 0.97, "\n".join(words), transform=axes.transAxes, ha="right", va="top", fontsize=8, color="#555555")
