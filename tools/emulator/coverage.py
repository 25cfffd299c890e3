"""Which lines of ``cuda/`` the emulated tests execute, told by gcov."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from .build import CACHE_VARIABLE, ROOT, EmulatorError, read_sources
from .sanitizers import run

EXCEPTIONS = Path(__file__).with_name("coverage_exceptions.txt")
Lines = dict[str, dict[int, bool]]  # by file: the lines that hold code, and whether any test executes them


def coverage(arguments: Iterable[str]) -> int:
    """Run the emulated tests, print the lines of every file that none of them executes; return the exit status.

    The status is 0 if the tests pass and every line is executed, or excused in coverage_exceptions.txt.
    """
    if shutil.which("gcov") is None:
        raise EmulatorError("coverage needs gcov, which comes with gcc, and there is none on the PATH")
    with tempfile.TemporaryDirectory() as folder:
        os.environ[CACHE_VARIABLE] = folder
        selection = ["-m", "covered", "tests"]
        status = run("coverage", "pytest", ["-q", *selection, *arguments])
        if status != 0:
            return status
        lines = _executed(Path(folder))
    return report(lines, _read_exceptions())


def _executed(folder: Path) -> Lines:
    """Return the union over all kernels and template instances."""
    lines: Lines = defaultdict(dict)
    for data in sorted(folder.rglob("*.gcda")):
        report = subprocess.run(
            ["gcov", "--json-format", "--stdout", data.name],
            cwd=data.parent,
            capture_output=True,
            text=True,
            check=True,
        )
        for file in json.loads(report.stdout)["files"]:
            folder, _, name = file["file"].rpartition("cuda/")
            if folder in ("", "./"):
                for line in file["lines"]:
                    number = line["line_number"]
                    lines[name][number] = lines[name].get(number, False) or line["count"] > 0
    return lines


def _read_exceptions() -> dict[tuple[str, str], str]:
    """Return the reason for each excused line, by file and text."""
    reasons = {}
    for entry in EXCEPTIONS.read_text().splitlines():
        if entry and not entry.startswith("#"):
            file, text, reason = (part.strip() for part in entry.split(" | "))
            reasons[file, text] = reason
    return reasons


def report(lines: Lines, reasons: dict[tuple[str, str], str]) -> int:
    """Print the verdict on every file of ``cuda/``; return the exit status. A brace on its own computes nothing."""
    failures, excused = 0, set()
    for name, text in read_sources().items():
        texts, executed = text.splitlines(), lines.get(name)
        if executed is None:
            print(f"cuda/{name}: not executed at all")
            failures += 1
            continue
        print(f"cuda/{name}: {sum(executed.values())} of {len(executed)} lines executed")
        for number in sorted(number for number, hit in executed.items() if not hit):
            key = name, texts[number - 1].strip()
            if key[1] == "}":
                continue
            print(f"  cuda/{name}:{number}: {key[1]}  ({reasons.get(key, 'NEVER EXECUTED')})")
            excused.add(key)
            failures += key not in reasons
    for file, text in sorted(reasons.keys() - excused):
        print(f"{EXCEPTIONS.relative_to(ROOT)}: cuda/{file} is executed, or gone: {text}")
        failures += 1
    print("every line is executed or excused" if failures == 0 else f"{failures} to be tested or excused")
    return min(failures, 1)
