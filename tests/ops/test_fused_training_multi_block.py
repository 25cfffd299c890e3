"""Networks that several blocks train: the steps of the layers again, by a cooperative grid and by clusters."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import pytest

import bnkernels as bn
from bnkernels.nn.mlp import MLP
from bnkernels.nn.optimizers import make_optimizer
from bnkernels.ops.fused_training import launch
from bnkernels.runtime.registry import runtime_of
from bnkernels.runtime.seam import WORKSPACE_BYTES
from tests.ops.test_constant_channels import test_fused_training_of_equal_examples_and_neurons as assert_phi_of_beta
from tests.ops.test_constant_channels import test_the_running_mean_of_equal_examples as assert_the_running_mean
from tests.ops.test_fused_training import OPTIMIZERS, RATES, by_layers, in_one, make_data
from tests.ops.test_fused_training import test_adams_first_step_does_not_overflow as assert_it_does_not_overflow
from tests.ops.test_fused_training import test_large_logits_do_not_overflow as assert_large_logits_do_not_overflow
from tests.regress.refusal import refused
from tests.train.test_engines import network_on
from tools import backends
from tools.backends import Backend
from tools.emulator import LaunchRecord
from tools.emulator.runtime import LIMITS

# Fewer neurons than blocks, more than all own at a time; widths that nothing divides; more examples than a block takes.
ARCHITECTURES = [
    ((7, 20, 10), 64),
    ((5, 3), 6),
    ((6, 33, 17, 5), 30),
    ((3, 9, 8, 7, 6, 5, 4), 65),
    ((2, 130, 3), 13),
    ((300, 6, 3), 7),
    ((5, 12, 3), 300),
]
NORMED = [(name, norm) for name in ("sgd", "adam") for norm in ("batch", "layer", "none")] + [("momentum", "batch")]


@pytest.fixture(params=["grid", "cluster"])
def group(request: pytest.FixtureRequest, backend: Backend, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Let groups train what one block could, and say what they are."""
    if backend.is_numpy:
        pytest.skip("needs a device")
    monkeypatch.setattr(launch, "_why_not_one", lambda *_: "a test wants groups")
    monkeypatch.setattr(launch, "CLUSTER", launch.CLUSTER if request.param == "cluster" else 0)
    if backend.name == "emulator":
        with backends.emulated_runtime().device_limits(LIMITS._replace(clusters=True)):
            yield request.param
        return
    like = backend.empty((1,), "float32")
    if request.param == "cluster" and not runtime_of(type(like)).limits(like).clusters:
        pytest.skip("this device has no clusters")
    yield request.param


@pytest.mark.parametrize(("name", "norm"), NORMED)
@pytest.mark.parametrize(("sizes", "batch"), ARCHITECTURES)
def test_steps_are_those_of_the_layers(
    backend: Backend, group: str, rng: np.random.Generator, sizes: tuple[int, ...], batch: int, name: str, norm: str
) -> None:
    if backend.name == "emulator" and (group, name) in {("cluster", "adam"), ("grid", "sgd")} and batch != 30:
        pytest.skip("the other kind of group makes these steps; a GPU makes them all")
    x, y = make_data(rng, sizes, 4 * batch, "float64")
    model = MLP(sizes, norm=norm, activation="tanh", dtype="float64", seed=3, momentum=None, unbiased=False)
    found = in_one(backend, model, name, x, y, batch)
    optimizer = make_optimizer(name, model, RATES[name])
    losses = by_layers(model, optimizer, x, y, batch)
    np.testing.assert_allclose(found[0], losses, rtol=1e-11)
    for got, want in zip(found[1:], (model.parameters, model.running, *optimizer.arrays.values()), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("norm", ["batch", "layer", "none"])
def test_many_steps_in_float32_learn_what_the_layers_learn(
    backend: Backend, group: str, rng: np.random.Generator, norm: str
) -> None:
    if backend.name == "emulator" and (group == "cluster" or norm == "none"):
        pytest.skip("the same steps as of a grid with batch norm; a GPU makes them")
    sizes, batch, steps = (6, 12, 4), 16, 80 if backend.name == "emulator" else 200
    x, y = make_data(rng, sizes, steps * batch, "float32")
    model = MLP(sizes, norm=norm, activation="relu", seed=1)
    losses, parameters, *_ = in_one(backend, model, "momentum", x, y, batch)
    wanted = by_layers(model, make_optimizer("momentum", model, RATES["momentum"]), x, y, batch)
    np.testing.assert_allclose(losses[:10], wanted[:10], rtol=1e-4)
    assert losses[-20:].mean() == pytest.approx(np.mean(wanted[-20:]), rel=0.1, abs=0.02)
    assert losses[-20:].mean() < 0.5 * losses[:5].mean()
    assert np.isfinite(parameters).all()


@pytest.mark.parametrize("first", [0, 1, 2])
def test_large_logits_do_not_overflow(backend: Backend, group: str, rng: np.random.Generator, first: int) -> None:
    assert_large_logits_do_not_overflow(backend, rng, first)


def test_adams_first_step_does_not_overflow(backend: Backend, group: str) -> None:
    assert_it_does_not_overflow(backend)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_constant_channels_give_phi_of_beta(backend: Backend, group: str, norm: str, dtype: str) -> None:
    assert_phi_of_beta(backend, norm, dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("batch", [11, 77, 300])
def test_the_running_mean_of_equal_examples(backend: Backend, group: str, batch: int, dtype: str) -> None:
    assert_the_running_mean(backend, batch, dtype)


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_far_from_0_costs_no_digits(backend: Backend, group: str, norm: str, rng: np.random.Generator) -> None:
    """In float32 a sum of 64 numbers of 2^20 is a multiple of 8, and the mean made of it up to 1/16 off."""
    model, exact = (MLP((1, 4, 3), norm=norm, dtype=dtype, activation="tanh") for dtype in ("float32", "float64"))
    weight = np.array([[1, 0.5, 2, -1]]) if norm == "batch" else 8192 + np.arange(4.0)[None] ** 2
    x = 2.0**20 + rng.integers(0, 12, (64, 1)) if norm == "batch" else np.full((64, 1), 3.0)
    state = model.state() | {"0.weight": weight}
    for one in (model, exact):
        kinds = {name: one.parameters.dtype if array.ndim else array.dtype for name, array in state.items()}
        one.load_state({name: array.astype(kinds[name]) for name, array in state.items()})
    y = (np.arange(64) % 3).astype(np.int32)
    losses, *_ = in_one(backend, model, "sgd", x.astype("float32"), y, 64)
    right, *_ = in_one(backends.make("numpy"), exact, "sgd", x, y, 64)
    np.testing.assert_allclose(losses, right, rtol=1e-6)


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_two_calls_are_one_and_indices_name_the_rows(
    backend: Backend, group: str, rng: np.random.Generator, norm: str
) -> None:
    sizes, batch = (5, 9, 3), 10
    x, y = make_data(rng, sizes, 50, "float32")
    indices = rng.integers(0, 50, (5, batch)).astype(np.int32)
    model = MLP(sizes, norm=norm, momentum=None)
    at_once = in_one(backend, model, "adam", x[indices.ravel()], y[indices.ravel()], batch)
    parameters, running, on_x, on_y = backend.arrays(model.parameters, model.running, x, y)
    state = tuple(backend.asarray(np.zeros_like(model.parameters)) for _ in range(2))
    losses = []
    for first, last in ((0, 2), (2, 5)):
        done = {"steps_before": first, "batches_before": first, "indices": backend.asarray(indices[first:last])}
        given = (model.fused, parameters, state, running if running.size else None, on_x, on_y)
        part = bn.fused_training(*given, batch=batch, optimizer="adam", lr=RATES["adam"], **done)
        losses.append(backend.asnumpy(part))
    found = (np.concatenate(losses), *map(backend.asnumpy, (parameters, running, *state)))
    for one, two in zip(at_once, found, strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_a_wrong_label_makes_the_loss_nan(backend: Backend, group: str, rng: np.random.Generator, norm: str) -> None:
    x, y = make_data(rng, (5, 9, 3), 20, "float32")
    y[3] = -1
    losses, *_ = in_one(backend, MLP((5, 9, 3), norm=norm), "sgd", x, y, 10)
    assert np.isnan(losses).all()


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_many_models_are_trained_in_one_launch(
    backend: Backend, group: str, rng: np.random.Generator, norm: str
) -> None:
    sizes, batch, count = (5, 9, 3), 10, 3
    x, y = make_data(rng, sizes, 3 * batch, "float64")
    models = [MLP(sizes, norm=norm, dtype="float64", activation="tanh", seed=seed) for seed in range(count)]
    alone = [in_one(backend, model, "sgd", x, y, batch) for model in models]
    parameters, running = (
        backend.asarray(np.stack([getattr(model, name) for model in models])) for name in ("parameters", "running")
    )
    given = (models[0].fused, parameters, (), running if running.size else None, *backend.arrays(x, y))
    losses = bn.fused_training(*given, batch=batch, lr=RATES["sgd"])
    for found, own in zip((losses, parameters, running), zip(*alone, strict=True), strict=True):
        # In a grid each model has fewer blocks than alone, and sums in another order.
        np.testing.assert_allclose(backend.asnumpy(found), np.stack(own), rtol=0 if group == "cluster" else 1e-9)


def counts_of_a_step(norm: str, rng: np.random.Generator) -> tuple[LaunchRecord, dict[str, int]]:
    """Return the launch of three steps, and what it does more than that of two."""
    emulated, sizes, batch = backends.emulated_runtime(), (6, 9, 8, 3), 20
    model = MLP(sizes, norm=norm)
    found = []
    for steps in (2, 3):
        x, y = make_data(rng, sizes, steps * batch, "float32")
        emulated.launches.clear()
        in_one(backends.make("emulator"), model, "sgd", x, y, batch)
        (record,) = emulated.launches
        counts = record.counts
        updated = sum(of.bytes_written for at, of in counts.arrays.items() if len(at) == model.parameters.nbytes)
        counters = sum(of.writes for at, of in counts.arrays.items() if len(at) == WORKSPACE_BYTES)
        read = sum(of.bytes_read for at, of in counts.arrays.items() if len(at) == x.nbytes)
        found.append(
            {
                "barriers": counts.barriers,
                "barrier_counter": counters,
                "x": read,
                "parameters": updated,
                "bytes": counts.total.bytes_read + counts.total.bytes_written,
            }
        )
    return record, {name: found[1][name] - found[0][name] for name in found[0]}


@pytest.mark.emulator
@pytest.mark.plain_build  # unoptimised, the numbers read in place of missing ones count too
def test_one_launch_that_costs_no_barrier_more_with_batch_norm(
    backend: Backend, group: str, rng: np.random.Generator
) -> None:
    (record, batch), (_, none) = (counts_of_a_step(norm, rng) for norm in ("batch", "none"))
    assert record.launch.grid == ((8, 1, 1) if group == "cluster" else (1, 4, 1))
    assert batch["barriers"] == none["barriers"] > 0
    assert batch["x"] == 6 * 20 * 4, "every example is read once"
    # gamma and rstd, running statistics, and what the mean and variance of a neuron are made of: no example.
    assert batch["bytes"] - none["bytes"] <= 6 * (9 + 8) * 32 * 4, "six words of a neuron, for 32 threads"


@pytest.mark.emulator
@pytest.mark.parametrize(("norm", "barriers"), [("batch", 5), ("none", 5), ("layer", 2)])
def test_a_step_is_so_many_meetings(
    backend: Backend, group: str, rng: np.random.Generator, norm: str, barriers: int
) -> None:
    if group == "cluster" or backends.emulated_runtime().build not in ("plain", "coverage"):
        pytest.skip("counted by what is written to the counter")
    record, counts = counts_of_a_step(norm, rng)
    assert counts["barrier_counter"] == barriers * record.launch.blocks


@pytest.mark.emulator
@pytest.mark.parametrize("sizes", [(6, 9, 8, 3), (5, 9)])
@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_the_order_of_blocks_and_threads_changes_no_bit(
    backend: Backend, group: str, rng: np.random.Generator, norm: str, sizes: tuple[int, ...]
) -> None:
    emulated, batch = backends.emulated_runtime(), 20
    x, y = make_data(rng, sizes, 3 * batch, "float32")
    found = []
    for seed in range(3):
        with emulated.schedule(seed):
            found.append(in_one(backends.make("emulator"), MLP(sizes, norm=norm), "adam", x, y, batch))
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            np.testing.assert_array_equal(one, two)


@pytest.mark.emulator
@pytest.mark.parametrize(("norm", "first"), [("batch", 0), ("none", 0), ("layer", 6 * 9)])
def test_a_step_writes_the_weights_that_other_blocks_read(
    backend: Backend, group: str, rng: np.random.Generator, norm: str, first: int
) -> None:
    """Those of the first layer have no gradient to pass on; layer norm has all weights multiply each example."""
    if backends.emulated_runtime().build not in ("plain", "coverage"):
        pytest.skip("counted by what is written")
    _, counts = counts_of_a_step(norm, rng)
    of_neurons = (9 + 8) * (1 if norm == "none" else 2) + 3
    assert counts["parameters"] == (first + 9 * 8 + 8 * 3 + of_neurons) * 4


@pytest.mark.emulator
@pytest.mark.parametrize(
    ("sizes", "batch"), [((6, 33, 17, 5), 12), ((3, 9, 8, 7, 6, 4), 9), ((2, 130, 3), 13), ((5, 3), 6)]
)
@pytest.mark.parametrize(("name", "norm"), [("adam", "batch"), ("adam", "layer"), ("momentum", "none")])
def test_weights_that_blocks_keep_are_those_in_global_memory(
    backend: Backend, group: str, rng: np.random.Generator, sizes: tuple[int, ...], batch: int, name: str, norm: str
) -> None:
    """The same bits for every number of arrays that have room: a byte less, and there is one array less."""
    emulated = backends.emulated_runtime()
    limits = emulated.limits(None)
    x, y = make_data(rng, sizes, 3 * batch, "float32")
    model = MLP(sizes, norm=norm, seed=5)
    found: dict[int, tuple] = {}
    while 0 not in found:
        with emulated.device_limits(limits):
            arrays = in_one(backend, model, name, x, y, batch)
        chosen = emulated.launches[-1].launch
        limits = limits._replace(shared_bytes=chosen.shared_bytes - 1)
        found[dict(chosen.constants)["kept"]] = arrays
    assert list(found) == list(range(1 + OPTIMIZERS[name], -1, -1))
    for kept in found.values():
        for one, two in zip(kept, found[0], strict=True):
            np.testing.assert_array_equal(one, two)


def test_what_does_not_fit_names_the_limits_and_the_way_out(backend: Backend, rng: np.random.Generator) -> None:
    sizes = (20, 1100, 3)
    x, y = make_data(rng, sizes, 60, "float32")
    if backend.is_numpy:
        assert in_one(backend, MLP(sizes), "sgd", x, y, 60)[0].shape == (1,)
        return
    message = (
        "the network does not fit: one block needs .*; several take layers of at most 1024, got 1100; train it layer"
    )
    with refused(backend, ValueError, message):
        in_one(backend, MLP(sizes), "sgd", x, y, 60)


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_the_engines_take_over_from_each_other(
    backend: Backend, group: str, rng: np.random.Generator, norm: str
) -> None:
    """Layers continue from a checkpoint of a multi-block launch, and the other way round."""
    x, y = backend.arrays(*make_data(rng, (6, 8, 3), 6 * 16, "float64"))
    options = {"optimizer": "adam", "dtype": "float64", "activation": "tanh", "lr": 0.01}
    ends = []
    for engines in (("layers", "layers"), ("fused", "layers"), ("layers", "fused")):
        before = network_on(backend, norm, engine=engines[0], **options)
        before.train(x, y, 0, 3, lambda: False)
        after = network_on(backend, norm, engine=engines[1], **options)
        assert re.fullmatch(r"layers|fused \(\d+ blocks\)", str(after.engine))
        after.load_arrays(before.arrays())
        after.train(x, y, 0, 6, lambda: False)
        ends.append(after.arrays())
    for other in ends[1:]:
        for entry, array in ends[0].items():
            np.testing.assert_allclose(other[entry], array, rtol=1e-7, atol=1e-9, err_msg=entry)
