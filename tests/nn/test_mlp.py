"""The network: its gradients, its state, and the same training on every backend."""

from __future__ import annotations

import numpy as np
import pytest

from bnkernels import MLP, softmax_cross_entropy
from bnkernels.nn.optimizers import OPTIMIZERS, make_optimizer
from bnkernels.ops.activations import ACTIVATIONS
from tools.backends import Backend

NORMS = ["batch", "layer", "none"]


def batch_of(rng: np.random.Generator, rows: int, inputs: int, classes: int, dtype: str) -> tuple:
    """Return a random mini-batch."""
    return rng.standard_normal((rows, inputs)).astype(dtype), rng.integers(0, classes, rows)


def train(backend: Backend, norm: str, optimizer: str, steps: int, dtype: str, **options) -> tuple[MLP, list[float]]:
    """Train on a fixed random problem; return the network and the loss of every step."""
    rng = np.random.default_rng(7)
    model = MLP((8, 20, 12, 5), norm=norm, dtype=dtype, seed=3, xp=backend.xp, **options)
    optimiser = make_optimizer(optimizer, model, lr=0.05)
    losses = []
    for _ in range(steps):
        x, labels = (backend.asarray(array) for array in batch_of(rng, 64, 8, 5, dtype))
        loss, dlogits = softmax_cross_entropy(model.forward(x, training=True), labels)
        model.backward(dlogits)
        optimiser.step()
        losses.append(float(backend.asnumpy(loss).mean()))
    return model, losses


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_match_central_differences(
    backend: Backend, rng: np.random.Generator, norm: str, activation: str
) -> None:
    x, labels = batch_of(rng, 9, 4, 3, "float64")
    model = MLP((4, 5, 3), norm=norm, activation=activation, dtype="float64", xp=backend.xp)
    on_x, on_labels = backend.asarray(x), backend.asarray(labels)

    def loss() -> float:
        losses, _ = softmax_cross_entropy(model.forward(on_x, training=True), on_labels)
        return float(backend.asnumpy(losses).mean())

    _, dlogits = softmax_cross_entropy(model.forward(on_x, training=True), on_labels)
    model.backward(dlogits)
    gradients = backend.asnumpy(model.gradients).copy()
    assert np.abs(gradients).max() > 0.01
    start, step = backend.asnumpy(model.parameters).copy(), 1e-6
    for _ in range(6):  # along random directions: every parameter takes part in each
        direction = rng.standard_normal(len(start))
        values = []
        for sign in (1, -1):
            model.parameters[...] = backend.asarray(start + sign * step * direction)
            values.append(loss())
        numeric = (values[0] - values[1]) / (2 * step)
        assert abs(numeric - gradients @ direction) <= 1e-8


@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
@pytest.mark.parametrize("norm", NORMS)
def test_training_is_the_same_on_every_backend(backend: Backend, norm: str, optimizer: str) -> None:
    from tools.backends import make

    model, losses = train(backend, norm, optimizer, steps=12, dtype="float64")
    expected, expected_losses = train(make("numpy"), norm, optimizer, steps=12, dtype="float64")
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-10)
    for name, array in expected.state().items():
        np.testing.assert_allclose(model.state()[name], array, rtol=1e-8, atol=1e-10, err_msg=name)


@pytest.mark.parametrize("norm", NORMS)
def test_the_loss_falls(backend: Backend, norm: str) -> None:
    model = MLP((8, 20, 3), norm=norm, xp=backend.xp)
    optimiser = make_optimizer("momentum", model, lr=0.05)
    rng = np.random.default_rng(1)
    x = rng.standard_normal((64, 8)).astype("float32")
    labels = (x[:, 0] > 0).astype("int64") + (x[:, 1] > 0.5)
    x, labels = backend.asarray(x), backend.asarray(labels)
    losses = []
    for _ in range(25):
        loss, dlogits = softmax_cross_entropy(model.forward(x, training=True), labels)
        model.backward(dlogits)
        optimiser.step()
        losses.append(float(backend.asnumpy(loss).mean()))
    assert losses[-1] < 0.5 * losses[0]


def test_the_same_seed_gives_the_same_weights_with_and_without_norm() -> None:
    with_norm, without = MLP((6, 4, 3), norm="batch", seed=5).state(), MLP((6, 4, 3), norm="none", seed=5).state()
    for name in ("0.weight", "1.weight"):
        np.testing.assert_array_equal(with_norm[name], without[name])
    assert "0.bias" not in with_norm  # beta replaces it
    assert "0.gamma" not in without
    assert (MLP((6, 4, 3), seed=6).state()["0.weight"] != with_norm["0.weight"]).any()


def test_inference_depends_on_the_running_statistics_alone(backend: Backend, rng: np.random.Generator) -> None:
    model, _ = train(backend, "batch", "sgd", steps=5, dtype="float32")
    x, _ = batch_of(rng, 10, 8, 5, "float32")
    before = model.state()
    together = backend.asnumpy(model.forward(backend.asarray(x), training=False))
    alone = np.concatenate(
        [backend.asnumpy(model.forward(backend.asarray(x[i : i + 1]), training=False)) for i in range(10)]
    )
    np.testing.assert_allclose(together, alone, rtol=1e-5, atol=1e-6)  # the matrix products differ in order
    for name, array in model.state().items():
        np.testing.assert_array_equal(array, before[name])


def test_momentum_none_averages_all_batches(backend: Backend, rng: np.random.Generator) -> None:
    model = MLP((3, 4, 2), xp=backend.xp, dtype="float64", momentum=None)
    batches = [rng.standard_normal((16, 3)) + i for i in range(5)]
    for x in batches:
        model.forward(backend.asarray(x), training=True)
    weight = model.state()["0.weight"]
    np.testing.assert_allclose(
        model.state()["0.running_mean"], np.mean([(x @ weight).mean(0) for x in batches], axis=0), rtol=1e-12
    )
    np.testing.assert_allclose(
        model.state()["0.running_var"], np.mean([(x @ weight).var(0, ddof=1) for x in batches], axis=0), rtol=1e-12
    )


@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
def test_state_round_trip_continues_identically(backend: Backend, optimizer: str) -> None:
    model, _ = train(backend, "batch", optimizer, steps=3, dtype="float32")
    optimiser = make_optimizer(optimizer, model, lr=0.1)
    other = MLP(model.sizes, seed=99, xp=backend.xp)
    other.load_state(model.state())
    other_optimiser = make_optimizer(optimizer, other, lr=0.1)
    rng = np.random.default_rng(2)
    for step in range(4):
        x, labels = (backend.asarray(array) for array in batch_of(rng, 64, 8, 5, "float32"))
        for network, rule in ((model, optimiser), (other, other_optimiser)):
            _, dlogits = softmax_cross_entropy(network.forward(x, training=True), labels)
            network.backward(dlogits)
            rule.step()
        if step == 1:
            other_optimiser = make_optimizer(optimizer, other, lr=0.1)
            other_optimiser.load_state(optimiser.state())
    for name, array in model.state().items():
        np.testing.assert_array_equal(other.state()[name], array, err_msg=name)


def test_a_foreign_state_is_refused_and_changes_nothing() -> None:
    model = MLP((4, 3, 2))
    before = model.state()
    for wrong, message in (
        (MLP((4, 3, 2), norm="none").state(), "missing .*gamma.* unknown .*bias"),
        (MLP((4, 5, 2)).state(), "must have the shape"),
    ):
        with pytest.raises(ValueError, match=message):
            model.load_state(wrong)
    for name, array in model.state().items():
        np.testing.assert_array_equal(array, before[name])
    adam = make_optimizer("adam", model, lr=0.1)
    with pytest.raises(ValueError, match="not of this Adam"):
        adam.load_state(make_optimizer("sgd", model, lr=0.1).state())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sizes": (4,)}, "sizes"),
        ({"sizes": (4, 0, 2)}, "positive"),
        ({"sizes": (4, 2), "norm": "group"}, "norm must be one of batch, layer, none"),
        ({"sizes": (4, 2), "activation": "softplus"}, "activation must be one of"),
        ({"sizes": (4, 2), "dtype": "float16"}, "float32 or float64"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MLP(**arguments)
    with pytest.raises(ValueError, match="sgd, momentum, rmsprop, adam"):
        make_optimizer("adagrad", MLP((4, 2)), lr=0.1)
