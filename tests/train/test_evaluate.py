"""Evaluating a checkpoint: on the run's own test set, on other data, and what does not fit."""

import json
import re

import numpy as np
import pytest

from tests.train.test_cli import document, npz, run  # noqa: F401  npz is a fixture of every test


def test_evaluate_evaluates_a_checkpoint(capsys):
    trained = document(capsys, "--epochs", "3")["summary"]["networks"]
    code, out, _ = run(capsys, "evaluate", "run", "--device", "cpu")
    assert code == 0
    assert out.startswith("40 test examples of ")
    assert f"with batch norm     test accuracy {trained['batch']['test_accuracy']:.2%}" in out
    assert "after 15 steps" in out
    code, out, _ = run(capsys, "evaluate", "run/checkpoint.npz", "--json")
    assert json.loads(out)["networks"]["none"]["test_accuracy"] == trained["none"]["test_accuracy"]


def test_evaluate_takes_other_data(capsys, tmp_path):
    document(capsys, "--epochs", "3")
    np.savez(tmp_path / "other.npz", x=5 * np.eye(3, 6)[np.arange(20) % 3], y=np.arange(20) % 3)
    code, out, _ = run(capsys, "evaluate", "run", "--data", "other.npz")
    assert code == 0
    assert f"20 test examples of {tmp_path / 'other.npz'}" in out


def test_evaluate_takes_a_hold_out_file_whole_whatever_classes_occur_in_it(capsys, tmp_path):
    """Every row counts: the file is not split again, and needs neither every class nor a second row."""
    expected = document(capsys, "--epochs", "3")["summary"]["networks"]["batch"]["test_accuracy"]
    (tmp_path / "data.npz").rename(tmp_path / "moved.npz")  # the run's own data, of which it has seen four fifths
    code, out, _ = run(capsys, "evaluate", "run", "--data", "moved.npz", "--json")
    assert code == 0
    assert json.loads(out)["test_examples"] == 40
    assert json.loads(out)["networks"]["batch"]["test_accuracy"] == expected
    for rows, noun in ((1, "example"), (5, "examples"), (100, "examples")):
        np.savez(tmp_path / "hold.npz", x=5 * np.eye(3, 6)[np.full(rows, 2)], y=np.full(rows, 2))
        code, out, _ = run(capsys, "evaluate", "run", "--data", "hold.npz")
        assert code == 0
        assert out.startswith(f"{rows} test {noun} of ")
        assert "with batch norm     test accuracy 100.00%" in out


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.ones((4, 6)), "y": np.full(4, 3)}, "y must lie in 0 to 2, got 3 to 3"),
        ({"x": np.ones((4, 5)), "y": np.ones(4, int)}, "take 6 features and tell 3 classes apart, but the data have 5"),
        ({"x": np.ones((4, 6))}, "has no y"),
        ({"x": np.full((4, 6), np.nan), "y": np.ones(4, int)}, "x has NaN or infinity in 4 rows"),
    ],
)
def test_evaluate_refuses_what_does_not_fit(capsys, tmp_path, arrays, message):
    document(capsys, "--epochs", "1")
    np.savez(tmp_path / "hold.npz", **arrays)
    code, out, err = run(capsys, "evaluate", "run", "--data", "hold.npz")
    assert (code, out) == (2, "")
    assert re.fullmatch(r"bnkernels: error: [^\n]+\n", err)
    assert message in err


def test_evaluate_of_a_network_that_diverged_is_json_with_null(capsys):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    document(capsys, "--epochs", "2", "--norm", "none", "--lr", "1e30")
    code, out, err = run(capsys, "evaluate", "run", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out, parse_constant=refuse)["networks"]["none"]["test_loss"] is None
    assert ", loss not finite, after 10 steps" in run(capsys, "evaluate", "run")[1]
