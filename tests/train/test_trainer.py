"""The trainer: the same batches for both networks, exact continuation, and clear refusals."""

import dataclasses
import json

import numpy as np
import pytest

from bnkernels.ops.fused_training.launch import OPTIMIZERS
from bnkernels.runtime.registry import DeviceError
from bnkernels.train.data import DataError, Dataset
from bnkernels.train.evaluate import evaluate
from bnkernels.train.run_config import EVALUATION_ROWS
from bnkernels.train.trainer import ConfigError, Trainer, TrainingConfig, resume, train


@pytest.fixture(autouse=True)
def no_drawing(monkeypatch):
    """Leave the picture, the slowest part of a small run, to test_plots.py."""
    monkeypatch.setattr("bnkernels.train.runs.draw_curves", lambda history, title: b"a picture")


def blobs(n_train=100, n_test=30, classes=3, dtype="float32"):
    """Return well separated clouds of points, one per class."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, classes, n_train + n_test).astype(np.int32)
    x = (5 * np.eye(classes, 6)[y] + rng.standard_normal((len(y), 6))).astype(dtype)
    return Dataset("npz", x[:n_train], y[:n_train], x[n_train:], y[n_train:], classes)


def config(**changes):
    return TrainingConfig(**{"hidden": (8,), "batch_size": 16, "epochs": 4, "lr": 0.1, "device": "cpu"} | changes)


def states(learners):
    """Return the bits of everything a learner consists of."""
    return {
        (norm, name): array.tobytes() for norm, learner in learners.items() for name, array in learner.arrays().items()
    }


def trained(configuration, dataset):
    trainer = Trainer(configuration, dataset)
    while not trainer.finished:
        trainer.run_epoch()
    return trainer


@pytest.fixture
def npz(tmp_path):
    """Return a file with the blobs."""
    data = blobs()
    path = tmp_path / "data.npz"
    np.savez(path, x=data.x_train, y=data.y_train, x_test=data.x_test, y_test=data.y_test)
    return path


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_both_networks_learn(activation, optimizer, dtype):
    lr = {"sgd": 0.1, "momentum": 0.03, "adam": 0.01}[optimizer]
    options = config(activation=activation, optimizer=optimizer, dtype=dtype, lr=lr, epochs=30)
    result = train(options, dataset=blobs(dtype=dtype))
    assert {norm: model.parameters.dtype.name for norm, model in result.models.items()} == dict.fromkeys(
        ("batch", "none"), dtype
    )
    for norm, history in result.history.items():
        assert history[-1]["loss"] < history[0]["loss"], norm
        assert history[-1]["accuracy"] > 0.9, norm


def test_both_networks_start_from_the_same_weights_and_see_the_same_batches(monkeypatch):
    trainer = Trainer(config(epochs=2, engine="layers"), blobs())
    weights = [network.model.state()["0.weight"] for network in trainer.learners.values()]
    assert np.array_equal(*weights)
    seen = {}
    for norm, network in trainer.learners.items():

        def forward(x, *, training, norm=norm, forward=network.model.forward):
            if training:
                seen.setdefault(norm, []).append(x.copy())
            return forward(x, training=training)

        monkeypatch.setattr(network.model, "forward", forward)
    trainer.run_epoch()
    trainer.run_epoch()
    assert len(seen["batch"]) == 12
    assert np.array_equal(seen["batch"], seen["none"])
    first, second = (np.sort(np.concatenate(seen["batch"][i : i + 6]).ravel()) for i in (0, 6))
    assert not np.array_equal(first, second)  # 96 of 100 examples each time, but not the same ones


def test_a_batch_holds_each_example_at_most_once_per_epoch(monkeypatch):
    data = blobs()
    trainer = Trainer(config(norm="none", engine="layers"), data)
    rows = []
    model = trainer.learners["none"].model
    monkeypatch.setattr(
        model,
        "forward",
        lambda x, *, training, forward=model.forward: (
            rows.extend(row.tobytes() for row in x if training),
            forward(x, training=training),
        )[1],
    )
    trainer.run_epoch()
    assert len(rows) == len(set(rows)) == 96
    assert set(rows) <= {row.tobytes() for row in data.x_train}


def test_the_labels_stay_with_their_examples():
    """With shuffled labels nothing could be learnt; see also the accuracy of the main job in test_cli.py."""
    data = blobs()
    wrong = dataclasses.replace(data, y_train=np.random.default_rng(1).permutation(data.y_train))
    right, shuffled = (train(config(epochs=10), dataset=d).summary["networks"]["batch"] for d in (data, wrong))
    assert right["test_accuracy"] > 0.9 > shuffled["test_accuracy"]


def test_the_same_configuration_gives_the_same_bits_and_another_seed_does_not():
    first, repeated, other = (trained(config(seed=seed), blobs()) for seed in (0, 0, 1))
    assert states(first.learners) == states(repeated.learners)
    assert states(first.learners) != states(other.learners)


def test_one_network_alone_is_trained_as_beside_the_other():
    both = trained(config(), blobs())
    for norm in ("batch", "none"):
        alone = trained(config(norm=norm), blobs())
        assert list(alone.learners) == [norm]
        assert states(alone.learners) == states({norm: both.learners[norm]})


def test_steps_may_end_within_an_epoch():
    trainer = trained(config(epochs=None, steps=8), blobs())
    assert [entry["step"] for entry in trainer.learners["none"].history] == [6, 8]
    assert trainer.learners["none"].history[-1]["epoch"] == pytest.approx(8 / 6)


@pytest.mark.parametrize("stop_after", [0, 1, 5, 6, 7, 12, 17, 30, 47])
def test_stopped_at_any_step_and_continued_the_bits_are_the_same(npz, tmp_path, stop_after):
    options = config(dataset="npz", data=str(npz), optimizer="adam", engine="layers")  # which ask before every step
    asked = iter(range(10**6))
    stopped = train(options, folder=tmp_path / "run", should_stop=lambda: next(asked) >= stop_after)
    assert stopped.status == "stopped"
    assert not (tmp_path / "run" / "metrics.json").exists()
    result = resume(tmp_path / "run")
    assert result.status == "finished"
    whole = trained(options, None)
    for norm, model in result.models.items():
        assert model.parameters.tobytes() == whole.learners[norm].model.parameters.tobytes()
        steps = [entry["step"] for entry in result.history[norm]]
        assert steps == [6, 12, 18, 24]
        assert [entry["loss"] for entry in result.history[norm]] == [
            entry["loss"] for entry in whole.learners[norm].history
        ]


@pytest.mark.parametrize("first", [{"epochs": 2}, {"steps": 8}, {"steps": 1}])
def test_an_extended_run_equals_a_long_one(npz, tmp_path, first):
    options = config(dataset="npz", data=str(npz), epochs=None, optimizer="momentum")
    train(dataclasses.replace(options, **{"epochs": None} | first), folder=tmp_path / "run")
    result = resume(tmp_path / "run", epochs=5)
    whole = trained(dataclasses.replace(options, epochs=5), None)
    assert result.config.epochs == 5
    assert result.config.steps is None
    for norm, model in result.models.items():
        assert model.parameters.tobytes() == whole.learners[norm].model.parameters.tobytes()


def test_resuming_a_finished_run_changes_nothing(npz, tmp_path):
    train(config(dataset="npz", data=str(npz)), folder=tmp_path / "run")
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in (tmp_path / "run").iterdir()}
    assert sorted(before) == ["checkpoint.npz", "curves.png", "metrics.json"]
    result = resume(tmp_path / "run")
    assert result.status == "already finished"
    assert {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in (tmp_path / "run").iterdir()} == before


def test_resuming_a_run_killed_before_its_last_files_writes_them(npz, tmp_path):
    train(config(dataset="npz", data=str(npz)), folder=tmp_path / "run")
    metrics = (tmp_path / "run" / "metrics.json").read_bytes()
    for name in ("metrics.json", "curves.png"):
        (tmp_path / "run" / name).unlink()
    resume(tmp_path / "run")
    assert (tmp_path / "run" / "metrics.json").read_bytes() == metrics
    assert (tmp_path / "run" / "curves.png").exists()


def test_a_run_with_its_checkpoint_elsewhere_is_resumed_from_there(npz, tmp_path):
    elsewhere = tmp_path / "safe" / "run.npz"
    options = config(dataset="npz", data=str(npz), epochs=1)
    assert train(options, folder=tmp_path / "run", checkpoint=elsewhere).files["checkpoint"] == elsewhere
    result = resume(elsewhere, epochs=2)
    assert result.files["metrics"] == tmp_path / "run" / "metrics.json"
    assert json.loads(result.files["metrics"].read_text())["config"]["epochs"] == 2
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["curves.png", "metrics.json"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 5}, "started with seed 0, not 5"),
        ({"hidden": (9,)}, r"started with hidden \(8,\), not \(9,\)"),
        ({"lr": 0.2}, "started with lr 0.1, not 0.2"),
        ({"norm": "batch"}, "started with norm both, not batch"),
        ({"folder": "elsewhere"}, "the folder of the run is .*run, not elsewhere"),
        ({"checkpoint": "elsewhere"}, "the checkpoint of the run is .*run/checkpoint.npz, not elsewhere"),
        ({"epochs": 3}, "already done 24 steps, more than the 18 asked for"),
        ({"steps": 23}, "already done 24 steps, more than the 23 asked for"),
        ({"epochs": 5, "steps": 50}, "not both"),
    ],
)
def test_a_resumed_run_refuses_what_contradicts_it(npz, tmp_path, options, message):
    train(config(dataset="npz", data=str(npz)), folder=tmp_path / "run")
    content = (tmp_path / "run" / "checkpoint.npz").read_bytes()
    with pytest.raises(ConfigError, match=message):
        resume(tmp_path / "run", **options)
    assert (tmp_path / "run" / "checkpoint.npz").read_bytes() == content


def test_a_resumed_run_accepts_what_it_was_started_with(npz, tmp_path):
    options = config(dataset="npz", data=str(npz))
    train(options, folder=tmp_path / "run")
    same = resume(tmp_path / "run", folder=tmp_path / "run", hidden=(8,), lr=0.1, epochs=4, data=npz, device="auto")
    assert same.status == "already finished"


def test_a_resumed_run_knows_its_data_again(npz, tmp_path):
    train(config(dataset="npz", data=str(npz)), folder=tmp_path / "run")
    moved = npz.rename(tmp_path / "moved.npz")
    with pytest.raises(DataError, match="does not exist"):
        resume(tmp_path / "run", epochs=5)
    assert resume(tmp_path / "run", epochs=5, data=moved).config.data == str(moved)
    with np.load(moved) as archive:
        entries = dict(archive)
    entries["x"][3, 2] += 1
    np.savez(moved, **entries)
    with pytest.raises(DataError, match="not those the checkpoint was trained on"):
        resume(tmp_path / "run", epochs=6)


def test_a_folder_that_holds_a_run_is_left_alone(npz, tmp_path):
    options = config(dataset="npz", data=str(npz), epochs=1)
    train(options, folder=tmp_path / "run")
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    with pytest.raises(ConfigError, match="exists already: continue that run with --resume"):
        train(options, folder=tmp_path / "run")
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot make the folder .*file"):
        train(config(), folder=tmp_path / "file" / "run", dataset=blobs())


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train(config(), dataset=blobs()).files == {}
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match="needs a folder"):
        train(config(), dataset=blobs(), checkpoint=tmp_path / "c.npz")


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(ConfigError, match="at most the 100 training examples, got 101"):
        Trainer(config(batch_size=101), blobs())
    assert Trainer(config(batch_size=100), blobs()).steps_per_epoch == 1


def test_cuda_without_a_gpu_says_why(monkeypatch):
    monkeypatch.setattr("bnkernels.runtime.registry.why_no_cuda", lambda: "no driver answers")
    with pytest.raises(DeviceError, match="device cuda is not usable: no driver answers, or take device cpu"):
        Trainer(config(device="cuda"), blobs())
    assert Trainer(config(device="auto"), blobs()).device == "cpu, because no driver answers"


@pytest.mark.cuda
def test_cpu_and_gpu_agree():
    results = [
        train(config(device=device, dtype="float64"), dataset=blobs(dtype="float64")) for device in ("cpu", "cuda")
    ]
    assert results[1].device == "cuda"
    for norm in ("batch", "none"):
        cpu, gpu = (result.models[norm].state() for result in results)
        for name, array in cpu.items():
            assert (np.abs(gpu[name] - array) <= 1e-9).all(), name


@pytest.mark.cuda
def test_a_run_on_the_gpu_continues_to_the_same_bits(npz, tmp_path):
    options = config(dataset="npz", data=str(npz), device="cuda", optimizer="adam")
    asked = iter(range(10**6))
    train(options, folder=tmp_path / "run", should_stop=lambda: next(asked) >= 9)
    result, whole = resume(tmp_path / "run"), train(options)
    for norm, model in result.models.items():
        assert model.parameters.tobytes() == whole.models[norm].parameters.tobytes()


@pytest.mark.parametrize("rows", [1, EVALUATION_ROWS, EVALUATION_ROWS + 1])
def test_evaluation_in_pieces_equals_evaluation_at_once(rows):
    trainer = trained(config(dtype="float64"), blobs(dtype="float64"))
    x, y = np.resize(trainer.dataset.x_test, (rows, 6)), np.resize(trainer.dataset.y_test, rows)
    network = trainer.learners["batch"]
    logits = network.model.forward(x, training=False)
    losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(rows), y]
    loss, accuracy = network.evaluate(x, y)
    assert loss == pytest.approx(losses.mean(), rel=1e-10)
    assert accuracy == (logits.argmax(axis=1) == y).mean()


def test_a_diverging_run_ends_and_says_so(tmp_path, npz):
    options = config(dataset="npz", data=str(npz), lr=1e30, epochs=2)
    result = train(options, folder=tmp_path / "run")
    assert result.history["none"][-1]["loss"] is None
    assert json.loads(result.files["metrics"].read_text())["summary"]["networks"]["none"]["training_loss"] is None


def test_evaluate_evaluates_what_was_saved(npz, tmp_path):
    result = train(config(dataset="npz", data=str(npz)), folder=tmp_path / "run")
    evaluation = evaluate(tmp_path / "run")
    assert evaluation["test_examples"] == 30
    for norm, network in evaluation["networks"].items():
        assert network["step"] == 24
        assert network["test_accuracy"] == result.summary["networks"][norm]["test_accuracy"]


def test_evaluate_refuses_data_of_another_shape(npz, tmp_path):
    train(config(dataset="npz", data=str(npz), epochs=1), folder=tmp_path / "run")
    other = tmp_path / "other.npz"
    np.savez(other, x=np.zeros((10, 5)), y=np.arange(10) % 3)
    with pytest.raises(DataError, match="take 6 features and tell 3 classes apart, but the data have 5 and 3"):
        evaluate(tmp_path / "run", data=other)
