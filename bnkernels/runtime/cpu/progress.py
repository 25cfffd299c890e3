"""A line on a stream while CPU kernels are compiled, which happens once per machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from numba.core.event import Event, Listener, install_listener

ERASE = "\r\x1b[K"


class _Line(Listener):
    """Listener of Numba, which tells of kernels that it compiles and not of those that it loads from its cache."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._terminal = stream, stream.isatty()
        self._depth, self._said = 0, False

    def on_start(self, event: Event) -> None:
        """Say that a kernel is compiled: on a terminal each of them, elsewhere the first."""
        self._depth += 1
        name = event.data["dispatcher"].py_func.__module__
        if self._depth > 1 or not name.startswith("bnkernels.ops.") or (self._said and not self._terminal):
            return
        self._said = True
        words = name.split(".")[2].removesuffix("_cpu").replace("_", " ")
        line = f"compiling CPU kernels (once per machine): {words} ..."
        print(f"{ERASE}{line}" if self._terminal else line, end="" if self._terminal else "\n", file=self._stream)
        self._stream.flush()

    def on_end(self, event: Event) -> None:
        """Erase the line."""
        self._depth -= 1
        if self._terminal and self._said and not self._depth:
            print(ERASE, end="", file=self._stream, flush=True)


@contextmanager
def compilation_shown(stream: TextIO) -> Iterator[None]:
    """Say meanwhile what is compiled: on a terminal in a line that vanishes, elsewhere once."""
    with install_listener("numba:compile", _Line(stream)):
        yield
