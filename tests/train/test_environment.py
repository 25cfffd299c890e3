"""The environment report names every part, also on machines where parts are absent or broken; memory; BLAS threads."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import bnkernels
from bnkernels.runtime import cpu, registry, source
from bnkernels.train import environment


def facts() -> dict[str, str]:
    return dict(line.split(": ", 1) for line in environment.report().splitlines())


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Put a CuPy with two GPUs in place of whatever is installed; return its module `cuda`."""
    gpu = {"major": 9, "minor": 0, "totalGlobalMem": 3 * 2**29}
    runtime = SimpleNamespace(
        driverGetVersion=lambda: 13010,
        runtimeGetVersion=lambda: 12090,
        getDeviceCount=lambda: 2,
        getDeviceProperties=lambda device: gpu | {"name": b"GPU %d" % device},
    )
    nvrtc = SimpleNamespace(getVersion=lambda: (13, 5))
    cuda = SimpleNamespace(runtime=runtime, nvrtc=nvrtc, is_available=lambda: True)
    monkeypatch.setattr(environment, "_cupy", lambda: SimpleNamespace(__version__="14.2.0", cuda=cuda))
    return cuda


def test_the_installation_is_described() -> None:
    found = facts()
    assert found["bnkernels"] == bnkernels.__version__
    assert found["NumPy"] == np.__version__
    assert platform.python_version() in found["Python"]
    assert re.fullmatch(r".+, \d+ cores", found["CPU"])
    assert re.fullmatch(re.escape(str(source.folder())) + r" \(SHA-256 [0-9a-f]{16}\)", found["kernel sources"])


def test_the_engine_of_numpy_arrays_is_named_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the report, and in the documents of what ran on a CPU."""
    pytest.importorskip("numba")
    found, document = facts(), environment.versions("cpu, because")
    assert found["NumPy arrays"] == document["numpy_arrays"] == "compiled by Numba"
    assert found["Numba"] == document["numba"] == metadata.version("numba")
    assert found["SciPy"] == metadata.version("scipy")
    assert re.fullmatch(r"\d+, (the processors of this process|set by .+)", found["CPU threads"])
    assert not {"numpy_arrays", "numba"} & environment.versions("cuda").keys()
    with cpu.using("reference"):
        assert facts()["NumPy arrays"] == "NumPy reference, because BNKERNELS_CPU_ENGINE is reference"
        document = environment.versions("cpu")
        assert (document["numpy_arrays"], "numba" in document) == ("NumPy reference", False)


def test_a_missing_numba_is_a_fact_and_what_brings_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(environment.metadata, "version", missing)
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "numba" else real(name))
    found = facts()
    assert found["NumPy arrays"].startswith("NumPy reference, because numba cannot be found; install bnkernels[cpu]")
    assert found["Numba"] == "numba is not installed"


def test_an_absent_cupy_is_a_fact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)  # import raises ModuleNotFoundError
    found = facts()
    for name in ("CuPy", "CUDA driver", "CUDA runtime", "NVRTC", "GPUs"):
        assert found[name] == "cupy is not installed"


def test_gpus_and_versions_are_described(cuda: SimpleNamespace) -> None:
    found = facts()
    assert found["CuPy"] == "14.2.0"
    assert found["CUDA driver"] == "13.1"
    assert found["CUDA runtime"] == "12.9"
    assert found["NVRTC"] == "13.5"
    assert found["GPUs"] == "GPU 0, sm_90, 1.5 GiB; GPU 1, sm_90, 1.5 GiB"


def test_a_driver_that_does_not_answer_is_a_fact(cuda: SimpleNamespace) -> None:
    cuda.is_available = lambda: False
    cuda.runtime.driverGetVersion = lambda: 0
    found = facts()
    assert found["GPUs"] == found["CUDA driver"] == "no driver answers"


def test_whether_the_kernels_can_run_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "why_no_cuda", lambda: "the reason")
    assert facts()["CUDA kernels"] == "the reason"
    monkeypatch.setattr(registry, "why_no_cuda", lambda: None)
    assert facts()["CUDA kernels"] == "can run"


def test_a_broken_part_leaves_the_others(cuda: SimpleNamespace) -> None:
    def fail() -> int:
        raise RuntimeError("two\nlines")

    cuda.runtime.driverGetVersion = fail
    found = facts()
    assert found["CUDA driver"] == "no answer (RuntimeError: two lines)"
    assert found["CUDA runtime"] == "12.9"


def test_the_cache_folder_follows_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUPY_CACHE_DIR", "/elsewhere")
    assert facts()["kernel cache"] == "/elsewhere"


def test_a_container_has_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(environment, "_MEMORY_LIMITS", (tmp_path / "absent", limit))
    machine = environment.total_memory()
    assert machine == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for text, total in (("max\n", machine), ("1073741824\n", 2**30), (f"{2**63}\n", machine)):
        limit.write_text(text)
        assert environment.total_memory() == total


def test_a_system_that_does_not_say_has_no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sysconf")
    assert environment.total_memory() is None


def test_small_products_take_one_blas_thread_and_large_ones_all() -> None:
    threadpoolctl = pytest.importorskip("threadpoolctl")

    def threads() -> list[int]:
        return [pool["num_threads"] for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"]

    with threadpoolctl.threadpool_limits(limits=2, user_api="blas"):
        before = threads()
        with environment.blas_threads((64, 20, 10), 64):
            assert set(threads()) == {1}
        assert threads() == before
        with environment.blas_threads((784, 512, 10), 256):
            assert threads() == before
