"""The harness: no speed without a right result, no row left out, nothing lost. Nothing depends on how fast it is."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import benchmarks.__main__ as command
from benchmarks import everything
from benchmarks.harness import clocks, measure, places, records
from benchmarks.harness.case import Arrays, Call, Case, NotSupportedError, Op, Provider, WrongResultError
from benchmarks.harness.timing import ROOT

CASES = [Case("double", "forward", (rows, 3)) for rows in (4, 8)]


def doubled(factor: float = 2.0) -> Callable[[Case, Arrays], Call]:
    """Return a provider's `prepare` that multiplies."""

    def prepare(case: Case, arrays: Arrays) -> Call:
        return lambda: (factor * arrays["x"],)

    return prepare


def refusing(error: BaseException) -> Callable[[Case, Arrays], Call]:
    """Return a `prepare` that raises."""

    def prepare(case: Case, arrays: Arrays) -> Call:
        raise error

    return prepare


def op_with(*providers: Provider, cases: list[Case] = CASES) -> Op:
    """Return an op that doubles its input."""
    return Op(
        "double",
        cases=cases,
        inputs=lambda case, random: {"x": random(case.shape)},
        reference=lambda case, arrays, xp: (2 * arrays["x"],),
        bytes_moved=lambda case: 2 * case.size * case.itemsize,
        providers=providers,
    )


def measured(*providers: Provider, case: Case = CASES[0]) -> dict[str, dict]:
    """Return the rows of a case by provider."""
    rows = measure.measure(op_with(*providers), case, providers, places.Host(), seconds=0.01)
    return {row["provider"]: row for row in rows}


def test_a_right_provider_is_timed_beside_the_copy() -> None:
    rows = measured(Provider("right", "cpu", doubled()))
    row = rows["right"]
    assert row["status"] == rows["copy"]["status"] == "ok"
    assert 0 < row["hot_us_p20"] <= row["hot_us_median"] <= row["hot_us_p80"]
    assert row["GB_per_s"] == pytest.approx(2 * 12 * 4 / row["hot_us_median"] / 1e3, rel=1e-3)
    assert row["percent_of_copy"] == pytest.approx(100 * rows["copy"]["hot_us_median"] / row["hot_us_median"], rel=1e-3)
    assert row["error"] == 0
    assert row["rounds"] >= measure.ROUNDS[0]


@pytest.mark.parametrize("factor", [2.01, np.nan, np.inf])
def test_a_wrong_provider_is_not_timed(factor: float) -> None:
    rows = measured(Provider("wrong", "cpu", doubled(factor)), Provider("right", "cpu", doubled()))
    assert rows["wrong"]["status"].startswith("wrong result: output 0 is off by")
    assert "hot_us_median" not in rows["wrong"]
    assert rows["right"]["status"] == "ok"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (NotSupportedError("not supported yet: no"), "not supported yet: no"),
        (ValueError("a log\nof a compiler"), "failed: ValueError: a log of a compiler"),
        (MemoryError("none left"), "failed: MemoryError: none left"),
    ],
)
def test_who_cannot_do_a_case_has_a_row_with_the_reason(error: Exception, status: str) -> None:
    rows = measured(Provider("refuses", "cpu", refusing(error)), Provider("right", "cpu", doubled()))
    assert rows["refuses"]["status"] == status
    assert rows["right"]["status"] == "ok"


def test_who_is_not_installed_is_not_even_prepared() -> None:
    absent = Provider("gone", "cpu", refusing(AssertionError("prepared")), absent=lambda: "it is not installed")
    assert measured(absent)["gone"]["status"] == "absent: it is not installed"


def test_a_case_without_its_data_type_has_rows_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ml_dtypes", None)
    rows = measured(Provider("right", "cpu", doubled()), case=Case("double", "forward", (4, 3), "bfloat16"))
    assert {row["status"] for row in rows.values()} == {"not measured: bfloat16 arrays need the package ml_dtypes"}


def error_of(found: Any, exact: Any, dtype: str = "float32") -> float:
    """Return the error of one output."""
    return measure.error_of(Case("double", "forward", (4,), dtype), [np.asarray(found)], (np.asarray(exact),))


def test_the_tolerance_grows_with_the_stored_type_and_the_largest_element() -> None:
    assert error_of([1.0, 1e3], [1.0, 1e3 + 1e-2]) == pytest.approx(1e-5, rel=1e-3)
    assert error_of([1.0 + 2**-7], [1.0], "bfloat16") == pytest.approx(2**-7, rel=1e-3)
    with pytest.raises(WrongResultError, match="off by"):
        error_of([1.0 + 2**-7], [1.0], "float32")


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_what_is_no_number_is_wrong(wrong: float) -> None:
    with pytest.raises(WrongResultError, match=f"off by {wrong}"):
        error_of([1.0, wrong], [1.0, 1.0])


@pytest.mark.parametrize(("found", "message"), [([[1.0, 1.0]], "has the shape"), ([], "0 outputs instead of 1")])
def test_outputs_of_another_form_are_wrong(found: list, message: str) -> None:
    with pytest.raises(WrongResultError, match=message):
        measure.error_of(CASES[0], [np.asarray(output) for output in found], (np.ones(3),))


# ---- the command line -----------------------------------------------------------------------------------------------


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Put an op in the place of all others."""
    return lambda *providers, **given: monkeypatch.setattr(command, "OPS", {"double": op_with(*providers, **given)})


def run(path: Path, *arguments: str) -> tuple[int, list[dict]]:
    """Run quickly; return exit status and rows."""
    status = command.main(["--place", "cpu", "--seconds-per-case", "0.01", "--out", str(path), *arguments])
    return status, json.loads(path.read_text())["rows"]


def test_a_run_writes_json_csv_and_a_table(
    tmp_path: Path, listed: Callable[..., None], capsys: pytest.CaptureFixture
) -> None:
    listed(
        Provider("right", "cpu", doubled()),
        Provider("gone", "cpu", doubled(), absent=lambda: "it is not installed"),
        Provider("elsewhere", "cuda", doubled()),
    )
    status, rows = run(tmp_path / "deep" / "ops.json")
    assert status == 0
    assert [(row["shape"], row["provider"]) for row in rows] == [
        (shape, name) for shape in ("4x3", "8x3") for name in ("right", "gone", "copy")
    ]
    document = json.loads((tmp_path / "deep" / "ops.json").read_text())
    assert {"device", "versions", "commit", "date", "place"} <= document.keys()
    with (tmp_path / "deep" / "ops.csv").open(newline="") as text:
        lines = list(csv.DictReader(text))
    assert [line["provider"] for line in lines] == [row["provider"] for row in rows]
    assert float(lines[0]["hot_us_median"]) == rows[0]["hot_us_median"]
    printed = capsys.readouterr().out
    assert "double forward 4x3 float32 NC on cpu" in printed
    assert "absent: it is not installed" in printed


@pytest.mark.parametrize("wrong", [doubled(3), refusing(RuntimeError("broken"))])
def test_a_run_with_a_wrong_or_broken_provider_fails(
    tmp_path: Path, listed: Callable[..., None], wrong: Callable
) -> None:
    listed(Provider("right", "cpu", doubled()), Provider("wrong", "cpu", wrong))
    status, rows = run(tmp_path / "ops.json")
    assert status == 1
    assert [row["status"] for row in rows if row["provider"] == "right"] == ["ok", "ok"]


def test_ctrl_c_keeps_what_was_measured(
    tmp_path: Path, listed: Callable[..., None], capsys: pytest.CaptureFixture
) -> None:
    def interrupted(case: Case, arrays: Arrays) -> Call:
        if case == CASES[1]:
            raise KeyboardInterrupt
        return doubled()(case, arrays)

    listed(Provider("right", "cpu", interrupted))
    _, rows = run(tmp_path / "ops.json")
    assert [row["status"] for row in rows] == ["ok", "ok", "not measured: interrupted"]
    assert "what was measured is kept" in capsys.readouterr().err


def test_the_end_of_the_time_keeps_what_was_measured(tmp_path: Path, listed: Callable[..., None]) -> None:
    listed(Provider("right", "cpu", doubled()))
    _, rows = run(tmp_path / "ops.json", "--seconds", "1e-9")
    assert [row["status"] for row in rows] == ["not measured: out of time"] * 2


def test_slow_starters_come_last_and_with_everybody(tmp_path: Path, listed: Callable[..., None]) -> None:
    prepared: list[tuple[str, Case]] = []

    def noting(name: str) -> Callable:
        def prepare(case: Case, arrays: Arrays) -> Call:
            prepared.append((name, case))
            return doubled()(case, arrays)

        return prepare

    listed(Provider("slow", "cpu", noting("slow"), slow_start=True), Provider("quick", "cpu", noting("quick")))
    _, rows = run(tmp_path / "ops.json")
    first, second = CASES
    assert prepared == [
        ("quick", first),
        ("quick", second),
        ("slow", first),
        ("quick", first),
        ("slow", second),
        ("quick", second),
    ]
    assert [row["provider"] for row in rows] == ["slow", "quick", "copy"] * 2
    assert {row["status"] for row in rows} == {"ok"}


def test_large_cases_of_the_list_are_left_to_a_gpu(tmp_path: Path, listed: Callable[..., None]) -> None:
    huge = Case("double", "forward", (2**20, 32))
    listed(Provider("right", "cpu", doubled()), cases=[huge])
    _, rows = run(tmp_path / "ops.json")
    assert [row["status"] for row in rows] == ["not measured: 34 million elements are left to a GPU"]


def test_shapes_of_ones_own(tmp_path: Path, listed: Callable[..., None]) -> None:
    listed(Provider("right", "cpu", doubled()))
    _, rows = run(tmp_path / "ops.json", "--shape", "5x2", "7x1", "--dtype", "float64")
    assert [(row["shape"], row["dtype"]) for row in rows if row["provider"] == "right"] == [
        ("5x2", "float64"),
        ("7x1", "float64"),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "64x"], "expected up to four positive sizes"),
        (["--shape", "0x3"], "expected up to four positive sizes"),
        (["--out", "results"], "expects a path that ends in .json"),
        (["--op", "triple"], "invalid choice"),
    ],
)
def test_bad_options_are_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        command.main(["--place", "cpu", *arguments])
    assert message in capsys.readouterr().err


def test_no_case_left_says_so(listed: Callable[..., None]) -> None:
    listed(Provider("right", "cpu", doubled()))
    with pytest.raises(SystemExit, match="no case is left"):
        command.main(["--place", "cpu", "--dtype", "float16"])


def test_the_list_is_complete() -> None:
    from benchmarks.ops.bench_batch_norm import CASES as listed_cases

    shapes = {case.shape for case in listed_cases}
    assert shapes >= {(64, 20), (8192, 1024), (100_000, 32), (65_536, 4096), (20, 6, 65536), (128, 2048, 4, 4)}
    assert {case.epilogue for case in listed_cases} == {"", "relu", "add_relu"}
    assert len(listed_cases) == len(set(map(str, listed_cases))) == (2 * 7 + 2 + 2 * 4 + 5) * 2 * 3
    assert listed_cases[0] == Case("batch_norm", "forward", (64, 20))


def test_the_table_puts_the_fastest_first_and_the_reasons_last() -> None:
    common = measure.new_row(CASES[0], Provider("", "cpu", doubled()), 96)
    rows = [
        common | {"provider": "slow", "status": "ok", "hot_us_median": 2.0, "hot_us_p20": 1.5, "hot_us_p80": 3.0},
        common | {"provider": "gone", "status": "absent: why"},
        common | {"provider": "fast", "status": "ok", "hot_us_median": 1.0, "hot_us_p20": 1.0, "hot_us_p80": 1.0},
    ]
    lines = records.table(rows).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["fast", "slow", "gone"]
    assert "2 (1.5 to 3)" in lines[2]
    assert lines[3].endswith("absent: why")


def test_a_host_batch_makes_every_call_once() -> None:
    made: list[int] = []
    batch = clocks.HostClock().batch([lambda i=i: (made.append(i),) for i in range(3)], keep=False)
    assert batch.run() > 0
    assert made == [0, 1, 2]


# ---- other ways in --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "case"),
    [
        ("benchmarks", "batch_norm forward 64x20 float32"),
        ("benchmarks/ops/bench_mini_batch.py", "mini_batch forward 64x64 float32"),
    ],
    ids=["all", "one op"],
)
def test_the_same_case_under_pytest_benchmark(where: str, case: str, tmp_path: Path) -> None:
    path = tmp_path / "benchmarks.json"
    wanted = " and ".join(f"{case}-cpu-bnkernels".split()) + " and not masked and not linear"
    arguments = ["-m", "pytest", "-q", where, "--benchmark-only", "-k", wanted, f"--benchmark-json={path}"]
    # pytest-benchmark measures nothing in a process of pytest-xdist.
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=alone, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = json.loads(path.read_text())["benchmarks"]
    assert found["group"] == f"{case} on cpu"
    assert found["extra_info"]["status"] == "ok"
    assert found["extra_info"]["hot_us_median"] > 0
    assert found["stats"]["median"] > 0


@pytest.mark.parametrize("failing", [None, "benchmarks.steps.overhead"])
def test_everything_runs_all_parts_whatever_becomes_of_one(
    failing: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    modules: list[str] = []

    def run(arguments: list[str], cwd: Path) -> subprocess.CompletedProcess:
        modules.append(arguments[2])
        return subprocess.CompletedProcess(arguments, returncode=int(arguments[2] == failing))

    monkeypatch.setattr(everything, "subprocess", types.SimpleNamespace(run=run))
    assert everything.main(["--place", "cpu"]) == int(failing is not None)
    assert modules == [
        "benchmarks",
        "benchmarks.steps.bench_train_step",
        "benchmarks.steps.overhead",
        "benchmarks.partition",
        "benchmarks.report",
    ]
    assert capsys.readouterr().out.count("failed (1)") == int(failing is not None)
