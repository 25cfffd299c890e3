"""The engine of NumPy arrays: compiled kernels or the reference, how it is chosen, and what is imported when."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from bnkernels.runtime import cpu

NAME = "bnkernels.ops.parameter_update.cpu"
NO_NUMBA = "numba cannot be found; install bnkernels[cpu] for compiled kernels"
UPDATE = (
    "import numpy as np, bnkernels as bn; a = np.ones(3); bn.sgd_update(a, np.ones(3), lr=1.0); assert not a.any(); "
)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the engine be chosen anew, before and after."""
    monkeypatch.setattr(cpu, "_modules", {})
    monkeypatch.delenv(cpu.VARIABLE, raising=False)
    return


@pytest.fixture
def without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "numba" else real(name))


def python(code: str, **environment: str) -> str:
    """Return what a new interpreter prints."""
    path = os.pathsep.join(filter(None, sys.path))
    command, env = [sys.executable, "-c", code], os.environ | {"PYTHONPATH": path} | environment
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.strip()


def test_compiled_kernels_compute_where_they_can() -> None:
    pytest.importorskip("numba")
    pytest.importorskip("scipy")
    assert cpu.kernels(NAME).__name__ == NAME
    assert (cpu.engine(), cpu.why_reference()) == ("compiled by Numba", None)


def test_without_numba_the_reference_computes_and_says_what_to_install(without_numba: None) -> None:
    assert cpu.kernels(NAME) is None
    assert (cpu.engine(), cpu.why_reference()) == ("NumPy reference", NO_NUMBA)


def test_what_is_demanded_is_given_or_refused(monkeypatch: pytest.MonkeyPatch, without_numba: None) -> None:
    monkeypatch.setenv(cpu.VARIABLE, "compiled")
    with pytest.raises(RuntimeError, match=r"BNKERNELS_CPU_ENGINE is compiled, but numba cannot be found; install bnk"):
        cpu.kernels(NAME)
    monkeypatch.setenv(cpu.VARIABLE, "reference")
    assert cpu.kernels(NAME) is None
    assert cpu.why_reference() == "BNKERNELS_CPU_ENGINE is reference"


def test_another_engine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cpu.VARIABLE, "fast")
    with pytest.raises(RuntimeError, match="BNKERNELS_CPU_ENGINE must be one of auto, compiled, reference, got 'fast'"):
        cpu.kernels(NAME)


def test_an_engine_is_used_meanwhile() -> None:
    pytest.importorskip("numba")
    with cpu.using("reference"):
        assert cpu.kernels(NAME) is None
        with cpu.using("compiled"):
            assert cpu.kernels(NAME) is not None
        assert cpu.kernels(NAME) is None
    assert cpu.kernels(NAME) is not None


def test_importing_the_package_loads_nothing_of_numba() -> None:
    assert python("import sys, bnkernels; print({'numba', 'llvmlite', 'scipy'} & {*sys.modules})") == "set()"


def test_importing_the_package_takes_little_beside_importing_numpy(tmp_path: Path) -> None:
    """At most 0.35 of it, where 0.25 is usual: the median over processes, in each of which a load slows both alike.

    With bytecode on disk, as for all but the first process: else most of the time would be that of compiling Python.
    """
    now, bytecode = "time.process_time()", {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(tmp_path)}
    code = f"import time; a = {now}; import numpy; b = {now}; import bnkernels; print(({now} - b) / (b - a))"
    _, *ratios = [float(python(code, **bytecode)) for _ in range(8)]
    assert np.median(ratios) < 0.35


def test_the_reference_loads_nothing_of_numba() -> None:
    code = UPDATE + "import sys; print('numba' in sys.modules)"
    assert python(code, BNKERNELS_CPU_ENGINE="reference") == "False"


def test_the_first_call_loads_it() -> None:
    pytest.importorskip("numba")
    assert python(UPDATE + "import sys; print('numba' in sys.modules)") == "True"
