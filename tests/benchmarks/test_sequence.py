"""The figure of the LSTMs: what was trained is kept, and the page says what the document holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.report import sequence as page
from benchmarks.steps import sequence

SMALL = ["--hidden", "3", "--epochs", "1", "--models", "2", "--batch-size", "700"]


def test_a_run_writes_document_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert sequence.main([*SMALL, "--ways", "row by row", "--out", str(tmp_path)]) == 0
    document = json.loads((tmp_path / "sequence.json").read_text(encoding="utf-8"))
    assert (document["place"], document["settings"]["hidden"], document["settings"]["models"]) == ("cpu", 3, 2)
    networks = document["ways"]["row by row"]
    assert list(networks) == ["batch", "layer", "none"]
    for curves in networks.values():
        assert curves["steps"] == [2]
        assert [len(models) for name in ("loss", "accuracy") for models in curves[name]] == [2, 2]
        assert curves["us_per_step"] > 0
    assert (tmp_path / "sequence.png").read_bytes().startswith(b"\x89PNG")
    assert "epoch 1: batch " in capsys.readouterr()[0]
    text = page.tables({"cpu": document}, "..")
    assert "On a GPU: not yet measured." in text
    assert "digits, 3 units, mini-batches of 700, rmsprop at 0.001, clipped to a norm of 1, noise of 0.1 on h_0" in text
    assert "## Row by row\n\n|  | steps to 80% | steps to 90% | steps to 95% | at the end | µs per step |" in text


def test_the_ways_that_were_trained_before_an_interruption_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = sequence.train

    def interrupted(config, **options):
        if config.permute == "permutation":
            raise KeyboardInterrupt
        return real(config, **options)

    monkeypatch.setattr(sequence, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sequence.main([*SMALL, "--ways", "row by row", "pixels permuted", "--out", str(tmp_path)])
    assert list(json.loads((tmp_path / "sequence.json").read_text(encoding="utf-8"))["ways"]) == ["row by row"]


def test_steps_to_an_accuracy() -> None:
    networks = {
        "batch": {"steps": [10, 20], "accuracy": [[0.85, 0.2], [0.9, 0.96]], "us_per_step": 1234.5},
        "none": {"steps": [10, 20], "accuracy": [[0.1, 0.2], [0.3, 0.5]], "us_per_step": 99.94},
    }
    assert page.of_way(networks).splitlines()[2:] == [
        "| with batch norm | 15 (10 to 20) | 20 (20 to 20) | 20 (1 of 2) | 93.0% (90.0% to 96.0%) | 1234 |",
        "| without norm | not reached | not reached | not reached | 40.0% (30.0% to 50.0%) | 99.9 |",
    ]
    assert page.first_steps([10, 20], [(0.1, 0.9), (0.95, 0.1)], 0.9) == [20, 10]


def test_one_model_has_no_spread(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        sequence.main(["--models", "1"])
    assert "--models must be at least 2, to have a spread; got 1" in capsys.readouterr()[1]
    with pytest.raises(SystemExit, match="error: hidden must be at least 1, got 0"):
        sequence.main(["--hidden", "0"])
