"""Pictures: of a run, loss and accuracy over the steps; of the batch-norm paper's experiment, its figure 1."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np

from bnkernels.train.run_config import LABELS

# Okabe and Ito's blue and vermilion: distinct in every kind of colour vision; the line styles tell them apart in grey.
STYLES = {
    "batch": {"label": LABELS["batch"], "color": "#0072B2", "linestyle": "-"},
    "sync-batch": {"label": LABELS["sync-batch"], "color": "#CC79A7", "linestyle": ":"},
    "layer": {"label": LABELS["layer"], "color": "#009E73", "linestyle": "-."},
    "none": {"label": LABELS["none"], "color": "#D55E00", "linestyle": "--"},
}


def require_matplotlib() -> None:
    """Fail now rather than after the training where Matplotlib is missing.

    Raises
    ------
    ImportError
        If Matplotlib is not installed; the message says how to install it.
    """
    if find_spec("matplotlib") is None:  # not imported yet: that takes half a second
        raise ImportError("the curves need Matplotlib: pip install 'bnkernels[train]'")


def draw_curves(history: Mapping[str, Sequence[Mapping[str, Any]]], title: str) -> bytes:
    """Draw training loss and test accuracy over the training steps.

    Parameters
    ----------
    history : mapping of str to sequence of mappings
        For each network, ``"batch"`` or ``"none"``, its evaluations with ``step``, ``loss`` and ``accuracy``. A loss of
        None (not finite) leaves a gap. An ensemble, with ``models``, has a band from the lowest of its models to the
        highest; mean ± deviation could leave the possible range, above 100 % or below a loss of 0.
    title : str
        Title of the figure, one line.

    Returns
    -------
    bytes
        A PNG image of 1500 x 650 pixels.

    Raises
    ------
    ImportError
        If Matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.figure import Figure  # no pyplot: no global state, no window, no backend to choose

    figure = Figure(figsize=(10, 13 / 3), dpi=150, layout="constrained")
    figure.suptitle(title, fontsize=11)
    loss_axes, accuracy_axes = figure.subplots(1, 2)
    draw_history(loss_axes, history, "loss")
    draw_history(accuracy_axes, history, "accuracy", 100)
    loss_axes.set(ylabel="training loss (cross-entropy, nats)", yscale="log")
    accuracy_axes.set(ylabel="test accuracy (%)")
    accuracy_axes.axhline(95, color="grey", linewidth=0.8, linestyle=":", label="95 %")
    for axes in (loss_axes, accuracy_axes):
        finish_axes(axes)
    return png(figure)


def draw_history(axes: Any, history: Mapping[str, Sequence[Mapping[str, Any]]], name: str, unit: float = 1) -> None:
    """Draw a figure of every evaluation over the training steps, and the band of the models of an ensemble.

    Parameters
    ----------
    axes : matplotlib.axes.Axes
        Axes to draw on.
    history : mapping of str to sequence of mappings
        Evaluations of each network, as `draw_curves` takes them.
    name : {"loss", "accuracy"}
        Figure.
    unit : float
        Factor of the figures.
    """
    for norm, evaluations in history.items():
        steps = [entry["step"] for entry in evaluations]
        marker = "o" if len(steps) < 10 else ""
        axes.plot(steps, unit * _numbers([entry[name] for entry in evaluations]), marker=marker, **STYLES[norm])
        each = unit * _numbers([[model[name] for model in entry.get("models", ())] for entry in evaluations])
        if each.size and not np.isnan(each).all():
            color = STYLES[norm]["color"]
            axes.fill_between(steps, each.min(axis=1), each.max(axis=1), color=color, alpha=0.2, linewidth=0)


def finish_axes(axes: Any, **legend: Any) -> None:
    """Give axes that have been drawn on their steps, grid and legend."""
    axes.set(xlabel="training step")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, **legend)


def draw_accuracy(document: Mapping[str, Any]) -> bytes:
    """Draw figure 1a of the batch-norm paper: test accuracy over the steps.

    Parameters
    ----------
    document : mapping
        Document that `bnkernels.train.reproduce.run` returned.

    Returns
    -------
    bytes
        A PNG image of 1050 x 675 pixels.

    Raises
    ------
    ImportError
        If Matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    for norm, network in document["networks"].items():
        axes.plot(network["steps"], [100 * accuracy for accuracy in network["test_accuracy"]], **STYLES[norm])
    axes.set(xlabel="training step", ylabel="test accuracy (%)", title=_title(document))
    axes.set_xlim(0, document["settings"]["steps"])
    axes.set_ylim(60, 100)  # the first steps are below
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, loc="lower right")
    return png(figure)


def draw_percentiles(document: Mapping[str, Any]) -> bytes:
    """Draw figures 1b and 1c of the batch-norm paper: percentiles of the input of a typical sigmoid over the steps.

    Parameters
    ----------
    document : mapping
        Document that `bnkernels.train.reproduce.run` returned.

    Returns
    -------
    bytes
        A PNG image of 1500 x 675 pixels.

    Raises
    ------
    ImportError
        If Matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), dpi=150, layout="constrained")
    figure.suptitle(_title(document), fontsize=11)
    for axes, norm in zip(figure.subplots(1, 2, sharey=True), ("none", "batch"), strict=True):
        network, style = document["networks"][norm], STYLES[norm]
        low, middle, high = network["input_percentiles"].values()
        axes.fill_between(network["steps"], low, high, color=style["color"], alpha=0.2, linewidth=0)
        for values, label in ((high, "85 %"), (middle, "50 %"), (low, "15 %")):
            axes.plot(network["steps"], values, color=style["color"], linewidth=2 if label == "50 %" else 1)
            end = network["steps"][-1], values[-1]
            axes.annotate(label, end, xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
        axes.set(xlabel="training step", title=f"{style['label']}, sigmoid {network['typical_sigmoid']}")
        axes.set_xlim(0, document["settings"]["steps"] * 1.1)
        axes.grid(alpha=0.25)
        axes.tick_params(labelleft=True)
    figure.axes[0].set_ylabel("input of the sigmoid")
    return png(figure)


def _numbers(figures: Sequence[Any]) -> np.ndarray:
    """Return these figures, NaN for None."""
    return np.array(figures, dtype=float)


def _title(document: Mapping[str, Any]) -> str:
    settings = document["settings"]
    sizes = "-".join(map(str, settings["sizes"]))
    data = document["data"]
    pixels = data["inputs"].split()[-1]
    return f"{data['name']} ({pixels}), {sizes} sigmoids, mini-batches of {settings['batch']}"


def png(figure: Any) -> bytes:
    """Return a figure as the content of a PNG file."""
    image = io.BytesIO()
    figure.savefig(image, format="png")
    return image.getvalue()
