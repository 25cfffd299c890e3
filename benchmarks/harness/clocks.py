"""Clocks, which gather calls and time them: on the host, as CUDA graphs of CuPy or PyTorch, or as a row of JAX calls.

A clock turns a row of calls into a `Batch`, which makes them all and returns the seconds that each took. On a GPU all
clocks work on one stream, so that what one provider left running is never in another one's time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter, process_time, sleep
from typing import Any, NamedTuple, Protocol

import numpy as np

from benchmarks.harness.case import Call
from benchmarks.harness.graph_nodes import Nodes, count_nodes


class Batch(NamedTuple):
    """Calls that are ready to be made together.

    Attributes
    ----------
    run : callable
        Makes all calls once; returns seconds per call.
    nodes : Nodes or None
        Nodes of a CUDA graph of them; None where there is no graph.
    """

    run: Callable[[], float]
    nodes: Nodes | None = None


class Clock(Protocol):
    """Timing of the calls of one engine."""

    method: str  # as the results name it

    def batch(self, calls: Sequence[Call], keep: bool) -> Batch:
        """Gather calls; with `keep` every one of them writes into outputs of its own, where it allocates any."""

    def working(self) -> Any:
        """Return the context in which calls are prepared and made."""

    def synchronise(self, outputs: Any = None) -> None:
        """Wait until everything, and these outputs above all, has been computed."""

    def to_float64(self, output: Any) -> Any:
        """Return an output as an array of the place's module, in float64."""


def made(calls: Sequence[Call], keep: bool) -> deque[tuple]:
    """Make the calls; return the outputs of all, so that no two share memory, or of the last alone."""
    return deque((call() for call in calls), maxlen=None if keep else 1)


QUIET = 12e-3  # seconds: longer than a tick, in which Linux counts the time of threads that compute
LONGEST_WAIT = 10.0  # seconds
AWAKE = 50e-3  # seconds of calls


def wait_for_others() -> None:
    """Return when no thread of this process computes: those of OpenMP spin on for 10 ms and more behind a call.

    Raises
    ------
    RuntimeError
        If they do not end: nothing can be timed beside them.
    """
    started = perf_counter()
    while perf_counter() - started < LONGEST_WAIT:
        before = process_time()
        sleep(QUIET)
        if process_time() - before < QUIET / 10:
            return
    raise RuntimeError(f"other threads of this process have computed for {LONGEST_WAIT:g} s: nothing can be timed")


def awaken(call: Call) -> None:
    """Make calls until the system has its cores awake and gives the threads of the call one each."""
    begun = perf_counter()
    while perf_counter() - begun < AWAKE:
        call()


class HostClock:
    """Calls that have computed when they return: NumPy, PyTorch on the CPU, threads.

    Parameters
    ----------
    alone : bool
        Whether others' threads must have gone to sleep first, since they take cores that the calls of this batch need,
        and its own be awake.
    """

    method = "wall"

    def __init__(self, alone: bool = False) -> None:
        self.alone = alone

    def batch(self, calls: Sequence[Call], keep: bool) -> Batch:
        """Gather calls; the wall clock is read before the first and after the last."""

        def run() -> float:
            if self.alone:
                wait_for_others()
                awaken(calls[0])
            started = perf_counter()
            for call in calls:
                call()
            return (perf_counter() - started) / len(calls)

        return Batch(run)

    @contextmanager
    def working(self) -> Iterator[None]:
        """Need nothing."""
        yield

    def synchronise(self, outputs: Any = None) -> None:
        """Return: it has."""

    def to_float64(self, output: Any) -> np.ndarray:
        """Return a NumPy array."""
        if type(output).__module__.partition(".")[0] == "torch":
            output = output.detach().double().numpy()
        return np.asarray(output, np.float64)


class JaxClock:
    """A row of asynchronous calls and a wait for the last: what JAX can do without its own profiler."""

    method = "wall, calls in a row"

    def __init__(self, place: str) -> None:
        self.place = place

    def batch(self, calls: Sequence[Call], keep: bool) -> Batch:
        """Gather calls; JAX runs them in order, so the last one's outputs are there last."""

        def run() -> float:
            started = perf_counter()
            for call in calls:
                outputs = call()
            self.synchronise(outputs)
            return (perf_counter() - started) / len(calls)

        return Batch(run)

    @contextmanager
    def working(self) -> Iterator[None]:
        """Need nothing: JAX has its own streams."""
        yield

    def synchronise(self, outputs: Any = None) -> None:
        """Wait for these outputs."""
        if outputs is not None:
            import jax

            jax.block_until_ready(outputs)

    def to_float64(self, output: Any) -> Any:
        """Return a NumPy or a CuPy array: float32 first, which DLPack knows everywhere."""
        single = output.astype("float32")
        if self.place == "cpu":
            return np.asarray(single, np.float64)
        import cupy

        return cupy.from_dlpack(single).astype("float64")


class Device:
    """The GPU of all clocks: CuPy, a stream, and the memory with which the L2 cache is flushed."""

    FLUSH = r"""
    extern "C" __global__ void bnk_flush(const uint4* buffer, long long count, unsigned* never) {
        const long long step = gridDim.x * (long long)blockDim.x;
        unsigned sum = 0;
        for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < count; i += step) sum += buffer[i].x;
        if (sum == 1) *never = sum;  // the buffer holds zeros: nothing is written, but the compiler cannot know
    }
    """

    def __init__(self) -> None:
        import cupy

        self.cupy = cupy
        self.stream = cupy.cuda.Stream(non_blocking=True)
        # CuPy's pool does not know about captures: what a graph's temporaries were must stay theirs while it lives.
        self.pool = cupy.cuda.MemoryPool()
        attributes = cupy.cuda.Device().attributes
        self.cache_bytes = int(attributes["L2CacheSize"])
        self._blocks = 4 * int(attributes["MultiProcessorCount"])
        with self.working():
            self._buffer = cupy.zeros(3 * self.cache_bytes // 16 * 4, "uint32")
            self._kernel = cupy.RawKernel(self.FLUSH, "bnk_flush")

    @contextmanager
    def working(self) -> Iterator[None]:
        """Make the stream CuPy's current one, and take memory from the pool of the graphs."""
        with self.stream, self.cupy.cuda.using_allocator(self.pool.malloc):
            yield

    def flush(self) -> None:
        """Read as much memory as evicts everything else from the cache; reading leaves nothing to be written back."""
        with self.working():
            count = np.int64(self._buffer.size // 4)
            self._kernel((self._blocks,), (256,), (self._buffer, count, self._buffer))

    def timed(self, replay: Callable[[], None], calls: int, flush: bool) -> float:
        """Return seconds per call of a replay on the stream, by events."""
        start, end = self.cupy.cuda.Event(), self.cupy.cuda.Event()
        if flush:
            self.flush()
        start.record(self.stream)
        replay()
        end.record(self.stream)
        end.synchronize()
        return self.cupy.cuda.get_elapsed_time(start, end) / 1e3 / calls


class CupyClock:
    """CUDA graphs captured on CuPy's stream."""

    method = "CUDA graph"

    def __init__(self, device: Device) -> None:
        self.device = device

    def batch(self, calls: Sequence[Call], keep: bool) -> Batch:
        """Capture the calls; `keep` also empties the cache before every replay."""
        device = self.device
        with device.working():
            device.stream.begin_capture()
            try:
                outputs = made(calls, keep)
                nodes = count_nodes(device.stream.ptr)
            finally:
                graph = device.stream.end_capture()
            del outputs
            graph.upload(device.stream)
        return Batch(lambda: device.timed(lambda: graph.launch(device.stream), len(calls), keep), nodes)

    def working(self) -> Any:
        """Make the stream the current one."""
        return self.device.working()

    def synchronise(self, outputs: Any = None) -> None:
        """Wait for the stream."""
        self.device.stream.synchronize()

    def to_float64(self, output: Any) -> Any:
        """Return a CuPy array."""
        return output.astype("float64")


class TorchClock:
    """CUDA graphs captured by PyTorch, whose allocator then gives them a pool of their own."""

    method = "CUDA graph"

    def __init__(self, device: Device) -> None:
        import torch

        self.device, self.torch = device, torch
        self.stream = torch.cuda.ExternalStream(device.stream.ptr)

    def batch(self, calls: Sequence[Call], keep: bool) -> Batch:
        """Capture the calls; `keep` also empties the cache before every replay."""
        torch, graph = self.torch, self.torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = made(calls, keep)
            nodes = count_nodes(torch.cuda.current_stream().cuda_stream)
        del outputs

        def replay() -> None:
            with torch.cuda.stream(self.stream):
                graph.replay()

        return Batch(lambda: self.device.timed(replay, len(calls), keep), nodes)

    @contextmanager
    def working(self) -> Iterator[None]:
        """Make the stream the current one, of CuPy too: what a provider prepares with it is then in order."""
        with self.device.working(), self.torch.cuda.stream(self.stream):
            yield

    def synchronise(self, outputs: Any = None) -> None:
        """Wait for the stream."""
        self.device.stream.synchronize()

    def to_float64(self, output: Any) -> Any:
        """Return a CuPy array."""
        return self.device.cupy.from_dlpack(output.detach().double().contiguous())
