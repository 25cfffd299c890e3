"""The comparison of training steps: no speed without a right result. Nothing here depends on how fast anything is."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import steps
from benchmarks.harness import timing
from benchmarks.report import train_step as report
from benchmarks.steps import bench_train_step as bench
from benchmarks.steps.expression import ExpressionStep
from benchmarks.steps.ours import OurStep
from benchmarks.steps.step import Batches, Maker, State, check_losses, initial_state
from bnkernels.runtime import cpu

BATCHES = bench.QUESTION.mini_batches()
OPTIMIZERS = ("sgd", "momentum", "adam")
NORMS = ("none", "batch", "layer")
CPU_MAKERS = [maker for maker in steps.MAKERS if maker.place == "cpu"]


def random_batches(inputs: int, classes: int, count: int = 4) -> Batches:
    """Return mini-batches of 16 random examples."""
    rng = np.random.default_rng(0)
    draw = rng.standard_normal, rng.integers
    return [(draw[0]((16, inputs), dtype=np.float32), draw[1](0, classes, 16, dtype=np.int32)) for _ in range(count)]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("activation", ["relu", "sigmoid"])
@pytest.mark.parametrize("sizes", [(7, 5, 3), (7, 5, 6, 3), (7, 5, 6, 4, 3)], ids=str)
@pytest.mark.parametrize("maker", CPU_MAKERS, ids=lambda maker: maker.name)
def test_every_variant_computes_the_losses_of_float64(
    maker: Maker, sizes: tuple[int, ...], activation: str, norm: str, optimizer: str
) -> None:
    if reason := maker.absent():
        pytest.skip(reason)
    if "compile" in maker.name:
        pytest.skip("compiles for seconds; benchmarks.steps.bench_train_step --only checks it")
    state, batches = initial_state(sizes, norm), random_batches(sizes[0], sizes[-1])
    exact = ExpressionStep(state, optimizer, 1e-3, dtype="float64", activation=activation)
    expected = exact.losses(exact.prepare_all(batches))
    step = maker.make(state, optimizer, 1e-3, activation=activation)
    for _ in range(2):  # the second time after a reset
        check_losses(maker.name, step.losses(step.prepare_all(batches)), expected, roundings=32)
        step.reset()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("activation", ["relu", "sigmoid"])
@pytest.mark.parametrize("sizes", [(64, 20, 10), (64, 6, 5, 10)], ids=str)
def test_the_reference_follows_the_gradient(sizes: tuple[int, ...], activation: str, norm: str) -> None:
    """A small step of SGD lowers the loss by its gradient's square, which central differences know without formulas."""
    state = initial_state(sizes, norm)
    batch = BATCHES[0]

    def network(lr: float) -> ExpressionStep:
        return ExpressionStep(state, "sgd", lr, dtype="float64", activation=activation)

    def loss_at(distance: float) -> float:
        moved = network(distance)
        moved.step(*moved.prepare(*batch))  # moves by `distance` against the gradient
        return float(moved.step(*moved.prepare(*batch)).mean())

    before, after = network(0.0), network(1.0)
    for each in (before, after):
        each.step(*each.prepare(*batch))
    squares = sum(((before.parameters[name] - after.parameters[name]) ** 2).sum() for name in before.parameters)
    slope = (loss_at(1e-6) - loss_at(-1e-6)) / 2e-6
    np.testing.assert_allclose(slope, -squares, rtol=1e-5)


def with_another_eps(state: State, optimizer: str, lr: float, **options: Any) -> OurStep:
    """Return our step with a wrong eps, whose losses look right to three digits."""
    step = OurStep(state, optimizer, lr, **options)
    if "0.gamma" in state:
        step.model.layers[1].eps = 1e-3
    return step


class NaNStep(OurStep):
    """Our step with a weight that is NaN."""

    def reset(self) -> None:
        """Spoil a weight."""
        super().reset()
        self.model.parameters[0] = np.nan


def only(monkeypatch: pytest.MonkeyPatch, *makers: Maker) -> None:
    """Let these and nobody else make steps."""
    monkeypatch.setattr(steps, "MAKERS", makers)


@pytest.mark.parametrize("wrong", [with_another_eps, NaNStep])
def test_a_wrong_variant_is_not_timed(wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, Maker("bnkernels", "cpu", wrong))
    monkeypatch.setattr(bench, "time_steps", lambda *_: pytest.fail("timed"))
    with pytest.raises(SystemExit, match=r"^error: bnkernels \(64-20-10, norm batch, sgd\).*not timed$"):
        bench.main(["--quick"])


def test_who_fails_or_is_absent_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def broken(state: State, optimizer: str, lr: float, **options: Any) -> OurStep:
        raise RuntimeError("a compiler's\nlog")

    monkeypatch.setattr(bench, "SEEDS", 1)
    only(
        monkeypatch,
        Maker("bnkernels", "cpu", OurStep),
        Maker("broken", "cpu", broken),
        Maker("gone", "cpu", broken, absent=lambda: "it is not installed"),
    )
    path = tmp_path / "results" / "train_step.json"
    with pytest.raises(SystemExit, match="error: broken failed"):
        bench.main(["--quick", "--json", str(path)])
    written = json.loads(path.read_text(encoding="utf-8"))
    assert written["absent"] == {
        "gone": "it is not installed",
        "broken": "failed: RuntimeError: a compiler's log",
    }
    assert {row["maker"] for row in written["rows"]} == {"bnkernels"}
    assert "gone (it is not installed)" in report.figures({"cpu": written})
    assert "it is not installed" in capsys.readouterr().out


def test_a_run_writes_what_the_report_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "SEEDS", 1)
    only(monkeypatch, Maker("bnkernels", "cpu", OurStep), Maker("NumPy expression", "cpu", ExpressionStep))
    monkeypatch.setattr(bench, "tasks", lambda quick: [(network, "sgd", 2) for network in bench.NETWORKS])
    document = bench.measure()
    assert {(row["maker"], row["network"], row["norm"]) for row in document["rows"]} == {
        (maker, str(network), norm)
        for maker in ("bnkernels", "NumPy expression")
        for network in bench.NETWORKS
        for norm in bench.NORMS
    }
    assert document["engine"] == cpu.engine()
    assert all(row["us"]["p20"] <= row["us"]["median"] <= row["us"]["p80"] for row in document["rows"])
    assert [target["met"] for target in document["targets"]][1] is None  # nobody has PyTorch
    assert "## 784-100-100-100-10, mini-batches of 60" in report.figures({"cpu": document})
    assert "bnkernels, batch norm" in report.figures({"cpu": json.loads(json.dumps(document))})


@pytest.mark.parametrize(
    ("accuracy", "torch", "without", "met"),
    [
        (0.97, 0.03, 1.1, [True] * 6),
        (0.96, 0.8, 1.2, [False] * 6),
        (0.965, None, 1.15, [True, None, True, True, None, None]),
    ],
)
def test_targets(accuracy: float, torch: float | None, without: float, met: list) -> None:
    found = {"with / without": {"median": without}}
    if torch is not None:
        found |= {f"ours / PyTorch, {norm}": {"median": torch} for norm in ("batch norm", "no norm")}
    ratios = [{"network": str(network), "optimizer": "sgd", "ratios": found} for network in bench.NETWORKS]
    assert [row["met"] for row in bench.targets({"batch": {"mean": accuracy}}, ratios)] == met


def test_the_faster_of_our_engines_and_the_fastest_pytorch_are_compared() -> None:
    us = {"bnkernels": (9, 5), "bnkernels fused": (4, 2), "PyTorch": (80, 70), "PyTorch, fused optimiser": (90, 60)}
    times = {
        (name, norm): np.array([float(t)])
        for name, pair in us.items()
        for norm, t in zip(bench.NORMS, pair, strict=True)
    }
    ratios = {name: ratio["median"] for name, ratio in bench.ratios_of(times).items()}
    assert ratios == {
        "with / without": 2,
        "layers, with / without": 1.8,
        "PyTorch with / without": pytest.approx(80 / 60, rel=1e-3),
        "ours / PyTorch, batch norm": 0.05,
        "ours / PyTorch, no norm": pytest.approx(2 / 60, rel=1e-3),
    }


def test_nobody_of_a_name_is_an_error() -> None:
    with pytest.raises(SystemExit, match="nobody at cpu is named Nobody"):
        bench.main(["--only", "Nobody"])


def test_rounds_are_interleaved_in_changing_order() -> None:
    calls: list[str] = []
    seen_collecting: list[bool] = []

    def measurement(name: str) -> float:
        calls.append(name)
        seen_collecting.append(gc.isenabled())
        return len(calls)

    figures = timing.interleave({name: lambda name=name: measurement(name) for name in "abc"}, rounds=20)
    rounds = [calls[i : i + 3] for i in range(0, 60, 3)]
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len({tuple(names) for names in rounds}) > 3
    assert sorted(np.concatenate(list(figures.values()))) == list(range(1, 61))
    assert not any(seen_collecting)
    assert gc.isenabled()


def test_collection_is_enabled_again_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError):
        timing.interleave({"a": lambda: 1 / 0}, rounds=1)
    assert gc.isenabled()


def test_quantiles() -> None:
    assert timing.quantiles(np.arange(101) * 1.00001) == {"median": 50.0, "p20": 20.0, "p80": 80.0}


def test_results_have_a_folder_per_device() -> None:
    assert timing.results_folder({"device": "AMD EPYC, 2 cores"}) == timing.RESULTS / "amd-epyc-2-cores"
    assert timing.results_folder({"device": "NVIDIA H200"}) == timing.RESULTS / "nvidia-h200"
