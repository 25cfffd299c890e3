"""Running statistics: biased or unbiased, a momentum or the average of all batches, or none; op, layer, checkpoint."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import bnkernels as bn
from bnkernels.nn import BatchNorm
from bnkernels.train.checkpoint import load_checkpoint, save_checkpoint
from tests.regress.refusal import refused
from tools import oracle
from tools.backends import Backend
from tools.emulator import EmulatorRuntime

# Rows in registers, streamed, in several axes, and so many that the cooperative kernels take them.
SHAPES = [(2, 3), (64, 20), (1100, 20), (5, 3, 4, 6), (4096, 32), (16, 8, 1024)]
MODES: dict[str, dict[str, Any]] = {
    "momentum": {"momentum": 0.25},
    "average": {"momentum": None},
    "average, biased": {"momentum": None, "unbiased": False},
    "not tracked": {"track_running_stats": False},
}


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("unbiased", [False, True])
def test_running_variance_is_over_n_or_n_minus_1(
    backend: Backend, rng: np.random.Generator, shape: tuple[int, ...], dtype: str, unbiased: bool
) -> None:
    x = (3 + rng.standard_normal(shape)).astype(dtype)
    channels, acc_dtype = shape[1], "float64" if dtype == "float64" else "float32"
    on = backend.arrays(x, None, None, np.full(channels, 0.5, acc_dtype), np.full(channels, 2.0, acc_dtype))
    y, statistics = bn.batch_norm_forward(*on, momentum=0.25, unbiased=unbiased)
    rows = np.moveaxis(x, 1, -1).reshape(-1, channels).astype(oracle.Extended)
    u, count = oracle.unit_roundoff(x.dtype), len(rows)
    new_var = 0.75 * 2 + 0.25 * ((rows - rows.mean(0)) ** 2).sum(0) / (count - unbiased)
    oracle.assert_within(backend.asnumpy(on[4]), new_var, oracle.SLACK * u * new_var, "running_var")
    oracle.assert_within(backend.asnumpy(on[3]), 0.375 + 0.25 * rows.mean(0), 16 * u * np.ones(channels), "mean")
    # Nothing else depends on it: what is normalised with is biased.
    same = bn.batch_norm_forward(on[0], momentum=0.25)
    for got, want in zip((y, statistics), same, strict=True):
        np.testing.assert_array_equal(backend.asnumpy(got), backend.asnumpy(want))


def test_unbiased_is_the_default_and_a_truth_value(backend: Backend, rng: np.random.Generator) -> None:
    x = backend.asarray(rng.standard_normal((8, 2)))
    results = []
    for options in ({}, {"unbiased": True}, {"unbiased": np.True_}):
        running = backend.arrays(np.zeros(2), np.ones(2))
        bn.batch_norm_forward(x, None, None, *running, **options)
        results.append(backend.asnumpy(running[1]))
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])
    running = backend.arrays(np.zeros(2), np.ones(2))
    for bad in (1, None, "yes"):
        with refused(backend, TypeError, f"unbiased must be True or False, got {bad!r}", *running):
            bn.batch_norm_forward(x, None, None, *running, unbiased=bad)


def test_running_variance_is_that_of_pytorch_and_biased_that_of_flax(
    torch: ModuleType, backend: Backend, rng: np.random.Generator
) -> None:
    x = rng.standard_normal((20, 3))
    theirs = torch.nn.BatchNorm1d(3, dtype=torch.float64, momentum=None)
    layer = new_layer(backend, momentum=None)
    for batch in np.split(x, 4):
        theirs(torch.from_numpy(batch))
        layer.forward(backend.asarray(batch), training=True)
    assert layer.batches == int(theirs.num_batches_tracked)
    np.testing.assert_allclose(backend.asnumpy(layer.running_mean), theirs.running_mean.numpy(), rtol=1e-12)
    np.testing.assert_allclose(backend.asnumpy(layer.running_var), theirs.running_var.numpy(), rtol=1e-12)
    biased = new_layer(backend, momentum=1.0, unbiased=False)
    biased.forward(backend.asarray(x), training=True)
    np.testing.assert_allclose(backend.asnumpy(biased.running_var), x.var(0), rtol=1e-12)


def new_layer(backend: Backend, *, tracked: bool = True, **options: Any) -> BatchNorm:
    """Return a layer of three channels in float64."""
    vectors = backend.arrays(np.float64([1, 2, -1]), np.float64([0, 1, 2]))
    running = backend.arrays(np.zeros(3), np.ones(3)) if tracked else ()
    return BatchNorm.from_arrays(*vectors, *running, **options)


@pytest.mark.parametrize("unbiased", [False, True])
def test_the_average_of_all_batches(backend: Backend, rng: np.random.Generator, unbiased: bool) -> None:
    batches = rng.standard_normal((5, 8, 3)) * 2 + 1
    layer = new_layer(backend, momentum=None, unbiased=unbiased)
    for number, batch in enumerate(batches):
        layer.forward(backend.asarray(batch), training=True)
        layer.forward(backend.asarray(batch), training=False)  # does not count
        assert layer.batches == number + 1
    means, variances = batches.mean(1).mean(0), batches.var(1, ddof=unbiased).mean(0)
    np.testing.assert_allclose(backend.asnumpy(layer.running_mean), means, rtol=1e-12)
    np.testing.assert_allclose(backend.asnumpy(layer.running_var), variances, rtol=1e-12)


@pytest.mark.parametrize("op", ["forward", "linear", "statistics"])
def test_an_op_counts_the_batches_before(backend: Backend, rng: np.random.Generator, op: str) -> None:
    batches = rng.standard_normal((4, 8, 3)) * 2 + 1
    running, identity = backend.arrays(np.zeros(3), np.ones(3)), backend.asarray(np.eye(3))
    for number, batch in enumerate(map(backend.asarray, batches)):
        options = {"momentum": None, "batches_before": number}
        if op == "forward":
            bn.batch_norm_forward(batch, None, None, *running, **options)
        elif op == "linear":
            bn.linear_batch_norm_forward(batch, identity, None, None, *running, **options)
        else:
            bn.batch_norm_statistics(bn.batch_norm_moments(batch)[None], *running, **options)
    np.testing.assert_allclose(backend.asnumpy(running[0]), batches.mean(1).mean(0), rtol=1e-12)
    np.testing.assert_allclose(backend.asnumpy(running[1]), batches.var(1, ddof=1).mean(0), rtol=1e-12)


def test_without_running_statistics_every_batch_is_normalised_by_its_own(
    backend: Backend, rng: np.random.Generator
) -> None:
    first, second = (backend.asarray(rng.standard_normal((8, 3))) for _ in range(2))
    dy = rng.standard_normal((8, 3))
    layer = new_layer(backend, tracked=False, activation="tanh")
    trained = backend.asnumpy(layer.forward(first, training=True))
    # An evaluation in between: the backward is still that of the forward in training.
    np.testing.assert_array_equal(backend.asnumpy(layer.forward(first, training=False)), trained)
    evaluated = layer.forward(second, training=False)
    dx = backend.asnumpy(layer.backward(backend.asarray(dy)))

    vectors = layer.gamma, layer.beta
    y, _ = bn.batch_norm_forward(second, *vectors, activation="tanh")
    np.testing.assert_array_equal(backend.asnumpy(evaluated), backend.asnumpy(y))
    _, statistics = bn.batch_norm_forward(first, *vectors, activation="tanh")
    want, *_ = bn.batch_norm_backward(backend.asarray(dy), first, *vectors, statistics, activation="tanh")
    np.testing.assert_allclose(dx, backend.asnumpy(want), rtol=1e-13, atol=1e-15)
    with pytest.raises(ValueError, match="one value per channel has no variance"):
        layer.forward(backend.asarray(np.ones((1, 3))), training=False)


def test_a_layer_refuses_half_of_the_running_statistics_and_bad_options(backend: Backend) -> None:
    (vector,) = backend.arrays(np.ones(3))
    for running, name in (((vector, None), "running_var"), ((None, vector), "running_mean")):
        with pytest.raises(ValueError, match=f"{name} is None and its companion is not; pass both, or neither"):
            BatchNorm.from_arrays(vector, vector, *running)
    with pytest.raises(ValueError, match="momentum must be between 0 and 1 and finite, got 2"):
        BatchNorm(3, momentum=2)
    with pytest.raises(TypeError, match="unbiased must be True or False, got 0"):
        BatchNorm(3, unbiased=0)
    with pytest.raises(TypeError, match="track_running_stats must be True or False, got None"):
        bn.MLP((2, 3, 2), track_running_stats=None)


@pytest.mark.parametrize("mode", MODES)
def test_training_goes_on_from_a_checkpoint_with_the_same_bits(
    backend: Backend, rng: np.random.Generator, tmp_path: Path, mode: str
) -> None:
    batches = rng.standard_normal((6, 10, 4)).astype("float32")
    labels = backend.asarray(rng.integers(0, 3, 10))

    def train(model: bn.MLP, batches: np.ndarray) -> None:
        for batch in batches:
            _, dlogits = bn.softmax_cross_entropy(model.forward(backend.asarray(batch), training=True), labels)
            model.backward(dlogits)
            bn.sgd_update(model.parameters, model.gradients, lr=0.1)

    through, stopped = (bn.MLP((4, 5, 3), xp=backend.xp, **MODES[mode]) for _ in range(2))
    train(through, batches)
    train(stopped, batches[:3])
    save_checkpoint(tmp_path / "half.npz", {}, stopped.state())
    resumed = bn.MLP((4, 5, 3), xp=backend.xp, seed=9, **MODES[mode])
    resumed.load_state(load_checkpoint(tmp_path / "half.npz")[1])
    train(resumed, batches[3:])

    assert (mode == "not tracked") == ("0.running_var" not in resumed.state())
    assert (mode == "not tracked") == ("0.batches" not in resumed.state())
    for name, array in through.state().items():
        np.testing.assert_array_equal(resumed.state()[name], array, err_msg=name)
    logits = (backend.asnumpy(m.forward(backend.asarray(batches[0]), training=False)) for m in (through, resumed))
    np.testing.assert_array_equal(*logits)


def test_a_state_with_running_statistics_is_not_one_without() -> None:
    tracked, untracked = bn.MLP((4, 5, 3)), bn.MLP((4, 5, 3), track_running_stats=False)
    with pytest.raises(ValueError, match=r"unknown \['0.batches', '0.running_mean', '0.running_var'\]"):
        untracked.load_state(tracked.state())
    with pytest.raises(ValueError, match=r"missing \['0.batches', '0.running_mean', '0.running_var'\]"):
        tracked.load_state(untracked.state())


@pytest.mark.emulator
def test_a_repeated_call_tells_unbiased_from_biased(emulated: EmulatorRuntime, rng: np.random.Generator) -> None:
    x = emulated.asarray(rng.standard_normal((4, 2)).astype("f4"))
    out = bn.batch_norm_forward(x)
    running, found = [emulated.asarray(np.zeros(2, "f4")) for _ in range(2)], []
    for unbiased in (True, False, True, False):
        running[1][:] = 0
        bn.batch_norm_forward(x, None, None, *running, momentum=1.0, unbiased=unbiased, out=out)
        found.append(np.array(running[1], subok=False))
    np.testing.assert_allclose(found[1], found[0] * 0.75, rtol=1e-6)
    np.testing.assert_array_equal(found[2:], found[:2])
