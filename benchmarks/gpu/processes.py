"""Programs with a time limit, of which nothing is left running."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

GRACE = 3.0  # seconds to write down what was measured after an interrupt


def run_limited(
    command: Sequence[str],
    seconds: float,
    environment: Mapping[str, str] | None = None,
    log: Any = None,
    grace: float = GRACE,
) -> int | None:
    """Run a program in a process group of its own; return its exit status, or None if it had to be stopped.

    Parameters
    ----------
    command : sequence of str
        The program and its arguments.
    seconds : float
        After which the whole group is interrupted, and killed if it does not end.
    environment : mapping, optional
        Instead of this process's own.
    log : file, optional
        File of its output and standard error; by default those of this process.
    grace : float
        Seconds between interrupt and kill; longer than that of whatever the program itself runs.
    """
    process = start(command, environment, log)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        end(process, grace)


def start(command: Sequence[str], environment: Mapping[str, str] | None = None, log: Any = None) -> subprocess.Popen:
    """Start a program in a process group of its own, ready to be interrupted."""

    def prepare() -> None:
        os.setpgrp()  # a group, not a session: what ends this session ends the group with it
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # which is ignored by what a shell runs in the background

    stderr = subprocess.STDOUT if log else None
    return subprocess.Popen(command, env=environment, stdout=log, stderr=stderr, preexec_fn=prepare)


def end(process: subprocess.Popen, grace: float) -> None:
    """End what is left of a process group: by an interrupt first, which programs here answer by keeping results."""
    for number, seconds in ((signal.SIGINT, grace), (signal.SIGKILL, None)):
        if not signalled(process, number):
            return
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            continue
        if number == signal.SIGINT:
            signalled(process, signal.SIGKILL)  # its children, should it have left any
            return


def signalled(process: subprocess.Popen, number: int) -> bool:
    """Send a signal to the group; return False if nobody is left in it."""
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return False
    return True
