"""Ops under pytest-benchmark: what a ``bench_*.py`` declares, and the checking and timing of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest

from benchmarks.harness import WrongResultError, round4

ROUNDINGS = 1000  # of the largest element: what a right result is far below, and a wrong one far above

Arrays = dict[str, np.ndarray]
Provider = Callable[[Arrays], Callable[[], tuple]]


class Op(NamedTuple):
    """One op as a benchmark: how to make its inputs, what is right, what it has to move, and who can compute it.

    A provider takes the inputs and returns the function to time, which returns the outputs.
    """

    inputs: Callable[[np.random.Generator, tuple[int, ...], str], Arrays]
    reference: Callable[[Arrays], tuple[np.ndarray, ...]]
    bytes_moved: Callable[[Arrays], int]
    providers: Mapping[str, Provider]


def bench(benchmark: Any, op: Op, provider: str, shape: tuple[int, ...], dtype: str) -> None:
    """Check a provider against the reference in float64, then time it; skips where the provider is not there."""
    inputs = op.inputs(np.random.default_rng(0), shape, dtype)
    exact = op.reference(
        {name: array.astype("f8") if array.dtype.kind == "f" else array for name, array in inputs.items()}
    )
    call = op.providers[provider]({name: array.copy() for name, array in inputs.items()})
    for i, (found, expected) in enumerate(zip(call(), exact, strict=True)):
        check_close(f"{provider}, output {i}", to_numpy(found), expected, np.dtype(dtype))
    benchmark.extra_info.update(provider=provider, shape=list(shape), dtype=dtype, bytes=op.bytes_moved(inputs))
    benchmark(call)
    if benchmark.stats is not None:  # None under --benchmark-disable
        benchmark.extra_info["GB/s"] = round4(op.bytes_moved(inputs) / benchmark.stats["median"] / 1e9)


def check_close(name: str, found: np.ndarray, exact: np.ndarray, dtype: np.dtype) -> None:
    """Raise WrongResultError unless every element is right to `ROUNDINGS` roundings of the largest one."""
    error = np.abs(found - exact).max(initial=0)
    allowed = ROUNDINGS * np.finfo(dtype).eps * np.abs(exact).max(initial=1)
    if not error <= allowed:  # also if it is NaN
        raise WrongResultError(f"{name}: an error of {error:.3g}, more than {allowed:.3g}: not timed")


def to_numpy(array: Any) -> np.ndarray:
    """Return an array of NumPy, CuPy or PyTorch as NumPy's."""
    return np.asarray(array.get() if hasattr(array, "get") else array)


def require_torch() -> ModuleType:
    """Return PyTorch with one thread, or skip."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    torch.set_num_threads(1)
    return torch


def on_cupy(provider: Provider) -> Provider:
    """Return a provider that computes on CuPy arrays and waits for the device, or skips."""

    def cupy_provider(inputs: Arrays) -> Callable[[], tuple]:
        cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
        if not cupy.cuda.is_available():
            pytest.skip("no GPU answers")
        call = provider({name: cupy.asarray(array) for name, array in inputs.items()})

        def synchronised() -> tuple:
            outputs = call()
            cupy.cuda.get_current_stream().synchronize()
            return outputs

        return synchronised

    return cupy_provider
