"""Captured steps are those of the layers; what varies comes from the device, and nothing is allocated meanwhile."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import bnkernels as bn
from bnkernels.nn.mlp import MLP
from bnkernels.nn.optimizers import make_optimizer
from bnkernels.runtime import registry
from bnkernels.train.captured_step import CapturedStep, why_not_captured
from bnkernels.train.config import ConfigError
from tests.ops.test_fused_training import RATES, by_layers, make_data
from tests.runtime.test_cuda_runtime import forget_the_runtime
from tests.runtime.test_cuda_workspace import alive, made
from tests.train.test_engines import network_on
from tools import backends
from tools.backends import Backend
from tools.emulator import EmulatorError, EmulatorRuntime
from tools.fake_cupy import graphs as fake_cupy_graphs
from tools.fake_cupy import streams as fake_cupy_streams

__all__ = ["made"]  # the fixture, on the stand-in below
ARCHITECTURES = [((7, 20, 10), 64), ((5, 3), 6), ((6, 33, 17, 5), 30), ((3, 9, 8, 7, 6, 5, 4), 65)]


@pytest.fixture
def cupy(emulated: EmulatorRuntime, monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """Put the stand-in with streams and graphs in CuPy's place."""
    stand_in = fake_cupy_streams.make(emulated)
    monkeypatch.setitem(sys.modules, "cupy", stand_in)
    monkeypatch.setattr(registry, "runtimes", dict(registry.runtimes))
    forget_the_runtime()
    yield stand_in
    forget_the_runtime()


def captured(backend: Backend, model: MLP, name: str, batch: int) -> tuple[CapturedStep, Any]:
    """Return the captured step of a copy of the model, and its optimiser."""
    copy = MLP(model.sizes, norm=model.norm, activation=model.activation, dtype=model.dtype, xp=backend.xp)
    copy.load_state(model.state())
    optimizer = make_optimizer(name, copy, RATES[name])
    return CapturedStep(copy, name, tuple(optimizer.arrays.values()), batch), optimizer


@pytest.mark.parametrize(("name", "norm"), [("sgd", "none"), ("momentum", "layer"), ("adam", "batch")])
@pytest.mark.parametrize(("sizes", "batch"), ARCHITECTURES)
def test_steps_are_those_of_the_layers(
    backend: Backend, rng: np.random.Generator, sizes: tuple[int, ...], batch: int, name: str, norm: str
) -> None:
    if backend.is_numpy:
        pytest.skip("needs a device")
    x, y = make_data(rng, sizes, 5 * batch + 1, "float64")
    model = MLP(sizes, norm=norm, activation="tanh", dtype="float64", seed=3)
    step, optimizer = captured(backend, model, name, batch)
    assert len(list(step.run(*backend.arrays(x, y), lr=RATES[name], before=0))) == 5
    by_layers(model, wanted := make_optimizer(name, model, RATES[name]), x[: 5 * batch], y[: 5 * batch], batch)
    found = step.model.parameters, step.model.running, *optimizer.arrays.values()
    for got, want in zip(found, (model.parameters, model.running, *wanted.arrays.values()), strict=True):
        np.testing.assert_allclose(backend.asnumpy(got), want, rtol=1e-7, atol=1e-9)


@pytest.mark.emulator
def test_a_step_is_captured_once_and_goes_on_with_other_data(
    emulated: EmulatorRuntime, rng: np.random.Generator
) -> None:
    backend, batch = backends.make("emulator"), 10
    model = MLP((5, 8, 3), activation="tanh", dtype="float64", seed=1)
    optimizer = make_optimizer("adam", model, RATES["adam"])
    step, _ = captured(backend, model, "adam", batch)
    made = []
    for epoch in range(3):  # the last one is longer: new addresses, so it is captured again
        x, y = make_data(rng, (5, 8, 3), (3 if epoch < 2 else 4) * batch, "float64")
        by_layers(model, optimizer, x, y, batch)
        before = step._replay
        for _ in step.run(*backend.arrays(x, y), lr=RATES["adam"], before=3 * epoch):
            pass
        made.append(step._replay is not before)
    assert made == [True, False, True]
    np.testing.assert_allclose(backend.asnumpy(step.model.parameters), model.parameters, rtol=1e-7, atol=1e-9)
    assert len(emulated.launches) == 10 * (1 + 1 + 1 + 1 + 1), "every step is as many launches"


@pytest.mark.emulator
def test_an_allocation_in_a_capture_is_an_error(emulated: EmulatorRuntime) -> None:
    x = emulated.asarray(np.ones((4, 3), "float32"))
    with pytest.raises(EmulatorError, match="is allocated in a capture"):
        emulated.capture(lambda: bn.batch_norm_forward(x), x)


@pytest.mark.parametrize(("name", "norm"), [("sgd", "batch"), ("momentum", "none"), ("adam", "layer")])
def test_the_engine_takes_over_in_the_middle_of_an_epoch(
    backend: Backend, rng: np.random.Generator, name: str, norm: str
) -> None:
    if backend.is_numpy:
        pytest.skip("needs a device")
    x, y = backend.arrays(*make_data(rng, (6, 8, 3), 10 * 16, "float64"))
    options = {"optimizer": name, "dtype": "float64", "activation": "tanh", "lr": RATES[name]}
    ends = []
    for engines in (("layers", "layers"), ("graph", "layers"), ("layers", "graph")):
        before = network_on(backend, norm, engine=engines[0], **options)
        before.train(x, y, 0, 10, iter([False] * 4 + [True] * 2).__next__)
        assert before.step == 4
        after = network_on(backend, norm, engine=engines[1], **options)
        after.load_arrays(before.arrays())
        after.train(x, y, 0, 10, lambda: False)
        assert after.step == after.optimizer.steps == 10
        ends.append(after.arrays())
    for other in ends[1:]:
        for entry, array in ends[0].items():
            np.testing.assert_allclose(other[entry], array, rtol=1e-7, atol=1e-9, err_msg=entry)


def test_what_cannot_be_captured_says_why(backend: Backend) -> None:
    if backend.is_numpy:
        assert why_not_captured(MLP((5, 8, 3)), 10) == "it needs a GPU"
        with pytest.raises(
            ConfigError, match="the engine cannot be graph: it needs a GPU; take engine layers, or auto"
        ):
            network_on(backend, "batch", engine="graph")
        return
    model = MLP((5, 8, 3), momentum=None, xp=backend.xp)
    assert why_not_captured(model, 10).startswith("its running statistics are plain averages")
    model = MLP((5, 2000, 3), xp=backend.xp)
    message = r"a layer of 5 inputs and 2000 outputs on 10 examples needs a library's product"
    with pytest.raises(ValueError, match=message):
        CapturedStep(model, "sgd", (), 10)
    assert why_not_captured(MLP((5, 8, 3), xp=backend.xp), 600).startswith("a layer of 5 inputs and 8 outputs on 600")
    assert str(network_on(backend, "batch", engine="graph").engine) == "graph"


@pytest.mark.emulator
def test_through_cupy_a_step_is_a_graph(cupy: types.ModuleType, rng: np.random.Generator) -> None:
    sizes, batch = (6, 12, 9, 4), 16
    x, y = make_data(rng, sizes, 4 * batch, "float64")
    model = MLP(sizes, activation="tanh", dtype="float64", seed=2)
    on_gpu = MLP(sizes, activation="tanh", dtype="float64", seed=2, xp=cupy)
    optimizer = make_optimizer("momentum", on_gpu, RATES["momentum"])
    step = CapturedStep(on_gpu, "momentum", tuple(optimizer.arrays.values()), batch)
    graphs = []
    launch = fake_cupy_graphs.Graph.launch
    fake_cupy_graphs.Graph.launch = lambda graph, stream=None: graphs.append(graph) or launch(graph, stream)
    try:
        steps = step.run(cupy.asarray(x), cupy.asarray(y), lr=RATES["momentum"], before=0)
        reads = cupy.driver.reads
        assert len(list(steps)) == 4
    finally:
        fake_cupy_graphs.Graph.launch = launch
    assert cupy.driver.reads == reads, "a step read something back: it would wait for the device"
    assert len(graphs) == 3
    assert len(set(map(id, graphs))) == 1
    assert len(graphs[0].work) == 1 + 2 + 1 + 2 + 1
    by_layers(model, make_optimizer("momentum", model, RATES["momentum"]), x, y, batch)
    np.testing.assert_allclose(on_gpu.parameters.get(), model.parameters, rtol=1e-7, atol=1e-9)


@pytest.mark.emulator
def test_graphs_that_are_gone_leave_no_workspace(cupy: types.ModuleType, rng: np.random.Generator, made: list) -> None:
    """Data of two lengths in turn, an epoch and what is left of it: every time the step is captured anew."""
    step = CapturedStep(MLP((6, 7, 3), dtype="float64", xp=cupy), "sgd", (), 8)
    for examples in (32, 24, 32, 24):
        x, y = make_data(rng, (6, 7, 3), examples, "float64")
        assert len(list(step.run(cupy.asarray(x), cupy.asarray(y), lr=0.1, before=0))) == examples // 8
        of_graph = alive(made)
        assert of_graph <= 2, "that of the graph, and of the current stream"
    assert len(made) >= 4
    del step
    assert alive(made) == of_graph - 1
