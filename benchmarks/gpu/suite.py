"""The test suite on a GPU machine, where a skipped test is a failure; and the pytest plugin that makes it one.

``python -m benchmarks.gpu.suite --out PATH`` first plants a test that skips, which has to fail; then it runs the tests
that need the GPU, of which none may skip; then the rest, of which some may, for want of a tool that the machine does
not have. Whatever ends a run, what was counted so far is in the document.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from benchmarks.gpu.processes import run_limited
from benchmarks.harness.timing import ROOT, write_json

COUNTS, ALLOWED = "BNKERNELS_SUITE_COUNTS", "BNKERNELS_SUITE_ALLOWED_SKIPS"
CUDA_SECONDS = 150
NOTHING = "(?!)"  # a pattern that nothing matches
# Optional software of a GPU machine: tools of development, other frameworks, address space.
MISSING_TOOLS = (
    r"ruff|clang-format|numpydoc|nbmake|hypothesis|sklearn|scikit-learn|matplotlib|needs make|needs g\+\+|g\+\+|"
    r"NVRTC is not installed|PyTorch is not installed|'torch'|'jax'|'triton'|threadpoolctl|"
    r"address space|refuses to reserve"
)
PLANTED = """
import pytest

def test_that_skips():
    pytest.skip("planted")
"""


# ---- the plugin, in the process of the tests ------------------------------------------------------------------------


class Recorder:
    """Turns skips into failures, and keeps a document of counts up to date."""

    def __init__(self, path: Path, allowed: str) -> None:
        self._path, self._allowed, self._written = path, re.compile(allowed), 0.0
        self.counts: Counter[str] = Counter()
        self.skipped: Counter[str] = Counter()
        self.failed: list[str] = []

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Iterator[None]:
        """Judge a test's report."""
        return self._judged((yield))

    @pytest.hookimpl(wrapper=True)
    def pytest_make_collect_report(self) -> Iterator[None]:
        """Judge the report of a file, all of which may be skipped."""
        return self._judged((yield))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count a test."""
        if report.when == "call" or report.outcome != "passed":
            self._count(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Count a file that could not be collected, or was skipped."""
        if report.outcome != "passed":
            self._count(report)

    def pytest_sessionfinish(self) -> None:
        """Write the last counts."""
        self._write()

    def _judged(self, report: Any) -> Any:
        if report.outcome == "skipped" and not hasattr(report, "wasxfail"):
            reason = reason_of(report)
            if not self._allowed.search(reason):
                report.outcome, report.longrepr = "failed", f"skipped, which is forbidden here: {reason}"
        return report

    def _count(self, report: Any) -> None:
        outcome = "xfailed" if report.outcome == "skipped" and hasattr(report, "wasxfail") else report.outcome
        self.counts[outcome] += 1
        if outcome == "skipped":
            self.skipped[reason_of(report)] += 1
        elif outcome == "failed" and len(self.failed) < 40:
            last = str(report.longrepr).strip().splitlines()[-1:] or [""]
            self.failed.append(f"{report.nodeid}: {last[0][:300]}")
        if time.monotonic() - self._written > 1:
            self._write()

    def _write(self) -> None:
        document = {**self.counts, "skips": dict(self.skipped.most_common()), "failures": self.failed}
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps(document), encoding="utf-8")
        partial.replace(self._path)
        self._written = time.monotonic()


def reason_of(report: Any) -> str:
    """Return why a report says skipped."""
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return text.removeprefix("Skipped: ")


def pytest_configure(config: pytest.Config) -> None:
    """Record where this was asked for; the processes of pytest-xdist judge, and only their parent writes."""
    if COUNTS not in os.environ:
        return
    name = f"worker-{os.getpid()}.json" if hasattr(config, "workerinput") else "counts.json"
    config.pluginmanager.register(Recorder(Path(os.environ[COUNTS]) / name, os.environ.get(ALLOWED, NOTHING)))


# ---- the runs -------------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """One run of pytest: what it is called, its arguments, and which reasons to skip it allows."""

    name: str
    arguments: Sequence[str]
    allowed: str
    seconds: float


def run(plan: Run) -> dict[str, Any]:
    """Run pytest; return counts and outcome: ``ok``, or what is wrong."""
    arguments = ["-m", "pytest", "-q", "-rf", "-p", "benchmarks.gpu.suite", "-p", "no:cacheprovider", *plan.arguments]
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        path = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}".rstrip(os.pathsep)
        environment = os.environ | {COUNTS: folder, ALLOWED: plan.allowed, "PYTHONPATH": path}
        print(f"\n== {plan.name}: pytest {' '.join(plan.arguments)}", flush=True)
        status = run_limited([sys.executable, *arguments], plan.seconds, environment)
        counts = Path(folder) / "counts.json"
        document = json.loads(counts.read_text(encoding="utf-8")) if counts.exists() else {}
    found = {"seconds": round(time.monotonic() - started), **document}
    return {"outcome": judged(status, found, plan.seconds), **found}


def judged(status: int | None, found: dict[str, Any], seconds: float) -> str:
    """Return the outcome of a run with this exit status (None: it was stopped) and these counts."""
    passed, failed = found.get("passed", 0), found.get("failed", 0)
    if status is None:
        return f"out of time after {seconds:.0f} s: {passed} passed so far, {failed} failed"
    if failed:
        return f"failed: {failed} tests"
    if status != 0:
        return f"failed: pytest answered {status}"
    return "ok" if passed else "failed: no test ran"


def skips_are_failures() -> str:
    """Plant a test that skips; return ``ok`` if it becomes a failure."""
    with tempfile.TemporaryDirectory() as folder:
        test = Path(folder) / "test_planted.py"
        test.write_text(PLANTED, encoding="utf-8")
        found = run(Run("a planted skip, which has to fail", ["--rootdir", folder, str(test)], NOTHING, 60))
    if found.get("failed") == 1 and "forbidden here: planted" in found["failures"][0]:
        return "ok"
    return f"failed: a skipped test went through ({found['outcome']})"


def parallel() -> list[str]:
    """Return the options that spread tests over the cores: the emulator's builds are locked, so that is safe."""
    return ["-n", "auto", "--dist", "worksteal"] if importlib.util.find_spec("xdist") else []


def plans(seconds: float, dry_run: bool) -> list[Run]:
    """Return the runs: on a GPU those that need it, then all others; without one a few on the emulator."""
    if dry_run:
        few = ["-m", "emulator", "tests/ops/test_parameter_update.py", "-k", "sgd and not torch"]
        return [Run("emulator", few, NOTHING, seconds)]
    cuda = min(CUDA_SECONDS, 0.7 * seconds)
    return [
        Run("cuda", ["-m", "cuda"], NOTHING, cuda),
        Run("rest", ["-m", "not cuda", *parallel()], MISSING_TOOLS, seconds - cuda),
    ]


def measure(seconds: float, dry_run: bool, out: Path) -> dict[str, Any]:
    """Run everything; write the document after each run."""
    end = time.monotonic() + seconds
    document: dict[str, Any] = {"outcome": "stopped in the middle", "dry_run": dry_run}
    document["skips_are_failures"] = skips_are_failures()
    for plan in plans(seconds, dry_run):
        write_json(out, document)
        # The second run also gets the time that the first one leaves.
        left = end - time.monotonic() if plan.name == "rest" else min(plan.seconds, end - time.monotonic())
        document[plan.name] = run(plan._replace(seconds=max(left, 1)))
    runs = {name: value["outcome"] for name, value in document.items() if isinstance(value, dict)}
    bad = {"skips": document["skips_are_failures"]} | runs
    wrong = [f"{name} {outcome}" for name, outcome in bad.items() if outcome != "ok"]
    document["outcome"] = "; ".join(wrong) if wrong else "ok"
    document["figures"] = [
        f"{name}: {value.get('passed', 0)} passed, {value.get('failed', 0)} failed, {value.get('skipped', 0)} skipped"
        for name, value in document.items()
        if isinstance(value, dict)
    ]
    write_json(out, document)
    return document


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; return 1 unless everything passed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.suite", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="PATH.json")
    parser.add_argument("--seconds", type=float, default=210.0)
    parser.add_argument("--dry-run", action="store_true", help="a few tests on the emulator")
    options = parser.parse_args(arguments)
    if not options.dry_run:
        os.environ["BNKERNELS_REQUIRE_GPU"] = "1"
    document = measure(options.seconds, options.dry_run, options.out)
    print(f"outcome: {document['outcome']}")
    return int(document["outcome"] != "ok")


if __name__ == "__main__":
    sys.exit(main())
