"""Timing and records that all benchmarks share: interleaved rounds, quantiles, and the facts of a run."""

from __future__ import annotations

import datetime
import gc
import importlib
import json
import re
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bnkernels.runtime import cpu
from bnkernels.train.checkpoint import write_atomically
from bnkernels.train.environment import report

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


# ---- timing ---------------------------------------------------------------------------------------------------------


def interleave(measurements: Mapping[str, Callable[[], float]], rounds: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Take every measurement once per round, in random order: all see the same machine state (clocks, load).

    Parameters
    ----------
    measurements : dict of str to callable
        Each returns its figure, in whatever unit.
    rounds : int
        Number of rounds.
    seed : int
        Seed of the order.

    Returns
    -------
    dict of str to numpy.ndarray, shape (rounds,)
        The figures by name, round by round.
    """
    rng = np.random.default_rng(seed)
    names = list(measurements)
    figures = {name: np.empty(rounds) for name in names}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()  # a collection would hit whichever variant happens to run
    try:
        for i in range(rounds):
            for name in rng.permutation(names):
                figures[name][i] = measurements[name]()
    finally:
        if collecting:
            gc.enable()
    return figures


def quantiles(figures: np.ndarray) -> dict[str, float]:
    """Return median, p20 and p80, to four digits."""
    p20, median, p80 = np.quantile(figures, (0.2, 0.5, 0.8))
    return {"median": round4(median), "p20": round4(p20), "p80": round4(p80)}


def round4(figure: float) -> float:
    """Return a figure to four significant digits: no timing here is better than that."""
    return float(f"{figure:.4g}")


# ---- the facts of a run ---------------------------------------------------------------------------------------------


def facts(*packages: str, place: str = "cpu") -> dict[str, Any]:
    """Return what a table of figures has to say about where they come from.

    Parameters
    ----------
    *packages : str
        Names of further packages whose versions matter.
    place : str
        ``cpu`` or ``cuda``.

    Returns
    -------
    dict
        Place, device, versions (None for what is not installed), on a CPU the engine of NumPy arrays, the usual number
        of threads, commit and date.
    """
    about = dict(line.split(": ", 1) for line in report().splitlines())
    wanted = ["Python", "NumPy", "BLAS", "bnkernels"]
    device = about["CPU"]
    if place == "cuda":
        wanted += ["CuPy", "CUDA driver", "CUDA runtime", "NVRTC"]
        device = about["GPUs"].partition(",")[0]
    else:
        packages += ("numba",)
    return {
        "place": place,
        "device": device,
        "versions": {name: about[name].partition(",")[0] for name in wanted}
        | {name: version_of(name) for name in packages},
        **({"engine": cpu.engine()} if place == "cpu" else {}),
        "threads": 1,
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }


def results_folder(document: Mapping[str, Any]) -> Path:
    """Return where the results of a device belong, by the facts of a run."""
    return RESULTS / re.sub(r"[^a-z0-9]+", "-", document["device"].lower()).strip("-")


def version_of(package: str) -> str | None:
    """Return the version of a package, or None where it is not installed."""
    try:
        return importlib.import_module(package).__version__
    except ImportError:
        return None


def commit() -> str:
    """Return the short hash of the checkout, with ``+`` behind it if it differs in more than results and prose."""
    try:
        name = _git("rev-parse", "--short", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results", ":!*.md")
        return name + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "not a git checkout"


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write a document of figures, one line per entry at its top two levels, so that changes read well."""
    entries = [f"{_dumps(key)}: {_lines(value)}" for key, value in document.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, ("{\n" + ",\n".join(entries) + "\n}\n").encode())


def _lines(value: Any) -> str:
    if isinstance(value, list) and value:
        return "[\n  " + ",\n  ".join(map(_dumps, value)) + "\n]"
    if isinstance(value, dict) and value:
        return "{\n  " + ",\n  ".join(f"{_dumps(k)}: {_dumps(v)}" for k, v in value.items()) + "\n}"
    return _dumps(value)


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
