"""Norms as layers of thinc: compared with thinc's own layer norm and with NumPy, trained, saved, found by a config."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("thinc", reason="thinc is not installed")

from thinc.api import Adam, Config, Ragged, registry, with_array2d
from thinc.api import LayerNorm as ThincLayerNorm

from bnkernels.compat.thinc import BatchNorm, LayerNorm
from tests.compat.test_courses import gradients
from tests.train.test_captured_step import cupy

__all__ = ["cupy"]  # the fixture

CONFIG = """
[model]
@layers = "chain.v1"
[model.*.linear]
@layers = "Linear.v1"
nO = 16
[model.*.norm]
@layers = "bnkernels.BatchNorm.v1"
activation = "relu"
[model.*.rows]
@layers = "bnkernels.LayerNorm.v1"
[model.*.softmax]
@layers = "Softmax.v1"
"""


def single(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Return random numbers in float32."""
    return rng.standard_normal(shape).astype("float32")


def from_config() -> Any:
    """Return a network whose layers are found by their names."""
    return registry.resolve(Config().from_str(CONFIG))["model"]


def train(model: Any, x: np.ndarray, classes: np.ndarray, steps: int) -> None:
    """Make some steps of Adam."""
    optimiser = Adam(0.02)
    for _ in range(steps):
        probabilities, backprop = model.begin_update(x)
        backprop((probabilities - classes) / len(x))
        model.finish_update(optimiser)


def test_layer_norm_is_that_of_thinc(rng: np.random.Generator) -> None:
    x, dy = single(rng, 7, 12), single(rng, 7, 12)
    theirs = ThincLayerNorm().initialize(x)
    theirs.set_param("G", single(rng, 12))
    theirs.set_param("b", single(rng, 12))
    ours = LayerNorm().from_bytes(theirs.to_bytes())
    results = []
    for model in (ours, theirs):
        for _ in range(2):  # gradients are added
            y, backprop = model.begin_update(x)
            dx = backprop(dy)
        results.append((y, dx, model.get_grad("G"), model.get_grad("b")))
    for got, want in zip(*results, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    y, backprop = ours(np.asfortranarray(x), is_train=True)
    np.testing.assert_array_equal(y, results[0][0])
    np.testing.assert_array_equal(backprop(np.asfortranarray(dy)), results[0][1])


def test_batch_norm_is_its_definition(rng: np.random.Generator) -> None:
    model, mean, var = BatchNorm(momentum=0.25, eps=1e-3), np.zeros(5), np.ones(5)
    gain, bias = single(rng, 5), single(rng, 5)
    model.initialize(single(rng, 2, 5))
    assert (model.get_dim("nI"), model.get_dim("nO")) == (5, 5)
    model.set_param("G", gain)
    model.set_param("b", bias)
    of_gain, of_bias = np.zeros(5), np.zeros(5)
    for rows in (8, 3):
        x, dy = single(rng, rows, 5) + 1, single(rng, rows, 5)
        y, backprop = model.begin_update(x)
        mean, var = 0.75 * mean + 0.25 * x.mean(0), 0.75 * var + 0.25 * x.var(0, ddof=1)
        np.testing.assert_allclose(y, gain * (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-3) + bias, rtol=1e-5, atol=1e-5)
        dx, dgain, dbias = gradients(np.float64(x), dy, gain, (0,), 1e-3)
        np.testing.assert_allclose(backprop(dy), dx, rtol=1e-4, atol=1e-5)
        of_gain, of_bias = of_gain + dgain, of_bias + dbias
    np.testing.assert_allclose(model.get_grad("G"), of_gain, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(model.get_grad("b"), of_bias, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(model.attrs["running_mean"], mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(model.attrs["running_var"], var, rtol=1e-5, atol=1e-6)
    y, backprop = model(x, is_train=False)
    np.testing.assert_allclose(y, gain * (x - mean) / np.sqrt(var + 1e-3) + bias, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(backprop(dy), dy * gain / np.sqrt(var + 1e-3), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(model.attrs["running_mean"], mean, rtol=1e-5, atol=1e-6)


def test_a_network_is_trained_saved_and_loaded(rng: np.random.Generator) -> None:
    x = single(rng, 60, 2)
    labels = (x[:, 0] * x[:, 1] > 0).astype(int)  # no straight line parts them
    classes = np.eye(2, dtype="float32")[labels]
    model = from_config().initialize(x, classes)
    train(model, x, classes, 60)
    assert (model.predict(x).argmax(1) == labels).mean() >= 0.95
    loaded = from_config().from_bytes(model.to_bytes())
    assert loaded.to_bytes() == model.to_bytes()
    np.testing.assert_array_equal(loaded.predict(x), model.predict(x))
    before, copied = model.predict(x), model.copy()
    for one in (model, loaded):  # a loaded network goes on learning
        train(one, x, classes, 2)
    np.testing.assert_array_equal(loaded.predict(x), model.predict(x))
    np.testing.assert_array_equal(copied.predict(x), before)
    means = [one.layers[1].attrs["running_mean"] for one in (model, loaded, copied)]
    np.testing.assert_array_equal(means[0], means[1])
    assert (means[0] != means[2]).any()


@pytest.mark.emulator
def test_running_statistics_follow_the_model(rng: np.random.Generator, cupy: ModuleType) -> None:
    """The parameters are moved to a GPU and back by thinc, and the attributes are not."""
    x = single(rng, 6, 3)
    model, other = BatchNorm().initialize(x), BatchNorm().initialize(x)
    on_gpu, on_cpu = SimpleNamespace(xp=cupy, asarray=cupy.asarray), model.ops
    for ops, given in ((on_gpu, cupy.asarray(x)), (on_cpu, x)):
        model.ops = ops
        for name in ("G", "b"):
            model.set_param(name, cupy.asarray(other.get_param(name)) if ops is on_gpu else other.get_param(name))
        y, _ = model.begin_update(given)
        assert {type(model.attrs[name]) for name in ("running_mean", "running_var")} == {type(y)} == {type(given)}
        other.begin_update(x)
    np.testing.assert_allclose(model.attrs["running_mean"], other.attrs["running_mean"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(model.attrs["running_var"], other.attrs["running_var"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [BatchNorm, LayerNorm])
def test_ragged_arrays_and_lists(rng: np.random.Generator, make: Any) -> None:
    x, dy, lengths = single(rng, 6, 3), single(rng, 6, 3), np.array([1, 3, 2], "int32")
    parts, dparts = (np.split(array, np.cumsum(lengths)[:-1]) for array in (x, dy))
    plain = make().initialize(x)
    y, backprop = plain(x, is_train=True)
    dx = backprop(dy)
    model = with_array2d(make())
    of_ragged, backprop = model.initialize(Ragged(x, lengths))(Ragged(x, lengths), is_train=True)
    np.testing.assert_array_equal(of_ragged.data, y)
    np.testing.assert_array_equal(backprop(Ragged(dy, lengths)).data, dx)
    of_list, backprop = with_array2d(make()).initialize(parts)(parts, is_train=True)
    np.testing.assert_array_equal(np.concatenate(of_list), y)
    np.testing.assert_array_equal(np.concatenate(backprop(dparts)), dx)


def test_no_rows_and_what_does_not_fit(rng: np.random.Generator) -> None:
    for make in (BatchNorm, LayerNorm):
        model = make().initialize(single(rng, 4, 3))
        y, backprop = model(single(rng, 0, 3), is_train=True)  # a text without words
        assert y.shape == backprop(y).shape == (0, 3)
        assert (model.get_grad("G") == 0).all()
        with pytest.raises(ValueError, match="gamma must"):
            model.predict(single(rng, 4, 2))
    model = BatchNorm().initialize(single(rng, 4, 3))
    with pytest.raises(ValueError, match="one value per channel has no variance"):
        model.begin_update(single(rng, 1, 3))
    assert (model.attrs["running_mean"] == 0).all()
