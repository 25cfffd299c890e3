"""Predicting the classes of new data: without labels, by one network, all, or an ensemble; and what does not fit."""

import json
import re

import numpy as np
import pytest

from bnkernels.train.predict import predict
from tests.train.test_cli import document, npz, run  # noqa: F401  npz is a fixture of every test


def new_data(folder, classes, **more):
    """Write rows that are clearly of these classes, without labels."""
    np.savez(folder / "new.npz", x=5 * np.eye(3, 6)[classes], **more)


def test_predict_prints_a_class_for_every_row(capsys, tmp_path):
    """It split the file and printed an accuracy."""
    document(capsys, "--epochs", "3")
    classes = [2, 2, 0, 2, 0]  # 1 does not occur
    new_data(tmp_path, classes)
    code, out, err = run(capsys, "predict", "run", "--data", "new.npz", "--norm", "batch", "--device", "cpu")
    assert (code, err) == (0, "")
    assert out.split() == [str(number) for number in classes]
    code, out, _ = run(capsys, "predict", "run", "--data", "new.npz")
    assert out.splitlines() == ["batch\tnone", *(f"{number}\t{number}" for number in classes)]


def test_labels_that_are_text_come_back_as_text(capsys, tmp_path):
    names = np.array(["apple", "banana", "cherry"])
    with np.load("data.npz") as data:
        x, y = data["x"], data["y"]
    np.savez("data.npz", x=x, y=names[y])
    document(capsys, "--epochs", "3")
    new_data(tmp_path, [2, 0])
    _, out, _ = run(capsys, "predict", "run", "--data", "new.npz", "--norm", "none")
    assert out.split() == ["cherry", "apple"]
    np.savez("some.npz", x=x[:20], y=names[y[:20]])
    np.savez("strange.npz", x=x[:20], y=np.array(["plum"] * 20))
    code, out, _ = run(capsys, "evaluate", "run", "--data", "some.npz")
    assert (code, "20 test examples" in out) == (0, True)
    code, _, err = run(capsys, "evaluate", "run", "--data", "strange.npz")
    assert (code, "'plum', which is none of the 3 classes" in err) == (2, True)


def test_predict_prints_one_document(capsys, tmp_path):
    document(capsys, "--epochs", "3")
    new_data(tmp_path, [1], y=np.array(["spam"]), x_test=np.zeros(3))  # nobody reads these
    code, out, _ = run(capsys, "predict", "run/checkpoint.npz", "--data", "new.npz", "--json")
    found = json.loads(out)
    assert code == 0
    assert (found["examples"], found["predictions"]) == (1, {"batch": [1], "none": [1]})
    assert found["data"].endswith("new.npz")


def test_predictions_are_those_that_evaluate_counts(capsys, tmp_path):
    document(capsys, "--epochs", "1")
    with np.load("data.npz") as data:
        x, y = data["x"], data["y"]
    np.savez(tmp_path / "all.npz", x=x[:37], y=y[:37])
    networks = json.loads(run(capsys, "evaluate", "run", "--data", "all.npz", "--json")[1])["networks"]
    for norm, classes in predict("run", "all.npz", device="cpu")["predictions"].items():
        assert networks[norm]["test_accuracy"] == (np.array(classes) == y[:37]).mean()


def test_the_predictions_of_an_ensemble_are_of_the_mean_probability(tmp_path):
    from bnkernels.train.config import TrainingConfig
    from bnkernels.train.ensemble import Ensemble

    config = TrainingConfig(dataset="npz", data="x.npz", models=3, device="cpu")
    ensemble = Ensemble("layer", config, (6, 5, 3), np)
    x = np.random.default_rng(0).standard_normal((10, 6)).astype("float32")
    each = []
    for member in ensemble.members:
        logits = member.model.forward(x, training=False).astype("f8")
        each.append(np.exp(logits) / np.exp(logits).sum(1, keepdims=True))
    np.testing.assert_allclose(ensemble.probabilities(x), np.mean(each, axis=0), rtol=1e-12)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.ones((4, 5))}, "the networks take 6 features, but x has 5"),
        ({"y": np.ones(4, int)}, "has no x: write it with numpy.savez(path, x=...)"),
        ({"x": np.ones(6)}, "x must be (N, features)"),
        ({"x": np.full((4, 6), np.nan)}, "x has NaN or infinity in 4 rows"),
        ({"x": np.full((4, 6), "a")}, "x must be real numbers"),
    ],
)
def test_predict_refuses_what_does_not_fit(capsys, tmp_path, arrays, message):
    document(capsys, "--epochs", "1")
    np.savez(tmp_path / "new.npz", **arrays)
    code, out, err = run(capsys, "predict", "run", "--data", "new.npz")
    assert (code, out) == (2, "")
    assert re.fullmatch(r"bnkernels: error: [^\n]+\n", err)
    assert message in err


def test_predict_needs_data_and_a_network_of_the_run(capsys, tmp_path):
    document(capsys, "--epochs", "1", "--norm", "batch")
    code, out, err = run(capsys, "predict", "run")
    assert (code, out) == (2, "")
    assert "--data" in err
    new_data(tmp_path, [0])
    code, _, err = run(capsys, "predict", "run", "--data", "new.npz", "--norm", "layer")
    assert (code, err) == (2, "bnkernels: error: the run has networks with norm batch, not layer\n")
    code, _, err = run(capsys, "predict", "run", "--data", "nothing.npz")
    assert (code, err) == (2, "bnkernels: error: the data file nothing.npz does not exist: give an .npz file with x\n")


def test_a_network_that_diverged_predicts_nothing(capsys, tmp_path):
    document(capsys, "--epochs", "2", "--norm", "none", "--lr", "1e30")
    new_data(tmp_path, [0, 1])
    code, out, err = run(capsys, "predict", "run", "--data", "new.npz")
    assert (code, out) == (2, "")
    assert "the network with norm none gives no finite probabilities: its training diverged" in err
