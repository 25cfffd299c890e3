"""Programs with a time limit: their exit status, and nothing of them left behind."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu.processes import end, run_limited, start


def started(program: str, ready: Path) -> subprocess.Popen:
    """Start a program as `run_limited` does; return when it has written the file, however slow the machine is."""
    process = start([sys.executable, "-c", program])
    deadline = time.monotonic() + 60
    while not (ready.exists() and ready.read_text()):
        assert process.poll() is None, "the program ended"
        assert time.monotonic() < deadline, "the program did not get ready"
        time.sleep(0.02)
    return process


def test_the_status_of_a_program_and_none_at_the_limit() -> None:
    assert run_limited([sys.executable, "-c", "raise SystemExit(3)"], 30) == 3
    assert run_limited([sys.executable, "-c", "import time; time.sleep(60)"], 0.5) is None


@pytest.mark.parametrize("ignored", [False, True], ids=["foreground", "background"])
def test_an_interrupt_lets_a_program_write_what_it_has(tmp_path: Path, ignored: bool) -> None:
    """Also where a shell runs all of this in the background, and so has it ignore interrupts."""
    ready, note = tmp_path / "ready", tmp_path / "note"
    program = f"""
import time
try:
    open({str(ready)!r}, "w").write("ready")
    time.sleep(60)
except KeyboardInterrupt:
    open({str(note)!r}, "w").write("kept")
"""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN if ignored else signal.default_int_handler)
    try:
        process = started(program, ready)
    finally:
        signal.signal(signal.SIGINT, before)
    end(process, grace=30)
    assert note.read_text() == "kept"


def test_a_stopped_program_takes_its_children_with_it(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    program = f"""
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open({str(note)!r}, "w").write(str(child.pid))
time.sleep(60)
"""
    process = started(program, note)
    before = time.monotonic()
    end(process, grace=0.5)
    assert time.monotonic() - before < 10
    state = Path(f"/proc/{note.read_text()}/stat")
    deadline = time.monotonic() + 5
    while state.exists() and state.read_text().split()[2] != "Z" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not state.exists() or state.read_text().split()[2] == "Z"
