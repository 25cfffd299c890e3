"""Layers made of layers: gradients, residual sums, masks, and what a backward and an evaluation leave alone."""

from __future__ import annotations

import numpy as np
import pytest

from bnkernels import nn
from tests.nn.common import assert_close, assert_gradients, network, normalised
from tools.backends import Backend


def test_a_network_of_layers_has_the_gradients_of_its_forward(backend: Backend, rng: np.random.Generator) -> None:
    model = network(backend)
    assert_gradients(backend, model, rng.standard_normal((7, 4)), rng.standard_normal((7, 2)))
    assert_gradients(backend, model.eval(), rng.standard_normal((7, 4)), rng.standard_normal((7, 2)))


def test_residual_adds_before_the_activation_of_its_norm(backend: Backend, rng: np.random.Generator) -> None:
    x = rng.standard_normal((6, 3))
    norm = nn.BatchNorm(3, activation="relu", dtype="float64", xp=backend.xp)
    assert_close(backend, nn.Residual(norm)(backend.asarray(x)), np.maximum(normalised(x, (0,), 1e-5) + x, 0))
    plain = nn.Residual(nn.ReLU())
    assert_close(backend, plain(backend.asarray(x)), np.maximum(x, 0) + x)
    assert_close(backend, plain.backward(backend.asarray(x)), x * (x > 0) + x)
    wide = nn.Residual(nn.Linear(3, 4, dtype="float64", xp=backend.xp))
    with pytest.raises(ValueError, match=r"must keep the shape of x, \(6, 3\), to be added to it; they made \(6, 4\)"):
        wide(backend.asarray(x))


def test_a_mask_passes_through_a_sequence(backend: Backend, rng: np.random.Generator) -> None:
    x, mask = rng.standard_normal((4, 3, 2)), np.array([[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 0]], bool)
    first, second = (nn.BatchNorm(2, axis=-1, dtype="float64", xp=backend.xp) for _ in range(2))
    y = backend.asnumpy(nn.Sequential(first, nn.Tanh(), second)(backend.asarray(x), mask=backend.asarray(mask)))
    rows = normalised(np.tanh(normalised(x[mask], (0,), 1e-5)), (0,), 1e-5)
    np.testing.assert_allclose(y[mask], rows, rtol=1e-12)
    assert not y[~mask].any()


def test_a_mask_is_not_lost_on_the_way() -> None:
    """Statistics of all rows, hidden ones too, would be wrong without a word."""
    x, mask = np.ones((4, 3), "f4"), np.array([True, True, False, True])
    with pytest.raises(ValueError, match="LinearBatchNorm takes no mask; use a Linear and a BatchNorm in its place"):
        nn.Sequential(nn.LinearBatchNorm(3, 2))(x, mask=mask)
    nn.Sequential(nn.LinearBatchNorm(3, 2, norm="layer"), nn.BatchNorm(2))(x, mask=mask)


def test_backward_never_writes_over_dy_and_can_accumulate(backend: Backend, rng: np.random.Generator) -> None:
    """The old layers wrote dx over dy."""
    model = network(backend)
    x, dy = backend.arrays(rng.standard_normal((7, 4)), rng.standard_normal((7, 2)))
    before = backend.asnumpy(dy).copy(), backend.asnumpy(x).copy()
    model(x)
    first = backend.asnumpy(model.backward(dy)).copy()
    once = {name: backend.asnumpy(array).copy() for name, array in model.gradients.items()}
    second = model.backward(dy, accumulate=True)
    np.testing.assert_array_equal(backend.asnumpy(second), first)
    for name, array in model.gradients.items():
        np.testing.assert_array_equal(backend.asnumpy(array), 2 * once[name], err_msg=name)
    model.backward(dy)
    for name, array in model.gradients.items():
        np.testing.assert_array_equal(backend.asnumpy(array), once[name], err_msg=name)
    model.zero_gradients()
    assert not any(backend.asnumpy(array).any() for array in model.gradients.values())
    np.testing.assert_array_equal(backend.asnumpy(dy), before[0])
    np.testing.assert_array_equal(backend.asnumpy(x), before[1])


def test_an_evaluation_that_is_asked_for_leaves_no_trace(backend: Backend, rng: np.random.Generator) -> None:
    model = network(backend)
    x, other, dy = backend.arrays(*rng.standard_normal((2, 7, 4)), rng.standard_normal((7, 2)))
    model(x)
    want, before = backend.asnumpy(model.backward(dy)).copy(), model.state_dict()
    model(other, training=False)
    np.testing.assert_array_equal(backend.asnumpy(model.backward(dy)), want)
    for name, array in model.state_dict().items():
        np.testing.assert_array_equal(array, before[name])
