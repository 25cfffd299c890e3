"""The picture of a run."""

import struct
import sys

import numpy as np
import pytest

from bnkernels.train.plots import STYLES, draw_curves


def history(losses):
    return [{"step": 22 * (i + 1), "loss": loss, "accuracy": 0.9 + 0.01 * i} for i, loss in enumerate(losses)]


def pixels(image):
    import io

    from matplotlib.image import imread

    return imread(io.BytesIO(image), format="png")[..., :3]


def has_colour(image, norm):
    """Whether pixels of the network's own colour are in the picture."""
    from matplotlib.colors import to_rgb

    return bool((np.abs(pixels(image) - to_rgb(STYLES[norm]["color"])).max(axis=-1) < 0.02).sum() > 50)


def test_the_picture_is_a_png_of_the_promised_size():
    image = draw_curves({"batch": history([1, 0.5])}, "title")
    assert image.startswith(b"\x89PNG\r\n\x1a\n")
    assert struct.unpack(">II", image[16:24]) == (1500, 650)


@pytest.mark.parametrize("norms", [("batch",), ("none",), ("batch", "none")])
def test_every_network_has_its_own_colour(norms):
    image = draw_curves({norm: history([1, 0.5, 0.1]) for norm in norms}, "title")
    assert [norm for norm in STYLES if has_colour(image, norm)] == list(norms)


def test_a_diverged_loss_leaves_a_gap():
    image = draw_curves({"batch": history([1, None, None]), "none": history([None] * 3)}, "title")
    assert has_colour(image, "batch")


def test_drawing_opens_no_window_and_imports_no_pyplot(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    assert draw_curves({"batch": history([1, 0.5])}, "title")


def test_without_matplotlib_the_message_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'bnkernels\[train\]'"):
        draw_curves({"batch": history([1])}, "title")


def of_models(entries, spread):
    """Return the entries as of two models, the same way apart from the mean."""
    models = [
        [{name: entry[name] * (1 + sign * spread) for name in ("loss", "accuracy")} for sign in (-1, 1)]
        for entry in entries
    ]
    return [{**entry, "models": pair} for entry, pair in zip(entries, models, strict=True)]


def test_an_ensemble_has_a_band():
    plain, wide = (draw_curves({"batch": of_models(history([1, 0.5, 0.1]), spread)}, "title") for spread in (0, 0.05))
    assert (pixels(wide) != pixels(plain)).any()
    gaps = [{**entry, "loss": None, "models": [{"loss": None, "accuracy": 0.9}] * 2} for entry in history([1, 0.5])]
    assert draw_curves({"batch": gaps}, "title").startswith(b"\x89PNG")


def test_the_band_is_what_models_reached(monkeypatch):
    """A deviation from the mean would be beyond 100 %, and below a loss of 0, which has no place on a log axis."""
    from matplotlib.axes import Axes

    bands = []
    monkeypatch.setattr(Axes, "fill_between", lambda axes, steps, low, high, **style: bands.append((low, high)))
    entries = [
        {"loss": 0.5, "accuracy": 0.95, "models": [{"loss": 0.01, "accuracy": 0.9}, {"loss": 0.99, "accuracy": 1.0}]}
    ]
    draw_curves(
        {"batch": [{"step": 1, "loss_spread": 0.7, "accuracy_spread": 0.07, **entry} for entry in entries]}, "title"
    )
    (loss, accuracy) = bands
    np.testing.assert_allclose(loss, [[0.01], [0.99]])
    np.testing.assert_allclose(accuracy, [[90], [100]])
