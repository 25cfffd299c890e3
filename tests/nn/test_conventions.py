"""Norms that people write by hand for CuPy and NumPy, each as a layer: a row of the table, a test.

Every convention is written down again in a few lines of NumPy: the weight of the old or the new in the running
statistics, their variance over N or N - 1, eps, the axes, where they start. Where the public code is wrong, the test
says what is right: what its own names promise. `docs/howto/other_code.md` has the table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from bnkernels import nn
from tests.nn.common import assert_close, assert_gradients
from tools.backends import Backend

Running = tuple[Any, Any]
Step = Callable[[np.ndarray, Running], tuple[np.ndarray, Running]]


def assert_follows(
    backend: Backend, layer: nn.BatchNorm, step: Step, running: Running, batches: np.ndarray, shape: Any = None
) -> Running:
    """Train a layer on batches, as `step` of a convention does, and compare; return the running statistics."""
    for batch in batches:
        want, running = step(batch, running)
        y = layer(backend.asarray(batch if shape is None else batch.reshape(shape)))
        assert_close(backend, y, want if shape is None else want.reshape(shape), 1e-10)
        for ours, theirs in zip((layer.running_mean, layer.running_var), running, strict=True):
            assert_close(backend, ours, np.ravel(theirs), 1e-11)
    dy = np.random.default_rng(5).standard_normal(batches[-1].shape if shape is None else shape)
    assert_gradients(backend, layer, batches[-1].reshape(dy.shape), dy)
    return running


def started(backend: Backend, layer: nn.BatchNorm, var: float) -> nn.BatchNorm:
    """Return a layer whose running variance starts at this number."""
    layer.running_var[...] = backend.asarray(np.full(layer.running_var.shape, var))
    return layer


def double(backend: Backend, features: int, **options: Any) -> nn.BatchNorm:
    """Return a batch norm in float64."""
    return nn.BatchNorm(features, dtype="float64", xp=backend.xp, **options)


def taken(backend: Backend, shape: tuple[int, ...], start: tuple[float, ...], **options: Any) -> tuple[Any, list[Any]]:
    """Return a layer of arrays of a shape such as (1, C), and these."""
    arrays = backend.arrays(*(np.full(shape, number, np.float64) for number in start))
    return nn.BatchNorm.from_arrays(*arrays, **options), arrays


def test_row_1_deep_learning_from_scratch(backend: Backend, rng: np.random.Generator) -> None:
    """Statistics of every activation of an image; the old weighs 0.9; over N; the running variance starts at 0."""

    def step(x: np.ndarray, running: Running) -> tuple[np.ndarray, Running]:
        rows = x.reshape(len(x), -1)
        centred = rows - rows.mean(0)
        var = (centred**2).mean(0)
        running = 0.9 * running[0] + 0.1 * rows.mean(0), 0.9 * running[1] + 0.1 * var
        return (centred / np.sqrt(var + 10e-7)).reshape(x.shape), running

    layer = started(backend, double(backend, 12, decay=0.9, unbiased=False, eps=10e-7), 0)
    batches = rng.standard_normal((3, 5, 3, 2, 2)) + 1
    mean, var = assert_follows(backend, layer, step, (np.zeros(12), np.zeros(12)), batches, (5, 12))
    layer = started(backend, double(backend, 12, decay=0.9, unbiased=False, eps=10e-7), 0)
    for batch in batches:
        layer(backend.asarray(batch.reshape(5, 12)))
    x = batches[0].reshape(5, 12)
    assert_close(backend, layer.forward(backend.asarray(x), training=False), (x - mean) / np.sqrt(var + 10e-7), 1e-10)


def test_row_2_dezero(backend: Backend, rng: np.random.Generator) -> None:
    """Images as rows of pixels; decay 0.9; over max(N - 1, 1); eps 2e-5."""

    def step(x: np.ndarray, running: Running) -> tuple[np.ndarray, Running]:
        rows = x.transpose(0, 2, 3, 1).reshape(-1, 3)
        m, mean, var = len(rows), rows.mean(0), rows.var(0)
        running = 0.9 * running[0] + 0.1 * mean, 0.9 * running[1] + 0.1 * var * (m / max(m - 1, 1))
        y = (rows - mean) / np.sqrt(var + 2e-5)
        return y.reshape(4, 2, 5, 3).transpose(0, 3, 1, 2), running

    layer = double(backend, 3, decay=0.9, eps=2e-5)
    assert_follows(backend, layer, step, (np.zeros(3), np.ones(3)), rng.standard_normal((3, 4, 3, 2, 5)))
    like = nn.batch_norm_like("chainer", 3)
    assert (like.decay, like.eps, like.unbiased, like.axis) == (layer.decay, layer.eps, layer.unbiased, layer.axis)


def test_row_3_needle(backend: Backend, rng: np.random.Generator) -> None:
    """PyTorch's names and momentum, but a running variance over N."""

    def step(x: np.ndarray, running: Running) -> tuple[np.ndarray, Running]:
        running = (1 - 0.1) * running[0] + 0.1 * x.mean(0), (1 - 0.1) * running[1] + 0.1 * x.var(0)
        return (x - x.mean(0)) / (x.var(0) + 1e-5) ** 0.5, running

    layer = double(backend, 4, momentum=0.1, unbiased=False)
    assert_follows(backend, layer, step, (np.zeros(4), np.ones(4)), rng.standard_normal((3, 6, 4)))


def test_row_4_numpy_ml(backend: Backend, rng: np.random.Generator) -> None:
    """Channels last; the old weighs 0.9; over N; gradients accumulate until they are zeroed."""

    def step(x: np.ndarray, running: Running) -> tuple[np.ndarray, Running]:
        mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
        running = 0.9 * running[0] + (1 - 0.9) * mean, 0.9 * running[1] + (1 - 0.9) * var
        return (x - mean) / np.sqrt(var + 1e-5), running

    layer = double(backend, 3, decay=0.9, unbiased=False, axis=-1)
    batches = rng.standard_normal((2, 4, 2, 2, 3))
    assert_follows(backend, layer, step, (np.zeros(3), np.ones(3)), batches)
    layer.zero_gradients()
    for batch in batches:
        layer(backend.asarray(batch))
        layer.backward(backend.asarray(batch), accumulate=True)
    xhats = [step(batch, (0, 0))[0] for batch in batches]
    assert_close(backend, layer.gradients["bias"], batches.sum((0, 1, 2, 3)), 1e-10)
    products = sum((batch * xhat).sum((0, 1, 2)) for batch, xhat in zip(batches, xhats, strict=True))
    assert_close(backend, layer.gradients["weight"], products, 1e-10)


def test_row_5_ml_from_scratch(backend: Backend, rng: np.random.Generator) -> None:
    """The old weighs 0.99; eps 0.01; the running statistics start as those of the first batch."""
    layer, running = double(backend, 3, momentum=1.0, unbiased=False, eps=0.01), None
    for batch in rng.standard_normal((3, 6, 3)) + 2:
        new = batch.mean(0), batch.var(0)
        if running is None:
            running = new
        running = [0.99 * old + (1 - 0.99) * one for old, one in zip(running, new, strict=True)]
        assert_close(backend, layer(backend.asarray(batch)), (batch - new[0]) / np.sqrt(new[1] + 0.01))
        layer.momentum = 1 - 0.99  # after the first batch
        for ours, theirs in zip((layer.running_mean, layer.running_var), running, strict=True):
            assert_close(backend, ours, theirs)


def test_row_6_pydeepflow(backend: Backend, rng: np.random.Generator) -> None:
    """Vectors of shape (1, C). Its backward gives sum(dz z) for gamma, and dz unchanged, which is wrong."""

    def step(x: np.ndarray, running: Running) -> tuple[np.ndarray, Running]:
        mean, var = (getattr(x, name)(axis=0, keepdims=True) for name in ("mean", "var"))
        return (x - mean) / np.sqrt(var + 1e-5), (0.9 * running[0] + 0.1 * mean, 0.9 * running[1] + 0.1 * var)

    layer, arrays = taken(backend, (1, 4), (1, 0, 0, 1), decay=0.9, unbiased=False)
    x, dy = rng.standard_normal((2, 6, 4)) + 1
    assert_follows(backend, layer, step, (np.zeros((1, 4)), np.ones((1, 4))), x[None])
    layer(backend.asarray(x))
    dx, xhat = backend.asnumpy(layer.backward(backend.asarray(dy))), step(x, (0, 0))[0]
    assert_close(backend, layer.gradients["weight"], (dy * xhat).sum(0), 1e-10)
    assert np.abs((dy * xhat).sum(0) - (dy * x).sum(0)).min() > 0.01
    want = (dy - dy.mean(0) - xhat * (dy * xhat).mean(0)) / np.sqrt(x.var(0) + 1e-5)
    np.testing.assert_allclose(dx, want, rtol=1e-9, atol=1e-11)
    assert np.abs(dx - dy).max() > 0.1
    assert np.shares_memory(layer.running_mean, arrays[2])


def test_row_7_pydynet(backend: Backend, rng: np.random.Generator) -> None:
    """Vectors of shape (1, C, 1, 1); eps 1e-6. Its layer norm averages over the batch, which is wrong."""

    def step(x: np.ndarray, running: Running) -> tuple[np.ndarray, Running]:
        mean, var = x.mean((0, 2, 3), keepdims=True), x.var((0, 2, 3), keepdims=True)
        return (x - mean) / np.sqrt(var + 1e-6), (0.9 * running[0] + 0.1 * mean, 0.9 * running[1] + 0.1 * var)

    shape = (1, 3, 1, 1)
    layer, _ = taken(backend, shape, (1, 0, 0, 1), momentum=0.1, unbiased=False, eps=1e-6)
    batches = rng.standard_normal((2, 4, 3, 2, 2))
    assert_follows(backend, layer, step, (np.zeros(shape), np.ones(shape)), batches)
    norm = nn.LayerNorm((3, 2, 2), eps=1e-6, dtype="float64", xp=backend.xp)
    together = backend.asnumpy(norm(backend.asarray(batches[0])))
    for x, y in zip(batches[0], together, strict=True):  # an example is normalised by itself
        np.testing.assert_allclose(y, (x - x.mean()) / np.sqrt(x.var() + 1e-6), rtol=1e-10, atol=1e-12)
    assert dict(norm.buffers) == {}


def test_row_8_neunet(backend: Backend, rng: np.random.Generator) -> None:
    """PyTorch's name and default, momentum=0.1, for the weight of the old: 90 % of every new batch."""

    def step(x: np.ndarray, running: Running) -> tuple[np.ndarray, Running]:
        running = 0.1 * running[0] + 0.9 * x.mean(0), 0.1 * running[1] + 0.9 * x.var(0)
        return (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5), running

    layer, _ = taken(backend, (1, 4), (1, 0, 0, 1), decay=0.1, unbiased=False)
    assert "decay=0.1" in repr(layer)
    assert "momentum=0.1" in repr(nn.BatchNorm(4))
    assert_follows(backend, layer, step, (np.zeros(4), np.ones(4)), rng.standard_normal((3, 6, 4)))


def test_row_9_ml_by_hand(backend: Backend, rng: np.random.Generator) -> None:
    """PyTorch's conventions; a batch of one leaves the running statistics."""

    def step(x: np.ndarray, running: Running) -> tuple[np.ndarray, Running]:
        if len(x) == 1:
            return np.zeros_like(x), running
        running = 0.9 * running[0] + 0.1 * x.mean(0), 0.9 * running[1] + 0.1 * x.var(0, ddof=1)
        return (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5), running

    assert_follows(backend, double(backend, 4), step, (np.zeros(4), np.ones(4)), rng.standard_normal((2, 6, 4)))
    layer, running = double(backend, 4, allow_single=True), (np.zeros(4), np.ones(4))
    for rows in (6, 1, 3):
        x = rng.standard_normal((rows, 4))
        y, running = step(x, running)
        assert_close(backend, layer(backend.asarray(x)), y, 1e-10)
        assert_close(backend, layer.running_var, running[1])
    assert layer.batches == 2


def test_row_10_mytorch(backend: Backend, rng: np.random.Generator) -> None:
    """alpha=0.9 for the old; eps 1e-8. One copy's eval=True does not normalise, which is wrong."""

    def step(x: np.ndarray, running: Running) -> tuple[np.ndarray, Running]:
        mean, var = x.sum(0) / len(x), ((x - x.sum(0) / len(x)) ** 2).sum(0) / len(x)
        return (x - mean) / (var + 1e-8) ** 0.5, (0.9 * running[0] + 0.1 * mean, 0.9 * running[1] + 0.1 * var)

    options: dict[str, Any] = {"decay": 0.9, "unbiased": False, "eps": 1e-8}
    layer, _ = taken(backend, (1, 4), (2, 1, 0, 1), **options)
    x, running = rng.standard_normal((6, 4)) + 3, (np.zeros(4), np.ones(4))
    for _ in range(3):
        y, running = step(x, running)
        assert_close(backend, layer(backend.asarray(x)), 2 * y + 1, 1e-10)
    want = 2 * (x - running[0]) / np.sqrt(running[1] + 1e-8) + 1
    assert_close(backend, layer.eval()(backend.asarray(x)), want, 1e-10)


def test_row_11_cs231n(backend: Backend, rng: np.random.Generator) -> None:
    """Functions with a cache and a dict: momentum 0.9 for the old, over N, running statistics from 0."""

    def step(x: np.ndarray, running: Running) -> tuple[np.ndarray, Running]:
        mu = x.mean(axis=0)
        var = ((x - mu) ** 2).mean(axis=0)
        running = 0.9 * running[0] + (1 - 0.9) * mu, 0.9 * running[1] + (1 - 0.9) * var
        return (x - mu) / np.sqrt(var + 1e-5), running

    layer = started(backend, double(backend, 4, decay=0.9, unbiased=False), 0)
    assert_follows(backend, layer, step, (np.zeros(4), np.zeros(4)), rng.standard_normal((3, 6, 4)))


def test_row_12_marquetry(backend: Backend, rng: np.random.Generator) -> None:
    """Chainer's conventions with eps 1e-15, and the right backward of an evaluation."""

    def step(x: np.ndarray, running: Running) -> tuple[np.ndarray, Running]:
        running = 0.9 * running[0] + 0.1 * x.mean(0), 0.9 * running[1] + 0.1 * x.var(0) * len(x) / (len(x) - 1)
        return (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-15), running

    layer = double(backend, 4, decay=0.9, eps=1e-15)
    assert_follows(backend, layer, step, (np.zeros(4), np.ones(4)), rng.standard_normal((3, 6, 4)))
    x, dy = rng.standard_normal((2, 6, 4))
    layer.eval()(backend.asarray(x))
    mean, deviation = backend.asnumpy(layer.running_mean), np.sqrt(backend.asnumpy(layer.running_var) + 1e-15)
    assert_close(backend, layer.backward(backend.asarray(dy)), dy / deviation)
    assert_close(backend, layer.gradients["weight"], (dy * (x - mean) / deviation).sum(0))


@pytest.mark.parametrize("single", [np.float32, np.float64])
def test_row_12_a_small_eps_is_one_of_either_type(single: type) -> None:
    """1e-15 is far above the smallest normal number of float32."""
    x = np.array([[1], [2], [4]], single)
    y = nn.BatchNorm(1, eps=1e-15, dtype=single)(x)
    np.testing.assert_allclose(y, (x - x.mean()) / x.std(), rtol=1e-6)


def test_row_13_a_norm_without_memory(backend: Backend, rng: np.random.Generator) -> None:
    """One gamma and one beta for all, nothing running, eps 1e-7. It divides by var + eps, which is wrong."""
    x, dy = rng.standard_normal((2, 6, 4))
    layer = double(backend, 4, track_running_stats=False, eps=1e-7)
    layer.weight[...], layer.bias[...] = 3, -1
    xhat = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-7)
    for mode in (True, False):  # without running statistics an evaluation takes those of its batch too
        assert_close(backend, layer.train(mode)(backend.asarray(x)), 3 * xhat - 1, 1e-10)
    layer.backward(backend.asarray(dy))
    of_gamma, of_beta = (backend.asnumpy(layer.gradients[name]).sum() for name in ("weight", "bias"))
    np.testing.assert_allclose((of_gamma, of_beta), ((dy * xhat).sum(), dy.sum()), rtol=1e-9)
    assert layer.state_dict().keys() == {"weight", "bias"}


def test_row_14_a_backward_that_works(backend: Backend, rng: np.random.Generator) -> None:
    """Vectors of shape (1, C), a running variance from 0. Its backward reads what its forward never set."""

    def step(x: np.ndarray, running: Running) -> tuple[np.ndarray, Running]:
        running = 0.9 * running[0] + 0.1 * x.mean(0), 0.9 * running[1] + 0.1 * x.var(0)
        return (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5), running

    layer, _ = taken(backend, (1, 4), (1, 0, 0, 0), decay=0.9, unbiased=False)
    assert_follows(backend, layer, step, (np.zeros(4), np.zeros(4)), rng.standard_normal((2, 6, 4)))
    with pytest.raises(RuntimeError, match="call this BatchNorm before it"):
        nn.BatchNorm(4).backward(np.ones((6, 4), "float32"))


def test_row_15_thinc_layer_norm(backend: Backend, rng: np.random.Generator) -> None:
    """Layer norm of rows with eps 1e-8; gain and bias are G and b; gradients are added."""
    x, dy = rng.standard_normal((2, 6, 4))
    gain, bias = rng.standard_normal((2, 4))
    layer = nn.LayerNorm.from_arrays(*backend.arrays(gain, bias), eps=1e-8)
    xhat = (x - x.mean(1, keepdims=True)) * (x.var(1, keepdims=True) + 1e-8) ** -0.5
    assert_close(backend, layer(backend.asarray(x)), xhat * gain + bias, 1e-10)
    for count in (1, 2):
        layer.backward(backend.asarray(dy), accumulate=True)
        assert_close(backend, layer.gradients["weight"], count * (dy * xhat).sum(0), 1e-10)
        assert_close(backend, layer.gradients["bias"], count * dy.sum(0), 1e-10)
    assert_gradients(backend, layer, x, dy)


def test_row_16_crossq_batch_renorm(backend: Backend, rng: np.random.Generator) -> None:
    """Renormalisation after a warm-up: momentum 0.01, eps 1e-3, r up to 3, d up to 5, running variance over N - 1.

    It divides by the deviation over N - 1, as no other: within the limits that cancels, and at a limit, or during the
    warm-up, ours is larger by sqrt(N / (N - 1)), but for eps.
    """
    layer = double(backend, 3, momentum=0.01, eps=1e-3, renorm=(1.0, 0.0))
    mean, var, rows = np.zeros(3), np.ones(3), 64
    for step, scale in enumerate((1.0, 1.5, 6.0)):
        x = scale * rng.standard_normal((rows, 3)) + 0.5
        theirs = x.var(0, ddof=1)
        if step:  # the warm-up is over
            layer.renorm = (3.0, 5.0)
            ratio, shift = np.sqrt(theirs + 1e-3) / np.sqrt(var + 1e-3), (x.mean(0) - mean) / np.sqrt(var + 1e-3)
            r, d = np.clip(ratio, 1 / 3, 3), np.clip(shift, -5, 5)
        else:
            r, d = np.ones(3), np.zeros(3)
        want = (x - x.mean(0)) / np.sqrt(theirs + 1e-3) * r + d
        y = backend.asnumpy(layer(backend.asarray(x)))
        if step == 1:
            assert (r == ratio).all()
            np.testing.assert_allclose(y, want, rtol=1e-9, atol=1e-9)
        else:
            np.testing.assert_allclose((y - d) / (want - d), np.sqrt(rows / (rows - 1)), rtol=1e-4)
        mean, var = 0.99 * mean + 0.01 * x.mean(0), 0.99 * var + 0.01 * theirs
        assert_close(backend, layer.running_mean, mean, 1e-11)
        assert_close(backend, layer.running_var, var, 1e-11)
    assert backend.asnumpy(layer.backward(backend.asarray(x))).shape == x.shape
