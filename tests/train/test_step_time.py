"""The headline ratio: networks in turns, the median of the rounds, and no verdict where it would mean nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bnkernels.runtime.registry import Device
from bnkernels.train.config import TrainingConfig
from bnkernels.train.ensemble import make_learner
from bnkernels.train.step_time import MOST_ROUNDS, Rounds, StepTimeRatio
from bnkernels.train.tables import answer
from bnkernels.train.trainer import resume, train

CPU = Device(np, "cpu")


def timed(ratios: list[float], steps: int = 1, device: Device = CPU) -> StepTimeRatio:
    """Return the ratio of a run whose first round, the warm-up, was a hundred times slower with batch norm."""
    rounds = Rounds(device, ["layers", "layers"])
    for ratio in [100, *ratios]:
        rounds.add(steps, {"batch": 3 * ratio, "none": 3, "layer": 50})
    return rounds.ratio()


def test_the_figure_is_the_median_of_the_rounds_without_the_first() -> None:
    found = timed([1.5, 1.6, 1.7, 1.8, 1.9] * 50)
    assert found == StepTimeRatio(1.7, (1.6, 1.8), 250, 251, None)
    assert str(found) == (
        "A step with batch norm takes 1.70 times a step without (quartiles 1.60 and 1.80 of 250 rounds). "
        "Accepted wisdom: 3 to 5 times."
    )


@pytest.mark.parametrize(
    ("ratios", "options", "reason"),
    [
        ([1.7] * 198, {}, "199 steps of each were timed, and 200 are needed"),
        ([], {"steps": 500}, "500 steps of each were timed, and 200 are needed"),
        ([1.7] * 500, {"device": Device(np, "the emulator", emulated=True)}, "the emulator has no speed of its own"),
    ],
    ids=["too short", "one round", "emulator"],
)
def test_there_is_no_verdict_where_it_would_mean_nothing(
    ratios: list[float], options: dict[str, Any], reason: str
) -> None:
    found = timed(ratios, **options)
    assert found.why_no_verdict == reason
    assert str(found) == f"No verdict on the time of a step with batch norm: {reason}."


@pytest.mark.parametrize(("low", "high", "verdict"), [(1.72, 2.28, True), (1.69, 2.0, False), (2.0, 2.31, False)])
def test_the_quartiles_of_a_verdict_are_within_15_percent(low: float, high: float, verdict: bool) -> None:
    found = timed([low] * 60 + [2.0] * 100 + [high] * 60)
    assert (found.median, *found.quartiles) == (2.0, low, high)
    assert (found.why_no_verdict is None) is verdict
    if not verdict:
        assert f"between {low:.2f} and {high:.2f}, more than 15 % from the median, 2.00" in str(found)


def test_rounds_need_both_networks_and_end_at_some_time() -> None:
    rounds = Rounds(CPU, ["layers"])
    rounds.add(1, {"batch": 2.0})
    rounds.add(1, {"none": 2.0, "layer": 1.0})
    assert rounds.ratio()[:4] == (None, None, 0, 0)
    for _ in range(MOST_ROUNDS + 10):
        rounds.add(2, {"batch": 2.0, "none": 1.0})
    assert rounds.ratio()[:4] == (2.0, (2.0, 2.0), MOST_ROUNDS, 2 * MOST_ROUNDS + 2)


def test_only_rounds_of_the_same_place_go_on() -> None:
    first = Rounds(CPU, ["layers", "layers"])
    for _ in range(4):
        first.add(5, {"batch": 2.0, "none": 1.0})
    state = json.loads(json.dumps(first.state()))
    restored, elsewhere = Rounds(CPU, ["layers", "layers"]), Rounds(Device(np, "cuda"), ["layers", "layers"])
    for rounds in (restored, elsewhere):
        rounds.load_state(state)
        rounds.load_state(None)  # a checkpoint without a state
    assert restored.ratio() == first.ratio()
    assert elsewhere.ratio().rounds == 0


def test_the_networks_take_turns_and_none_is_always_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrainingConfig(hidden=(8,), batch_size=16, lr=0.1, device="cpu", engine="layers")
    learners = {norm: make_learner(norm, config, (6, 8, 3), np) for norm in ("batch", "layer", "none")}
    made = []
    for norm, learner in learners.items():
        step = learner.optimizer.step
        monkeypatch.setattr(learner.optimizer, "step", lambda step=step, norm=norm: made.append(norm) or step())
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((5 * 16, 6)).astype("float32"), np.arange(5 * 16, dtype="int32") % 3
    rounds = Rounds(CPU, [])
    epochs = (0, 1), (1, 5)  # the first has one round
    times = [rounds.train(learners, x[16 * a :], y[16 * a :], a, b, lambda: False) for a, b in epochs]
    assert [{norm: len(each) for norm, each in part.items()} for part in times] == [
        dict.fromkeys(learners, 1),
        dict.fromkeys(learners, 4),
    ]
    forward = list(learners)
    assert made == [*forward, *forward[::-1], *forward, *forward[::-1], *forward]


def test_a_turn_of_compiled_steps_is_long_enough_to_be_timed() -> None:
    """A call costs as much as a few of the smallest steps: the longest turn of all networks is that of each."""
    config = TrainingConfig(hidden=(8,), batch_size=16, lr=0.1, device="cpu", engine="layers")
    learners = {norm: make_learner(norm, config, (6, 8, 3), np) for norm in ("batch", "none")}
    learners["none"].engine.steps_per_turn = 4
    x, y = np.zeros((10 * 16, 6), "float32"), np.zeros(10 * 16, "int32")
    times = Rounds(CPU, []).train(learners, x, y, 0, 10, lambda: False)
    assert {norm: len(each) for norm, each in times.items()} == {"batch": 3, "none": 3}


def test_what_is_compiled_is_compiled_before_a_step_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """And on a copy: not a bit of the network changes."""
    config = TrainingConfig(hidden=(8,), batch_size=16, optimizer="adam", lr=0.1, device="cpu")
    learner = make_learner("batch", config, (6, 8, 3), np)
    before = {name: array.tobytes() for name, array in learner.arrays().items()}
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((3 * 16, 6)).astype("float32"), np.arange(3 * 16, dtype="int32") % 3
    learner.engine.warm_up(x, y)
    assert {name: array.tobytes() for name, array in learner.arrays().items()} == before
    warmed = []
    monkeypatch.setattr(learner.engine, "warm_up", lambda x, y: warmed.append(learner.step))
    rounds = Rounds(CPU, [])
    for last in (1, 3):
        rounds.train({"batch": learner}, x, y, 0, last, lambda: False)
    assert warmed == [0, 1]  # before the steps of every epoch


def test_a_stopped_and_resumed_run_keeps_its_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bnkernels.train.runs.draw_curves", lambda history, title: b"a picture")
    np.savez(tmp_path / "x.npz", x=np.random.default_rng(0).standard_normal((100, 6)), y=np.arange(100) % 3)
    options = {"dataset": "npz", "data": str(tmp_path / "x.npz"), "hidden": (8,), "batch_size": 16, "device": "cpu"}
    options["engine"] = "layers"
    asked = iter(range(10**6))
    train(TrainingConfig(**options, steps=150), folder=tmp_path / "run", should_stop=lambda: next(asked) >= 99)
    result = resume(tmp_path / "run", steps=210)
    assert 209 <= result.step_time_ratio.steps <= 210
    assert result.step_time_ratio.rounds == result.step_time_ratio.steps - 2  # two processes warmed up
    document = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert document["summary"]["step_time_ratio"] == json.loads(json.dumps(result.step_time_ratio._asdict()))
    assert answer(result).splitlines()[-2] == str(result.step_time_ratio)
    assert resume(tmp_path / "run").step_time_ratio == result.step_time_ratio
