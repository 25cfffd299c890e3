"""Many steps in one launch: those of the layers, step by step, whatever the architecture.

Long because the steps of every architecture, optimiser and engine are compared in the same way.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bnkernels as bn
from benchmarks.harness.case import Case
from benchmarks.harness.places import cast, to_float64
from benchmarks.ops import bench_fused_training
from benchmarks.steps.bench_train_step import QUESTION, Variant, check
from benchmarks.steps.ours import FusedStep, GraphStep
from bnkernels.nn.mlp import MLP
from bnkernels.nn.optimizers import make_optimizer
from bnkernels.ops.activations import ACTIVATIONS
from bnkernels.ops.fused_training.launch import OPTIMIZERS, Problem, shared_bytes
from bnkernels.ops.softmax_cross_entropy.op import softmax_cross_entropy
from bnkernels.runtime.cpu import threads
from tests.regress.refusal import refused
from tools import backends
from tools.backends import Backend
from tools.emulator import EmulatorRuntime

# One hidden layer to five; widths that no warp divides, one neuron, more neurons than subwarps, which have 8 to 32
# threads.
ARCHITECTURES = [
    ((7, 20, 10), 64),
    ((5, 3), 6),
    ((4, 1, 3), 2),
    ((6, 33, 17, 5), 30),
    ((3, 9, 8, 7, 6, 5, 4), 65),
    ((2, 110, 3), 13),
    ((5, 12, 3), 200),
]
LEARNERS = [((6, 12, 9, 4), 16, phi, norm) for phi in ("relu", "gelu") for norm in ("batch", "layer", "none")]
LEARNERS += [((7, 9, 8, 7, 6, 5, 4), 20, "gelu", "batch"), ((5, 33, 3), 10, "relu", "batch")]
RATES = {"sgd": 0.1, "momentum": 0.03, "adam": 0.01}
NORMED = [(name, norm) for name in ("sgd", "adam") for norm in ("batch", "layer", "none")] + [("momentum", "batch")]


def make_data(rng: np.random.Generator, sizes: tuple[int, ...], rows: int, dtype: str) -> tuple:
    """Return examples and labels that can be learnt."""
    labels = rng.integers(0, sizes[-1], rows).astype(np.int32)
    centres = rng.standard_normal((sizes[-1], sizes[0]))
    return (centres[labels] + 0.5 * rng.standard_normal((rows, sizes[0]))).astype(dtype), labels


def by_layers(model: MLP, optimizer: Any, x: np.ndarray, y: np.ndarray, batch: int) -> list[float]:
    """Train step by step with the layers of the package; return the losses."""
    losses = []
    for start in range(0, len(x), batch):
        logits = model.forward(x[start : start + batch], training=True)
        loss, dlogits = softmax_cross_entropy(logits, y[start : start + batch])
        losses.append(float(np.mean(loss, dtype="float64")))
        model.backward(dlogits)
        optimizer.step()
    return losses


def in_one(backend: Backend, model: MLP, name: str, x: np.ndarray, y: np.ndarray, batch: int, **more: Any) -> tuple:
    """Train a copy of the network in one call; return losses, parameters, running statistics and states."""
    count = OPTIMIZERS[name]
    parameters, running = backend.arrays(model.parameters, model.running)
    state = tuple(backend.asarray(np.zeros_like(model.parameters)) for _ in range(count))
    on_x, on_y = backend.arrays(x, y)
    given = (model.fused, parameters, state, running if running.size else None, on_x, on_y)
    losses = bn.fused_training(*given, batch=batch, optimizer=name, lr=RATES[name], **more)
    return tuple(map(backend.asnumpy, (losses, parameters, running, *state)))


@pytest.mark.parametrize(("name", "norm"), NORMED)
@pytest.mark.parametrize(("sizes", "batch"), ARCHITECTURES)
def test_steps_are_those_of_the_layers(
    backend: Backend, rng: np.random.Generator, sizes: tuple[int, ...], batch: int, name: str, norm: str
) -> None:
    x, y = make_data(rng, sizes, 6 * batch, "float64")
    model = MLP(sizes, norm=norm, activation="tanh", dtype="float64", seed=3)
    found = in_one(backend, model, name, x, y, batch)
    optimizer = make_optimizer(name, model, RATES[name])
    losses = by_layers(model, optimizer, x, y, batch)
    np.testing.assert_allclose(found[0], losses, rtol=1e-11)
    # A few neurons make batch norm of two examples amplify roundings; Adam divides them by as little.
    for got, want in zip(found[1:], (model.parameters, model.running, *optimizer.arrays.values()), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(("sizes", "batch", "activation", "norm"), LEARNERS)
def test_two_hundred_steps_in_float32_learn_what_the_layers_learn(
    backend: Backend, rng: np.random.Generator, sizes: tuple[int, ...], batch: int, activation: str, norm: str
) -> None:
    x, y = make_data(rng, sizes, 200 * batch + 3, "float32")
    model = MLP(sizes, norm=norm, activation=activation, seed=1)
    losses, parameters, *_ = in_one(backend, model, "momentum", x, y, batch)
    wanted = by_layers(model, make_optimizer("momentum", model, RATES["momentum"]), x[:-3], y[:-3], batch)
    np.testing.assert_allclose(losses[:10], wanted[:10], rtol=1e-4)
    # Roundings grow over the steps, the more where a relu changes sides; what is learnt does not.
    assert losses[-20:].mean() == pytest.approx(np.mean(wanted[-20:]), rel=0.1, abs=0.02)
    assert losses[-20:].mean() < 0.5 * losses[:5].mean()
    assert np.isfinite(parameters).all()


@pytest.mark.parametrize("first", [0, 1, 2])
def test_large_logits_do_not_overflow(backend: Backend, rng: np.random.Generator, first: int) -> None:
    """The largest one, of whichever class, is far beyond those of which float32 has an exponential."""
    sizes, batch = (4, 6, 3), 8
    x, y = make_data(rng, sizes, 2 * batch, "float32")
    model = MLP(sizes, norm="batch", activation="tanh", seed=2)
    model.layer_arrays[-1].parameters["bias"][...] = np.roll([1000, 0, -1000], first)
    found = in_one(backend, model, "sgd", x, y, batch)
    losses = by_layers(model, make_optimizer("sgd", model, RATES["sgd"]), x, y, batch)
    assert max(losses) > 500
    np.testing.assert_allclose(found[0], losses, rtol=1e-5)
    np.testing.assert_allclose(found[1], model.parameters, rtol=1e-4, atol=1e-4)


def test_adams_first_step_does_not_overflow(backend: Backend) -> None:
    """The squares of gradients of 1e20, divided by 1 - beta2, are beyond float32; each weight moves by the rate."""
    model = MLP((3, 2), norm="none")
    model.parameters[:] = 0  # so that the gradients are x / 2 and -x / 2
    x = np.full((4, 3), [1e20, 3e19, -1e21], "float32")
    _, parameters, *_ = in_one(backend, model, "adam", x, np.zeros(4, "int32"), 4)
    np.testing.assert_allclose(parameters[:6] / RATES["adam"], [1, -1, 1, -1, -1, 1], rtol=1e-6)


def test_a_layer_norm_far_from_0_costs_no_digits(backend: Backend) -> None:
    model, weight = MLP((1, 7, 2), norm="layer", activation="tanh"), 8192 + np.arange(7.0)[None] ** 2 % 11
    model.load_state(model.state() | {"0.weight": weight})
    losses, *_ = in_one(backend, model, "sgd", np.full((8, 1), 3, "float32"), np.zeros(8, "int32"), 8)
    z = 3 * (weight - weight.mean())
    logits = np.tanh(z / np.sqrt(z.var() + 1e-5)) @ model.state()["1.weight"]
    assert losses[0] == pytest.approx(float(np.log(np.exp(logits).sum()) - logits[0, 0]), rel=1e-6)


def test_a_mean_far_from_0_costs_no_digits(backend: Backend, rng: np.random.Generator) -> None:
    """In float32 a sum of 64 numbers of 2^20 is a multiple of 8, and the mean made of it up to 1/16 off."""
    model, exact = (MLP((1, 4, 3), dtype=dtype, activation="tanh") for dtype in ("float32", "float64"))
    model.parameters[:4] = [1, 0.5, 2, -1]  # so that all products are exact
    exact.parameters[:] = 0
    for name, array in model.state().items():
        exact.load_state(exact.state() | {name: array})
    x = 2.0**20 + rng.integers(0, 12, (64, 1))
    y = (x[:, 0] % 3).astype(np.int32)
    losses, _, running, *_ = in_one(backend, model, "sgd", x.astype("float32"), y, 64)
    right, _, exact_running, *_ = in_one(backends.make("numpy"), exact, "sgd", x, y, 64)
    np.testing.assert_allclose(losses, right, rtol=1e-6)
    np.testing.assert_allclose(running[running != 0], exact_running[exact_running != 0], rtol=1e-6)


@pytest.mark.parametrize(("momentum", "unbiased"), [(None, True), (0.3, False)])
def test_running_statistics_move_as_the_layers_move_them(
    backend: Backend, rng: np.random.Generator, momentum: float | None, unbiased: bool
) -> None:
    sizes, batch = (5, 8, 3), 20
    x, y = make_data(rng, sizes, 10 * batch, "float64")
    model = MLP(sizes, dtype="float64", momentum=momentum, unbiased=unbiased)
    parts = [
        in_one(backend, model, "adam", x[: 10 * batch], y[: 10 * batch], batch),
    ]
    by_layers(model, make_optimizer("adam", model, RATES["adam"]), x, y, batch)
    np.testing.assert_allclose(parts[0][2], model.running, rtol=1e-9)


@pytest.mark.parametrize("name", RATES)
def test_two_calls_are_one(backend: Backend, rng: np.random.Generator, name: str) -> None:
    """Bit for bit: nothing but the arrays and the count of steps goes from one to the next."""
    sizes, batch = (5, 9, 3), 10
    x, y = make_data(rng, sizes, 7 * batch, "float32")
    model = MLP(sizes, momentum=None)
    at_once = in_one(backend, model, name, x, y, batch)
    parameters, running, on_x, on_y = backend.arrays(model.parameters, model.running, x, y)
    state = tuple(backend.asarray(np.zeros_like(model.parameters)) for _ in range(OPTIMIZERS[name]))
    losses = []
    for first, last in ((0, 3), (3, 7)):
        rows = slice(first * batch, last * batch)
        done = {"steps_before": first, "batches_before": first}
        given = (model.fused, parameters, state, running, on_x[rows], on_y[rows])
        part = bn.fused_training(*given, batch=batch, optimizer=name, lr=RATES[name], **done)
        losses.append(backend.asnumpy(part))
    found = (np.concatenate(losses), *map(backend.asnumpy, (parameters, running, *state)))
    for one, two in zip(at_once, found, strict=True):
        np.testing.assert_array_equal(one, two)


def test_indices_name_the_rows(backend: Backend, rng: np.random.Generator) -> None:
    sizes, batch = (5, 9, 3), 10
    x, y = make_data(rng, sizes, 50, "float32")
    indices = rng.integers(0, 50, (4, batch)).astype(np.int32)
    model = MLP(sizes)
    want = in_one(backend, model, "sgd", x[indices.ravel()], y[indices.ravel()], batch)
    found = in_one(backend, model, "sgd", x, y, batch, indices=backend.asarray(indices))
    for one, two in zip(want, found, strict=True):
        np.testing.assert_array_equal(one, two)


def test_what_is_left_over_of_the_rows_is_not_used(backend: Backend, rng: np.random.Generator) -> None:
    x, y = make_data(rng, (5, 9, 3), 37, "float32")
    model = MLP((5, 9, 3))
    losses, *_ = in_one(backend, model, "sgd", x, y, 10)
    assert losses.shape == (3,)
    nothing, parameters, *_ = in_one(backend, model, "sgd", x[:5], y[:5], 10)
    assert nothing.shape == (0,)
    np.testing.assert_array_equal(parameters, model.parameters)


def test_a_wrong_label_makes_the_loss_nan(backend: Backend, rng: np.random.Generator) -> None:
    if backend.is_numpy:
        pytest.skip("NumPy looks, and raises: see test_a_wrong_label_or_index_changes_nothing_on_numpy")
    x, y = make_data(rng, (5, 9, 3), 20, "float32")
    y[3] = 7
    losses, *_ = in_one(backend, MLP((5, 9, 3)), "sgd", x, y, 10)
    assert np.isnan(losses).all()


@pytest.mark.emulator
@pytest.mark.parametrize(("norm", "more"), [("batch", 0), ("none", 0), ("layer", 2)])
def test_one_launch_with_as_many_barriers_with_batch_norm_as_without(
    emulated: EmulatorRuntime, rng: np.random.Generator, norm: str, more: int
) -> None:
    backend = backends.make("emulator")
    x, y = make_data(rng, (64, 20, 10), 5 * 64, "float32")
    in_one(backend, MLP((64, 20, 10), norm=norm), "sgd", x, y, 64)
    (record,) = emulated.launches
    assert record.launch.grid == (1, 1, 1)
    assert record.counts.barriers == 3 + 5 * (2 * 2 + 1 + more)
    if emulated.build in ("plain", "coverage"):
        examples = next(traffic for at, traffic in record.counts.arrays.items() if len(at) == x.nbytes)
        assert examples.bytes_read == examples.unique_bytes_read == x.nbytes


@pytest.mark.emulator
@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_the_order_of_threads_changes_no_bit(emulated: EmulatorRuntime, rng: np.random.Generator, norm: str) -> None:
    x, y = make_data(rng, (6, 9, 5, 3), 4 * 20, "float32")
    found = []
    for seed in range(3):
        with emulated.schedule(seed):
            found.append(in_one(backends.make("emulator"), MLP((6, 9, 5, 3), norm=norm), "adam", x, y, 20))
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"batch": 1}, ValueError, r"batch must be from 2 to (512|2\*\*31 - 1), got 1"),
        ({"optimizer": "lion"}, ValueError, "optimizer must be one of sgd, momentum, adam; got 'lion'"),
        ({"optimizer": "adam"}, ValueError, r"state of adam must be 2 arrays \(first, second\), got 0"),
        ({"lr": -1}, ValueError, "lr must be at least 0 and finite, got -1"),
        ({"x": np.zeros((20, 4), "float32")}, ValueError, r"x must have the shape \(rows, 5\), .*got \(20, 4\)"),
        (
            {"labels": np.zeros(20, "int64")},
            TypeError,
            r"labels must be int32, got int64; convert it with labels\.astype",
        ),
        ({"indices": np.zeros((2, 9), "int32")}, ValueError, r"indices must have the shape \(2, 10\), got \(2, 9\)"),
        ({"out": np.zeros(3, "float32")}, ValueError, r"losses must have the shape \(2,\), got \(3,\)"),
        ({"parameters": np.zeros(16, "float32")}, ValueError, "layers must begin at multiples of 4 within the 16"),
    ],
)
def test_bad_input_is_refused(backend: Backend, changes: dict, error: type, message: str) -> None:
    model = MLP((5, 9, 3))
    arrays = {"parameters": model.parameters, "running": model.running, "x": np.zeros((20, 5), "float32")}
    arrays |= {"labels": np.zeros(20, "int32"), "indices": None, "out": None}
    options = {"batch": 10, "optimizer": "sgd", "lr": 0.1}
    options |= {name: value for name, value in changes.items() if name in options}
    arrays |= {name: value for name, value in changes.items() if name in arrays}
    on = {name: None if array is None else backend.asarray(array) for name, array in arrays.items()}
    extra = {"indices": on["indices"], "out": on["out"]}
    given = (on["parameters"], (), on["running"], on["x"], on["labels"])
    with refused(backend, error, message, *(array for array in on.values() if array is not None)):
        bn.fused_training(model.fused, *given, **options, **extra)


def test_only_a_gpu_limits_the_mini_batch(backend: Backend, rng: np.random.Generator) -> None:
    x, y = make_data(rng, (5, 9, 3), 1200, "float32")
    model = MLP((5, 9, 3))
    if backend.is_numpy:
        assert in_one(backend, model, "sgd", x, y, 600)[0].shape == (2,)
        return
    with pytest.raises(ValueError, match="from 2 to 512, got 600; train larger mini-batches layer by layer"):
        in_one(backend, model, "sgd", x, y, 600)


@pytest.mark.parametrize(("name", "norm"), NORMED)
@pytest.mark.parametrize(("sizes", "batch"), [((20, 130, 40, 10), 300), ((260, 300, 250, 3), 200)])
def test_large_layers_are_trained_in_blocks_and_by_the_blas(
    rng: np.random.Generator, sizes: tuple[int, ...], batch: int, name: str, norm: str
) -> None:
    """On NumPy arrays: mini-batches of several blocks, the last of them smaller, and products of both kinds."""
    with backends.entered("compiled") as backend:
        x, y = make_data(rng, sizes, 3 * batch, "float64")
        model = MLP(sizes, norm=norm, activation="silu", dtype="float64", seed=3)
        found = in_one(backend, model, name, x, y, batch)
        optimizer = make_optimizer(name, model, RATES[name])
        np.testing.assert_allclose(found[0], by_layers(model, optimizer, x, y, batch), rtol=1e-11, atol=1e-14)
        for got, want in zip(found[1:], (model.parameters, model.running, *optimizer.arrays.values()), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("norm", ["batch", "layer", "none"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_all_activations_are_those_of_the_layers(
    backend: Backend, rng: np.random.Generator, activation: str, norm: str
) -> None:
    sizes, batch = (6, 13, 9, 4), 20
    x, y = make_data(rng, sizes, 4 * batch, "float64")
    model = MLP(sizes, norm=norm, activation=activation, dtype="float64", seed=3)
    found = in_one(backend, model, "sgd", x, y, batch)
    losses = by_layers(model, make_optimizer("sgd", model, RATES["sgd"]), x, y, batch)
    np.testing.assert_allclose(found[0], losses, rtol=1e-11)
    np.testing.assert_allclose(found[1], model.parameters, rtol=1e-7, atol=1e-9)


def test_the_number_of_threads_changes_no_bit(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model is computed by one thread, whichever it is."""
    monkeypatch.setattr(threads, "WORTH_SHARING", 0)
    before, found = threads.get_num_threads(), []
    x, y = make_data(rng, (6, 20, 4), 5 * 30, "float32")
    models = [MLP((6, 20, 4), seed=seed) for seed in range(5)]
    try:
        with backends.entered("compiled"):
            for count in (1, 2, 3):
                threads.set_num_threads(count)
                parameters, running = (
                    np.stack([getattr(m, part) for m in models]) for part in ("parameters", "running")
                )
                losses = bn.fused_training(models[0].fused, parameters, (), running, x, y, batch=30, lr=0.1)
                found.append((losses, parameters, running))
    finally:
        threads.set_num_threads(before)
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            np.testing.assert_array_equal(one, two)


def test_read_only_examples_are_trained_on(backend: Backend, rng: np.random.Generator) -> None:
    x, y = make_data(rng, (5, 9, 3), 20, "float32")
    want = in_one(backend, MLP((5, 9, 3)), "sgd", x, y, 10)
    on_x, on_y, parameters, running = backend.arrays(x, y, MLP((5, 9, 3)).parameters, MLP((5, 9, 3)).running)
    if backend.is_numpy:
        on_x.flags.writeable = on_y.flags.writeable = False
    losses = bn.fused_training(MLP((5, 9, 3)).fused, parameters, (), running, on_x, on_y, batch=10, lr=RATES["sgd"])
    np.testing.assert_array_equal(backend.asnumpy(losses), want[0])


@pytest.mark.parametrize("kind", [FusedStep, GraphStep])
@pytest.mark.parametrize("norm", ["batch", "none"])
@pytest.mark.parametrize("name", RATES)
def test_the_benchmarked_steps_are_right(backend: Backend, name: str, norm: str, kind: type[FusedStep]) -> None:
    """`check` raises unless the losses are those of float64."""
    if backend.is_numpy and kind is GraphStep:
        pytest.skip("needs a device")
    variant = Variant("bnkernels fused", QUESTION, norm, name)
    step = variant.step(kind, xp=backend.xp)
    assert check(variant, step, QUESTION.mini_batches()[:4]) >= 0
    assert step.optimizer.steps == 4


@pytest.mark.parametrize("direction", bench_fused_training.NORMS)
def test_the_benchmarked_call_starts_anew_every_time(direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_fused_training, "STEPS", 5)
    case = Case("fused_training", direction, (8, 6))
    drawn = np.random.default_rng(0).standard_normal
    arrays = cast(case, bench_fused_training.inputs(case, lambda shape: drawn(shape, dtype="float32")))
    (exact,) = bench_fused_training.reference(case, to_float64(arrays), np)
    for prepare in (bench_fused_training.ours, bench_fused_training.layers):
        call = prepare(case, arrays)
        for _ in range(2):
            np.testing.assert_allclose(call()[0], exact, rtol=1e-4)


def test_the_page_names_the_bytes_that_are_needed() -> None:
    page = (Path(__file__).parents[2] / "docs" / "fused_layers.md").read_text(encoding="utf-8")
    for sizes in ((64, 20, 10), (64, 100, 10)):
        model = MLP(sizes)
        rest = np.dtype("float32"), model.parameters.size, model.running.size
        sgd, adam = (round(shared_bytes(Problem(model.fused, 64, name, *rest)) / 1024) for name in ("sgd", "adam"))
        assert f"| {'-'.join(map(str, sizes))} | {sgd} KiB | {adam} KiB |" in page
