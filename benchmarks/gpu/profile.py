"""Nsight Compute over the kernels of the instruction budget: what limits them, beside what was predicted.

``python -m benchmarks.gpu.profile --out PATH`` profiles each row of `budget_rows` once. ``--run``
is what runs inside the profiler. It explains times and proves nothing: where Nsight Compute is missing, or the driver
lets only administrators count, the document says so.
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.counts.budget_rows import ROWS
from benchmarks.gpu.processes import run_limited
from benchmarks.gpu.sanitize import tool_path
from benchmarks.harness.case import native_dtype
from benchmarks.harness.timing import write_json

METRICS = {
    "us": "gpu__time_duration.sum",  # nanoseconds
    "instructions": "smsp__inst_executed.sum",  # warp instructions
    "issue_percent": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "dram_percent": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "sectors_per_load": "l1tex__average_t_sectors_per_request_pipe_lsu_mem_global_op_ld.ratio",
    "stalled_without_instruction": "smsp__average_warps_issue_stalled_no_instruction_per_issue_active.ratio",
    "stalled_for_memory": "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio",
    "shared_wavefronts": "l1tex__data_pipe_lsu_wavefronts_mem_shared.sum",
}
Kernels = dict[str, dict[str, float]]


def run(empty: Callable[..., Any]) -> None:
    """Call every row once, on arrays of zeros, which no kernel works on differently."""
    for row in ROWS:
        row.call(lambda shape, dtype="float32": empty(shape, native_dtype(dtype)), 1)()


def parse(text: str) -> Kernels:
    """Return the metrics of every kernel from what ``ncu --csv`` prints, a metric a line behind other lines."""
    found: Kernels = {}
    names = {metric: name for name, metric in METRICS.items()}
    for line in csv.DictReader(line for line in text.splitlines() if line.startswith('"')):
        name, value = names.get(line["Metric Name"]), line["Metric Value"].replace(",", "")
        if name is None:
            continue
        kernel = found.setdefault(line["Kernel Name"].partition("(")[0], {})
        try:
            kernel[name] = float(value) / (1000 if name == "us" else 1)
        except ValueError:  # "n/a": this GPU, or this version, does not count it
            continue
    return found


def measure(seconds: float, out: Path) -> dict[str, Any]:
    """Profile, and write the document."""
    document: dict[str, Any] = {"outcome": "ok", "kernels": {}, "figures": []}
    profiler = tool_path("ncu")
    if profiler is None:
        document["figures"] = ["not profiled: Nsight Compute (ncu) is not installed"]
        write_json(out, document)
        return document
    command = [profiler, "--csv", "--print-units", "base", "--kernel-name", "regex:^bnk_"]
    command += ["--metrics", ",".join(METRICS.values()), sys.executable, "-m", "benchmarks.gpu.profile", "--run"]
    with tempfile.TemporaryFile() as log:
        status = run_limited(command, seconds, log=log)
        log.seek(0)
        text = log.read().decode(errors="replace")
    document["kernels"] = parse(text)
    if status is None:
        document["outcome"] = f"out of time after {seconds:.0f} s"
    elif "ERR_NVGPUCTRPERM" in text:
        document["figures"] = ["not profiled: the driver lets only administrators read its counters"]
    elif status != 0 or not document["kernels"]:
        document["outcome"] = f"failed: ncu ended with status {status}: {text.strip()[-300:]}"
    document["figures"] += [shown(kernel, found) for kernel, found in document["kernels"].items()]
    write_json(out, document)
    return document


def shown(kernel: str, found: dict[str, float]) -> str:
    """Return what says most about a kernel."""
    figures = {"issue": "issue_percent", "DRAM": "dram_percent"}
    parts = [f"{word} {found[name]:.0f} %" for word, name in figures.items() if name in found]
    return f"{kernel.removeprefix('bnk_')} {', '.join(parts)}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; return 1 where profiling failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.profile", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, metavar="PATH.json")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--run", action="store_true", help="run what the profiler watches, without it")
    options = parser.parse_args(arguments)
    if options.run:
        import cupy

        run(cupy.zeros)
        cupy.cuda.runtime.deviceSynchronize()
        return 0
    if options.out is None:
        parser.error("--out is needed")
    document = measure(options.seconds, options.out)
    print(f"outcome: {document['outcome']}", *document["figures"], sep="\n")
    return int(document["outcome"] != "ok")


if __name__ == "__main__":
    sys.exit(main())
