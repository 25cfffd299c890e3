"""The machine and the installation: their report for bug reports, their memory, and the threads of BLAS."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import os
import platform
from collections.abc import Callable
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from bnkernels._version import __version__
from bnkernels.runtime import cpu, registry, source
from bnkernels.runtime.cpu import threads

_BLAS_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
_CACHE = Path("~/.cupy/kernel_cache")
# Files with the limit of a container: control groups of version 2, and of version 1.
_MEMORY_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
SMALL_PRODUCT = 2**20  # multiplications of a matrix product below which threads wait longer than they compute


def report() -> str:
    """Describe this machine and installation.

    Returns
    -------
    str
        Lines ``name: fact``; memory in GiB. A part that is absent or does not answer has the reason as its fact.

    Examples
    --------
    >>> report().splitlines()[0].partition(":")[0]
    'bnkernels'
    """
    facts = {
        "bnkernels": lambda: __version__,
        "Python": lambda: f"{platform.python_implementation()} {platform.python_version()}",
        "NumPy": lambda: np.__version__,
        "system": platform.platform,
        "CPU": _cpu,
        "BLAS": _blas,
        "NumPy arrays": _numpy_arrays,
        "Numba": lambda: metadata.version("numba"),
        "SciPy": lambda: metadata.version("scipy"),
        "CPU threads": threads.described,
        "CuPy": lambda: _cupy().__version__,
        "CUDA kernels": lambda: registry.why_no_cuda() or "can run",
        "CUDA driver": lambda: _release(_cupy().cuda.runtime.driverGetVersion()),
        "CUDA runtime": lambda: _release(_cupy().cuda.runtime.runtimeGetVersion()),
        "NVRTC": lambda: ".".join(map(str, _cupy().cuda.nvrtc.getVersion())),
        "GPUs": _gpus,
        "kernel sources": lambda: f"{source.folder()} (SHA-256 {_digest()})",
        "kernel cache": lambda: str(Path(os.environ.get("CUPY_CACHE_DIR", _CACHE)).expanduser()),
    }
    return "\n".join(f"{name}: {_answer(fact)}" for name, fact in facts.items())


def versions(device: str) -> dict[str, str]:
    """Return the environment of a run, for its documents.

    Parameters
    ----------
    device : str
        Device in words.

    Returns
    -------
    dict of str to str
        Versions, platform, device, and on a CPU what computes NumPy arrays.
    """
    found = {
        "bnkernels": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "platform": platform.platform(),
        "device": device,
    }
    if device.startswith("cpu"):
        found["numpy_arrays"] = cpu.engine()
        if cpu.why_reference() is None:
            found["numba"] = metadata.version("numba")
    return found


def total_memory() -> int | None:
    """Return the number of bytes of memory that this process can have.

    Returns
    -------
    int or None
        The machine's memory, or the limit of the container it runs in; None where the system does not say.
    """
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf, and another system may lack the names
        return None
    for limit in _MEMORY_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # not there, or "max"
            total = min(total, int(limit.read_text(encoding="ascii")))
    return total


def blas_threads(sizes: tuple[int, ...], batch_size: int) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which NumPy's BLAS takes one thread, if all products of a step are too small to share.

    It needs threadpoolctl, which comes with scikit-learn; without it BLAS keeps its threads, and is only slower.

    Parameters
    ----------
    sizes : tuple of int
        Number of inputs, width of each hidden layer, number of classes.
    batch_size : int
        Number of examples of a step.
    """
    largest = batch_size * max(inputs * outputs for inputs, outputs in pairwise(sizes))
    if largest >= SMALL_PRODUCT:
        return contextlib.nullcontext()
    try:
        from threadpoolctl import threadpool_limits
    except ImportError:
        return contextlib.nullcontext()
    return threadpool_limits(limits=1, user_api="blas")


def _answer(fact: Callable[[], str]) -> str:
    """Return the fact, or why there is none: the report is for machines where anything at all may be broken."""
    try:
        return fact()
    except ModuleNotFoundError as error:  # and its subclass for packages without metadata
        return f"{error.name} is not installed"
    except Exception as error:
        return f"no answer ({type(error).__name__}: {' '.join(str(error).split())})"


def _cpu() -> str:
    """Return the processor's name, which the platform module knows on some systems only, and the cores."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = (line.partition(":") for line in info.read_text(encoding="utf-8").splitlines())
        name = next((value.strip() for key, _, value in lines if key.strip() == "model name"), name)
    return f"{name}, {os.cpu_count()} cores"


def _blas() -> str:
    """Return the library behind NumPy's matrix products, and the thread counts that are set for it."""
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    told = [f"{name}={os.environ[name]}" for name in _BLAS_THREADS if name in os.environ]
    return f"{blas['name']} {blas['version']}, threads: {' '.join(told) or 'not set'}"


def _numpy_arrays() -> str:
    """Return what computes NumPy arrays, and why it is not the compiled kernels."""
    reason = cpu.why_reference()
    return f"{cpu.engine()}, because {reason}" if reason else cpu.engine()


def _cupy() -> ModuleType:
    return importlib.import_module("cupy")


def _release(version: int) -> str:
    """Return a CUDA version as people write it: 13010 is 13.1."""
    return f"{version // 1000}.{version % 1000 // 10}" if version else "no driver answers"


def _gpus() -> str:
    """Return name, compute capability and memory of every GPU."""
    cuda = _cupy().cuda
    if not cuda.is_available():
        return "no driver answers"
    gpus = map(cuda.runtime.getDeviceProperties, range(cuda.runtime.getDeviceCount()))
    return "; ".join(
        f"{gpu['name'].decode()}, sm_{gpu['major']}{gpu['minor']}, {gpu['totalGlobalMem'] / 2**30:.1f} GiB"
        for gpu in gpus
    )


def _digest() -> str:
    """Return the start of a hash over the kernel sources as they are compiled."""
    text = "".join(map(source.read, source.stems()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
