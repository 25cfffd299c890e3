"""Mini-batches that the fused trainer draws itself: those that `random_rows` names, wherever it computes."""

from __future__ import annotations

import numpy as np
import pytest

import bnkernels as bn
from bnkernels.nn.mlp import MLP
from bnkernels.ops.fused_training import launch
from tests.ops.test_fused_training import make_data
from tests.regress.refusal import refused
from tools.backends import Backend

SIZES, BATCH, STEPS = (5, 9, 3), 10, 4


@pytest.fixture(params=["block", "group"])
def form(request: pytest.FixtureRequest, backend: Backend, monkeypatch: pytest.MonkeyPatch) -> str:
    """Let one block train, or several."""
    if request.param == "group":
        if backend.is_numpy:
            pytest.skip("needs a device")
        monkeypatch.setattr(launch, "_why_not_one", lambda *_: "a test wants groups")
    return request.param


def trained(backend: Backend, models: list[MLP], x: np.ndarray, y: np.ndarray, **options: object) -> list[np.ndarray]:
    """Train copies with Adam; return losses, parameters and state."""
    flat = np.stack([model.parameters for model in models]) if len(models) > 1 else models[0].parameters
    running = np.stack([model.running for model in models]) if len(models) > 1 else models[0].running
    arrays = backend.arrays(flat, np.zeros_like(flat), np.zeros_like(flat), running, x, y)
    parameters, first, second, tracked, *data = arrays
    tracked = tracked if running.size else None
    given = {"batch": BATCH, "optimizer": "adam", "lr": 0.01} | options
    losses = bn.fused_training(models[0].fused, parameters, (first, second), tracked, *data, **given)
    return [backend.asnumpy(array) for array in (losses, parameters, first, second)]


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_drawn_mini_batches_are_those_of_random_rows(
    backend: Backend, form: str, rng: np.random.Generator, norm: str
) -> None:
    x, y = make_data(rng, SIZES, 37, "float32")
    model = MLP(SIZES, norm=norm)
    rows = bn.random_rows(2**32 - 1, STEPS * BATCH, 37).reshape(STEPS, BATCH)
    named = trained(backend, [model], x, y, indices=backend.asarray(rows))
    drawn = trained(backend, [model], x, y, seed=2**32 - 1, steps=STEPS)
    for one, two in zip(named, drawn, strict=True):
        np.testing.assert_array_equal(one, two)


def test_the_next_call_draws_on(backend: Backend, form: str, rng: np.random.Generator) -> None:
    x, y = make_data(rng, SIZES, 37, "float32")
    rows = bn.random_rows(5, STEPS * BATCH, 37, start=7 * BATCH).reshape(STEPS, BATCH)
    named = trained(backend, [MLP(SIZES)], x, y, indices=backend.asarray(rows), steps_before=7)
    drawn = trained(backend, [MLP(SIZES)], x, y, seed=5, steps=STEPS, steps_before=7)
    for one, two in zip(named, drawn, strict=True):
        np.testing.assert_array_equal(one, two)


def test_every_model_may_draw_its_own(backend: Backend, form: str, rng: np.random.Generator) -> None:
    x, y = make_data(rng, SIZES, 37, "float32")
    models = [MLP(SIZES, seed=seed) for seed in range(3)]
    losses, *_ = trained(backend, models, x, y, seed=[1, 2, 1], steps=STEPS)
    for own, model, seed in zip(losses, models, (1, 2, 1), strict=True):
        alone, *_ = trained(backend, [model], x, y, seed=seed, steps=STEPS)
        np.testing.assert_allclose(own, alone, rtol=1e-5)
    same, *_ = trained(backend, models, x, y, seed=1, steps=STEPS)
    np.testing.assert_array_equal(same[[0, 2]], losses[[0, 2]])
    assert (same[1] != losses[1]).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 1}, "seed and steps go together, and without indices"),
        ({"steps": 1}, "seed and steps go together, and without indices"),
        ({"seed": 1, "steps": 1, "indices": np.zeros((1, BATCH), "int32")}, "seed and steps go together, and without"),
        ({"seed": -1, "steps": 1}, r"seed must be from 0 to 2\*\*32 - 1, got -1"),
        ({"seed": 2**32, "steps": 1}, r"seed must be from 0 to 2\*\*32 - 1, got 4294967296"),
        ({"seed": [1, 2], "steps": 1}, r"seed must be a number or 1 of them, one for each model, got \[1, 2\]"),
        ({"seed": 1, "steps": -1}, "steps must be at least 0, got -1"),
        ({"seed": 1, "steps": 1, "rows": 0}, "x must have rows to draw from, got none"),
    ],
)
def test_bad_draws_are_refused(backend: Backend, options: dict, message: str) -> None:
    model, rows = MLP(SIZES), options.get("rows", 20)
    x, y = np.zeros((rows, SIZES[0]), "float32"), np.zeros(rows, "int32")
    parameters, running, on_x, on_y = backend.arrays(model.parameters, model.running, x, y)
    more = {name: backend.asarray(value) if name == "indices" else value for name, value in options.items()}
    more.pop("rows", None)
    with refused(backend, ValueError, message, parameters, running):
        bn.fused_training(model.fused, parameters, (), running, on_x, on_y, batch=BATCH, lr=0.1, **more)
