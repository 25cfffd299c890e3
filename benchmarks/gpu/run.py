"""``make gpu``: one command for a machine with a GPU. Facts, tests, sanitizers, benchmarks, and a short table last.

It needs a python3 with CuPy, NumPy and pytest, installs nothing and reads no network. Each step runs in a process of
its own with a time limit, writes its documents into the folder of results at once, and cannot stop the next one. Parts
may be run one by one: what other parts have left in the folder stays in the table.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.processes import run_limited
from benchmarks.gpu.steps import PARTS, STEPS, Step
from benchmarks.harness.timing import facts, write_json
from bnkernels.runtime import registry

SECONDS = 525.0  # under nine minutes
PATIENCE = 4  # times as long may everything take in a dry run, whose machine is small and may be busy
GRACE = 12.0  # seconds a step has to write what it measured, after its limit
PACKAGES = ("torch", "triton", "jax", "ml_dtypes", "cuda-bindings", "pytest", "pytest-xdist")
LOG_BYTES = 8 * 2**20
TAIL = 25  # lines of a failed step's output that are shown


class Results:
    """The folder of a run: ``summary.json``, ``run.log`` and what the steps write.

    Parameters
    ----------
    folder : Path
        Made if it is not there.
    about : mapping
        The facts of the run: device, versions, commit, date.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.about, self.log = folder, dict(about), folder / "run.log"
        self.summary = folder / "summary.json"
        self.steps: dict[str, dict[str, Any]] = {}
        if self.summary.exists():
            before = json.loads(self.summary.read_text(encoding="utf-8"))
            if before.get("device") == self.about["device"]:
                self.steps = before["steps"]

    def keep(self, name: str, entry: Mapping[str, Any]) -> None:
        """Write what became of a step."""
        self.steps[name] = {"commit": self.about["commit"], "date": self.about["date"], **entry}
        order = [step.name for step in STEPS if step.name in self.steps]
        self.steps = {name: self.steps[name] for name in order}
        write_json(self.summary, {**self.about, "steps": self.steps})

    def start_anew(self) -> None:
        """Forget what was there."""
        self.steps = {}
        self.log.unlink(missing_ok=True)

    def trim_log(self) -> None:
        """Keep the log's end: a step that prints without end must not fill the disk."""
        if self.log.stat().st_size > LOG_BYTES:
            self.log.write_bytes(b"... the beginning was cut off\n" + self.log.read_bytes()[-LOG_BYTES // 2 :])


# ---- one step -------------------------------------------------------------------------------------------------------


def run_step(step: Step, results: Results, seconds: float, dry_run: bool) -> dict[str, Any]:
    """Run a step; return its entry of the summary."""
    document = results.folder / step.document
    if not step.keeps_older:
        document.unlink(missing_ok=True)
    before = document.stat().st_mtime_ns if document.exists() else None
    command = [sys.executable, "-m", *step.command(results.folder, seconds, dry_run)]
    started = time.monotonic()
    with results.log.open("ab") as log:
        warning = "dry run: no number below is a measurement of a GPU\n" if dry_run else ""
        log.write(f"\n==== {step.name}: python3 -m {' '.join(command[2:])}\n{warning}".encode())
        log.flush()
        begin = log.tell()
        status = run_limited(command, seconds, log=log, grace=GRACE)
    output = results.log.read_bytes()[begin:].decode(errors="replace")
    results.trim_log()
    wrote = document.exists() and document.stat().st_mtime_ns != before
    entry = outcome_of(step, status, seconds, document if wrote else None, dry_run)
    if step.optional and status is None and document.exists():
        entry |= {"ok": True, "outcome": f"{entry['outcome']}: the older figures stand"}
    if not entry["ok"]:
        print("\n".join(f"    {line}" for line in output.splitlines()[-TAIL:]))
    for name in step.superfluous:
        (results.folder / name).unlink(missing_ok=True)
    return {"part": step.part, **entry, "seconds": round(time.monotonic() - started)}


def outcome_of(step: Step, status: int | None, seconds: float, document: Path | None, dry_run: bool) -> dict[str, Any]:
    """Judge a step by its exit status (None: it was stopped) and its document; return what the summary says of it."""
    outcome, content, figures = "ok", {}, []
    if status is None:
        outcome = f"out of time after {seconds:.0f} s"
    elif status != 0:
        outcome = f"failed: exit status {status}"
    if document is None:
        outcome = "failed: it wrote no document" if outcome == "ok" else outcome
    else:
        try:
            if dry_run:
                from benchmarks.gpu.dry_run import blank

                blank(document)
            content = json.loads(document.read_text(encoding="utf-8"))
            figures = [] if dry_run else step.figures(content)
            if outcome == "ok" and not step.measured(content):
                outcome = "failed: nothing was measured"
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as problem:
            outcome = f"failed: its document cannot be read: {type(problem).__name__}: {problem}"
    told = content.get("outcome", "ok")
    if told != "ok" and not (status is None and told == "stopped in the middle"):
        outcome = told if outcome.startswith("failed: exit status") else f"{outcome}; {told}"
    entry: dict[str, Any] = {"outcome": outcome, "ok": outcome == "ok", "figures": figures}
    if step.merged and document is not None:
        entry["document"] = content
        document.unlink()
    return entry


# ---- all of them ----------------------------------------------------------------------------------------------------


def limits(steps: Sequence[Step], left: float) -> float:
    """Return the seconds that the first of these steps may take: what it may at most, and what the others can spare."""
    first, *others = steps
    spare = left - sum(step.least for step in others)
    alone = len({step.part for step in steps}) == 1 and not others
    return max(min(left, first.least), spare if alone else min(first.most, spare), 1.0)


def run(parts: Sequence[str], results: Results, seconds: float, dry_run: bool) -> bool:
    """Run the steps of the parts; return whether all went well."""
    end = time.monotonic() + seconds
    if set(parts) == set(PARTS):
        results.start_anew()
    steps = [step for step in STEPS if step.part in parts and not (dry_run and step.only_on_a_gpu)]
    if dry_run:
        steps = [step._replace(most=PATIENCE * step.most) for step in steps]
    good = True
    while steps:
        step, left = steps[0], end - time.monotonic()
        if left < 5:
            entry: dict[str, Any] = {"part": step.part, "outcome": "not run: out of time", "ok": step.optional}
        else:
            limit = limits(steps, left)
            print(f"-- {step.name}: at most {limit:.0f} s", flush=True)
            results.keep(step.name, {"part": step.part, "outcome": "stopped in the middle", "ok": False})
            entry = run_step(step, results, limit, dry_run)
        results.keep(step.name, entry)
        good &= entry["ok"]
        print(f"   {entry['outcome']}", flush=True)
        steps = steps[1:]
    return good


def table(results: Results) -> str:
    """Return what the folder holds, a line per step."""
    about = results.about
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if version)
    lines = [
        f"{about['device']}; commit {about['commit']}, {about['date']}" + ("; DRY RUN" if about["dry_run"] else "")
    ]
    lines += [versions, ""]
    for step in STEPS:
        entry = results.steps.get(step.name)
        if entry is None:
            lines.append(f"{step.part:9} {step.name:20} not run")
            continue
        took = f"{entry['seconds']:4} s" if "seconds" in entry else " " * 6
        commit = "" if entry["commit"] == about["commit"] else f" (at commit {entry['commit']})"
        figures = "; ".join(entry.get("figures", []))
        lines.append(f"{step.part:9} {step.name:20} {took}  {entry['outcome'][:160]}{commit}")
        lines += [f"{'':38}{figures[:300]}"] if figures else []
    return "\n".join(lines)


def about_this_machine(dry_run: bool) -> dict[str, Any]:
    """Return the facts of the run, or as ``absent`` why nothing can run."""
    if dry_run:
        from benchmarks.gpu.dry_run import stand_in

        stand_in()
    if reason := registry.why_no_cuda():
        return {"absent": reason}
    about = {"dry_run": dry_run, **facts(place="cuda")}
    about["versions"] |= {name: version_of(name) for name in PACKAGES}
    return about


def version_of(distribution: str) -> str | None:
    """Return the installed version without an import, which takes seconds for some; None where there is none."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def ask(dry_run: bool) -> dict[str, Any]:
    """Return the facts of the run from a process of their own: this one keeps out of the GPU.

    Raises
    ------
    RuntimeError
        If that process fails; the message is what it said.
    """
    command = [sys.executable, "-m", "benchmarks.gpu", "--about", *(["--dry-run"] if dry_run else [])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if done.returncode != 0:
        raise RuntimeError(done.stderr.strip() or f"python -m benchmarks.gpu --about answered {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def interrupted(number: int, frame: Any) -> None:
    """Let a polite end be as good as Ctrl-C: what was finished is kept, and no process stays behind."""
    raise KeyboardInterrupt


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(prog="python3 -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {','.join(PARTS)} (default: all)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: the variable OUT, else build/gpu")
    parser.add_argument("--seconds", type=float, help=f"for everything (default: {SECONDS:.0f})")
    parser.add_argument("--dry-run", action="store_true", help="without a GPU: walk through all of it on the emulator")
    parser.add_argument("--about", action="store_true", help="print the facts of the machine as JSON, run nothing")
    options = parser.parse_args(arguments)
    options.parts = options.parts.split(",")
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"expected parts among {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
    default = "build/gpu-dry-run" if options.dry_run else os.environ.get("OUT") or "build/gpu"
    options.out = options.out or Path(default)
    options.seconds = options.seconds or (PATIENCE * SECONDS if options.dry_run else SECONDS)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; return 1 unless every step went well, 2 if none can run."""
    options = parse(arguments)
    if options.about:
        print(json.dumps(about_this_machine(options.dry_run)))
        return 0
    signal.signal(signal.SIGTERM, interrupted)
    try:
        about = ask(options.dry_run)
    except (RuntimeError, subprocess.TimeoutExpired) as problem:
        about = {"absent": problem}
    if "absent" in about:
        print(f"error: nothing can run: {about['absent']}", file=sys.stderr)
        return 2
    results = Results(options.out.absolute(), about)
    try:
        good = run(options.parts, results, options.seconds, options.dry_run)
    except KeyboardInterrupt:
        print("interrupted: what was finished is kept", file=sys.stderr)
        good = False
    print(f"\nwritten: {results.folder}\n\n{table(results)}")
    return int(not good)
