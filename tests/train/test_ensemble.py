"""Several models at once: each is what it would be alone, in one launch; the trainer's reports of mean and spread."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bnkernels as bn
from bnkernels import cli
from bnkernels.nn.mlp import MLP
from bnkernels.ops.fused_training.launch import OPTIMIZERS
from bnkernels.train.checkpoint import CheckpointError
from bnkernels.train.config import TrainingConfig
from bnkernels.train.ensemble import make_learner
from bnkernels.train.learner import Learner
from tests.ops.test_fused_training import RATES, make_data
from tests.regress.refusal import refused
from tools import backends
from tools.backends import Backend
from tools.emulator import EmulatorRuntime


def ensemble(backend: Backend, models: list[MLP], name: str) -> tuple[Any, tuple, Any]:
    """Return parameters, states and running statistics of several models, each with its own row."""
    parameters, running = (np.stack([getattr(model, what) for model in models]) for what in ("parameters", "running"))
    state = tuple(backend.asarray(np.zeros_like(parameters)) for _ in range(OPTIMIZERS[name]))
    return backend.asarray(parameters), state, backend.asarray(running) if running.size else None


@pytest.mark.parametrize(("count", "indexed"), [(1, "no"), (3, "no"), (3, "shared"), (3, "own")])
@pytest.mark.parametrize("norm", ["batch", "none"])
@pytest.mark.parametrize("name", RATES)
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


@pytest.mark.parametrize("extra", [1, 2, 3])
def test_any_number_of_parameters_leaves_rows_aligned(backend: Backend, rng: np.random.Generator, extra: int) -> None:
    """Bit for bit what it is without; misaligned shared memory would be an error."""
    model = MLP((5, 9, 3), activation="tanh")
    x, y = backend.arrays(*make_data(rng, (5, 9, 3), 20, "float32"))
    ends = []
    for more in (0, extra):
        parameters, running = (
            np.append(array, np.zeros(more, "float32")) for array in (model.parameters, model.running)
        )
        on = backend.arrays(parameters, running)
        bn.fused_training(model.fused, on[0], (), on[1], x, y, batch=10, lr=0.1)
        ends.append(backend.asnumpy(on[0])[: model.parameters.size])
    np.testing.assert_array_equal(*ends)


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
        ({"running": np.zeros((3, 20), "float32")}, "of the layers must lie within the 20 running statistics"),
        (
            {"parameters": np.zeros((3, 100), "float32")},
            "layers must begin at multiples of 4 within the 100 parameters",
        ),
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


# ---- the trainer's ensembles ----------------------------------------------------------------------------------------


def config_of(models: int, **changes: Any) -> TrainingConfig:
    options = {"hidden": (8,), "batch_size": 16, "epochs": 4, "lr": 0.1, "device": "cpu", "seed": 5} | changes
    return TrainingConfig(models=models, **options)


@pytest.mark.parametrize("engine", ["layers", "graph", "fused"])
@pytest.mark.parametrize(("name", "norm"), [("sgd", "none"), ("momentum", "batch"), ("adam", "layer")])
def test_members_are_learners_of_their_seed(
    backend: Backend, rng: np.random.Generator, name: str, norm: str, engine: str
) -> None:
    if (backend.is_numpy and engine == "graph") or (backend.name == "reference" and engine == "fused"):
        pytest.skip("needs a device, or compiled kernels")
    x, y = backend.arrays(*make_data(rng, (6, 8, 3), 10 * 16, "float64"))
    config = config_of(2, optimizer=name, dtype="float64", activation="tanh", lr=RATES[name], engine=engine)
    ensemble = make_learner(norm, config, (6, 8, 3), backend.xp)
    assert str(ensemble.engine) == engine
    ensemble.train(x, y, 0, 4, lambda: False)
    ensemble.train(x, y, 0, 10, lambda: False)
    assert ensemble.step == 10
    for number in range(2):
        alone = Learner(norm, replace(config, seed=5 + number, models=1), (6, 8, 3), backend.xp)
        alone.train(x, y, 0, 10, lambda: False)
        for entry, array in alone.arrays().items():
            np.testing.assert_array_equal(ensemble.arrays()[f"{number}/{entry}"], array, err_msg=entry)
    each = ensemble.assess((x, y), (x, y))
    assert each["loss"] == pytest.approx(np.mean([model["loss"] for model in each["models"]]))
    assert each["accuracy_spread"] == pytest.approx(np.std([m["accuracy"] for m in each["models"]], ddof=1))


def test_an_ensemble_that_is_stopped_goes_on(rng: np.random.Generator) -> None:
    x, y = make_data(rng, (6, 8, 3), 60 * 16, "float32")
    ends = []
    for answers in ([False] * 9, [False, True]):
        first = make_learner("batch", config_of(2, engine="layers"), (6, 8, 3), np)
        first.train(x, y, 0, 60, iter(answers).__next__)
        second = make_learner("batch", config_of(2, engine="layers"), (6, 8, 3), np)
        second.load_arrays(first.arrays())
        second.train(x, y, 0, 60, lambda: False)
        ends.append((first.step, second.arrays()))
    assert [step for step, _ in ends] == [60, 10]
    for entry, array in ends[0][1].items():
        np.testing.assert_array_equal(array, ends[1][1][entry], err_msg=entry)


@pytest.mark.parametrize("part", ["model/0.weight", "optimizer/first", "optimizer/steps"])
def test_a_state_of_which_one_part_is_wrong_changes_no_model(part: str) -> None:
    ensemble = make_learner("batch", config_of(2, optimizer="adam"), (6, 8, 3), np)
    before = {name: array.tobytes() for name, array in ensemble.arrays().items()}
    state = make_learner("batch", config_of(2, optimizer="adam", seed=9), (6, 8, 3), np).arrays()
    for wrong in (state | {f"1/{part}": state[f"1/{part}"] * -1j}, state | {"2/model/x": np.ones(3)}):
        with pytest.raises(CheckpointError, match="of another"):
            ensemble.load_arrays(wrong)
        assert {name: array.tobytes() for name, array in ensemble.arrays().items()} == before


def test_a_loss_that_is_not_finite_has_no_mean(rng: np.random.Generator) -> None:
    x, y = make_data(rng, (6, 8, 3), 32, "float32")
    ensemble = make_learner("none", config_of(2), (6, 8, 3), np)
    ensemble.models[1].parameters[:] = np.nan
    found = ensemble.assess((x, y), (x, y))
    assert found["loss"] is None
    assert found["loss_spread"] is None
    assert found["models"][0]["loss"] is not None


def test_the_command_trains_resumes_and_evaluates_an_ensemble(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")
    folder = str(tmp_path / "run")
    options = ["--hidden", "6", "--device", "cpu", "--quiet"]
    assert cli.main(["train", "--models", "3", "--epochs", "1", "--out", folder, *options]) == 0
    assert "± standard deviation" in capsys.readouterr().out
    assert cli.main(["train", "--resume", folder, "--epochs", "2", "--quiet", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    for network in document["summary"]["networks"].values():
        assert len(network["models"]) == 3
        accuracies = [model["accuracy"] for model in network["models"]]
        assert network["test_accuracy"] == pytest.approx(np.mean(accuracies))
        assert network["test_accuracy_spread"] == pytest.approx(np.std(accuracies, ddof=1))
        assert len(set(accuracies)) > 1
    assert cli.main(["evaluate", folder, "--json"]) == 0
    evaluated = json.loads(capsys.readouterr().out)["networks"]["batch"]
    assert evaluated["test_accuracy"] == pytest.approx(document["summary"]["networks"]["batch"]["test_accuracy"])
    assert cli.main(["train", "--models", "0", *options]) == 2
    assert "models must be at least 1, got 0" in capsys.readouterr().err
    assert cli.main(["train", "--resume", folder, "--models", "2"]) == 2
    assert "the run was started with models 3, not 2" in capsys.readouterr().err
