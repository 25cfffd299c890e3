"""``bnkernels train --engine fused`` on the emulator: what the layers learn on NumPy arrays."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bnkernels import cli
from bnkernels.ops.fused_training import launch
from bnkernels.train.evaluate import evaluate
from tools.emulator.train import train


# Not among the tests of the emulator, which also run under sanitizers: those stop a process that draws curves.
@pytest.mark.parametrize("form", ["block", "group"])
def test_the_fused_engine_learns_what_the_layers_learn(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if form == "group":
        monkeypatch.setattr(launch, "_why_not_one", lambda *_: "a test wants groups")
    options = ["--steps", "8", "--dtype", "float64", "--activation", "tanh"]
    for name, run in (("fused", train), ("layers", lambda given: cli.main(["train", *given, "--device", "cpu"]))):
        assert run([*options, "--engine", name, "--out", str(tmp_path / name)]) == 0
    said = capsys.readouterr().out
    assert f"engine fused{' (4 blocks)' if form == 'group' else ''}\n" in said
    assert "No verdict on the time of a step with batch norm: the emulator has no speed of its own.\n" in said
    fused, layers = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("fused", "layers"))
    for norm in ("batch", "none"):
        (one,), (two,) = (document["history"][norm] for document in (fused, layers))
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-9)
        assert one["accuracy"] == two["accuracy"]
        assert evaluate(tmp_path / "fused", device="cpu")["networks"][norm]["test_accuracy"] == one["accuracy"]
