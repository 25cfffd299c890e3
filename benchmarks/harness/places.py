"""The two places a case runs in, CPU and GPU: array module, random numbers, clocks, and what bounds all providers."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import cache, partial
from importlib import import_module
from typing import Any

import numpy as np

from benchmarks.harness.case import Arrays, Call, Case, Provider, native_dtype
from benchmarks.harness.clocks import Clock, CupyClock, Device, HostClock, JaxClock, TorchClock
from bnkernels.runtime import registry
from bnkernels.runtime.cpu.threads import set_num_threads

SEED = 0
COPY, EMPTY = "copy", "empty kernel"  # the limits: bytes, and a launch that does nothing
COPY_MEMCPY = "copy, cudaMemcpy"  # the other way to copy; the faster of the two is the limit
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # constants of glibc's malloc.h


def why_absent(place: str) -> str | None:
    """Return why this machine has no such place, or None."""
    return None if place == "cpu" else registry.why_no_cuda()


def keep_memory() -> None:
    """Let freed memory be used again, however much: new pages in every call would be most of the time of large outputs.

    It favours those that allocate their outputs. For the process of a benchmark; elsewhere than with glibc, nothing.
    """
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1)):
            mallopt(option, value)


class Host:
    """The CPU: one buffer per provider, as its caches hold most of the sizes; everything by the wall clock."""

    name = "cpu"
    xp = np
    cold = False

    def __init__(self) -> None:
        self.random = partial(np.random.default_rng(SEED).standard_normal, dtype=np.float32)
        self.threads = 1

    def use_threads(self, count: int) -> None:
        """Let everybody whose threads can be set compute with so many from now on."""
        self.threads = count
        set_num_threads(count)
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(count)

    def working(self) -> Any:
        """Need nothing."""
        return nullcontext()

    def release(self) -> None:
        """Need nothing: memory goes back by itself."""

    def limits(self, nbytes: int) -> tuple[Provider, ...]:
        """Return the providers of a lower bound: no case that moves this number of bytes is faster."""
        return (Provider(COPY, "cpu", lambda case, arrays: self._copy(nbytes)),)

    def clock(self, engine: str) -> Clock:
        """Return the clock of an engine."""
        return JaxClock("cpu") if engine == "jax" else HostClock(alone=self.threads > 1)

    def sets(self, nbytes: int, held: int, providers: int) -> int:
        """Return 1: nothing rotates."""
        return 1

    def _copy(self, nbytes: int) -> Call:
        source, target = halves(np, nbytes)
        if self.threads > 1:
            pool, parts = ThreadPoolExecutor(self.threads), [np.array_split(a, self.threads) for a in (target, source)]

            def call_of_threads() -> tuple:
                list(pool.map(np.copyto, *parts))
                return (target,)

            return call_of_threads

        def call() -> tuple:
            np.copyto(target, source)
            return (target,)

        return call


class Gpu:
    """The current CUDA device, through CuPy."""

    name = "cuda"
    cold = True
    MOST_SETS = 200
    COPY_SOURCE = r"""
    extern "C" __global__ void bnk_copy(const uint4* source, uint4* target, long long count) {
        const long long step = gridDim.x * (long long)blockDim.x;
        long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
        for (; i < count; i += step) target[i] = source[i];
    }
    extern "C" __global__ void bnk_empty(int ignored) {}  // CuPy is used to arguments
    """

    def __init__(self) -> None:
        import cupy

        self.xp = cupy
        self.device = Device()
        with self.working():  # where the numbers are drawn as well: a generator has a state on the device
            self.random = partial(cupy.random.default_rng(SEED).standard_normal, dtype=np.float32)
        self._blocks = 8 * int(cupy.cuda.Device().attributes["MultiProcessorCount"])
        self._copy_kernel, self._empty_kernel = (
            cupy.RawKernel(self.COPY_SOURCE, f"bnk_{n}") for n in ("copy", "empty")
        )
        self._clocks: dict[str, Clock] = {}

    def working(self) -> Any:
        """Make the clocks' stream the current one: everything happens on it, in order."""
        return self.device.working()

    def use_threads(self, count: int) -> None:
        """Need nothing: the work is not the CPU's."""

    def release(self) -> None:
        """Give the memory of the last case back, CuPy's and PyTorch's."""
        gc.collect()
        self.device.pool.free_all_blocks()
        if "torch" in self._clocks:
            self._clocks["torch"].torch.cuda.empty_cache()

    def limits(self, nbytes: int) -> tuple[Provider, ...]:
        """Return the providers of a lower bound: no case that moves this number of bytes is faster."""
        makers = {COPY: self._copy, COPY_MEMCPY: self._memcpy, EMPTY: self._empty}
        return tuple(
            Provider(name, "cuda", lambda case, arrays, make=make: make(nbytes), engine="cupy")
            for name, make in makers.items()
        )

    def clock(self, engine: str) -> Clock:
        """Return the clock of an engine; all share one stream."""
        if engine not in self._clocks:
            makers = {"cupy": CupyClock, "torch": TorchClock, "jax": lambda device: JaxClock("cuda")}
            self._clocks[engine] = makers[engine](self.device)
        return self._clocks[engine]

    def sets(self, nbytes: int, held: int, providers: int) -> int:
        """Return the number of sets of buffers that rotate: three times the cache in all, at most half of the memory.

        Parameters
        ----------
        nbytes : int
            Bytes that a call moves.
        held : int
            Bytes of the arrays of a set.
        providers : int
            Number of providers that have sets at the same time.

        Raises
        ------
        MemoryError
            If the memory does not hold one set for each.
        """
        free, _ = self.xp.cuda.runtime.memGetInfo()
        fitting = free // 2 // max(held * providers, 1)
        if fitting < 1:
            raise MemoryError(f"needs about {2 * held * providers / 2**30:.1f} GiB of device memory")
        return min(-(-3 * self.device.cache_bytes // max(nbytes, 1)), self.MOST_SETS, fitting)

    def _copy(self, nbytes: int) -> Call:
        source, target = halves(self.xp, nbytes)
        count = np.int64(source.size // 16)
        blocks = max(1, min(self._blocks, -(-int(count) // 256)))

        def call() -> tuple:
            self._copy_kernel((blocks,), (256,), (source, target, count))
            return (target,)

        return call

    def _memcpy(self, nbytes: int) -> Call:
        source, target = halves(self.xp, nbytes)

        def call() -> tuple:
            target.data.copy_from_device_async(source.data, target.nbytes)
            return (target,)

        return call

    def _empty(self, nbytes: int) -> Call:
        def call() -> tuple:
            self._empty_kernel((1,), (32,), (np.int32(0),))
            return ()

        return call


def halves(xp: Any, nbytes: int) -> tuple[Any, Any]:
    """Return source and target of a copy that reads and writes this number of bytes in all."""
    size = max(nbytes // 2 // 16 * 16, 16)
    return xp.ones(size, "uint8"), xp.zeros(size, "uint8")


@cache
def place_of(name: str) -> Host | Gpu:
    """Return a place by name."""
    return Host() if name == "cpu" else Gpu()


def array_module(array: Any) -> Any:
    """Return NumPy or CuPy: the module of an array."""
    return np if isinstance(array, np.ndarray) else import_module("cupy")


def cast(case: Case, arrays: Arrays) -> Arrays:
    """Return the arrays in the data types of the case: data in its own, vectors in the accumulator's."""
    data, vectors = native_dtype(case.dtype), np.dtype(case.accumulator)
    return {
        name: array if array.dtype.kind != "f" else array.astype(data if array.ndim > 1 else vectors)
        for name, array in arrays.items()
    }


def copies(arrays: Arrays, count: int) -> Sequence[Arrays]:
    """Return this number of sets of copies."""
    return [{name: array.copy() for name, array in arrays.items()} for _ in range(count)]


def to_float64(arrays: Arrays) -> Arrays:
    """Return the arrays in float64; integers and masks as they are."""
    return {name: array if array.dtype.kind in "biu" else array.astype(np.float64) for name, array in arrays.items()}


def call_in(clock: Clock, prepare: Callable[[], Call]) -> tuple[Call, tuple]:
    """Prepare, make the first call, wait for it; return the call and its outputs."""
    with clock.working():
        call = prepare()
        outputs = call()
        clock.synchronise(outputs)
    return call, outputs
