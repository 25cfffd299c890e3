"""The documents hold what runs produced: regenerating them changes nothing, and without a run there is no figure."""

from __future__ import annotations

import doctest
import json
import re
from pathlib import Path

import pytest

from benchmarks import kernels, report
from tests.emulator import EmulatorRuntime

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("path", report.DOCUMENTS, ids=lambda path: path.name)
def test_the_documents_are_what_the_report_writes(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert report.render(text, report.sections()) == text, "run python -m benchmarks.report"


def test_every_section_has_its_place() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in report.DOCUMENTS)
    assert sorted(re.findall(r"^<!-- (\w+) -->$", text, re.M)) == sorted(report.sections())


@pytest.mark.emulator
def test_the_counts_of_the_kernels_are_those_of_these_kernels(emulated: EmulatorRuntime) -> None:
    committed = json.loads((report.RESULTS / "kernels.json").read_text(encoding="utf-8"))
    if emulated.build != "plain":
        pytest.skip(f"the build {emulated.build!r} does not count accesses")
    assert kernels.count() == committed["kernels"], "run python -m benchmarks.kernels"


def test_without_results_nothing_is_claimed(tmp_path: Path) -> None:
    for name, text in report.sections(tmp_path, tmp_path / "baseline.json").items():
        assert report.ABSENT in text, name
        assert not re.search(r"\d", text), name


def results() -> dict:
    """Return a run of SGD on a machine without PyTorch, as `bench_train_step` writes it."""
    spread = {"median": 100.4, "p20": 90.0, "p80": 120.0}
    rows = [{"maker": "bnkernels", "norm": norm, "optimizer": "sgd", "us": spread} for norm in ("batch", "none")]
    reached = {"mean": 0.9712, "seeds": [0.97, 0.9724], "steps_to_95": [66, None]}
    return {
        "device": "a CPU",
        "versions": {"NumPy": "2.0", "torch": None},
        "threads": 1,
        "commit": "0123abc",
        "date": "2026-01-02",
        "protocol": {"rounds": 7, "steps_per_round": 20},
        "rows": rows,
        "absent": ["PyTorch"],
        "ratios": {"sgd": {"with / without": {"median": 1.234, "p20": 1.0, "p80": 2.0}}},
        "accuracy": {"batch": reached, "none": reached},
        "targets": [
            {"target": "a <= 1", "found": 2.0, "met": False},
            {"target": "b <= 1", "found": 0.5, "met": True},
            {"target": "c <= 1", "found": None, "met": None},
        ],
    }


def test_the_training_step_shows_the_run_and_says_what_is_missing() -> None:
    text = report.train_step(results())
    assert "a CPU, 1 thread; NumPy 2.0; commit 0123abc, 2026-01-02." in text
    assert "| bnkernels, no norm | 100 (90 to 120) |" in text
    assert "| PyTorch | not installed |" in text
    assert "| any of them on a GPU | not yet measured |" in text
    assert "| ours: batch norm / no norm | 1.23 |" in text
    assert "| batch norm | 0.9712 | 0.9700, 0.9724 | 66, never |" in text
    assert "| a <= 1 | 2 | **not met** |" in text
    assert "| b <= 1 | 0.5 | met |" in text
    assert "| c <= 1 | not yet measured | not yet measured |" in text


def test_the_answer_claims_nothing_about_an_absent_peer() -> None:
    run = results()
    assert "1.23 times one without (one thread" in report.answer(run)
    run["ratios"]["sgd"]["ours / PyTorch, batch norm"] = {"median": 0.456}
    assert "and 0.46 times PyTorch's" in report.answer(run)


def test_what_was_between_the_comments_is_replaced() -> None:
    text = "a\n<!-- x -->\nold 1\n\nold 2\n<!-- /x -->\nb\n<!-- y -->\n<!-- /y -->\n"
    once = report.render(text, {"x": r"new \1", "y": "new", "z": "unused"})
    assert once == "a\n<!-- x -->\n\nnew \\1\n\n<!-- /x -->\nb\n<!-- y -->\n\nnew\n\n<!-- /y -->\n"
    assert report.render(once, {"x": r"new \1", "y": "new"}) == once


@pytest.mark.parametrize(
    "text",
    [
        "<!-- x -->\n",
        "<!-- /x -->\n",
        "<!-- unknown -->\n<!-- /unknown -->\n",
        "<!-- x -->\n<!-- /x -->\n<!-- x -->\n<!-- /x -->\n",
    ],
)
def test_broken_places_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected pairs of comments of x"):
        report.render(text, {"x": "new"})


def test_the_lines_of_the_readme_run() -> None:
    outcome = doctest.testfile(str(ROOT / "README.md"), module_relative=False)
    assert outcome.attempted >= 9
    assert outcome.failed == 0


@pytest.mark.parametrize("path", [*report.DOCUMENTS, ROOT / "docs" / "emulator.md"], ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (path.parent / target).exists(), target
