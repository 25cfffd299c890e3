"""Nsight Compute over our kernels: its output read, and every way in which it may count nothing told."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.counts.budget_rows import ROWS
from benchmarks.counts.counting import planner
from benchmarks.gpu import profile

# The columns of ncu 2025 with --csv, of which a metric is a line.
FAKE = """#!{python}
import os, sys
assert sys.argv[-3:] == ["-m", "benchmarks.gpu.profile", "--run"], sys.argv
asked = sys.argv[sys.argv.index("--metrics") + 1].split(",")
mode = os.environ["FAKE_MODE"]
print("==PROF== Connected to process 1")
if mode == "forbidden":
    print("==ERROR== ERR_NVGPUCTRPERM - The user does not have permission to access NVIDIA GPU Performance Counters")
    sys.exit(1)
if mode == "broken":
    sys.exit("==ERROR== The application returned an error code (1).")
print('"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"')
for number, metric in enumerate(asked):
    value = "n/a" if "sectors" in metric else "1,234.5" if number == 0 else str(number)
    print('"0","bnk_a(Arguments<float, 2>)","%s","ns","%s"' % (metric, value))
print('"0","bnk_a(Arguments<float, 2>)","something__else","","7"')
"""


@pytest.mark.parametrize(
    ("mode", "outcome", "figure"),
    [
        ("works", "ok", "a issue 2 %, DRAM 3 %"),
        ("forbidden", "ok", "not profiled: the driver lets only administrators read its counters"),
        ("broken", "failed: ncu ended with status 1: ==PROF== ", None),
        ("absent", "ok", "not profiled: Nsight Compute (ncu) is not installed"),
    ],
)
def test_what_the_profiler_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, outcome: str, figure: str | None
) -> None:
    if mode != "absent":
        script = tmp_path / "ncu"
        script.write_text(FAKE.format(python=sys.executable))
        script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("FAKE_MODE", mode)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    if Path("/usr/local/cuda/bin/ncu").exists() and mode == "absent":
        pytest.skip("Nsight Compute is installed where the toolkit usually is")
    out = tmp_path / "profile.json"
    assert profile.main(["--out", str(out)]) == (outcome != "ok")
    found = json.loads(out.read_text())
    assert found["outcome"].startswith(outcome)
    assert found["figures"] == ([] if figure is None else [figure])
    if mode == "works":
        of_kernel = found["kernels"]["bnk_a"]
        assert of_kernel["us"] == pytest.approx(1.2345)
        assert "sectors_per_load" not in of_kernel
        assert len(of_kernel) == len(profile.METRICS) - 1


def test_every_row_of_the_budget_runs_inside_the_profiler() -> None:
    plan = planner()
    plan.launches.clear()
    profile.run(plan.empty)
    forwards = sum(row.op.startswith("lstm") and "backward" in row.op for row in ROWS)  # the backwards need one each
    assert len(plan.launches) == len(ROWS) + forwards
    assert all(kernel.startswith("bnk_") for _, kernel, _ in plan.launches)
