"""``bnkernels train --engine fused`` on the emulator: what the layers learn on NumPy arrays."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bnkernels import cli
from bnkernels.ops.fused_training import launch
from tools.emulator.train import train


# Not among the tests of the emulator, which also run under sanitizers: those stop a process that draws curves.
@pytest.mark.parametrize("form", ["block", "group"])
def test_the_fused_engine_learns_what_the_layers_learn(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if form == "group":
        monkeypatch.setattr(launch, "_why_not_one", lambda *_: "a test wants groups")
    options = ["--steps", "8", "--norm", "batch", "--dtype", "float64", "--activation", "tanh"]
    for name, run in (("fused", train), ("layers", lambda given: cli.main(["train", *given, "--device", "cpu"]))):
        assert run([*options, "--engine", name, "--out", str(tmp_path / name)]) == 0
    assert f"engine fused{' (4 blocks)' if form == 'group' else ''}\n" in capsys.readouterr().out
    fused, layers = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("fused", "layers"))
    (one,), (two,) = (document["history"]["batch"] for document in (fused, layers))
    assert one["loss"] == pytest.approx(two["loss"], rel=1e-9)
    assert one["accuracy"] == two["accuracy"]
