"""JAX as a rival: it computes the case, or says why not."""

from __future__ import annotations

import os
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from benchmarks.harness.case import Case, NotSupportedError, native_dtype
from benchmarks.harness.clocks import JaxClock
from benchmarks.harness.measure import error_of
from benchmarks.peers import jax_xla
from tests.benchmarks.test_peers_torch import CASES, SHAPES, Foreign, exact, inputs

CPU, CUDA = jax_xla.PROVIDERS


@pytest.fixture
def jax() -> ModuleType:
    """Return JAX, or skip."""
    pytest.importorskip("jax", reason="JAX is not installed")
    return jax_xla.load()


@pytest.mark.parametrize("case", [case for case in CASES if case.dtype != "float64"], ids=str)
def test_jax_computes_the_case(case: Case, jax: ModuleType) -> None:
    arrays, clock = inputs(case), JaxClock("cpu")
    call = CPU.prepare(case, {name: array.copy() for name, array in arrays.items()})
    first, second = call(), call()
    error_of(case, map(clock.to_float64, first), exact(case, arrays))
    assert all(output.device.platform == "cpu" for output in first)
    np.testing.assert_array_equal(clock.to_float64(first[0]), clock.to_float64(second[0]))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_an_array_that_is_not_numpys_travels_by_dlpack(dtype: str, jax: ModuleType) -> None:
    array = np.arange(6).reshape(2, 3).astype(native_dtype(dtype))
    found = jax_xla.array_of(Foreign(array))
    assert found.dtype == array.dtype
    np.testing.assert_array_equal(np.asarray(found), array)


def test_running_statistics_run(jax: ModuleType) -> None:
    case = Case("batch_norm", "forward", (16, 5))
    arrays, clock = inputs(case), JaxClock("cpu")
    call = CPU.prepare(case, arrays)
    for _ in range(2):
        mean = arrays["running_mean"]
        arrays["running_mean"] = 0.9 * mean + 0.1 * arrays["x"].mean(0)
        np.testing.assert_allclose(clock.to_float64(call()[1]), arrays["running_mean"], rtol=1e-5)


def test_a_case_is_compiled_once(jax: ModuleType) -> None:
    case = Case("batch_norm", "backward", SHAPES["NHWC"], layout="NHWC", epilogue="relu")
    jax_xla.compiled.cache_clear()
    for _ in range(3):
        CPU.prepare(case, inputs(case))()
    assert jax_xla.compiled(jax_xla.backward, case)._cache_size() == 1
    assert jax_xla.compiled.cache_info().misses == 2  # the forward that is saved from, and the backward


def test_jax_refuses_float64() -> None:
    with pytest.raises(NotSupportedError, match="JAX computes in float32 unless jax_enable_x64 is set"):
        CPU.prepare(Case("batch_norm", "forward", (16, 5), "float64"), {})


def test_jax_has_one_thread_and_takes_no_memory_in_advance(jax: ModuleType) -> None:
    assert {name: os.environ[name] for name in jax_xla.ENVIRONMENT} == jax_xla.ENVIRONMENT


def test_jax_is_absent_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax_xla, "find_spec", lambda name: None)
    jax_xla.absent.cache_clear()
    assert CPU.absent() == CUDA.absent() == "JAX is not installed"
    jax_xla.absent.cache_clear()


def test_jax_without_a_gpu_is_absent_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def devices(platform: str) -> list:
        raise RuntimeError(f"Unknown backend {platform}")

    monkeypatch.setattr(jax_xla, "find_spec", lambda name: object())
    monkeypatch.setattr(jax_xla, "load", lambda: SimpleNamespace(devices=devices))
    jax_xla.absent.cache_clear()
    assert (CPU.absent(), CUDA.absent()) == (None, "JAX finds no GPU")
    jax_xla.absent.cache_clear()
