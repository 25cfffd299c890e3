"""The naive answer to the question, with real threads and barriers on the CPU; and beside it the other partition.

"Three phases": every example belongs to a thread; all add up, wait for one to form mean and variance, and go on. "By
neuron": the same threads own neurons instead, and nobody waits. ``three_phase.cpp`` is both; with one thread, plain
loops.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import weakref
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness.case import Arrays, Call, Case, NotSupportedError, Provider, cores
from benchmarks.harness.timing import ROOT
from benchmarks.peers import EPSILON, MOMENTUM

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ("-std=c++20", "-O3", "-march=native", "-shared", "-fPIC", "-pthread")
MOST_THREADS = 1024
BY_EXAMPLE, BY_NEURON = "three phases, C++", "by neuron, C++"
ARRAYS = ("x", "dy", "gamma", "beta", "mean", "rstd", "running_mean", "running_var", "out", "dgamma", "dbeta")


class Job(ctypes.Structure):
    """The struct of this name in ``three_phase.cpp``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ARRAYS),
        *((name, ctypes.c_int64) for name in ("rows", "channels")),
        *((name, ctypes.c_double) for name in ("momentum", "eps")),
        *((name, ctypes.c_int32) for name in ("relu", "backward", "by_example")),
    )


def absent() -> str | None:
    """Return why it cannot run, or None."""
    return None if shutil.which("g++") else "it needs g++"


@cache
def library() -> ctypes.CDLL:
    """Compile the source, once for every version of it, and load it."""
    digest = hashlib.sha256(SOURCE.read_bytes() + " ".join(FLAGS).encode()).hexdigest()[:16]
    path = ROOT / "build" / f"three_phase-{digest}.so"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        fresh = path.with_suffix(f".{os.getpid()}")
        done = subprocess.run(["g++", *FLAGS, SOURCE, "-o", fresh], capture_output=True, text=True)
        if done.returncode != 0:
            raise NotSupportedError(f"g++ does not compile {SOURCE.name} (it needs C++20): {done.stderr.strip()}")
        fresh.replace(path)
    loaded = ctypes.CDLL(str(path))
    loaded.bnk_pool_new.restype = ctypes.c_void_p
    loaded.bnk_pool_delete.argtypes = (ctypes.c_void_p,)
    loaded.bnk_pool_run.argtypes = (ctypes.c_void_p, ctypes.POINTER(Job))
    return loaded


class Pool:
    """Threads that wait for work; they end with the object."""

    def __init__(self, threads: int) -> None:
        self._address = library().bnk_pool_new(threads, cores())
        weakref.finalize(self, library().bnk_pool_delete, self._address)

    def run(self, job: Job) -> None:
        """Let all threads do their shares, and wait for them."""
        library().bnk_pool_run(self._address, job)


def prepare(case: Case, arrays: Arrays, by_example: bool, threads: int | None = None) -> Call:
    """Prepare a case.

    Parameters
    ----------
    case, arrays
        See `benchmarks.harness.case.Provider`.
    by_example : bool
        Three phases, instead of by neuron.
    threads : int, optional
        Number of threads; by default that of the case.

    Raises
    ------
    NotSupportedError
        For anything but float32 matrices, for a residual, and for more threads than a machine bears.
    """
    if (case.layout, case.dtype) != ("NC", "float32") or case.epilogue == "add_relu":
        raise NotSupportedError("not supported: written for float32 matrices without a residual")
    rows, channels = case.shape
    threads = case.threads if threads is None else threads
    if threads > MOST_THREADS:
        raise NotSupportedError(f"not supported: {threads} threads, more than {MOST_THREADS}")
    backward = case.direction == "backward"
    used: dict[str, Any] = arrays | {"out": np.empty_like(arrays["x"])}
    if backward:
        x = arrays["x"].astype(np.float64)
        used |= {"mean": x.mean(axis=0), "rstd": (x.var(axis=0) + EPSILON) ** -0.5}
        used |= {name: np.empty(channels, np.float32) for name in ("dgamma", "dbeta")}
    pointers = [used[name].ctypes.data if name in used else None for name in ARRAYS]
    job = Job(*pointers, rows, channels, MOMENTUM, EPSILON, bool(case.epilogue), backward, by_example)
    pool = Pool(threads)
    outputs = tuple(used[name] for name in (("out", "dgamma", "dbeta") if backward else ("out", *ARRAYS[6:8])))

    def call() -> tuple:
        pool.run(job)
        return outputs

    call.arrays = used  # the job has addresses only
    return call


PROVIDERS = tuple(
    Provider(
        name,
        "cpu",
        partial(prepare, by_example=by_example),
        absent,
        describe=lambda case, arrays, barriers=2 * by_example: f"barriers: {barriers}",
    )
    for name, by_example in ((BY_EXAMPLE, True), (BY_NEURON, False))
)
