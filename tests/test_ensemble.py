"""Several models at once: each is what it would be alone, in one launch; the trainer's reports of mean and spread."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import bnkernels as bn
from bnkernels.fused_training import OPTIMIZERS
from bnkernels.mlp import MLP
from tests import backends
from tests.backends import Backend
from tests.emulator import EmulatorRuntime
from tests.regress.refusal import refused
from tests.test_fused_training import RATES, make_data


def ensemble(backend: Backend, models: list[MLP], name: str) -> tuple[Any, tuple, Any]:
    """Return parameters, states and running statistics of several models, each with its own row."""
    parameters, running = (np.stack([getattr(model, what) for model in models]) for what in ("parameters", "running"))
    state = tuple(backend.asarray(np.zeros_like(parameters)) for _ in range(OPTIMIZERS[name]))
    return backend.asarray(parameters), state, backend.asarray(running) if running.size else None


@pytest.mark.parametrize("indexed", ["no", "shared", "own"])
@pytest.mark.parametrize("norm", ["batch", "none"])
@pytest.mark.parametrize("name", RATES)
@pytest.mark.parametrize("count", [1, 3])
def test_a_model_of_an_ensemble_is_the_model_alone(
    backend: Backend, rng: np.random.Generator, count: int, name: str, norm: str, indexed: str
) -> None:
    """Bit for bit: models know nothing of each other."""
    sizes, batch, steps = (5, 9, 3), 10, 4
    x, y = make_data(rng, sizes, steps * batch, "float32")
    models = [MLP(sizes, norm=norm, seed=seed, activation="tanh") for seed in range(count)]
    rates = [RATES[name] * (1 + 0.5 * model) for model in range(count)]
    indices = {"no": None, "shared": rng.integers(0, len(x), (steps, batch)).astype(np.int32)}
    indices["own"] = rng.integers(0, len(x), (count, steps, batch)).astype(np.int32)
    given = indices[indexed]
    parameters, state, running = ensemble(backend, models, name)
    on_x, on_y, on_indices = backend.arrays(x, y, given)
    options = {"batch": batch, "optimizer": name}
    network = models[0].fused
    losses = bn.fused_training(network, parameters, state, running, on_x, on_y, **options, indices=on_indices, lr=rates)
    assert losses.shape == (count, steps)
    for i, model in enumerate(models):
        alone, alone_state, alone_running = ensemble(backend, [model], name)
        mine = given[i] if indexed == "own" else given
        arrays = alone[0], tuple(array[0] for array in alone_state), None if running is None else alone_running[0]
        own = None if mine is None else backend.asarray(mine)
        want = bn.fused_training(network, *arrays, on_x, on_y, **options, indices=own, lr=rates[i])
        pairs = [(losses[i], want), (parameters[i], arrays[0]), *zip([s[i] for s in state], arrays[1], strict=True)]
        pairs += [(running[i], arrays[2])] if running is not None else []
        for one, two in pairs:
            np.testing.assert_array_equal(backend.asnumpy(one), backend.asnumpy(two))


@pytest.mark.emulator
def test_an_ensemble_is_one_launch(emulated: EmulatorRuntime, rng: np.random.Generator) -> None:
    backend, models = backends.make("emulator"), [MLP((5, 9, 3), seed=seed) for seed in range(3)]
    x, y = backend.arrays(*make_data(rng, (5, 9, 3), 20, "float32"))
    parameters, state, running = ensemble(backend, models, "sgd")
    bn.fused_training(models[0].fused, parameters, state, running, x, y, batch=10, lr=0.1)
    (record,) = emulated.launches
    assert record.launch.grid == (3, 1, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": [0.1, 0.2]}, "lr must be a number or 3 of them, one for each model"),
        ({"lr": [0.1, 0.2, -1]}, "lr must be at least 0 and finite, got -1"),
        ({"running": np.zeros((2, 32), "float32")}, r"running must have the shape \(3, 32\), got \(2, 32\)"),
        ({"indices": np.zeros((2, 2, 10), "int32")}, r"indices must have the shape \(3, 2, 10\), got \(2, 2, 10\)"),
        ({"parameters": np.zeros((0, 100), "float32")}, r"with M of at least 1, got \(0, 100\)"),
    ],
)
def test_a_wrong_ensemble_is_refused(backend: Backend, changes: dict[str, Any], message: str) -> None:
    models = [MLP((5, 9, 3), seed=seed) for seed in range(3)]
    parameters, _, running = ensemble(backend, models, "sgd")
    given = {"parameters": parameters, "running": running, "indices": None, "lr": 0.1}
    for name, value in changes.items():
        given[name] = backend.asarray(value) if isinstance(value, np.ndarray) else value
    x, y = backend.arrays(np.zeros((20, 5), "float32"), np.zeros(20, "int32"))
    arrays = given["parameters"], (), given["running"], x, y
    with refused(backend, ValueError, message, parameters):
        bn.fused_training(models[0].fused, *arrays, batch=10, lr=given["lr"], indices=given["indices"])
