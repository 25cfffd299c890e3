"""Cases, providers and ops: the computation on one shape, a library that does it, and the list of both.

This module knows neither a framework nor how time is taken.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

Arrays = dict[str, Any]
Call = Callable[[], tuple]

LAYOUTS = ("NC", "NCL", "NCHW", "NHWC")
DTYPES = ("float16", "bfloat16", "float32", "float64")
EPILOGUES = ("", "relu", "add_relu")  # after the normalisation: nothing, an activation, a residual sum before it
EPS = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23, "float64": 2.0**-52}


class NotSupportedError(Exception):
    """A provider cannot do a case; the message says why. Such a row is shown, not left out."""


class WrongResultError(ArithmeticError):
    """A provider computes something else than the reference, so its speed is of no interest."""


@dataclass(frozen=True)
class Case:
    """One line of the list of cases.

    Attributes
    ----------
    op, direction : str
        ``batch_norm`` and ``forward`` or ``backward``; for other ops see their ``bench_*.py``.
    shape : tuple of int
        (N, C) or (N, C, L) or (N, C, H, W): logical, whatever the layout in memory.
    dtype : str
        Data type; parameters and statistics are float32 (float64 for float64).
    layout : str
        Order of the axes in memory.
    epilogue : str
        Operation that is fused behind it where a provider can: ``""``, ``relu``, ``add_relu``.
    all_cores : bool
        Whether everybody computes with all cores of the CPU, instead of one thread.
    """

    op: str
    direction: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    layout: str = "NC"
    epilogue: str = ""
    all_cores: bool = False

    @property
    def threads(self) -> int:
        """Threads that everybody computes with on a CPU."""
        return cores() if self.all_cores else 1

    @property
    def size(self) -> int:
        """Elements of the data."""
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}[self.dtype]

    @property
    def memory_shape(self) -> tuple[int, ...]:
        """The shape as it lies in memory: NHWC has its channels last."""
        if self.layout == "NHWC":
            n, c, h, w = self.shape
            return n, h, w, c
        return self.shape

    @property
    def accumulator(self) -> str:
        """The data type of parameters and statistics."""
        return "float64" if self.dtype == "float64" else "float32"

    @property
    def channel_axis(self) -> int:
        """Axis of the channels in memory."""
        return -1 if self.layout == "NHWC" else 1

    def __str__(self) -> str:
        """Return the case as the tables show it."""
        words = [self.op, self.direction, "x".join(map(str, self.shape)), self.dtype]
        words += [self.layout] if self.layout != "NC" else []
        words += [f"+{self.epilogue}"] if self.epilogue else []
        return " ".join(words + (["all cores"] if self.all_cores else []))


@dataclass(frozen=True)
class Provider:
    """A library, or a way to use it, that can compute a case.

    Attributes
    ----------
    name : str
        As the tables show it.
    place : str
        ``cpu`` (NumPy arrays come in) or ``cuda`` (CuPy arrays come in).
    prepare : callable
        ``prepare(case, arrays)`` returns the call to time, which computes the case once and returns its outputs, arrays
        of whatever framework. Buffers, conversions and compilation belong into `prepare`, or into the first call. It
        raises `NotSupportedError` for a case it cannot do.
    absent : callable
        Returns why the provider cannot run on this machine at all, or None.
    engine : str
        Way in which its calls are gathered: ``host``, ``cupy``, ``torch``, ``jax`` (see `benchmarks.harness.clocks`).
    describe : callable
        ``describe(case, arrays)`` returns what was chosen behind the scenes, such as a backend; may be empty.
    slow_start : bool
        Compiles for seconds per case; comes last where time is short.
    """

    name: str
    place: str
    prepare: Callable[[Case, Arrays], Call]
    absent: Callable[[], str | None] = lambda: None
    engine: str = "host"
    describe: Callable[[Case, Arrays], str] = lambda case, arrays: ""
    slow_start: bool = False


def on_both(
    names: str | tuple[str, str],
    prepare: Callable[[Case, Arrays], Call],
    absent: Callable[[str], str | None] = lambda place: None,
    engine: str = "cupy",
) -> tuple[Provider, Provider]:
    """Return a provider on the CPU and one on a GPU that prepare a case in the same way.

    Parameters
    ----------
    names : str or (str, str)
        Name, or the one on the CPU and the one on a GPU.
    prepare : callable
        As in `Provider`.
    absent : callable
        ``absent(place)`` returns why the provider cannot run there, or None.
    engine : str
        Engine on the GPU.
    """
    cpu, cuda = (names, names) if isinstance(names, str) else names
    return (
        Provider(cpu, "cpu", prepare, partial(absent, "cpu")),
        Provider(cuda, "cuda", prepare, partial(absent, "cuda"), engine=engine),
    )


@dataclass(frozen=True)
class Op:
    """An op with its cases and providers, as a ``bench_*.py`` declares it.

    Attributes
    ----------
    name : str
        Name in `Case.op`.
    cases : sequence of Case
        The whole list, also of what we do not support yet.
    inputs : callable
        ``inputs(case, random)`` returns the arrays of a case; ``random(shape)`` draws float32 standard normal numbers
        where the case runs (NumPy or CuPy). Converting to the case's data type is done by the caller of `inputs`.
    reference : callable
        ``reference(case, arrays, xp)`` returns the right outputs from float64 arrays.
    bytes_moved : callable
        ``bytes_moved(case)``: the fewest bytes that the case has to read and write.
    providers : sequence of Provider
        Providers, bnkernels first.
    """

    name: str
    cases: Sequence[Case]
    inputs: Callable[[Case, Callable[..., Any]], Arrays]
    reference: Callable[[Case, Arrays, Any], tuple]
    bytes_moved: Callable[[Case], int]
    providers: Sequence[Provider]


def cores() -> int:
    """Return how many threads can run at the same time."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def one_thread(case: Case) -> None:
    """Refuse a case for all cores.

    Raises
    ------
    NotSupportedError
        For such a case.
    """
    if case.all_cores:
        raise NotSupportedError("it computes with one thread")


def native_dtype(name: str) -> np.dtype:
    """Return the NumPy data type; bfloat16 is that of ml_dtypes.

    Raises
    ------
    NotSupportedError
        For bfloat16 without ml_dtypes.
    """
    if name != "bfloat16":
        return np.dtype(name)
    try:
        import ml_dtypes
    except ImportError:
        raise NotSupportedError("bfloat16 arrays need the package ml_dtypes") from None
    return np.dtype(ml_dtypes.bfloat16)
