"""Streams, captures and graphs of the stand-in for CuPy.

Its rules are CuPy's and CUDA's: a stream is current only on its device, the default stream cannot capture, a stream
under capture records and does not run, and nobody waits meanwhile: a wait for the stream itself spoils the capture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


class Stream:
    """``cupy.cuda.Stream``: of the device current at its making; a context in which it is that device's current one."""

    def __init__(
        self,
        driver: Any,
        null: bool = False,
        non_blocking: bool = False,
        ptds: bool = False,
        priority: int | None = None,
    ) -> None:
        self._driver, self._before, self.is_non_blocking = driver, [], non_blocking
        if null or ptds:
            self.ptr, self.device_id = 0 if null else 2, -1
        else:  # as an address would look: far from the small numbers that CUDA reserves for the default streams
            self.ptr, self.device_id = driver.new_stream() << 12, driver.device

    @classmethod
    def from_external(cls, driver: Any, obj: Any) -> Stream:
        """Return the stream of another library, which speaks the CUDA stream protocol."""
        version, pointer = obj.__cuda_stream__()
        if (type(version), version, type(pointer)) != (int, 0, int):
            raise TypeError(f"__cuda_stream__() must return (0, int), got {version!r} and {pointer!r}")
        stream = cls(driver, null=True)
        stream.ptr = pointer
        return stream

    def __enter__(self) -> Stream:
        """Return the stream, as CuPy's does."""
        device = self._driver.device
        if self.device_id not in (-1, device):
            raise RuntimeError(
                f"The device that the stream is created on ({self.device_id}) "
                f"does not match with the current device ({device})"
            )
        self._before.append((device, self._driver.streams[device]))
        self._driver.streams[device] = self
        return self

    def __exit__(self, *_: object) -> None:
        device, before = self._before.pop()
        self._driver.streams[device] = before

    def begin_capture(self, mode: int | None = None) -> None:
        """Record what comes."""
        if self.ptr in (0, 1):
            raise RuntimeError("cannot capture on the default (legacy) stream")
        if self.ptr in self._driver.captures:
            raise RuntimeError("cudaErrorIllegalState: the stream is being captured already")
        self._driver.captures[self.ptr] = []

    def end_capture(self) -> Graph:
        """Return what came."""
        if self.ptr not in self._driver.captures:
            raise RuntimeError("cudaErrorIllegalState: the stream is not being captured")
        work = self._driver.captures.pop(self.ptr)
        if self.ptr in self._driver.invalid:
            self._driver.invalid.remove(self.ptr)
            raise RuntimeError("cudaErrorStreamCaptureInvalidated: operation failed due to a previous error")
        return Graph(self._driver, work)

    def is_capturing(self) -> bool:
        """Tell whether it records."""
        if self.ptr == 0 and self._driver.captures:
            raise RuntimeError("cudaErrorStreamCaptureImplicit: the legacy stream is asked while another is captured")
        return self.ptr in self._driver.captures

    @property
    def done(self) -> bool:
        """Whether what was launched has run: it has."""
        return True

    def synchronize(self) -> None:
        """Return: what was launched has run."""
        if self.ptr in self._driver.captures:
            self._driver.invalid.add(self.ptr)
        self._driver.wait("a wait for a stream")


class Graph:
    """``cupy.cuda.Graph``."""

    def __init__(self, driver: Any, work: Sequence[Callable[[], None]]) -> None:
        self._driver, self.work = driver, work

    def launch(self, stream: Stream | None = None) -> None:
        """Do the work."""
        self._driver.wait("the launch of a graph")
        self._driver.make_context()
        queue = stream or self._driver.streams[self._driver.device]
        self._driver.replays.append((self._driver.device, queue.ptr))
        for item in self.work:
            item()

    def upload(self, stream: Stream | None = None) -> None:
        """Return: the emulator has it."""
        self._driver.wait("the upload of a graph")
