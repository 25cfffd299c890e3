"""The budget of the kernels: the committed table is that of the sources, and its arithmetic that of the devices."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from benchmarks.counts import budget
from benchmarks.counts.budget_rows import ROWS, Row
from benchmarks.counts.devices import H100, H200
from benchmarks.report import budget as report
from bnkernels.runtime import source
from tools.compile import nvrtc, paths


def test_the_issue_budget_is_what_memory_leaves_time_for() -> None:
    cycles = 2 * budget.VECTOR / (4.3e12 / 132 / 1.98e9)  # for a vector in and one out
    assert budget.issue_budget(H200, 2) == pytest.approx(128 * cycles)
    assert budget.issue_budget(H100, 3) > budget.issue_budget(H200, 3) > budget.issue_budget(H200, 2)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_the_committed_table_is_of_these_sources(row: Row) -> None:
    committed = json.loads(budget.PATH.read_text(encoding="utf-8"))
    assert committed["nvrtc"] == nvrtc.NEWEST
    assert len(committed["rows"]) == len(ROWS)
    digest = committed_row(row)["digest"]
    assert digest == budget.digest(row), "python -m benchmarks.counts.budget, then python -m benchmarks.report"


@pytest.mark.usefixtures("nvrtc")
@pytest.mark.parametrize("row", ROWS[::9], ids=lambda row: row.name)
def test_the_same_sources_have_the_same_figures(row: Row) -> None:
    found = json.loads(json.dumps(budget.figures(row)))
    assert found | {"digest": budget.digest(row)} == committed_row(row)


def test_a_kernel_that_changes_has_another_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    before, read = budget.digest(ROWS[0]), source.read
    monkeypatch.setattr(source, "read", lambda *given: read(*given) + "\n")
    assert budget.digest(ROWS[0]) != before


def committed_row(row: Row) -> dict[str, Any]:
    """Return what is committed of a row."""
    rows = json.loads(budget.PATH.read_text(encoding="utf-8"))["rows"]
    (found,) = (one for one in rows if (one["op"], tuple(one["shape"])) == (row.op, row.shape))
    return found


@pytest.mark.usefixtures("nvrtc")
def test_a_path_with_too_few_turns_of_a_loop_is_refused() -> None:
    row = next(row for row in ROWS if row.summed)
    stem, kernel, launch = budget.launched(row)
    machine, vectors = paths.machine(stem, kernel, launch.constants), row.vectors(launch)
    budget.check_turns(row, machine, launch, vectors)
    for text, what in {
        "i < last; ++i, ": "sums",
        "write(kept.own[at])": "stores",
        "i < count; ++i, to": "copies",
    }.items():
        few = (0,) * len(row.trips(launch)[text])
        short = dataclasses.replace(row, trips=lambda launch, text=text, few=few: row.trips(launch) | {text: few})
        with pytest.raises(ValueError, match=f"{what} of {vectors} vectors"):
            budget.check_turns(short, machine, launch, vectors)


def test_a_measured_time_stands_beside_the_predicted_one() -> None:
    counts = json.loads(budget.PATH.read_text(encoding="utf-8"))
    forward = next(row for row in counts["rows"] if row["op"] == "batch_norm forward" and "budget" not in row)
    case = {"op": "batch_norm", "direction": "forward", "shape": "64x20", "dtype": "float32", "layout": "NC"}
    measured = case | {"epilogue": "relu", "provider": "bnkernels", "status": "ok", "hot_us_median": 8.0}
    predicted, found = report.times_of(forward, {"rows": [measured]}, None)
    assert found == 8.0
    assert predicted == pytest.approx(1.1 + forward["cycles"] / 1980)
    ratio = f"8, predicted / measured {predicted / 8:.2f}"
    assert ratio in report.page(counts, {"rows": [measured]}, None)
    assert "not yet measured" in report.page(counts, None, None)
