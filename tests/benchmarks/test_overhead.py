"""The overhead figure: right before fast, nothing lost, and pictures of the CSV alone."""

from __future__ import annotations

import csv
import functools
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import steps
from benchmarks.steps import overhead, overhead_plot
from benchmarks.steps.expression import ExpressionStep
from benchmarks.steps.ours import OurStep
from benchmarks.steps.overhead import Point
from benchmarks.steps.step import Maker, State

EXPRESSION = Maker("NumPy expression", "cpu", ExpressionStep)
OURS = Maker("bnkernels", "cpu", OurStep)
SMALL = (Point("units", 8), Point("batch", 16))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take two small points and one block of short rounds."""
    monkeypatch.setattr(overhead, "POINTS", SMALL)
    monkeypatch.setattr(overhead, "UNITS", 8)
    monkeypatch.setattr(overhead, "BATCH", 16)
    monkeypatch.setattr(overhead, "MOST_BLOCKS", 1)
    monkeypatch.setattr(overhead, "MOST_STEPS", 4)


def only(monkeypatch: pytest.MonkeyPatch, *makers: Maker) -> None:
    """Let these and nobody else make steps."""
    monkeypatch.setattr(steps, "MAKERS", makers)


def rows_of(folder: Path) -> list[dict[str, str]]:
    """Return the CSV."""
    with (folder / "overhead.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.usefixtures("small")
def test_a_run_has_a_row_for_everybody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    only(monkeypatch, OURS, EXPRESSION, Maker("gone", "cpu", ExpressionStep, absent=lambda: "it is not installed"))
    overhead.main(["--out", str(tmp_path)])
    rows = rows_of(tmp_path)
    assert [(row["axis"], row["framework"], row["norm"]) for row in rows] == list(
        itertools.product(("units", "batch"), ("bnkernels", "NumPy expression", "gone"), overhead.NORMS)
    )
    by_name = {(row["framework"], row["norm"]): row for row in rows}
    assert by_name["gone", "batch"]["status"] == "absent: it is not installed"
    for key in (("bnkernels", "batch"), ("bnkernels", "layer"), ("NumPy expression", "layer")):
        row = by_name[key]
        assert row["status"] == "ok"
        assert float(row["ratio_p20"]) <= float(row["ratio_median"]) <= float(row["ratio_p80"])
    assert by_name["bnkernels", "none"]["ratio_median"] == ""
    document = json.loads((tmp_path / "overhead.json").read_text(encoding="utf-8"))
    assert document["place"] == "cpu"
    assert len(document["rows"]) == len(rows)
    assert "gone, layer: absent: it is not installed" in capsys.readouterr().out


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("error", [None, RuntimeError("broken")])
def test_who_is_wrong_or_fails_is_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception | None
) -> None:
    def wrong(state: State, optimizer: str, lr: float) -> ExpressionStep:
        if error:
            raise error
        return ExpressionStep({name: array * 1.01 for name, array in state.items()}, optimizer, lr)

    only(monkeypatch, Maker("wrong", "cpu", wrong), EXPRESSION)
    with pytest.raises(SystemExit, match="6 rows are wrong or failed"):
        overhead.main(["--out", str(tmp_path)])
    statuses = {
        (row["framework"], row["status"].partition(":")[0], row["us_median"] == "") for row in rows_of(tmp_path)
    }
    assert statuses == {("wrong", "failed" if error else "wrong", True), ("NumPy expression", "ok", False)}


@pytest.mark.usefixtures("small")
def test_the_end_of_the_time_keeps_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, EXPRESSION)
    times = itertools.chain([0.0, 0.0], itertools.repeat(100.0))  # the start, the first point, and then it is late
    monkeypatch.setattr(overhead.time, "monotonic", lambda: next(times))
    overhead.main(["--out", str(tmp_path), "--seconds", "10"])
    statuses = {row["axis"]: row["status"] for row in rows_of(tmp_path)}
    assert statuses == {"units": "ok", "batch": "not measured: out of time"}


@pytest.mark.usefixtures("small")
def test_ctrl_c_keeps_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(state: State, optimizer: str, lr: float) -> ExpressionStep:
        made.append(state)
        if len(made) > len(overhead.NORMS):
            raise KeyboardInterrupt
        return ExpressionStep(state, optimizer, lr)

    made: list[State] = []
    only(monkeypatch, Maker("NumPy expression", "cpu", interrupted))
    with pytest.raises(SystemExit) as stopped:
        overhead.main(["--out", str(tmp_path)])
    assert stopped.value.code == 130
    statuses = {row["axis"]: row["status"] for row in rows_of(tmp_path)}
    assert statuses == {"units": "ok", "batch": "not measured: interrupted"}


def plotted(folder: Path, rows: list[dict[str, Any]]) -> list[str]:
    """Write a CSV and draw it; return the names of the pictures."""
    folder.mkdir(exist_ok=True)
    with (folder / "overhead.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, overhead.COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    return [path.name for path in overhead_plot.plot(folder)]


def csv_row(value: int, ratio: float, **more: object) -> dict[str, Any]:
    """Return a measured row."""
    row = {"place": "cpu", "device": "a CPU", "axis": "units", "value": value, "framework": "bnkernels"}
    ratios = {f"ratio_{quantile}": ratio for quantile in overhead.QUANTILES}
    return row | {"norm": "batch", "status": "ok"} | ratios | more


def test_the_pictures_come_from_the_csv_alone(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    rows = [csv_row(32, 1.5), csv_row(64, 1.25)]
    assert plotted(tmp_path / "a", rows) == ["overhead_units.png"]
    assert plotted(tmp_path / "b", rows) == ["overhead_units.png"]
    pictures = [(tmp_path / folder / "overhead_units.png").read_bytes() for folder in "ab"]
    assert pictures[0] == pictures[1]
    assert pictures[0].startswith(b"\x89PNG")
    plotted(tmp_path / "c", [csv_row(32, 1.5), csv_row(64, 2.25)])
    assert (tmp_path / "c" / "overhead_units.png").read_bytes() != pictures[0]


def test_without_a_measured_ratio_there_is_no_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    unmeasured = dict.fromkeys((f"ratio_{quantile}" for quantile in overhead.QUANTILES), "")
    assert plotted(tmp_path, [csv_row(32, 1.0) | unmeasured | {"status": "absent: gone"}]) == []


def test_the_points_are_those_of_the_published_measurement() -> None:
    by_axis = {
        axis: sorted(point.value for point in overhead.POINTS if point.axis == axis) for axis in ("units", "batch")
    }
    assert by_axis == {"units": [2**i for i in range(5, 11)], "batch": [2**i for i in range(8, 15)]}
    assert Point("units", 32).sizes == (32,) * 6 + (10,)


@pytest.mark.usefixtures("small")
def test_a_term_missing_in_a_backward_is_noticed() -> None:
    """The first loss is right then, and the rate of the figure is small: the losses after it have to tell."""

    class Forgetful(ExpressionStep):
        def _norm_backward(self, i: int, da: Any, xhat: Any, rstd: Any, gradients: dict[str, Any]) -> Any:
            whole = super()._norm_backward(i, da, xhat, rstd, gradients)
            return self.parameters[f"{i}.gamma"] * rstd * da if self.norm == "batch" else whole

    rows, _ = overhead.measure_point(Point("units", 32), {"forgetful": Maker("forgetful", "cpu", Forgetful)}, until=0)
    statuses = {row["norm"]: row["status"].partition(":")[0] for row in rows}
    assert statuses == {"none": "ok", "batch": "wrong", "layer": "ok"}


def test_a_ratio_is_that_of_the_same_round() -> None:
    figures = {("a", "none"): np.array([1.0, 10.0, 100.0]), ("a", "batch"): np.array([2.0, 20.0, 200.0])}
    found = overhead.figures_of(figures, "a", "batch", 7)
    assert found["us_median"] == 20
    assert found["ratio_p20"] == found["ratio_median"] == found["ratio_p80"] == 2
    assert (found["rounds"], found["steps_per_round"]) == (3, 7)
    del figures["a", "none"]
    assert "ratio_median" not in overhead.figures_of(figures, "a", "batch", 7)


@pytest.mark.usefixtures("small")
def test_the_slow_starters_come_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[str, int]] = []

    def recording(name: str, state: State, *rest: Any) -> ExpressionStep:
        made.append((name, len(state["0.weight"])))
        return ExpressionStep(state, *rest)

    makers = [
        Maker("slow", "cpu", functools.partial(recording, "slow"), slow_start=True),
        Maker("fast", "cpu", functools.partial(recording, "fast")),
    ]
    only(monkeypatch, *makers)
    monkeypatch.setattr(overhead, "POINTS", (Point("units", 4), Point("units", 8)))
    overhead.main(["--out", str(tmp_path)])
    assert list(dict.fromkeys(made)) == [("fast", 4), ("fast", 8), ("slow", 4), ("slow", 8)]
    assert {row["status"] for row in rows_of(tmp_path)} == {"ok"}


def test_ctrl_c_during_the_rounds_loses_the_unfinished_block_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = iter([1.0, 2.0, 3.0, 4.0])

    def watch() -> float:
        if (figure := next(figures, None)) is None:
            raise KeyboardInterrupt
        return figure

    monkeypatch.setattr(overhead, "BLOCK", 3)
    taken, interrupted = overhead.take_rounds({"0": watch}, until=float("inf"))
    assert interrupted
    np.testing.assert_array_equal(taken["0"], [1.0, 2.0, 3.0])
    assert overhead.take_rounds({"0": watch}, until=float("inf")) == ({}, True)
