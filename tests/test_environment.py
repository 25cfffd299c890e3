"""The environment report names every part, and answers on machines where parts are absent or broken."""

from __future__ import annotations

import platform
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest

import bnkernels
from bnkernels import _source
from bnkernels.environment import report


def facts() -> dict[str, str]:
    return dict(line.split(": ", 1) for line in report().splitlines())


def fake_cupy() -> SimpleNamespace:
    runtime = SimpleNamespace(
        driverGetVersion=lambda: 13010,
        runtimeGetVersion=lambda: 12090,
        getDeviceCount=lambda: 2,
        getDeviceProperties=lambda device: {
            "name": b"GPU %d" % device,
            "major": 9,
            "minor": 0,
            "totalGlobalMem": 3 * 2**29,
        },
    )
    return SimpleNamespace(
        __version__="14.2.0", cuda=SimpleNamespace(runtime=runtime, is_available=lambda: True, **cuda)
    )


def test_the_installation_is_described() -> None:
    found = facts()
    assert found["bnkernels"] == bnkernels.__version__
    assert found["NumPy"] == np.__version__
    assert platform.python_version() in found["Python"]
    assert re.fullmatch(r".+, \d+ cores", found["CPU"])
    assert re.fullmatch(re.escape(str(_source.folder())) + r" \(SHA-256 [0-9a-f]{16}\)", found["kernel sources"])


def test_an_absent_cupy_is_a_fact(monkeypatch: pytest.MonkeyPatch) -> None:
    class Absent:
        def find_spec(self, name: str, path: object = None, target: object = None) -> None:
            if name.partition(".")[0] == "cupy":
                raise ModuleNotFoundError(f"No module named {name!r}", name="cupy")

    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Absent(), *sys.meta_path])
    found = facts()
    for name in ("CuPy", "CUDA driver", "CUDA runtime", "NVRTC", "GPUs"):
        assert found[name] == "cupy is not installed"


def test_gpus_and_versions_are_described(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy())
    found = facts()
    assert found["CuPy"] == "14.2.0"
    assert found["CUDA driver"] == "13.1"
    assert found["CUDA runtime"] == "12.9"
    assert found["GPUs"] == "GPU 0, sm_90, 1.5 GiB; GPU 1, sm_90, 1.5 GiB"


def test_a_driver_that_does_not_answer_is_a_fact(monkeypatch: pytest.MonkeyPatch) -> None:
    cupy = fake_cupy()
    cupy.cuda.is_available = lambda: False
    cupy.cuda.runtime.driverGetVersion = lambda: 0
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    found = facts()
    assert found["GPUs"] == found["CUDA driver"] == "no driver answers"


def test_a_broken_part_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> int:
        raise RuntimeError("two\nlines")

    cupy = fake_cupy()
    cupy.cuda.runtime.driverGetVersion = fail
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    found = facts()
    assert found["CUDA driver"] == "no answer (RuntimeError: two lines)"
    assert found["CUDA runtime"] == "12.9"


def test_the_cache_folder_follows_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUPY_CACHE_DIR", "/elsewhere")
    assert facts()["kernel cache"] == "/elsewhere"
