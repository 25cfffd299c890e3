"""The picture of a run: training loss and test accuracy over the steps, with and without batch norm."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

# Okabe and Ito's blue and vermilion: distinct in every kind of colour vision; the line styles tell them apart in grey.
STYLES = {
    "batch": {"label": "with batch norm", "color": "#0072B2", "linestyle": "-"},
    "none": {"label": "without batch norm", "color": "#D55E00", "linestyle": "--"},
}


def require_matplotlib() -> None:
    """Fail now rather than after the training where Matplotlib is missing.

    Raises
    ------
    ImportError
        If Matplotlib is not installed; the message says how to install it.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError("the curves need Matplotlib: pip install 'bnkernels[train]'") from error


def draw_curves(history: Mapping[str, Sequence[Mapping[str, Any]]], title: str) -> bytes:
    """Draw training loss and test accuracy over the training steps.

    Parameters
    ----------
    history : mapping of str to sequence of mappings
        For each network, ``"batch"`` or ``"none"``, its evaluations with ``step``, ``loss`` and ``accuracy``. A loss of
        None (not finite) leaves a gap.
    title : str
        One line that says what was trained.

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
    for norm, evaluations in history.items():
        steps = [entry["step"] for entry in evaluations]
        losses = [float("nan") if entry["loss"] is None else entry["loss"] for entry in evaluations]
        marker = "o" if len(steps) < 10 else ""
        loss_axes.plot(steps, losses, marker=marker, **STYLES[norm])
        accuracy_axes.plot(steps, [100 * entry["accuracy"] for entry in evaluations], marker=marker, **STYLES[norm])
    loss_axes.set(ylabel="training loss (cross-entropy, nats)", yscale="log")
    accuracy_axes.set(ylabel="test accuracy (%)")
    accuracy_axes.axhline(95, color="grey", linewidth=0.8, linestyle=":", label="95 %")
    for axes in (loss_axes, accuracy_axes):
        axes.set(xlabel="training step")
        axes.set_xlim(left=0)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
    image = io.BytesIO()
    figure.savefig(image, format="png")
    return image.getvalue()
