"""NVIDIA's compute-sanitizer over every kernel, each tool first on a planted bug that it has to report.

``python -m benchmarks.gpu.sanitize --out PATH`` runs memcheck, racecheck, initcheck and synccheck, one after the
other. A tool that overlooks the bug planted for it is blind on this machine: its silence on our kernels is then not
claimed. ``--run clean`` and ``--run TOOL`` are what runs inside a tool. With ``--dry-run`` the sanitizers of the
tests' emulator take the place of NVIDIA's.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.gpu.device import SOURCES
from benchmarks.gpu.processes import run_limited
from benchmarks.harness.case import DTYPES, EPS
from benchmarks.harness.measure import STORED, SUMMED
from benchmarks.harness.samples import Sample, Sizes
from benchmarks.harness.timing import write_json
from benchmarks.ops import every_variant
from bnkernels.runtime import registry, source

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
EXIT = 66
NUMBERS = 63  # in each array of the planted kernels, for 64 threads
COMPLETE = "all ran and computed what NumPy computes"
SUMMARY = re.compile(r"(?:ERROR SUMMARY|RACECHECK SUMMARY): (\d+)")
EMULATED = {  # a build of the emulator for each tool, and a bug of tools/emulator/planted.cu
    "memcheck": ("asan", "read_past_the_end", "heap-buffer-overflow"),
    "racecheck": ("tsan", "missing_barrier", "data race"),
    "synccheck": ("plain", "divergent_barrier", "divergent __syncthreads"),
}


# ---- what runs inside a tool ----------------------------------------------------------------------------------------


def run_clean(asarray: Callable[[np.ndarray], Any], asnumpy: Callable[[Any], np.ndarray], some: bool = False) -> None:
    """Run every op in every variant on small arrays; raise ArithmeticError unless all kernels ran, and ran right.

    With `some` only the last two calls in float32, for a dry run: ``make emulate`` has the others, and compiles them.
    """
    like = asarray(np.zeros(1))
    runtime = registry.runtime_of(type(like))
    launched, launch = set(), runtime.launch

    def recording(source: str, entry_point: str, *rest: Any) -> None:
        launched.add(entry_point)
        launch(source, entry_point, *rest)

    runtime.launch = recording
    try:
        for name in ("float32",) if some else DTYPES:
            for title, sample, sizes in calls(name)[-2 if some else 0 :]:
                if "tf32x3" in title and not runtime.limits(like).tf32:
                    continue
                right = sample.arrays(sizes, name)
                found = {key: asarray(array) for key, array in right.items()}
                sample.run(right)
                sample.run(found)
                for key in sample.writes:
                    if key != "workspace":  # NumPy needs none
                        compare(asnumpy(found[key]), right[key], f"{key} of {title} in {name}")
    finally:
        runtime.launch = launch
    wanted = set() if some else {name for stem in source.stems() for name in source.entry_points(stem)}
    if not runtime.limits(like).clusters:
        wanted = {name for name in wanted if "_cluster" not in name}
    if not runtime.limits(like).tf32:
        wanted = {name for name in wanted if "_tf32x3" not in name}
    if missing := wanted - launched:
        raise ArithmeticError(f"these kernels did not run: {', '.join(sorted(missing))}")
    print(f"{len(launched)} kernels{', some of float32' if some else ''}: {COMPLETE}", flush=True)


def calls(dtype: str) -> list[tuple[str, Sample, Sizes]]:
    """Return name, call and sizes of everything that a data type has."""
    return [
        (f"{name} {dict(sizes)}", sample, sizes)
        for name, sample in every_variant().items()
        if dtype in sample.dtypes
        for sizes in sample.sizes
    ]


def compare(found: np.ndarray, exact: np.ndarray, what: str) -> None:
    """Raise ArithmeticError if a result is wrong by more than roundings explain; integers by anything."""
    name, rounded = exact.dtype.name, exact.dtype.kind not in "iu"
    found, exact = found.astype(np.float64), exact.astype(np.float64)
    error = np.abs(found - exact).max(initial=0)
    allowed = STORED * EPS[name] + SUMMED * EPS["float64" if name == "float64" else "float32"] if rounded else 0
    if not error <= allowed * np.abs(exact).max(initial=1):  # also if it is NaN
        raise ArithmeticError(f"{what}: off by {error:.3g}")


def run_planted(tool: str) -> None:
    """Run the kernel with the bug for a tool, whatever becomes of it."""
    import cupy

    cupy.cuda.set_allocator(None)  # a pool would put the end of an array in the middle of its own memory
    code = (SOURCES / "planted.cu").read_text(encoding="utf-8")
    kernel = cupy.RawKernel(code, f"bnk_planted_{tool}", ("--std=c++17",))
    x, y = (cupy.empty(NUMBERS, "float32") for _ in range(2))
    try:
        kernel((1,), (64,), (x, y, np.int64(NUMBERS)))
        cupy.cuda.runtime.deviceSynchronize()
    except Exception as problem:  # the tool may stop the kernel; its report is what counts
        print(f"after the launch: {' '.join(str(problem).split())}")


def inside(what: str, emulated: bool) -> int:
    """Run what a tool watches."""
    if emulated:
        from tools import backends

        runtime = backends.emulated_runtime()
        run_clean(runtime.asarray, lambda array: np.array(array, subok=False), some=True)
    elif what == "clean":
        import cupy

        cupy.cuda.set_allocator(None)
        run_clean(cupy.asarray, cupy.asnumpy)
    else:
        run_planted(what)
    return 0


# ---- the tools ------------------------------------------------------------------------------------------------------


class Output(NamedTuple):
    """Outcome of a run: exit status (None: it was stopped), what it printed, and how long it took."""

    status: int | None
    text: str
    seconds: float

    @property
    def reports(self) -> int | None:
        """Number of errors that compute-sanitizer counts, or None where it prints no summary."""
        counts = [int(count) for count in SUMMARY.findall(self.text)]
        return sum(counts) if counts else None

    @property
    def complaint(self) -> str:
        """The line that says most about what went wrong."""
        lines = [line.strip("= ").strip() for line in self.text.splitlines() if line.strip("= ").strip()]
        telling = [line for line in lines if re.search(r"not supported|error|Error|failed|Failed|denied|hazard", line)]
        ended = "was stopped at its time limit" if self.status is None else f"ended with status {self.status}"
        return f"{(telling or lines or ['it printed nothing'])[0][:200]} ({ended})"


class Tool(NamedTuple):
    """A tool: its runs, and how to tell that it has reported, and that it has nothing to report."""

    name: str
    planted: list[str]
    clean: list[str]
    has_reported: Callable[[Output], bool]
    is_silent: Callable[[Output], bool]


def nvidia_tool(sanitizer: str, name: str) -> Tool:
    """Return a tool of compute-sanitizer."""
    prefix = [sanitizer, "--tool", name, "--error-exitcode", str(EXIT), "--print-limit", "20", sys.executable]
    prefix += ["-m", "benchmarks.gpu.sanitize", "--run"]
    return Tool(
        name,
        [*prefix, name],
        [*prefix, "clean"],
        lambda out: bool(out.status and out.reports and f"bnk_planted_{name}" in out.text),
        lambda out: out.status == 0 and out.reports == 0 and COMPLETE in out.text,
    )


def emulator_tool(name: str) -> Tool:
    """Return the emulator's counterpart of a tool."""
    build, bug, report = EMULATED[name]
    run = [sys.executable, "-m", "tools.emulator", "run", build, "--module"]
    return Tool(
        name,
        [*run, "tools.emulator.planted", "--", bug],
        [*run, "benchmarks.gpu.sanitize", "--", "--run", "clean", "--emulated"],
        lambda out: bool(out.status and report in out.text),
        lambda out: out.status == 0 and COMPLETE in out.text,
    )


def tool_path(name: str) -> str | None:
    """Return the path of a program of the CUDA toolkit, or None where it is not installed."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    places = [os.environ.get("PATH", ""), *(f"{home}/bin" for home in homes if home)]
    return shutil.which(name, path=os.pathsep.join(places))


class Limit(NamedTuple):
    """Until when all runs together may take, and how many seconds each."""

    end: float
    each: float

    @property
    def reached(self) -> bool:
        """Whether no time is left."""
        return time.monotonic() > self.end


def execute(command: Sequence[str], limit: Limit) -> Output:
    """Run a program for as long as there is time; repeat on this program's output what it prints."""
    started = time.monotonic()
    with tempfile.TemporaryFile() as log:
        status = run_limited(command, max(1.0, min(limit.each, limit.end - started)), log=log)
        log.seek(0)
        text = log.read().decode(errors="replace")
    print(f"\n== {' '.join(command)}: {status}\n{text[-8000:]}", flush=True)
    return Output(status, text, time.monotonic() - started)


def judge(tool: Tool, limit: Limit) -> dict[str, Any]:
    """Run a tool on its bug, and if it reports that, on our kernels."""
    if limit.reached:
        return {"outcome": "not run: out of time"}
    planted = execute(tool.planted, limit)
    found: dict[str, Any] = {"planted_seconds": round(planted.seconds)}
    if not tool.has_reported(planted):
        return {"outcome": f"blind: {planted.complaint}"} | found
    if limit.reached:
        return {"outcome": "not run on our kernels: out of time"} | found
    clean = execute(tool.clean, limit)
    found["clean_seconds"] = round(clean.seconds)
    return {"outcome": "ok" if tool.is_silent(clean) else f"failed: {clean.complaint}"} | found


def measure(seconds: float, dry_run: bool, out: Path) -> dict[str, Any]:
    """Run all tools; write the document after each."""
    # The emulator's builds may have to be compiled first, and no time of a GPU is lost on them.
    limit = Limit(time.monotonic() + seconds, seconds if dry_run else seconds / 3)
    document: dict[str, Any] = {"outcome": "stopped in the middle", "dry_run": dry_run, "tools": {}}
    keep = partial(write_json, out, document)
    sanitizer = None if dry_run else tool_path("compute-sanitizer")
    if not dry_run and sanitizer is None:
        return finished(document | {"outcome": "compute-sanitizer is not installed"}, out)
    document["sanitizer"] = sanitizer or "the emulator's builds; initcheck has no counterpart among them"
    keep()
    command = [sys.executable, "-m", "benchmarks.gpu.sanitize", "--run", "clean", *(["--emulated"] if dry_run else [])]
    bare = execute(command, limit)  # also compiles, which would take longer inside a tool
    if bare.status != 0 or COMPLETE not in bare.text:
        return finished(document | {"outcome": f"failed without any tool: {bare.complaint}"}, out)
    tools = map(emulator_tool, EMULATED) if dry_run else (nvidia_tool(sanitizer, name) for name in TOOLS)
    for tool in tools:
        document["tools"][tool.name] = {"outcome": "stopped in the middle of it"}
        keep()
        document["tools"][tool.name] = judge(tool, limit)
    wrong = [f"{name} {tool['outcome']}" for name, tool in document["tools"].items() if tool["outcome"] != "ok"]
    return finished(document | {"outcome": "; ".join(wrong) if wrong else "ok"}, out)


def finished(document: dict[str, Any], out: Path) -> dict[str, Any]:
    """Write the document with what the last table shows of it."""
    document["figures"] = [f"{name} {tool['outcome'].partition(':')[0]}" for name, tool in document["tools"].items()]
    write_json(out, document)
    return document


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; return 1 unless every tool saw its bug and nothing else."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.sanitize", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, metavar="PATH.json")
    parser.add_argument("--seconds", type=float, default=90.0)
    parser.add_argument("--run", choices=("clean", *TOOLS), help="run what a tool watches, without a tool")
    parser.add_argument("--emulated", action="store_true", help="with --run clean: on the emulator")
    parser.add_argument("--dry-run", action="store_true", help="the emulator's sanitizers instead of NVIDIA's")
    options = parser.parse_args(arguments)
    if options.run:
        return inside(options.run, options.emulated)
    if options.out is None:
        parser.error("--out is needed")
    document = measure(options.seconds, options.dry_run, options.out)
    print(f"outcome: {document['outcome']}")
    return int(document["outcome"] != "ok")


if __name__ == "__main__":
    sys.exit(main())
