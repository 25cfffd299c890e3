"""The facts of a GPU on a stand-in for CuPy: every kernel compiles, what goes wrong is told, no figure comes out."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.gpu import dry_run as gpu_dry_run
from benchmarks.gpu import facts as gpu_facts
from benchmarks.gpu import launch_facts, sanitize
from benchmarks.gpu.device import SOURCES, Gpu
from bnkernels.runtime import registry
from tests.runtime.test_cuda_runtime import forget_the_runtime
from tools.compile.nvrtc import CompileError
from tools.emulator import EmulatorRuntime
from tools.fake_cupy import streams

REPLACED = ("cupy", "cupy_backends.cuda.api.driver", "cuda.bindings.driver")


@pytest.fixture
def cupy(emulated: EmulatorRuntime, monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """Put the stand-in in CuPy's place. The emulator comes first: it registers once, and must stay registered."""
    for name in REPLACED:
        monkeypatch.setitem(sys.modules, name, types.ModuleType("a placeholder"))  # puts back what was there
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(registry, "runtimes", dict(registry.runtimes))
    forget_the_runtime()
    yield gpu_dry_run.stand_in()
    forget_the_runtime()


def measure(**facts: Any) -> dict[str, Any]:
    """Measure these facts in a rehearsal; return the document and check that each state of it was kept."""
    kept: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_facts, "FACTS", facts)
        document = gpu_facts.measure(Gpu(rehearsal=True), 60, lambda now: kept.append(now["outcome"]))
    assert kept == ["stopped in the middle"] * len(facts) + [document["outcome"]]
    return document


@pytest.mark.emulator
def test_a_rehearsal_walks_every_fact_and_has_no_figure(cupy: types.ModuleType) -> None:
    document = gpu_facts.measure(Gpu(rehearsal=True), 60, lambda now: None)
    assert document["outcome"] == "ok", document["facts"]
    assert list(document["facts"]) == list(gpu_facts.FACTS)
    assert (document["figures"], document["rows"]) == ([], [])
    for name, fact in document["facts"].items():
        assert not any(isinstance(value, float | dict) for value in fact.values()), name


@pytest.mark.emulator
def test_a_fact_that_fails_leaves_the_others(cupy: types.ModuleType) -> None:
    def fails(gpu: Gpu) -> None:
        raise RuntimeError("cudaErrorIllegalAddress")

    def unavailable(gpu: Gpu) -> None:
        raise gpu_facts.UnavailableError("needs compute capability 9.0")

    document = measure(broken=fails, absent=unavailable, device=gpu_facts.device)
    assert document["outcome"] == "failed: broken"
    assert document["facts"]["broken"] == {"error": "RuntimeError: cudaErrorIllegalAddress"}
    assert document["facts"]["absent"] == {"unavailable": "needs compute capability 9.0"}
    assert document["facts"]["device"]["multiprocessors"] == 8


@pytest.mark.emulator
def test_out_of_time_is_told(cupy: types.ModuleType) -> None:
    document = gpu_facts.measure(Gpu(rehearsal=True), -1, lambda now: None)
    assert set(map(str, document["facts"].values())) == {"{'not_measured': 'out of time'}"}
    assert document["outcome"].startswith("failed: device, host cost of a launch")


@pytest.mark.emulator
@pytest.mark.parametrize(
    ("fact", "kernel", "message"),
    [
        ("grid barrier", "bnk_grid_barriers", "arrivals at the barriers of the grid: 0 instead of 1600"),
        ("cluster barrier, 4 blocks", "bnk_cluster_barriers_4", "sizes of the clusters that a plain launch makes"),
        ("copy", "bnk_copy_words", "the copy is the same: False instead of True"),
        ("copy of slices, 4096-byte rows", "bnk_copy_slices", "the copy is the same: False instead of True"),
        ("graph", "bnk_count_struct", "kernels that ran in a graph: 0 instead of 200"),
    ],
)
def test_a_kernel_that_does_nothing_has_no_time(cupy: types.ModuleType, fact: str, kernel: str, message: str) -> None:
    cupy.driver.host_kernels[kernel] = gpu_dry_run.nothing
    found = measure(fact=gpu_facts.FACTS[fact])["facts"]["fact"]
    assert message in found["error"]


@pytest.mark.emulator
def test_a_way_to_launch_that_loses_launches_or_is_gone_is_an_error_of_its_own(
    cupy: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["cupy_backends.cuda.api.driver"], "launchKernel", lambda *given: None)
    monkeypatch.delattr(sys.modules["cuda.bindings.driver"], "CUstream")
    document = measure(launches=launch_facts.launches)
    found = document["facts"]["launches"]
    assert "9 calls, but the kernel ran 0 times" in found["cupy_backends launchKernel, prepacked"]["error"]
    assert "CUstream" in found["cuda.bindings cuLaunchKernel, prepacked"]["error"]
    assert found["Function, address of a struct (bnkernels)"] is None
    assert document["outcome"] == "failed: launches"


def test_figures_become_rows_with_units() -> None:
    figure = {"median": 2.5, "p20": 2.0, "p80": 3.0}
    found = {
        "device": {"multiprocessors": 132},
        "copy": {"bytes": 2**30, "GB_per_s_kernel": figure},
        "graph": {"nodes": 200, "us_per_node": figure},
        "grid barrier": {"error": "RuntimeError: no"},
    }
    spread = {"value": 2.5, "p20": 2.0, "p80": 3.0}
    assert list(gpu_facts.rows(found)) == [
        {"fact": "multiprocessors", "value": 132, "unit": ""},
        {"fact": "copy: kernel", **spread, "unit": "GB/s"},
        {"fact": "graph: us per node", **spread, "unit": "us"},
    ]
    assert gpu_facts.telling(found) == ["graph node 2.5 us", "copy 2.5 GB/s"]


@pytest.mark.parametrize("architecture", [75, 80, 90, 100, 120])
@pytest.mark.parametrize("path", sorted(SOURCES.glob("*.cu")), ids=lambda path: path.stem)
def test_every_kernel_compiles_and_has_a_host_version(nvrtc: types.ModuleType, path: Path, architecture: int) -> None:
    found = nvrtc.resources(path.read_text(), architecture)
    assert all(kernel.spill_stores == 0 for kernel in found.values())
    if path.stem == "barriers":
        assert len(found) == (4 if architecture >= 90 else 1)
    if path.stem == "planted":
        assert set(found) == {f"bnk_planted_{tool}" for tool in sanitize.TOOLS}
    else:
        assert set(found) <= set(gpu_dry_run.HOST_KERNELS), "a kernel without a host version is in no dry run"


def test_the_struct_of_the_counting_kernel_has_the_size_that_python_packs(nvrtc: types.ModuleType) -> None:
    assembly = nvrtc.ptx((SOURCES / "launches.cu").read_text(), 80)
    assert f"bnk_count_struct_param_0[{launch_facts.ARGUMENTS.itemsize}]" in assembly


# ---- the stand-in itself --------------------------------------------------------------------------------------------


@pytest.mark.emulator
def test_a_capture_records_and_a_graph_replays(cupy: types.ModuleType) -> None:
    stream, x = cupy.cuda.Stream(non_blocking=True), cupy.zeros(4, "float32")
    with stream:
        stream.begin_capture()
        x.fill(3.0)
        with pytest.raises(RuntimeError, match="a copy to the host while a stream is being captured"):
            x.get()
        with pytest.raises(NotImplementedError, match="cuBLAS"):
            x @ x
        y = x + x
        y += x
        graph = stream.end_capture()
    assert float(x[0]) == 0.0, "a capture ran what it should have recorded"
    graph.launch(stream)
    assert [float(array[0]) for array in (x, y)] == [3.0, 9.0]


@pytest.mark.emulator
def test_the_stand_in_refuses_what_cuda_refuses(cupy: types.ModuleType) -> None:
    with pytest.raises(RuntimeError, match="cannot capture on the default"):
        cupy.cuda.Stream(null=True).begin_capture()
    stream = cupy.cuda.Stream()
    with pytest.raises(RuntimeError, match="not being captured"):
        stream.end_capture()
    start, end = cupy.cuda.Event(), cupy.cuda.Event()
    with pytest.raises(RuntimeError, match="must have been recorded"):
        cupy.cuda.get_elapsed_time(start, end)
    start.record(stream)
    end.record(stream)
    assert np.isnan(cupy.cuda.get_elapsed_time(start, end)), "a time of the stand-in looks like a figure"
    with pytest.raises(RuntimeError, match="no host version of the kernel bnk_unknown"):
        cupy.RawKernel('extern "C" __global__ void bnk_unknown() {}', "bnk_unknown")


@pytest.mark.emulator
def test_a_kernel_that_does_not_compile_fails_on_the_stand_in_too(cupy: types.ModuleType) -> None:
    if not streams.compile_for_gpus('extern "C" __global__ void bnk_empty() {}'):
        pytest.skip("NVRTC is not installed, or a sanitizer is in its way")
    with pytest.raises(CompileError, match="error"):
        cupy.RawKernel('extern "C" __global__ void bnk_empty() { syntax error; }', "bnk_empty")


@pytest.mark.emulator
def test_arithmetic_is_numpys_and_stays_on_the_stand_in(cupy: types.ModuleType) -> None:
    x = cupy.arange(6, dtype="float32").reshape(2, 3)
    flat = x.ravel()
    x -= 1.0
    assert flat.get().tolist() == [-1.0, 0.0, 1.0, 2.0, 3.0, 4.0], "in place is not in place"
    y = cupy.maximum(x @ x.T, 0.0).sum(axis=0)
    assert type(y) is cupy.ndarray
    np.testing.assert_array_equal(y.get(), [4.0, 31.0])
    picked = x[cupy.asarray([0, 1]), cupy.asarray([2, 0])]
    assert picked.get().tolist() == [1.0, 2.0]


def test_a_document_of_a_dry_run_has_no_figure(tmp_path: Path) -> None:
    path = tmp_path / "ops.json"
    path.write_text('{"device": "a GPU", "rows": [{"us": 1.5, "shape": "64x20", "calls": 3, "all": [NaN, 2.0]}]}')
    path.with_suffix(".csv").write_text("us,calls\n1.5,3\n")
    gpu_dry_run.blank(path)
    text = path.read_text()
    assert '"dry_run": true' in text
    assert '"device": "emulator"' in text
    assert '{"us": null, "shape": "64x20", "calls": 3, "all": [null, null]}' in text
    assert path.with_suffix(".csv").read_text() == "us,calls,dry_run\n"
