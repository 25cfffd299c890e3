"""``make gpu`` without a GPU: what becomes of a step that fails or hangs, of a skip, and of what a tool overlooks."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.gpu import run as gpu
from benchmarks.gpu import sanitize
from benchmarks.gpu import suite as gpu_suite
from benchmarks.gpu.steps import STEPS, Step, any_row_ok
from benchmarks.gpu.suite import Run
from bnkernels.runtime import cpu
from tools import backends

FAKE_STEP = """
import json, sys, time
mode, path = sys.argv[1:3]
if mode == "hangs":
    open(path, "w").write(json.dumps({"outcome": "stopped in the middle", "figures": ["half"]}))
    time.sleep(60)
if mode != "silent":
    outcome = "failed: planted" if mode == "fails" else "ok"
    text = json.dumps({"outcome": outcome, "figures": ["one figure"]})
    open(path, "w").write("no JSON" if mode == "garbled" else text)
print("what", mode, "prints")
sys.exit(mode == "fails")
"""
ABOUT = {"device": "a device", "versions": {"Python": "3"}, "commit": "abc", "date": "today", "dry_run": False}


# ---- steps ----------------------------------------------------------------------------------------------------------


def fake(name: str, mode: str, part: str = "facts", **given: Any) -> Step:
    document = given.pop("document", f"{name}.json")

    def command(folder: Path, seconds: float, dry_run: bool) -> list[str]:
        return ["fake_step", mode, str(folder / document)]

    return Step(part, name, 1, 30, document, command, lambda content: list(content["figures"]), **given)


@pytest.fixture(autouse=True)
def _reference_on_numpy_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile no CPU kernels in the processes that are started: emulated ones are what is looked at."""
    monkeypatch.setenv(cpu.VARIABLE, "reference")


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> gpu.Results:
    (tmp_path / "fake_step.py").write_text(FAKE_STEP)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return gpu.Results(tmp_path / "out", ABOUT)


def use(monkeypatch: pytest.MonkeyPatch, *steps: Step) -> None:
    monkeypatch.setattr(gpu, "STEPS", steps)


@pytest.mark.parametrize(
    ("mode", "outcome"),
    [
        ("works", "ok"),
        ("fails", "failed: planted"),
        ("silent", "failed: it wrote no document"),
        ("garbled", "failed: its document cannot be read"),
        ("hangs", "out of time after 1 s"),
    ],
)
def test_the_outcome_of_a_step(results: gpu.Results, mode: str, outcome: str) -> None:
    entry = gpu.run_step(fake("step", mode), results, 1, dry_run=False)
    assert entry["outcome"].startswith(outcome)
    assert entry["ok"] == (mode == "works")
    if mode in ("works", "hangs"):
        assert entry["figures"], "what was measured before the end is kept"


def test_a_step_that_measures_nothing_is_not_green(results: gpu.Results) -> None:
    entry = gpu.run_step(fake("step", "works", measured=lambda content: False), results, 10, dry_run=False)
    assert (entry["ok"], entry["outcome"]) == (False, "failed: nothing was measured")
    assert any_row_ok({"rows": [{"status": "absent: x"}, {"status": "ok"}, {"maker": "no status"}]})
    assert not any_row_ok({"rows": [{"status": "failed: x"}, {"status": "ok", "provider": "copy"}]})


def test_a_broken_step_stops_no_other_and_shows_in_table_and_status(
    results: gpu.Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, fake("first", "fails"), fake("second", "works", part="test"))
    assert not gpu.run(["facts", "test"], results, 60, dry_run=False)
    lines = gpu.table(results).splitlines()
    assert re.search(r"facts +first +\d+ s  failed: planted", "\n".join(lines))
    assert re.search(r"test +second +\d+ s  ok", "\n".join(lines))
    assert lines[-1].strip() == "one figure"
    assert "what fails prints" in results.log.read_text()


def test_parts_run_one_by_one_and_the_table_holds_all(results: gpu.Results, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, fake("first", "works"), fake("second", "works", part="test"), fake("third", "works", part="bench"))
    assert gpu.run(["test"], results, 60, dry_run=False)
    later = gpu.Results(results.folder, ABOUT | {"commit": "def"})
    assert gpu.run(["facts"], later, 60, dry_run=False)
    table = gpu.table(later)
    assert re.search(r"facts +first +\d+ s  ok\n", table)
    assert re.search(r"test +second +\d+ s  ok \(at commit abc\)\n", table)
    assert re.search(r"bench +third +not run", table)
    other = gpu.Results(results.folder, ABOUT | {"device": "another device"})
    assert not other.steps, "results of another device are none of this one"


def test_what_an_interrupt_leaves_says_so(results: gpu.Results, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, fake("first", "works"))

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu, "run_limited", interrupt)
    with pytest.raises(KeyboardInterrupt):
        gpu.run(["facts"], results, 60, dry_run=False)
    assert json.loads(results.summary.read_text())["steps"]["first"]["outcome"] == "stopped in the middle"


def test_a_better_document_that_does_not_come_leaves_the_older(results: gpu.Results) -> None:
    quick, long = fake("quick", "works", document="d.json"), fake("long", "hangs", document="other.json")
    assert gpu.run_step(quick, results, 10, dry_run=False)["ok"]
    late = long._replace(document="d.json", keeps_older=True, optional=True)
    entry = gpu.run_step(late, results, 1, dry_run=False)
    assert entry["ok"]
    assert "the older figures stand" in entry["outcome"]
    (results.folder / "d.json").unlink()
    assert not gpu.run_step(late, results, 1, dry_run=False)["ok"], "there is nothing that could stand"


def test_a_merged_document_is_in_the_summary_and_its_file_is_gone(
    results: gpu.Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, fake("step", "works", merged=True))
    assert gpu.run(["facts"], results, 60, dry_run=False)
    assert json.loads(results.summary.read_text())["steps"]["step"]["document"]["figures"] == ["one figure"]
    assert sorted(path.name for path in results.folder.iterdir()) == ["run.log", "summary.json"]


def test_a_run_leaves_at_most_eight_files() -> None:
    kept = {step.document for step in STEPS if not step.merged} | {"summary.json", "run.log", "ops.csv", "overhead.csv"}
    assert len(kept) <= 8


def test_the_limits_of_all_steps_keep_to_the_time_and_leave_every_step_its_least() -> None:
    left = gpu.SECONDS
    for i in range(len(STEPS)):
        limit = gpu.limits(STEPS[i:], left)
        assert limit >= STEPS[i].least
        left -= limit
    assert left >= 0
    alone = [step for step in STEPS if step.part == "test"]
    assert gpu.limits(alone, 500) == 500, "a part that runs alone has all the time"


def test_a_step_that_the_time_does_not_reach_is_not_green(
    results: gpu.Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, fake("step", "works"))
    assert not gpu.run(["facts"], results, 1, dry_run=False)
    assert results.steps["step"]["outcome"] == "not run: out of time"


def test_nothing_runs_without_cupy_or_with_an_unknown_part(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(gpu, "ask", lambda dry_run: {"absent": "no GPU answers"})
    assert gpu.main(["--out", str(tmp_path)]) == 2
    assert "nothing can run: no GPU answers" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        gpu.main(["--parts", "facts,tests"])


# ---- the suite ------------------------------------------------------------------------------------------------------

SUITE = """
import numpy as np
import pytest

def test_passes():
    assert True

def test_for_want_of_a_tool():
    pytest.skip("ruff is not installed")

@pytest.mark.xfail(strict=True)
def test_expected_to_fail():
    raise ValueError("as expected")
"""


def run_suite(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    allowed: str = gpu_suite.NOTHING,
    seconds: float = 60,
) -> dict[str, Any]:
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # a planted test needs no plugins
    (folder / "test_it.py").write_text(text)
    return gpu_suite.run(Run("planted", ["--rootdir", str(folder), str(folder / "test_it.py")], allowed, seconds))


def test_a_skip_is_a_failure_unless_a_tool_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    strict = run_suite(tmp_path, monkeypatch, SUITE)
    assert strict["outcome"] == "failed: 1 tests"
    assert strict["failures"][0].endswith("skipped, which is forbidden here: ruff is not installed")
    allowed = run_suite(tmp_path, monkeypatch, SUITE, gpu_suite.MISSING_TOOLS)
    assert allowed["outcome"] == "ok"
    assert (allowed["passed"], allowed["skips"]) == (1, {"ruff is not installed": 1})


def test_a_file_that_skips_as_a_whole_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = run_suite(tmp_path, monkeypatch, "import pytest\npytest.importorskip('no_such_package')\n")
    assert found["outcome"] == "failed: 1 tests"
    assert "no_such_package" in found["failures"][0]


def test_a_suite_out_of_time_is_not_green_and_keeps_its_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "import time\ndef test_a():\n    pass\ndef test_b():\n    time.sleep(60)\n"
    found = run_suite(tmp_path, monkeypatch, text, seconds=3)
    assert found["outcome"] == "out of time after 3 s: 1 passed so far, 0 failed"


@pytest.mark.parametrize(
    ("status", "counts", "outcome"),
    [
        (0, {"passed": 3}, "ok"),
        (5, {}, "failed: pytest answered 5"),
        (0, {}, "failed: no test ran"),
        (1, {"passed": 3, "failed": 2}, "failed: 2 tests"),
        (4, {"passed": 3}, "failed: pytest answered 4"),
    ],
)
def test_the_outcome_of_a_suite(status: int, counts: dict[str, int], outcome: str) -> None:
    assert gpu_suite.judged(status, counts, 60) == outcome


# ---- sanitizers -----------------------------------------------------------------------------------------------------

FAKE_SANITIZER = """#!{python}
import os, sys
tool, what, mode = sys.argv[2], sys.argv[-1], os.environ["FAKE_MODE"]
title = "RACECHECK SUMMARY: %d hazards displayed" if tool == "racecheck" else "ERROR SUMMARY: %d errors"
assert sys.argv[sys.argv.index("--error-exitcode") + 1] == "66"
if mode == "refuses":
    print("========= Error: Device not supported. Please refer to the documentation")
    sys.exit(1)
if what != "clean":
    found = mode not in ("overlooks", "reports something else")
    print("========= Invalid access at bnk_planted_" + tool if found else "========= Something else")
    print("========= " + title % (mode != "overlooks"))
    sys.exit(0 if mode == "overlooks" else 66)
if mode != "runs nothing":
    print({complete!r})
print("========= " + title % (3 if mode == "complains" else 0))
sys.exit(66 if mode == "complains" else 0)
"""


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
@pytest.mark.parametrize(
    ("mode", "outcome"),
    [
        ("works", "ok"),
        ("refuses", "blind: Error: Device not supported"),
        ("overlooks", "blind: "),
        ("reports something else", "blind: "),
        ("complains", "failed: "),
        ("runs nothing", "failed: "),
    ],
)
def test_a_sanitizer_is_believed_only_if_it_sees_its_bug(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tool: str, mode: str, outcome: str
) -> None:
    script = tmp_path / "compute-sanitizer"
    script.write_text(FAKE_SANITIZER.format(python=sys.executable, complete=sanitize.COMPLETE))
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path) + os.pathsep + os.environ["PATH"])
    monkeypatch.setenv("FAKE_MODE", mode)
    assert sanitize.tool_path("compute-sanitizer") == str(script)
    found = sanitize.judge(sanitize.nvidia_tool(str(script), tool), sanitize.Limit(time.monotonic() + 60, 20))
    assert found["outcome"].startswith(outcome)
    assert ("clean_seconds" in found) == (not outcome.startswith("blind")), "silence of a blind tool is not asked for"


def test_no_sanitizer_and_no_time_are_not_green(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = sanitize.nvidia_tool("none", "memcheck")
    assert sanitize.judge(tool, sanitize.Limit(time.monotonic() - 1, 20))["outcome"] == "not run: out of time"
    monkeypatch.setattr(sanitize, "tool_path", lambda name: None)
    out = tmp_path / "sanitize.json"
    assert sanitize.main(["--out", str(out)]) == 1
    assert json.loads(out.read_text())["outcome"] == "compute-sanitizer is not installed"


# Not marked as an emulator test: it starts builds of its own choice, one of them the plain one, which must not be
# loaded into a process that a sanitizer watches.
def test_the_emulator_in_its_place_sees_its_bug_and_is_blind_to_none_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    backends.emulated_runtime()
    limit = sanitize.Limit(time.monotonic() + 60, 60)
    planted = sanitize.execute(sanitize.emulator_tool("synccheck").planted, limit)
    assert sanitize.emulator_tool("synccheck").has_reported(planted)
    monkeypatch.setitem(sanitize.EMULATED, "synccheck", ("plain", "reverse", "divergent __syncthreads"))
    assert sanitize.judge(sanitize.emulator_tool("synccheck"), limit)["outcome"].startswith("blind: ")


@pytest.mark.covered  # make coverage compiles every kernel anyway
@pytest.mark.slow
@pytest.mark.emulator
def test_the_small_suite_runs_every_kernel_and_notices_a_missing_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runtime = backends.emulated_runtime()
    sanitize.run_clean(runtime.asarray, np.asarray)
    assert sanitize.COMPLETE in capsys.readouterr().out
    calls = sanitize.calls
    monkeypatch.setattr(sanitize, "calls", lambda dtype: calls(dtype)[-1:])
    with pytest.raises(ArithmeticError, match="these kernels did not run: bnk_batch_norm_backward_cooperative_bf16"):
        sanitize.run_clean(runtime.asarray, np.asarray)


@pytest.mark.slow
@pytest.mark.emulator
def test_a_dry_run_walks_everything_and_writes_no_figure(tmp_path: Path) -> None:
    backends.emulated_runtime()
    assert gpu.main(["--dry-run", "--out", str(tmp_path)]) == 0
    documents = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
    assert len(list(tmp_path.iterdir())) <= 8
    for document in documents:
        assert document["dry_run"] is True
        assert not list(floats(document))


def floats(value: Any) -> list[float]:
    if isinstance(value, dict | list):
        return [number for item in (value.values() if isinstance(value, dict) else value) for number in floats(item)]
    return [value] if isinstance(value, float) else []
