"""The comparison of training steps: no speed without a right result. Nothing here depends on how fast anything is."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import bench_train_step as bench
from benchmarks import harness, op_cases, report
from benchmarks.peers import NumPyStep, OurStep, State

BATCHES = bench.mini_batches()
OPTIMIZERS = ("sgd", "momentum", "adam")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("norm", bench.NORMS)
@pytest.mark.parametrize("maker", bench.MAKERS)
def test_every_variant_computes_the_losses_of_float64(maker: str, norm: str, optimizer: str) -> None:
    if maker.startswith(bench.TORCH):
        pytest.importorskip("torch", reason="PyTorch is not installed")
    variant = bench.Variant(maker, norm, optimizer)
    assert 0 < bench.check([variant], BATCHES)[variant] < 8


@pytest.mark.parametrize("norm", bench.NORMS)
def test_the_reference_follows_the_gradient(norm: str) -> None:
    """A small step of SGD lowers the loss by its gradient's square, which central differences know without formulas."""
    state = bench.initial_state(norm)
    batch = BATCHES[0]

    def network(lr: float) -> NumPyStep:
        return NumPyStep(state, "sgd", lr, "float64")

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


def with_another_eps(state: State, optimizer: str, lr: float) -> OurStep:
    """Return our step with a wrong eps, whose losses look right to three digits."""
    step = OurStep(state, optimizer, lr)
    step.model.layers[1].eps = 1e-3
    return step


def with_nan(state: State, optimizer: str, lr: float) -> OurStep:
    """Return our step with a weight that is NaN."""
    step = OurStep(state, optimizer, lr)
    step.model.parameters[0] = np.nan
    return step


@pytest.mark.parametrize("wrong", [with_another_eps, with_nan])
def test_a_wrong_variant_is_not_timed(wrong: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench.MAKERS, "bnkernels", wrong)
    monkeypatch.setattr(bench, "time_steps", lambda *_: pytest.fail("timed"))
    with pytest.raises(SystemExit, match=r"^error: bnkernels \(norm batch, sgd\).*not timed$"):
        bench.main(["--quick"])


def test_a_run_writes_what_the_report_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(bench, "SEEDS", 1)
    monkeypatch.setattr(bench, "version_of", lambda package: None)  # as on a machine without PyTorch
    document = bench.measure(["sgd"], rounds=2)
    monkeypatch.setattr(bench, "measure", lambda optimizers, rounds: document)
    path = tmp_path / "results" / "cpu.json"
    bench.main(["--json", str(path)])
    printed = capsys.readouterr().out
    assert "PyTorch                   not installed" in printed
    assert "GPU                       not yet measured" in printed
    written = json.loads(path.read_text(encoding="utf-8"))
    assert written == json.loads(json.dumps(document))
    assert {(row["maker"], row["norm"]) for row in written["rows"]} == {
        (maker, norm) for maker in ("bnkernels", "NumPy expression") for norm in bench.NORMS
    }
    assert all(row["us"]["p20"] <= row["us"]["median"] <= row["us"]["p80"] for row in written["rows"])
    assert [target["met"] for target in written["targets"]][1] is None
    assert "| PyTorch | not installed |" in report.train_step(written)


@pytest.mark.parametrize(
    ("accuracy", "torch", "without", "met"),
    [(0.97, 0.4, 1.6, [True, True, True]), (0.96, 0.6, 1.8, [False, False, False]), (0.965, None, 1.7, [1, None, 1])],
)
def test_targets(accuracy: float, torch: float | None, without: float, met: list) -> None:
    sgd = {"with / without": {"median": without}}
    if torch is not None:
        sgd["ours / PyTorch, batch norm"] = {"median": torch}
    assert [row["met"] for row in bench.targets({"batch": {"mean": accuracy}}, {"sgd": sgd})] == met


def test_rounds_are_interleaved_in_changing_order() -> None:
    calls: list[str] = []
    seen_collecting: list[bool] = []

    def measurement(name: str) -> float:
        calls.append(name)
        seen_collecting.append(gc.isenabled())
        return len(calls)

    figures = harness.interleave({name: lambda name=name: measurement(name) for name in "abc"}, rounds=20)
    rounds = [calls[i : i + 3] for i in range(0, 60, 3)]
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len({tuple(names) for names in rounds}) > 3
    assert sorted(np.concatenate(list(figures.values()))) == list(range(1, 61))
    assert not any(seen_collecting)
    assert gc.isenabled()


def test_collection_is_enabled_again_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError):
        harness.interleave({"a": lambda: 1 / 0}, rounds=1)
    assert gc.isenabled()


def test_quantiles() -> None:
    assert harness.quantiles(np.arange(101) * 1.00001) == {"median": 50.0, "p20": 20.0, "p80": 80.0}


@pytest.mark.parametrize("error", [1e-3, np.nan, np.inf])
def test_a_wrong_op_is_not_timed(error: float) -> None:
    exact = np.ones(3)
    op_cases.check_close("right", (exact + 1e-6).astype("f4"), exact, np.dtype("f4"))
    with pytest.raises(harness.WrongResultError, match=r"wrong: an error of .* not timed"):
        op_cases.check_close("wrong", exact + np.array([0, error, 0]), exact, np.dtype("f4"))


def test_an_optimiser_benchmark_counts_its_steps() -> None:
    """Its correctness check is made of one call, and what is timed are the calls after it."""
    from benchmarks.bench_parameter_update import OPS

    op = OPS["adam"]
    inputs = op.inputs(np.random.default_rng(0), (100,), "float64")
    ours, expression = (op.providers[name]({k: v.copy() for k, v in inputs.items()}) for name in list(op.providers)[:2])
    for _ in range(3):
        (found,), (expected,) = ours(), expression()
        np.testing.assert_allclose(found, expected, rtol=1e-12)
