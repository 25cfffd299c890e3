"""Starts Python inside a sanitizer, and makes sure that no report goes unseen."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from .build import BUILD_VARIABLE, BUILDS, EmulatorError, compiler

LOG_VARIABLE = "BNKERNELS_EMULATOR_LOG"
REPORTED = 66  # exit status after a report
_ADDR_NO_RANDOMIZE = 0x0040000


def run(build: str, module: str, arguments: Sequence[str]) -> int:
    """Run ``python -m module arguments`` on the emulator's build `build`; return its exit status.

    Whatever the sanitizer reports ends up on stderr, and the status is then not 0.
    """
    environment = os.environ | {BUILD_VARIABLE: build}
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "report"
        environment |= _environment(build, log)
        status = subprocess.run(
            [sys.executable, "-m", module, *arguments], env=environment, preexec_fn=_fixed_addresses
        )
        reports = "".join(path.read_text(errors="replace") for path in sorted(Path(folder).iterdir()))
    if not reports:
        return status.returncode
    print(_beginning(reports), file=sys.stderr)
    return status.returncode or REPORTED


class Reports:
    """What the sanitizer of this process reports, as it comes."""

    def __init__(self) -> None:
        log = os.environ.get(LOG_VARIABLE)
        self._path = Path(f"{log}.{os.getpid()}") if log else None
        self._seen = 0

    def new(self) -> str:
        """Return the beginning of what came since the last call."""
        if self._path is None or not self._path.exists():
            return ""
        with self._path.open(errors="replace") as log:
            log.seek(self._seen)
            text = log.read()
            self._seen = log.tell()
        return _beginning(text)


def _beginning(reports: str, most_lines: int = 60) -> str:
    """Keep the first reports: one race of a thousand threads is a thousand reports."""
    lines = reports.splitlines()
    rest = f"\n... and {len(lines) - most_lines} more lines of reports" if len(lines) > most_lines else ""
    return "\n".join(lines[:most_lines]) + rest


def library(sanitizer: str) -> Path:
    """Return the sanitizer's library, which comes with g++; raise `EmulatorError` where it does not."""
    name = f"lib{sanitizer}.so"
    found = subprocess.run([compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    path = Path(found.stdout.strip())
    if not path.is_absolute():
        raise EmulatorError(f"this g++ has no {name}: install the sanitizer libraries that belong to it")
    return path


def _environment(build: str, log: Path) -> dict[str, str]:
    """Return what a process needs around the build."""
    sanitizer = BUILDS[build].sanitizer
    if sanitizer is None:
        return {}
    common = f"log_path={log}:exitcode={REPORTED}"
    return {
        LOG_VARIABLE: str(log),
        "LD_PRELOAD": str(library(sanitizer)),
        "ASAN_OPTIONS": f"{common}:detect_leaks=0",  # the interpreter does not free everything
        "UBSAN_OPTIONS": "print_stacktrace=1",
        # Each launch is judged by itself, whatever was reported before.
        "TSAN_OPTIONS": f"{common}:suppress_equal_stacks=0:suppress_equal_addresses=0",
        "OPENBLAS_NUM_THREADS": "1",  # threads that TSan would follow for nothing
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",  # the name of the test is out before a report ends the process
    }


def _fixed_addresses() -> None:
    """Turn off address randomisation, where allowed: it puts memory where older TSan runtimes cannot follow."""
    libc = ctypes.CDLL(None)
    persona = libc.personality(0xFFFFFFFF)
    if persona != -1:
        libc.personality(persona | _ADDR_NO_RANDOMIZE)
