"""Picture of our times from commit to commit: all versions of the results in the repository's history.

``python -m benchmarks.history`` writes ``build/history.png``. A point is one of ``python -m benchmarks.everything`` or
of ``make gpu``: our median beside the fastest time of PyTorch in the same run, so that a slower machine or a busy one
moves both. Runs of different devices are lines of their own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bnkernels.train.files import write_atomically
from bnkernels.train.plots import png, require_matplotlib

ROOT = Path(__file__).parents[1]
CASES = (
    ("batch_norm", "forward", "64x20"),
    ("batch_norm", "backward", "64x20"),
    ("batch_norm", "forward", "8192x1024"),
    ("batch_norm", "backward", "8192x1024"),
    ("layer_norm", "forward", "1024x1024"),
)
Case = tuple[str, str, str]
Point = tuple[str, float]  # date and commit of a run, and the ratio


def versions(root: Path = ROOT) -> list[dict[str, Any]]:
    """Return every version of ``benchmarks/results/*/ops.json`` in the repository's history, the oldest first."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True, check=True).stdout

    found, seen = [], set()
    for commit in git("log", "--reverse", "--format=%H", "--", "benchmarks/results/*/ops.json").split():
        for name in git("ls-tree", "-r", "--name-only", commit, "benchmarks/results").splitlines():
            if not name.endswith("/ops.json"):
                continue
            blob = git("rev-parse", f"{commit}:{name}").strip()
            if blob not in seen:
                seen.add(blob)
                found.append(json.loads(git("cat-file", "blob", blob)))
    return found


def ratio(document: Mapping[str, Any], case: Case) -> float | None:
    """Return our time / PyTorch's of a case in float32 with one thread; None where a run has not both."""
    times: dict[str, float] = {}
    for row in document["rows"]:
        place = row["op"], row["direction"], row["shape"]
        alone = (row["dtype"], row.get("epilogue", ""), row.get("threads", 1)) == ("float32", "", 1)
        if place == case and alone and row["status"] == "ok":
            times[row["provider"]] = row["hot_us_median"]
    rivals = [time for name, time in times.items() if name.startswith("PyTorch")]
    return times["bnkernels"] / min(rivals) if rivals and "bnkernels" in times else None


def curves(documents: Sequence[Mapping[str, Any]]) -> dict[str, dict[Case, list[Point]]]:
    """Return of every device, and every case that it has timed, the ratios in the order of the runs."""
    found: dict[str, dict[Case, list[Point]]] = {}
    for document in documents:
        for case in CASES:
            if (value := ratio(document, case)) is not None:
                run = f"{document['date']}\n{document['commit']}"
                found.setdefault(document["device"], {}).setdefault(case, []).append((run, value))
    return found


def draw(found: Mapping[str, Mapping[Case, Sequence[Point]]]) -> bytes:
    """Return the picture: a device below the other."""
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6 * len(found)), dpi=120, layout="constrained")
    for axes, (device, cases) in zip(figure.subplots(len(found), squeeze=False)[:, 0], found.items(), strict=True):
        runs = list(dict.fromkeys(run for points in cases.values() for run, _ in points))
        for case, points in cases.items():
            axes.plot(
                [runs.index(run) for run, _ in points], [value for _, value in points], "o-", label=" ".join(case)
            )
        axes.axhline(1, color="black", linewidth=1)
        axes.set_xticks(range(len(runs)), runs, fontsize=7)
        axes.set(yscale="log", ylabel="our time / PyTorch's", title=device)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=7)
    return png(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.history", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "history.png", metavar="FILE")
    options = parser.parse_args(arguments)
    found = curves(versions())
    if not found:
        sys.exit("error: the history of this checkout has no results of ops beside PyTorch: clone all of it")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(options.out, draw(found))
    print(f"{sum(len(next(iter(cases.values()))) for cases in found.values())} runs: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
