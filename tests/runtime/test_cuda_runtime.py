"""The CUDA runtime without a GPU: its own code, on a stand-in for CuPy that runs the kernels on the emulator."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

import bnkernels as bn
from bnkernels.ops.batch_norm.launch import one_block
from bnkernels.ops.batch_norm.problem import BACKWARD, FORWARD, Problem
from bnkernels.runtime import registry, source
from tools import fake_cupy
from tools.emulator import EmulatorRuntime
from tools.emulator.build import CUDA_VARIABLE

RUNTIME_MODULE = "bnkernels.runtime.cuda"


def forget_the_runtime() -> None:
    """Let the next need of the CUDA runtime import it again."""
    sys.modules.pop(RUNTIME_MODULE, None)
    vars(sys.modules["bnkernels.runtime"]).pop("cuda", None)


@pytest.fixture
def cupy(emulated: EmulatorRuntime, monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """Put the stand-in in CuPy's place, unknown to the ops yet."""
    stand_in = fake_cupy.make(emulated)
    if CUDA_VARIABLE in os.environ:  # the sources that the emulated ops run on
        monkeypatch.setattr(source, "folder", lambda: Path(os.environ[CUDA_VARIABLE]))
    monkeypatch.setitem(sys.modules, "cupy", stand_in)
    monkeypatch.setattr(registry, "runtimes", dict(registry.runtimes))
    forget_the_runtime()
    yield stand_in
    forget_the_runtime()


def batch(rng: np.random.Generator, rows: int = 64, channels: int = 20) -> list[np.ndarray]:
    """Return x, gamma, beta, dy."""
    shapes = (rows, channels), (channels,), (channels,), (rows, channels)
    return [rng.standard_normal(shape).astype("float32") for shape in shapes]


def run_all_ops(rng: np.random.Generator, put: Callable[[np.ndarray], Any]) -> list[Any]:
    """Run every op on arrays made by `put`; return everything that was written."""
    x, gamma, beta, dy = map(put, batch(rng, 70, 37))
    running = put(np.zeros(37, "float32")), put(np.ones(37, "float32"))
    y, statistics = bn.batch_norm_forward(x, gamma, beta, *running, activation="relu")
    gradients = bn.batch_norm_backward(dy, x, gamma, beta, statistics, activation="relu")
    frozen = bn.batch_norm_inference(x, gamma, beta, *running, activation="tanh")
    frozen_gradients = bn.batch_norm_inference_backward(dy, x, gamma, beta, *running, activation="sigmoid")
    loss, dlogits = bn.softmax_cross_entropy(x, put(rng.integers(0, 37, 70)))
    states = [put(rng.standard_normal(1000)) for _ in range(3)]
    moments = [put(np.zeros(1000)) for _ in range(3)]
    slopes = put(rng.standard_normal(1000))
    bn.sgd_update(states[0], slopes, lr=0.1)
    bn.momentum_update(states[1], slopes, moments[0], lr=0.1)
    bn.adam_update(states[2], slopes, *moments[1:], step=1, lr=0.1)
    return [y, statistics, *running, *gradients, frozen, *frozen_gradients, loss, dlogits, *states, *moments]


@pytest.mark.emulator
def test_every_op_gives_the_bits_of_the_emulated_kernels(cupy: types.ModuleType, emulated: EmulatorRuntime) -> None:
    through_cupy = run_all_ops(np.random.default_rng(0), cupy.asarray)
    assert cupy.driver.reads == 0, "an op read a result back: it would wait for the device"
    assert cupy.driver.described == 0, "CuPy describes the type of a structured array at every launch: 20 us"
    assert len(cupy.driver.launches) == 8, "every op is one launch"
    assert not emulated.launches, "the ops went past the CUDA runtime"
    for got, want in zip(through_cupy, run_all_ops(np.random.default_rng(0), emulated.asarray), strict=True):
        assert type(got) is cupy.ndarray
        np.testing.assert_array_equal(got.get(), np.asarray(want))


@pytest.mark.emulator
def test_grid_block_and_shared_memory_are_those_of_the_plan(cupy: types.ModuleType, rng: np.random.Generator) -> None:
    x, gamma, beta, dy = map(cupy.asarray, batch(rng))
    _, statistics = bn.batch_norm_forward(x, gamma, beta)
    bn.batch_norm_backward(dy, x, gamma, beta, statistics)
    plans = [one_block(kind, Problem(1, 64, 20, 1, x.dtype)).launch for kind in (FORWARD, BACKWARD)]
    assert [record.launch for record in cupy.driver.launches] == plans
    assert all(plan.shared_bytes > 0 for plan in plans)


@pytest.mark.emulator
def test_what_no_strides_describe_is_copied_beside_itself(
    cupy: types.ModuleType, emulated: EmulatorRuntime, rng: np.random.Generator
) -> None:
    """Every other line of an image, on a device that is not the current one: no transfer, and the dense bits."""
    images = rng.standard_normal((4, 3, 6, 5)).astype("float32")
    with cupy.cuda.Device(1):
        x = cupy.asarray(images)[:, :, ::2]
    y, _ = bn.batch_norm_forward(x, residual=x)
    assert y.device.id == 1
    assert cupy.driver.reads == 0
    assert [record.device for record in cupy.driver.launches] == [1]
    dense = emulated.asarray(images[:, :, ::2])
    np.testing.assert_array_equal(y.get(), bn.batch_norm_forward(dense, residual=dense)[0])


@pytest.mark.emulator
def test_source_and_options_are_those_declared(cupy: types.ModuleType, rng: np.random.Generator) -> None:
    bn.batch_norm_forward(cupy.asarray(batch(rng)[0]))
    ((_, code, options),) = cupy.driver.compiled
    constants, _, text = code.partition("\n")
    assert constants.startswith("#define BNK_CONSTANTS(a) ((a).activation = 0, (a).given = 0, (a).width = 20,")
    assert text == source.read("batch_norm_forward", "bnk_batch_norm_forward_registers4_f32")
    assert options == source.OPTIONS


@pytest.mark.emulator
def test_a_kernel_is_compiled_and_looked_up_once_per_device(cupy: types.ModuleType, rng: np.random.Generator) -> None:
    arrays = batch(rng)
    for device in (0, 1, 0, 1):
        with cupy.cuda.Device(device):
            x, gamma, beta, dy = map(cupy.asarray, arrays)
        _, statistics = bn.batch_norm_forward(x, gamma, beta)
        bn.batch_norm_backward(dy, x, gamma, beta, statistics)
        bn.batch_norm_inference(x, gamma, beta, gamma, beta)
    kernels = (
        ("batch_norm_forward", "bnk_batch_norm_forward_registers4_f32"),
        ("batch_norm_backward", "bnk_batch_norm_backward_registers4_f32"),
        ("batch_norm_forward", "bnk_batch_norm_inference_f32"),
    )
    sources = {source.read(*kernel) for kernel in kernels}
    compiled = {(device, code.partition("\n")[2]) for device, code, _ in cupy.driver.compiled}  # without the constants
    assert compiled == {(device, text) for device in (0, 1) for text in sources}
    assert set(cupy.driver.compiled.values()) == {1}
    assert len(cupy.driver.functions) == 6, "three kernels on two devices"
    assert set(cupy.driver.functions.values()) == {1}


@pytest.mark.emulator
def test_sixteen_threads_compile_once(cupy: types.ModuleType, rng: np.random.Generator) -> None:
    x = cupy.asarray(batch(rng)[0])
    bn.softmax_cross_entropy(x, cupy.asarray(np.zeros(64, "int64")))  # the runtime is there, its forward kernel is not
    start = threading.Barrier(16)
    results: list[Any] = []

    def work() -> None:
        start.wait()
        results.append(bn.batch_norm_forward(x)[0])

    threads = [threading.Thread(target=work) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 16
    forward = [count for (_, code, _), count in cupy.driver.compiled.items() if "batch_norm_forward" in code]
    assert forward == [1]
    first = results[0].get()
    for result in results[1:]:
        np.testing.assert_array_equal(result.get(), first)


@pytest.mark.emulator
@pytest.mark.parametrize(("current", "home"), [(0, 1), (1, 0), (1, 1)])
def test_apex_1022_a_kernel_runs_on_the_device_of_its_arrays_whatever_the_current_one(
    cupy: types.ModuleType, rng: np.random.Generator, current: int, home: int
) -> None:
    with cupy.cuda.Device(home):
        x, gamma, beta, _ = map(cupy.asarray, batch(rng))
    with cupy.cuda.Device(current):
        y, statistics = bn.batch_norm_forward(x, gamma, beta)
        assert cupy.driver.device == current, "the caller's current device was changed"
    assert [record.device for record in cupy.driver.launches] == [home]
    assert {y.device.id, statistics.device.id} == {home}


@pytest.mark.emulator
def test_a_failed_launch_leaves_the_current_device_as_it_was(
    cupy: types.ModuleType, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    with cupy.cuda.Device(1):
        x = cupy.asarray(batch(rng)[0])

    def refuse(*_: Any) -> None:
        raise RuntimeError("cudaErrorLaunchFailure")

    monkeypatch.setattr(cupy.driver, "launch", refuse)
    with pytest.raises(RuntimeError, match="cudaErrorLaunchFailure"):
        bn.batch_norm_forward(x)
    assert cupy.driver.device == 0


@pytest.mark.emulator
def test_a_kernel_goes_to_the_current_stream_of_its_device(cupy: types.ModuleType, rng: np.random.Generator) -> None:
    with cupy.cuda.Device(1):
        x, mine = cupy.asarray(batch(rng)[0]), cupy.cuda.Stream()
    with cupy.cuda.Stream(), cupy.cuda.Device(1), mine, cupy.cuda.Device(0):  # a stream is current on its own device
        bn.batch_norm_forward(x)
    bn.batch_norm_forward(x)
    assert [(record.device, record.stream) for record in cupy.driver.launches] == [(1, mine.ptr), (1, 0)]


@pytest.mark.emulator
def test_arrays_of_two_devices_are_refused_before_anything_runs(
    cupy: types.ModuleType, rng: np.random.Generator
) -> None:
    x, gamma, beta, dy = map(cupy.asarray, batch(rng))
    labels, flat = cupy.asarray(np.zeros(64, "int64")), cupy.asarray(np.zeros(20, "float32"))
    _, statistics = bn.batch_norm_forward(x, gamma, beta)
    with cupy.cuda.Device(1):
        far, far_x = cupy.asarray(np.ones(20, "float32")), cupy.asarray(batch(rng)[0])
    cupy.driver.launches.clear()
    calls: dict[str, Callable[[], Any]] = {
        "beta": lambda: bn.batch_norm_forward(x, gamma, far),
        "running_var": lambda: bn.batch_norm_forward(x, gamma, beta, flat, far),
        "running_mean": lambda: bn.batch_norm_inference(x, gamma, beta, far, flat),
        "x": lambda: bn.batch_norm_backward(dy, far_x, gamma, beta, statistics),
        "gamma": lambda: bn.batch_norm_inference_backward(dy, x, far, beta, flat, gamma),
        "labels": lambda: bn.softmax_cross_entropy(far_x, labels),
        "gradients": lambda: bn.sgd_update(flat, far, lr=0.1),
        "velocity|gradients": lambda: bn.momentum_update(flat, gamma, far, lr=0.1),
        "second|gradients": lambda: bn.adam_update(flat, gamma, beta, far, step=1, lr=0.1),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=rf"({name}) is on device \d but \w+ is on device \d; move one of them"):
            call()
    assert not cupy.driver.launches


@pytest.mark.emulator
def test_numpy_and_cupy_are_not_mixed(cupy: types.ModuleType, rng: np.random.Generator) -> None:
    x, gamma, *_ = batch(rng)
    with pytest.raises(TypeError, match=r"gamma is a numpy\.ndarray but x is a cupy\.ndarray"):
        bn.batch_norm_forward(cupy.asarray(x), gamma)
    assert not cupy.driver.launches


@pytest.mark.emulator
def test_an_empty_batch_launches_nothing(cupy: types.ModuleType) -> None:
    x = cupy.asarray(np.zeros((0, 5), "float32"))
    y, statistics = bn.batch_norm_forward(x)
    assert y.shape == (0, 5)
    assert not statistics.get().any()
    assert not cupy.driver.launches


@pytest.mark.emulator
def test_the_stand_in_refuses_what_cupy_refuses(cupy: types.ModuleType) -> None:
    code = 'extern "C" __global__ void k() {}'
    with pytest.raises(TypeError, match="tuple of str"):
        cupy.RawModule(code=code, options=["--std=c++17"])
    with pytest.raises(TypeError, match="positional"):
        cupy.RawModule(code)
    kernel = cupy.RawModule(code=code).get_function("k")
    two = np.zeros(2, [("x", np.uint64)])
    with pytest.raises(TypeError, match="size one"):
        kernel((1,), (1,), (two,))
    with pytest.raises(TypeError, match="expected tuple, got int"):
        kernel(1, 1, (two[:1],))
    array = cupy.asarray(np.ones(3, "float32"))
    with pytest.raises(TypeError, match="Implicit conversion"):
        np.asarray(array)
    assert (float(array[0]), cupy.driver.reads) == (1.0, 1)
    with pytest.raises(RuntimeError, match=r"bnk_\w+ got memory of device 0 on 1"):
        launch_elsewhere(cupy, bn.batch_norm_forward, cupy.asarray(np.ones((4, 3), "float32")))
    with cupy.cuda.Device(1), cupy.cuda.Stream() as stream:
        assert cupy.cuda.get_current_stream() is stream
    with pytest.raises(RuntimeError, match="does not match with the current device"):
        stream.__enter__()


def launch_elsewhere(cupy: types.ModuleType, op: Callable, x: Any) -> None:
    """Launch what an op would launch, but on the other device."""
    runtime, launches = registry.runtime_of(cupy.ndarray), []
    with mock.patch.object(runtime, "launch", lambda *given: launches.append(given)):
        op(x)
    ((*launch, _),) = launches
    with cupy.cuda.Device(1 - x.device.id):
        runtime.launch(*launch, cupy.zeros(1, "float32"))


def test_import_of_the_package_looks_for_no_cupy() -> None:
    program = """
import sys
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("cupy", "cupyx", "cupy_backends"):
            print("import of", name)
sys.meta_path.insert(0, Watch())
import bnkernels, bnkernels.train.trainer, bnkernels.cli
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout == ""


def test_why_no_cuda_without_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)  # as if it were not installed
    forget_the_runtime()
    reason = registry.why_no_cuda()
    assert reason is not None
    assert reason.startswith("CuPy cannot be imported (")
    assert "install bnkernels[cuda13] or bnkernels[cuda12]" in reason


def test_why_no_cuda_where_cupy_breaks_at_its_import(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it does without a home that can be written: a CPU needs neither."""

    class Broken:
        def find_spec(self, name: str, *_: Any) -> None:
            if name == "cupy":
                raise FileNotFoundError(2, "No such file or directory", "/nowhere")

    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    forget_the_runtime()
    reason = registry.why_no_cuda()
    assert reason.startswith("CuPy cannot be imported (FileNotFoundError: [Errno 2] No such file or directory: '/nowh")
    assert "set CUPY_CACHE_DIR" in reason


@pytest.mark.emulator
@pytest.mark.parametrize("available", [False, True])
def test_why_no_cuda_with_cupy(cupy: types.ModuleType, available: bool) -> None:
    cupy.driver.available = available
    reason = registry.why_no_cuda()
    assert reason == (None if available else "CuPy is installed, but no NVIDIA driver and GPU answer")
    assert importlib.import_module(RUNTIME_MODULE).CudaRuntime.array_type is cupy.ndarray
