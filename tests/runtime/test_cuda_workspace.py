"""Cooperative launches through CuPy: more shared memory, and a workspace for every stream of every device."""

from __future__ import annotations

import gc
import threading
import types
import warnings
import weakref
from typing import Any

import numpy as np
import pytest

import bnkernels as bn
from bnkernels.runtime import registry
from bnkernels.runtime.seam import SHARED_BYTES, WORKSPACE_BYTES
from tests.runtime.test_cuda_runtime import batch, cupy
from tools.emulator import EmulatorRuntime
from tools.fake_cupy import kernels as fake_cupy_kernels

__all__ = ["cupy"]  # the fixture
pytestmark = pytest.mark.emulator


@pytest.fixture
def made(cupy: types.ModuleType) -> list[weakref.ref]:
    """Return the workspaces in the order of their making, those that are gone too."""
    made, zeros = [], cupy.zeros
    gc.freeze()  # only what is made from here on need be looked through

    def remembered(shape: Any, dtype: Any) -> Any:
        array = zeros(shape, dtype)
        if shape == WORKSPACE_BYTES:
            made.append(weakref.ref(array))
        return array

    cupy.zeros = remembered
    return made


def alive(made: list[weakref.ref]) -> int:
    """Return how many are still there."""
    gc.collect()
    return sum(array() is not None for array in made)


def test_blocks_that_wait_are_launched_to_be_resident_together(
    cupy: types.ModuleType, emulated: EmulatorRuntime, rng: np.random.Generator
) -> None:
    arrays = batch(rng, 20_000, 8)
    x, gamma, beta, dy = map(cupy.asarray, arrays)
    y, statistics = bn.batch_norm_forward(x, gamma, beta)
    dx, *_ = bn.batch_norm_backward(dy, x, gamma, beta, statistics)
    launches = [record.launch for record in cupy.driver.launches]
    assert all(launch.cooperative for launch in launches)
    assert all(launch.shared_bytes > SHARED_BYTES for launch in launches), "the kernels asked for more"
    x, gamma, beta, dy = map(emulated.asarray, arrays)
    want, statistics = bn.batch_norm_forward(x, gamma, beta)
    np.testing.assert_array_equal(y.get(), want)
    np.testing.assert_array_equal(dx.get(), bn.batch_norm_backward(dy, x, gamma, beta, statistics)[0])


def test_streams_and_devices_do_not_share_a_workspace(cupy: types.ModuleType, rng: np.random.Generator) -> None:
    """Two launches at once on one would count each other's arrivals."""
    made = []
    zeros = cupy.zeros
    cupy.zeros = lambda *given: made.append(zeros(*given)) or made[-1]
    streams = [cupy.cuda.Stream(), cupy.cuda.Stream()]
    for device in (0, 1, 0):
        with cupy.cuda.Device(device):
            x = cupy.asarray(batch(rng, 20_000, 8)[0])
        bn.batch_norm_forward(x)
        for stream in streams:
            with stream:
                bn.batch_norm_forward(x)
    assert [(array.device.id, array.nbytes) for array in made] == [(d, WORKSPACE_BYTES) for d in (0, 0, 0, 1)]
    assert len({array.data.ptr for array in made}) == 4


def test_a_launch_of_blocks_that_do_not_wait_takes_no_workspace(
    cupy: types.ModuleType, rng: np.random.Generator
) -> None:
    cupy.zeros = None
    bn.batch_norm_forward(cupy.asarray(batch(rng, 1024, 64)[0]))
    assert [record.entry_point for record in cupy.driver.launches] == ["bnk_batch_norm_forward_cooperative_f32"]


def test_a_workspace_is_not_made_while_a_graph_is_captured(cupy: types.ModuleType, rng: np.random.Generator) -> None:
    """Its zeros would be part of the graph: every replay would clear the counters, and eager calls would miss them."""
    x, stream = cupy.asarray(batch(rng, 20_000, 8)[0]), cupy.cuda.Stream()
    out = bn.batch_norm_forward(x)
    with stream:
        cupy.driver.captures[stream.ptr] = []
        with pytest.raises(RuntimeError, match="call the op once on this stream before the capture begins"):
            bn.batch_norm_forward(x, out=out)
        assert cupy.driver.captures.pop(stream.ptr) == [], "nothing was launched"
        bn.batch_norm_forward(x, out=out)
        cupy.driver.captures[stream.ptr] = []
        bn.batch_norm_forward(x, out=out)
        assert len(cupy.driver.captures.pop(stream.ptr)) == 1


def test_what_waits_and_takes_much_memory_gets_the_carveout(cupy: types.ModuleType, rng: np.random.Generator) -> None:
    bn.batch_norm_forward(cupy.asarray(batch(rng, 20_000, 8)[0]))
    bn.batch_norm_forward(cupy.asarray(batch(rng)[0]))
    waiting, small = cupy.driver.kernels
    limits = registry.runtime_of(cupy.ndarray).limits(cupy.asarray(np.zeros(1)))
    found = waiting.max_dynamic_shared_size_bytes, waiting.preferred_shared_memory_carveout
    assert found == (limits.shared_bytes, 100)
    assert (small.max_dynamic_shared_size_bytes, small.preferred_shared_memory_carveout) == (SHARED_BYTES, -1)


@pytest.mark.parametrize(
    ("capability", "tf32", "clusters"),
    [("75", False, False), ("80", True, False), ("89", True, False), ("90", True, True), ("120", True, True)],
)
def test_what_a_device_can_do_follows_from_its_compute_capability(
    cupy: types.ModuleType, capability: str, tf32: bool, clusters: bool
) -> None:
    device = types.SimpleNamespace(
        id=-int(capability), compute_capability=capability, attributes=cupy.cuda.Device(0).attributes
    )
    limits = registry.runtime_of(cupy.ndarray).limits(types.SimpleNamespace(device=device))
    assert (limits.tf32, limits.clusters) == (tf32, clusters)


def test_blocks_that_do_not_fit_the_device_are_refused_before_they_wait_for_ever(
    cupy: types.ModuleType, rng: np.random.Generator
) -> None:
    """CuPy warns, and launches as many as fit: those wait for the others."""
    x = cupy.asarray(batch(rng, 20_000, 8)[0])
    out = bn.batch_norm_forward(x)
    assert cupy.driver.asked == 1
    bn.batch_norm_forward(x, out=out)
    assert cupy.driver.asked == 1, "the driver is asked once per kernel, block and shared memory"
    with cupy.cuda.Device(1):
        x = cupy.asarray(batch(rng, 20_000, 8)[0])
    cupy.driver.launches.clear()
    cupy.driver.of_sm = 0
    warnings.simplefilter("error")  # pytest forgets it after the test
    with pytest.raises(RuntimeError, match="wait for one another, and the device holds 0 "):
        bn.batch_norm_forward(x)
    assert not cupy.driver.launches


def test_the_stand_in_cuts_a_grid_as_cupy_does(cupy: types.ModuleType) -> None:
    cut = fake_cupy_kernels.Function._cut
    with pytest.warns(UserWarning, match="reduced from 9 to 8"):
        assert cut((9, 1, 1), 8) == (8, 1, 1)
    assert cut((2, 4, 1), 8) == (2, 4, 1)
    with pytest.raises(ValueError, match=r"\(3 \* 3 \* 1\) exceeds the limit \(8\)"):
        cut((3, 3, 1), 8)


def test_a_new_thread_may_ask_whether_blocks_fit(cupy: types.ModuleType, rng: np.random.Generator) -> None:
    """The driver answers only a thread that has a context, which reading a device's number does not make."""
    x = cupy.asarray(batch(rng, 20_000, 8)[0])
    out, memory = bn.batch_norm_forward(x), cupy.zeros(WORKSPACE_BYTES, np.uint8)
    runtime = registry.runtime_of(cupy.ndarray)
    runtime._resident.clear()
    found: list[Any] = []

    def work() -> None:
        try:
            with runtime._workspaces.of_graph(memory):  # none is made, which would make a context too
                found.append(bn.batch_norm_forward(x, out=out))
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [out]


@pytest.mark.parametrize("dead", [False, True])
def test_a_launch_that_failed_leaves_no_counter_behind(
    cupy: types.ModuleType, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, made: list, dead: bool
) -> None:
    """A kernel that was stopped has counted some arrivals: the next one would wait for ever."""
    x = cupy.asarray(batch(rng, 20_000, 8)[0])
    want = bn.batch_norm_forward(x)[0].get()
    (workspace,) = made
    workspace()._memory[...] = 3
    run = cupy.driver.launch

    def fail(*_: Any) -> None:
        cupy.driver.dead = dead
        raise RuntimeError("cudaErrorLaunchTimeout: the launch timed out and was terminated")

    monkeypatch.setattr(cupy.driver, "launch", fail)
    with pytest.raises(RuntimeError, match="cudaErrorLaunchTimeout"):
        bn.batch_norm_forward(x)
    monkeypatch.setattr(cupy.driver, "launch", run)
    if dead:  # a workspace that cannot be cleared is dropped
        assert alive(made) == 0
        cupy.driver.dead = False
    else:
        assert not workspace()._memory.any()
    np.testing.assert_array_equal(bn.batch_norm_forward(x)[0].get(), want)
    assert len(made) == 1 + dead


def test_a_workspace_goes_with_its_stream(cupy: types.ModuleType, rng: np.random.Generator, made: list) -> None:
    x = cupy.asarray(batch(rng, 20_000, 8)[0])
    for _ in range(5):
        with cupy.cuda.Stream():
            bn.batch_norm_forward(x)
            bn.batch_norm_forward(x)
            assert alive(made) == 1
    assert alive(made) == 0
    assert len(made) == 5
    assert len(registry.runtime_of(cupy.ndarray)._workspaces) == 0


def test_a_workspace_of_a_default_stream_goes_with_its_thread(
    cupy: types.ModuleType, rng: np.random.Generator, made: list
) -> None:
    x = cupy.asarray(batch(rng, 20_000, 8)[0])
    bn.batch_norm_forward(x)
    for _ in range(2):
        thread = threading.Thread(target=bn.batch_norm_forward, args=(x,))
        thread.start()
        thread.join()
    assert (len(made), alive(made)) == (3, 1)


def test_a_workspace_in_a_graph_of_the_caller_stays(
    cupy: types.ModuleType, rng: np.random.Generator, made: list
) -> None:
    """Nobody tells when such a graph is gone, and it has the address."""
    x = cupy.asarray(batch(rng, 20_000, 8)[0])
    with cupy.cuda.Stream() as stream:
        out = bn.batch_norm_forward(x)
        want = out[0].get()
        stream.begin_capture()
        bn.batch_norm_forward(x, out=out)
        graph = stream.end_capture()
    del stream
    assert alive(made) == 1
    out[0].fill(0)
    graph.launch()
    np.testing.assert_array_equal(out[0].get(), want)


def captured(cupy: types.ModuleType, x: Any) -> tuple[Any, Any]:
    """Return the launch of a graph of a forward pass, and its outputs."""
    out = bn.batch_norm_forward(x)
    runtime = registry.runtime_of(cupy.ndarray)
    return runtime.capture(lambda: bn.batch_norm_forward(x, out=out), x), out


def test_a_workspace_of_a_captured_graph_goes_with_it(
    cupy: types.ModuleType, rng: np.random.Generator, made: list
) -> None:
    x = cupy.asarray(batch(rng, 20_000, 8)[0])
    replays = [captured(cupy, x) for _ in range(4)]
    assert alive(made) == 1 + len(replays)
    replays[-1][0]()
    replays.pop()
    assert alive(made) == 1 + len(replays)
    replays.clear()
    assert alive(made) == 1, "of the current stream"


def test_a_graph_runs_on_the_device_of_its_arrays(cupy: types.ModuleType, rng: np.random.Generator) -> None:
    with cupy.cuda.Device(1):
        x, mine = cupy.asarray(batch(rng, 20_000, 8)[0]), cupy.cuda.Stream()
    replay, out = captured(cupy, x)
    want = out[0].get()
    out[0].fill(0)
    replay()
    with cupy.cuda.Device(1), mine, cupy.cuda.Device(0):
        replay()
        assert cupy.driver.device == 0
    assert cupy.driver.replays == [(1, 0), (1, mine.ptr)]
    np.testing.assert_array_equal(out[0].get(), want)


def test_a_graph_that_failed_leaves_no_counter_behind(
    cupy: types.ModuleType, rng: np.random.Generator, made: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    replay, _ = captured(cupy, cupy.asarray(batch(rng, 20_000, 8)[0]))
    memory = made[-1]()
    memory._memory[...] = 3
    monkeypatch.setattr(cupy.driver, "replays", None)
    with pytest.raises(AttributeError):
        replay()
    assert not memory._memory.any()


def test_what_goes_wrong_in_a_capture_is_what_is_raised(cupy: types.ModuleType) -> None:
    """The end of a capture that was spoilt is an error too, and says less."""
    x = cupy.asarray(np.zeros((4, 3), "float32"))
    bn.batch_norm_forward(x)
    with pytest.raises(RuntimeError, match="cudaErrorStreamCaptureUnsupported: a wait for a stream"):
        registry.runtime_of(cupy.ndarray).capture(lambda: cupy.cuda.get_current_stream().synchronize(), x)
    assert not cupy.driver.captures, "the stream captures no more"


def test_a_stream_of_another_library_keeps_its_workspace(
    cupy: types.ModuleType, made: list[weakref.ref], rng: np.random.Generator
) -> None:
    from bnkernels.runtime import cuda

    with cupy.cuda.Device(1):
        x = cupy.asarray(batch(rng, 20_000, 8)[0])
    for handle in (0x7000, 0x8000, 0x7000):
        with cuda.on_stream(1, handle):
            bn.batch_norm_forward(x)
    assert [(record.device, record.stream) for record in cupy.driver.launches] == [
        (1, 0x7000),
        (1, 0x8000),
        (1, 0x7000),
    ]
    assert alive(made) == len(made) == 2
    assert (cupy.driver.device, cupy.cuda.get_current_stream(1).ptr) == (0, 0)
