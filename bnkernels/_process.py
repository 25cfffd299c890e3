"""The process of the command line: its interrupts while it loads and ends, and its output streams."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOPS = signal.SIGINT, signal.SIGTERM  # Ctrl-C, and what batch systems and containers send before they kill


def is_command() -> bool:
    """Return whether this process is the command ``bnkernels``, or ``python -m bnkernels`` that loads its module."""
    name = sys.argv[0] if sys.argv else ""
    if name == "-m":  # until the module is found, which is then what the original arguments have in its place
        name = sys.orig_argv[-len(sys.argv)].removeprefix("-m")
    return os.path.splitext(os.path.basename(name))[0] == "bnkernels"


def end_on_interrupt() -> bool:
    """Let an interrupt end this process silently, if it is the command: outside `main` nobody handles the exception.

    Returns
    -------
    bool
        Whether it does now. An interrupt that is ignored, as in the background of a shell, still is.
    """
    if not is_command() or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return False
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    return True


def raise_on_interrupt() -> None:
    """Let an interrupt be Python's exception again, if `end_on_interrupt` has changed that while the command loaded."""
    if loading:
        signal.signal(signal.SIGINT, signal.default_int_handler)


class Stop:
    """Whether a run shall stop: the trainer asks before every step.

    Attributes
    ----------
    received : int or None
        Signal that asked for it.
    """

    received: int | None = None

    def __call__(self) -> bool:
        return self.received is not None

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Turn the first Ctrl-C or SIGTERM into a wish; the next one of its kind acts at once."""
        if threading.current_thread() is not threading.main_thread():  # only the main thread gets signals
            yield
            return
        previous = {number: signal.getsignal(number) for number in STOPS}

        def request(number: int, frame: FrameType | None) -> None:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else previous[number])
            self.received = number

        for number in STOPS:
            signal.signal(number, request)
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def open_streams() -> None:
    """Give every standard stream a file, and let no character fail to be printed.

    A standard stream may be closed: the next file that is opened would take its place, and get what is printed.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        elif hasattr(stream, "reconfigure") and (stream.encoding.lower(), stream.errors) != (
            "utf-8",
            "surrogateescape",
        ):
            if stream.errors in ("strict", "surrogateescape"):  # the latter is Python's own choice for LC_ALL=POSIX
                stream.reconfigure(
                    errors="backslashreplace"
                )  # characters that the encoding lacks are printed as their codes


def flush() -> None:
    """Write what was printed. What cannot be written is dropped, or Python would try again at its end."""
    try:
        sys.stdout.flush()
    except OSError as error:
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), sys.stdout.fileno())
        raise OSError(error.errno, error.strerror, "standard output") from error


loading = end_on_interrupt()  # the package imports this first: most of the command's time goes by before its first line
