"""The documents hold what runs produced: regenerating them changes nothing, and without a run there is no figure."""

from __future__ import annotations

import doctest
import json
import re
import types
from pathlib import Path

import pytest

from benchmarks.counts import kernels
from benchmarks.report import documents, front, gpu, ops, overhead, partition, targets, train_step
from benchmarks.report.text import ABSENT
from tests.train.test_captured_step import cupy
from tools.emulator import EmulatorRuntime

__all__ = ["cupy"]  # the fixture


def test_the_readme_is_what_the_report_writes() -> None:
    text = documents.README.read_text(encoding="utf-8")
    assert documents.render(text, documents.sections()) == text, "run python -m benchmarks.report"
    assert re.findall(r"^<!-- (\w+) -->$", text, re.M) == sorted(documents.sections())


def test_the_generated_pages_are_what_the_report_writes() -> None:
    pages = documents.pages()
    assert {path.name for path in documents.GENERATED.iterdir()} == set(pages)
    for name, page in pages.items():
        assert (documents.GENERATED / name).read_text(encoding="utf-8") == str(page), "run python -m benchmarks.report"


def test_a_reader_is_through_the_readme_in_a_few_minutes() -> None:
    """Tables aside: a row more for a new op is no more to read."""
    lines = documents.README.read_text(encoding="utf-8").splitlines()
    assert sum(len(line.split()) for line in lines if not line.startswith("|")) <= 700


@pytest.mark.emulator
@pytest.mark.plain_build
def test_the_counts_of_the_kernels_are_those_of_these_kernels(emulated: EmulatorRuntime) -> None:
    committed = json.loads((documents.RESULTS / "kernels.json").read_text(encoding="utf-8"))
    assert kernels.count() == committed["kernels"], "run python -m benchmarks.counts.kernels"


def test_without_results_nothing_is_claimed(tmp_path: Path) -> None:
    bodies = {name: page.body for name, page in documents.pages(tmp_path, tmp_path / "baseline.json").items()}
    for name, text in (bodies | documents.sections(tmp_path)).items():
        assert ABSENT in text, name
        figures = re.sub(r"\* batch norm .*|^## .*", "", text, flags=re.M)  # the targets themselves, and headings
        assert not re.search(r"\d", figures), name


def results() -> dict:
    """Return a run of SGD on a machine without PyTorch, as `bench_train_step` writes it."""
    spread = {"median": 100.4, "p20": 90.0, "p80": 120.0}
    case = {"network": "64-20-10", "batch": 64, "optimizer": "sgd", "rounds": 7}
    rows = [{"maker": "bnkernels", "norm": norm, "us": spread} | case for norm in ("batch", "none")]
    reached = {"mean": 0.9712, "seeds": [0.97, 0.9724], "steps_to_95": [66, None]}
    return {
        "place": "cpu",
        "device": "a CPU",
        "versions": {"NumPy": "2.0", "torch": None},
        "engine": "compiled by Numba",
        "threads": 1,
        "commit": "0123abc",
        "date": "2026-01-02",
        "protocol": {"steps_per_round": 20},
        "rows": rows,
        "absent": {"PyTorch": "not installed"},
        "ratios": [case | {"ratios": {"with / without": {"median": 1.234, "p20": 1.0, "p80": 2.0}}}],
        "accuracy": {"batch": reached, "none": reached},
        "targets": [
            {"target": "a <= 1", "found": 2.0, "met": False},
            {"target": "b <= 1", "found": 0.5, "met": True},
            {"target": "c <= 1", "found": None, "met": None},
        ],
    }


def test_the_training_step_shows_the_run_and_says_what_is_missing() -> None:
    text = train_step.figures({"cpu": results(), "cuda": None})
    assert "On a CPU, a CPU, 1 thread; ours compiled by Numba; NumPy 2.0; commit 0123abc, 2026-01-02." in text
    assert "| bnkernels, no norm | 100 (90 to 120) |" in text
    assert text.count("PyTorch") == 1
    assert "Not measured: PyTorch (not installed)." in text
    assert "## 64-20-10, mini-batches of 64" in text
    assert "| ours, the faster engine: batch norm / no norm | 1.23 |" in text
    assert "| batch norm | 0.9712 | 0.9700, 0.9724 | 66, never |" in text
    assert text.endswith("On a GPU: not yet measured.")
    text = targets.page(None, results(), None)
    assert "| a <= 1 | 2 | **missed** |" in text
    assert "| b <= 1 | 0.5 | met |" in text
    assert "| c <= 1 | not yet measured | not yet measured |" in text


def op_row(provider: str, status: str = "ok", us: float | None = None, kind: str = "cold", **more: object) -> dict:
    """Return a row of the question's own forward, as `python -m benchmarks` writes it."""
    case = {"op": "batch_norm", "direction": "forward", "shape": "64x20", "dtype": "float32", "layout": "NC"}
    row = case | {"epilogue": "", "place": "cuda", "provider": provider, "status": status} | more
    if us is not None:
        row |= {f"{kind}_us_{quantile}": us for quantile in ("median", "p20", "p80")}
    return row


def ops_run(*rows: dict) -> dict:
    """Return a run on a GPU."""
    return {name: results()[name] for name in ("versions", "commit", "date")} | {
        "device": "NVIDIA Made-Up",
        "place": "cuda",
        "rows": list(rows),
    }


def test_the_best_rival_is_no_limit_and_was_right() -> None:
    run = ops_run(
        op_row("bnkernels", us=2.0, percent_of_copy=50.0, kernels=1.0),
        op_row("PyTorch", us=5.0, kernels=4.0),
        op_row("JAX", us=4.0),
        op_row("copy", us=1.0),
        op_row("wrong", status="wrong result: no"),
        op_row("gone", status="absent: it is not installed"),
    )
    text = ops.summary(run)
    assert "| batch norm forward, 64 x 20 float32 | 2 (2 to 2) | 50 | JAX | 4 (4 to 4) | 0.50 |" in text
    text = ops.of_the_question({"cuda": run})
    assert [line.split(" | ")[0] for line in text.splitlines() if "(" in line and line.startswith("|")] == [
        "| copy",
        "| **bnkernels**",
        "| JAX",
        "| PyTorch",
    ]
    assert "| PyTorch | 5 (5 to 5) | 4 |" in text
    assert "Not measured: gone (it is not installed)." in text
    assert "On a CPU: not yet measured." in text


def test_the_front_page_has_ours_beside_the_fastest_pytorch() -> None:
    cases = ops_run(
        op_row("bnkernels", us=2.0),
        op_row("PyTorch eager", us=5.0),
        op_row("torch.compile", us=4.0),
        op_row("copy", us=1.0),
    )
    steps = results() | {"place": "cuda"}
    text = front.speed({"cuda": cases}, {"cuda": steps})
    assert "| batch norm forward, 64 x 20 | 2 | 4 | 0.50 | 1 |" in text
    assert "| 64-20-10, training step with batch norm | 100 |  |  |  |" in text
    assert text.startswith("On a CPU: not yet measured.\n\nOn a GPU, NVIDIA Made-Up, 2026-01-02:")
    assert text.endswith("A step of ours with batch norm takes 1.23 times one without.")
    steps["ratios"][0]["ratios"]["PyTorch with / without"] = {"median": 1.1}
    assert front.speed({"cuda": cases}, {"cuda": steps}).endswith(", one of PyTorch's 1.10 times.")
    assert front.speed({"cuda": cases}, {"cuda": None}).count(ABSENT) == 2


def test_a_target_is_a_ratio_to_the_fastest_of_its_rivals_with_the_roofline_of_those_missed() -> None:
    question, large = {"layout": "NC", "threads": 1}, {"shape": "8192x1024", "threads": 1}
    rows = [
        op_row("bnkernels", us=9.0, kind="hot", bytes=10_000, **question),
        op_row("PyTorch eager", us=20.0, kind="hot", **question),
        op_row("PyTorch eager, out=", us=18.0, kind="hot", **question),
        op_row("by neuron, C++", us=5.0, kind="hot", **question),  # no rival of this target
        op_row("copy", us=1.0, kind="hot", **question),
        op_row("bnkernels", us=900.0, kind="hot", bytes=8192 * 1024 * 8, **large),
        op_row("PyTorch eager", us=1000.0, kind="hot", **large),
        op_row("copy", us=800.0, kind="hot", **large),
    ]
    text = targets.page(results() | {"rows": rows}, None, None)
    assert "| batch norm forward, 64 x 20 float32 | 9 | PyTorch eager, out= | 18 | 1 | 0.50 | <= 0.6 | met |" in text
    assert (
        "| batch norm forward, 8192 x 1024 float32 | 900 | PyTorch eager | 1000 | 800 | 0.90 | <= 0.7 | **missed**"
        in text
    )
    roofline = text.partition("Missed: what limits")[2]
    assert "| 67,108,864 | 74.6 | 83.9 | 67,108,864 | 74.6 | 0.80 | 0.7 | memory: a copy alone misses it |" in roofline
    assert "64 x 20" not in roofline
    assert "| batch norm forward, 8192 x 1024 float32, all cores |  |" in text  # on any machine
    shared = [row | {"threads": 7} for row in rows if row["shape"] == "8192x1024"]
    text = targets.page(results() | {"rows": shared}, None, None)
    assert (
        "| batch norm forward, 8192 x 1024 float32, 7 threads | 900 | PyTorch eager | 1000 | 800 | 0.90 | <= 0.8 |"
        in text
    )


def test_the_targets_of_the_overhead_are_those_of_its_worst_point() -> None:
    row = {"axis": "units", "status": "ok"}
    us = {("bnkernels", "none"): (9, 90), ("bnkernels fused", "none"): (10, 80), ("bnkernels fused", "batch"): (11, 84)}
    us |= {("PyTorch", "none"): (20, 84)}
    rows = [
        row | {"framework": framework, "norm": norm, "value": value, "us_median": t}
        for (framework, norm), times in us.items()
        for value, t in zip((32, 64), times, strict=True)
    ]
    first, second = targets.overhead_targets(rows)
    assert first["found"] == pytest.approx(11 / 9)
    assert not first["met"]
    assert second["found"] == pytest.approx(1)
    assert second["met"]


def test_times_against_threads_are_a_row_for_every_partition() -> None:
    rows = [
        {"shape": "64x20", "partition": way, "threads": threads, "us": {"median": us}}
        for way, us in (("by example", 7.0), ("by neuron", 5.0))
        for threads in (1, 2)
    ]
    text = partition.page(results() | {"rows": rows, "cores": 2}, "results")
    assert "| 64 x 20, by neuron | 5 | 5 |" in text
    assert "](results/a-cpu/partition.png)" in text


def test_a_case_that_nobody_measured_is_counted_and_not_shown() -> None:
    run = ops_run(op_row("bnkernels", us=2.0), op_row("bnkernels", status="not measured: out of time", shape="9x9"))
    text = ops.summary(run)
    assert "9 x 9" not in text
    assert "1 more cases" in text


@pytest.mark.parametrize(("times_empty", "outcome"), [(1.4, "1.4 | met |"), (1.6, "1.6 | **not met** |")])
def test_the_targets_on_a_gpu(tmp_path: Path, times_empty: float, outcome: str) -> None:
    text = gpu.page(tmp_path, ops_run(op_row("bnkernels", us=2.0, times_empty=times_empty)))
    first, *others = [line for line in text.splitlines() if "times an empty kernel" in line]
    assert first.endswith(f"<= 1.5 times an empty kernel | {outcome}")
    assert all(line.endswith("| not yet measured |  |") for line in others)


def test_the_best_of_pytorch_is_the_fastest_of_its_ways() -> None:
    big = {"shape": "100000x32"}
    rows = [op_row("bnkernels", us=2.0, **big), op_row("PyTorch eager, native", us=12.0, **big)]
    target = next(t for t in gpu.TARGETS if t.shape == "100000x32" and t.measure == "faster")
    assert gpu.found(target, rows) == 6.0
    assert gpu.found(target, [*rows, op_row("torch.compile", us=8.0, **big)]) == 4.0
    assert gpu.found(target, rows[1:]) is None


def overhead_run() -> dict:
    """Return a run of the overhead figure."""
    row = {"axis": "units", "value": 32, "framework": "bnkernels", "norm": "batch", "status": "ok", "ratio_median": 1.5}
    waiting = row | {"norm": "layer", "status": "not supported yet: layer norm"}
    waiting.pop("ratio_median")
    return results() | {"rows": [row, row | {"value": 64, "ratio_median": 1.25}, waiting]}


def test_the_overhead_is_a_row_per_framework_and_norm() -> None:
    text = overhead.tables({"cpu": overhead_run()}, "results")
    assert "| units of each layer | 32 | 64 |" in text
    assert "| bnkernels, batch norm | 1.50 | 1.25 |" in text
    assert text.count("Not measured: bnkernels, layer norm (not supported yet: layer norm).") == 1
    assert "](results/a-cpu/overhead_units.png)" in text


def test_the_newest_run_of_a_place_counts(tmp_path: Path) -> None:
    for folder, place, date in (("a", "cpu", "2026-01-01"), ("b", "cpu", "2026-02-01"), ("c", "cuda", "2026-03-01")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "ops.json").write_text(json.dumps({"place": place, "date": date}))
    assert documents.latest(tmp_path, "ops.json", "cpu")["date"] == "2026-02-01"
    assert documents.latest(tmp_path, "ops.json", "cuda")["date"] == "2026-03-01"
    assert documents.latest(tmp_path, "train_step.json", "cpu") is None


def test_results_are_taken_to_their_device(tmp_path: Path) -> None:
    run, results_folder = tmp_path / "run", tmp_path / "results"
    run.mkdir()
    (run / "ops.json").write_text(json.dumps(ops_run()))
    (run / "ops.csv").write_text("op\n")
    taken = documents.take(run, results_folder)
    assert sorted(path.relative_to(results_folder).as_posix() for path in taken) == [
        "nvidia-made-up/ops.csv",
        "nvidia-made-up/ops.json",
    ]


@pytest.mark.parametrize("content", [None, {"dry_run": True, "device": "emulator"}])
def test_a_dry_run_or_nothing_is_not_taken(tmp_path: Path, content: dict | None) -> None:
    if content:
        (tmp_path / "ops.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="dry run" if content else "holds no results"):
        documents.take(tmp_path, tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_what_was_between_the_comments_is_replaced() -> None:
    text = "a\n<!-- x -->\nold 1\n\nold 2\n<!-- /x -->\nb\n<!-- y -->\n<!-- /y -->\n"
    once = documents.render(text, {"x": r"new \1", "y": "new", "z": "unused"})
    assert once == "a\n<!-- x -->\n\nnew \\1\n\n<!-- /x -->\nb\n<!-- y -->\n\nnew\n\n<!-- /y -->\n"
    assert documents.render(once, {"x": r"new \1", "y": "new"}) == once


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
        documents.render(text, {"x": "new"})


def doctest_of_the_readme(array_module: str) -> doctest.TestResults:
    """Run the lines of the README with this module for xp."""
    text = documents.README.read_text(encoding="utf-8").replace("import numpy as xp", f"import {array_module} as xp")
    lines = doctest.DocTestParser().get_doctest(text, {}, "README.md", "README.md", 0)
    return doctest.DocTestRunner().run(lines)


def test_the_lines_of_the_readme_run() -> None:
    outcome = doctest_of_the_readme("numpy")
    assert outcome.attempted >= 9
    assert outcome.failed == 0


@pytest.mark.emulator
def test_the_lines_of_the_readme_run_on_cupy(cupy: types.ModuleType) -> None:
    assert doctest_of_the_readme("cupy").failed == 0
    launched = " ".join(record.entry_point for record in cupy.driver.launches)
    assert "bnk_batch_norm_forward_" in launched
    assert "bnk_batch_norm_backward_" in launched
