"""``make bench``: everything that this machine can measure, into ``benchmarks/results/<device>/``, then the reports.

On a CPU it takes about a quarter of an hour. Every part writes its own file, keeps what it has when it is interrupted,
and does not stop the others. What is counted and not measured depends on the sources alone: `benchmarks.counts.static`,
on its own.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from time import monotonic

from benchmarks.harness.places import why_absent
from benchmarks.harness.timing import ROOT, facts, results_folder

OPS_SECONDS, OVERHEAD_SECONDS = 480, 200


def parts(place: str, seconds: tuple[float, float]) -> dict[str, list[str]]:
    """Return the arguments of every part, by name, in order."""
    folder = results_folder(facts(place=place))
    ops, overhead = (str(limit) for limit in seconds)
    return {
        "ops": [
            "benchmarks",
            "--place",
            place,
            "--seconds",
            ops,
            "--seconds-per-case",
            "0.5",
            "--out",
            str(folder / "ops.json"),
        ],
        "training step": [
            "benchmarks.steps.bench_train_step",
            "--place",
            place,
            "--json",
            str(folder / "train_step.json"),
        ],
        "overhead": ["benchmarks.steps.overhead", "--place", place, "--seconds", overhead, "--out", str(folder)],
        **({"threads": ["benchmarks.partition", "--out", str(folder)]} if place == "cpu" else {}),
        "report": ["benchmarks.report"],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all parts; return 1 if one failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.everything", description=__doc__.splitlines()[0])
    parser.add_argument("--place", choices=("cpu", "cuda"), default="cpu" if why_absent("cuda") else "cuda")
    parser.add_argument(
        "--seconds", nargs=2, type=float, default=(OPS_SECONDS, OVERHEAD_SECONDS), metavar=("OPS", "STEPS")
    )
    options = parser.parse_args(arguments)
    outcomes = {}
    for name, part in parts(options.place, tuple(options.seconds)).items():
        print(f"==== {name}", flush=True)
        started = monotonic()
        status = subprocess.run([sys.executable, "-m", *part], cwd=ROOT).returncode
        outcomes[name] = status, monotonic() - started
    print("====")
    for name, (status, elapsed) in outcomes.items():
        print(f"{name:15} {'done' if status == 0 else f'failed ({status})':12} {elapsed:5.0f} s")
    return int(any(status for status, _ in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
