"""The GPU as its facts are measured: kernels, counters, events and graphs, through CuPy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness.graph_nodes import count_nodes
from benchmarks.harness.timing import quantiles

SOURCES = Path(__file__).parent / "cuda"
ROUNDS = 15
CLUSTERS = (2, 4, 8)  # sizes in blocks
HOLD_CYCLES = np.int64(100_000)  # some 50 microseconds


class UnavailableError(Exception):
    """The device, or what is installed, has no such thing; the message says what is missing."""


class Gpu:
    """The current device as the facts see it.

    Parameters
    ----------
    rehearsal : bool
        Walk through everything with a stand-in for CuPy: the same calls, a few of each, and no figure.
    """

    def __init__(self, rehearsal: bool = False) -> None:
        import cupy

        self.cupy, self.rehearsal = cupy, rehearsal
        self.rounds = 2 if rehearsal else ROUNDS
        self.stream = cupy.cuda.Stream(non_blocking=True)
        self.attributes = cupy.cuda.Device().attributes
        self.multiprocessors = int(self.attributes["MultiProcessorCount"])
        self.capability = int(cupy.cuda.Device().compute_capability)
        self._hold = self.kernel("launches", "bnk_hold")

    def kernel(self, file: str, name: str, cooperative: bool = False) -> Any:
        """Return a kernel of ``cuda/<file>.cu``."""
        code = (SOURCES / f"{file}.cu").read_text(encoding="utf-8")
        return self.cupy.RawKernel(code, name, ("--std=c++17",), enable_cooperative_groups=cooperative)

    def counter(self, size: int = 1) -> Any:
        """Return zeros that kernels count in."""
        return self.cupy.zeros(size, "uint32")

    def figure(self, values: Sequence[float]) -> dict[str, float] | None:
        """Return median and spread; None in a rehearsal, where no value means anything."""
        return None if self.rehearsal else quantiles(np.asarray(values))

    def timed(self, work: Callable[[], Any]) -> float:
        """Return microseconds that the device takes for what `work` enqueues, by events.

        The device is kept busy until the host has enqueued all of it: the host's time is not in the figure.
        """
        self._hold((1,), (1,), (HOLD_CYCLES,))
        start, end = self.cupy.cuda.Event(), self.cupy.cuda.Event()
        start.record(self.stream)
        work()
        end.record(self.stream)
        end.synchronize()
        return 1e3 * self.cupy.cuda.get_elapsed_time(start, end)

    def captured(self, work: Callable[[], Any], count: int) -> tuple[Any, int | None]:
        """Return a graph of `count` times `work`, and how many nodes the driver sees in it."""
        self.stream.begin_capture()
        try:
            for _ in range(count):
                work()
            nodes = count_nodes(self.stream.ptr).count
        finally:
            graph = self.stream.end_capture()
        graph.upload(self.stream)
        return graph, nodes

    @contextmanager
    def working(self) -> Iterator[None]:
        """Make the stream the current one."""
        with self.stream:
            yield


def expect(found: Any, right: Any, what: str) -> None:
    """Raise ArithmeticError unless a kernel did what it should."""
    if found != right:
        raise ArithmeticError(f"{what}: {found} instead of {right}: its time means nothing")
