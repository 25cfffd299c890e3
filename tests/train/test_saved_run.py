"""A checkpoint with a right digest and wrong content is one short line, changes nothing and sends nothing elsewhere."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bnkernels import cli
from bnkernels.train.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from bnkernels.train.config import ConfigError, TrainingConfig
from bnkernels.train.data import DataError, Dataset
from bnkernels.train.evaluate import evaluate
from bnkernels.train.runs import TrainingResult
from bnkernels.train.saved_run import load_run
from bnkernels.train.sequence import SequenceConfig
from bnkernels.train.trainer import Trainer, resume, train

HOSTILE: list[Any] = [
    None,
    True,
    -1,
    10**12,
    10**400,
    0.5,
    -1.5,
    1e300,
    "",
    "text",
    "\0",
    "\ud800",
    [],
    [[]],
    [-1],
    {},
    {"a": 1},
]


@pytest.fixture(autouse=True)
def no_drawing_and_no_flushing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the picture to test_plots.py, and the disk to test_files.py."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr("bnkernels.train.runs.draw_curves", lambda history, title: b"a picture")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a small data file."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("data") / "data.npz"
    np.savez(path, x=rng.standard_normal((100, 6)), y=np.arange(100) % 3)
    return path


def config(data: Path, **changes: Any) -> TrainingConfig:
    options = {"dataset": "npz", "data": str(data), "hidden": (8,), "batch_size": 16, "epochs": 2, "optimizer": "adam"}
    return TrainingConfig(**options | {"device": "cpu"} | changes)


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int | str, Path]:
    """Return finished runs, of one model and of two, and of an LSTM."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bnkernels.train.runs.draw_curves", lambda history, title: b"a picture")
        for models in (1, 2):
            train(config(data, models=models), folder=folder / str(models))
        options = {"dataset": "npz", "data": str(data), "hidden": 3, "batch_size": 50, "epochs": 1, "device": "cpu"}
        train(SequenceConfig(**options, norm="batch"), folder=folder / "lstm")
    return {kind: folder / str(kind) for kind in (1, 2, "lstm")}


@pytest.fixture(params=[1, 2])
def run(request: pytest.FixtureRequest, runs: dict[int | str, Path], tmp_path: Path) -> Path:
    """Return a copy of a finished run."""
    return Path(shutil.copytree(runs[request.param], tmp_path / "run"))


def rewritten(run: Path, meta: dict[str, Any], arrays: dict[str, np.ndarray]) -> Path:
    """Give a run another checkpoint, with a right digest."""
    path = run / "checkpoint.npz"
    save_checkpoint(path, {name: value for name, value in meta.items() if name not in ("format", "version")}, arrays)
    return path


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield where every part of the meta data is; of a list, its first element."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else list(enumerate(value))[:1] if isinstance(value, list) else ()
    for key, part in items:
        yield from places(part, (*path, key))


def changed(meta: dict[str, Any], place: tuple[Any, ...], value: Any = None, remove: bool = False) -> dict[str, Any]:
    """Return a copy of the meta data with another value at a place, or none."""
    result = copy.deepcopy(meta)
    inner: Any = result
    for key in place[:-1]:
        inner = inner[key]
    if remove:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    return result


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("run", [1, 2, "lstm"], indirect=True)
def test_whatever_is_wrong_is_one_short_line_and_whatever_is_accepted_works(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every part of the meta data removed, and replaced by every hostile value."""
    path = run / "checkpoint.npz"
    meta, arrays = load_checkpoint(path)
    dataset = Trainer(load_run(path)[0]).dataset
    refused = accepted = 0
    for place in places({name: part for name, part in meta.items() if name not in ("format", "version")}):
        for value, remove in [(value, False) for value in HOSTILE] + [(None, True)]:
            found = changed(meta, place, value, remove), arrays
            monkeypatch.setattr("bnkernels.train.saved_run.load_checkpoint", lambda path, found=found: found)
            error = why_not(path, dataset)
            if error is None:
                accepted += 1
                continue
            assert "\n" not in str(error)
            assert len(str(error)) < 400 + len(str(path))
            refused += 1
    assert refused > 500
    assert accepted > 20


def why_not(path: Path, dataset: Dataset) -> Exception | None:
    """Continue a run as far as a test has time for; return how it was refused."""
    try:
        options, meta, arrays = load_run(path)
        trainer = Trainer(options, dataset)
        trainer.load_state(meta, arrays)
    except (CheckpointError, ConfigError, DataError) as error:
        return error
    assert options.hidden == (3 if options.command == "train-sequence" else (8,))
    history = {norm: learner.history for norm, learner in trainer.learners.items()}
    ratio = trainer.rounds.ratio()
    result = TrainingResult("finished", options, {}, "cpu", trainer.learners, history, ratio, {})
    assert result.summary["networks"].keys() == set(trainer.learners)
    json.dumps(result.document(), allow_nan=False)
    return None


ARRAY_DAMAGE = {
    "missing": lambda array: None,
    "of another shape": lambda array: np.append(array, array.ravel()[:1]),
    "complex": lambda array: array * np.complex64(1j),
    "of text": lambda array: np.full(array.shape, "a"),
    "wider": lambda array: array.astype("float64" if array.dtype == "float32" else "float32"),
}


@pytest.mark.parametrize("damage", ARRAY_DAMAGE.values(), ids=ARRAY_DAMAGE.keys())
def test_a_wrong_array_changes_no_network(run: Path, damage: Any) -> None:
    """Whichever it is: all are looked at before the first is taken."""
    meta, arrays = load_checkpoint(run / "checkpoint.npz")
    for name in arrays:
        wrong = {other: array for other, array in arrays.items() if other != name}
        if (array := damage(arrays[name])) is not None:
            wrong[name] = array
        refuse(run, meta, wrong)
    refuse(run, meta, arrays | {"other/x": np.ones(3)})
    refuse(run, meta, arrays | {"batch/model/x": np.ones(3)})
    refuse(run, meta, arrays | {"batch/9/model/0.weight": np.ones(3)})


def test_a_wrong_counter_changes_no_network(run: Path) -> None:
    meta, arrays = load_checkpoint(run / "checkpoint.npz")
    counters = [name for name, array in arrays.items() if array.ndim == 0]
    assert len({name.rpartition("/")[2] for name in counters}) == 2
    for name in counters:
        for value in (-1, 0, 5, 2**62):
            refuse(run, meta, arrays | {name: np.array(value)})
        refuse(run, meta, arrays | {name: np.array(10.0)})


@pytest.mark.parametrize(("epoch", "steps"), [(1, (10, 10)), (2, (25, 25)), (2, (10, 16)), (1, (4, 10)), (0, (5, 5))])
def test_steps_and_epochs_that_contradict_each_other_change_no_network(run: Path, epoch: int, steps: Any) -> None:
    """An epoch has five steps; every network's counters agree with its steps."""
    meta, arrays = load_checkpoint(run / "checkpoint.npz")
    meta = changed(meta, ("config", "epochs"), 9) | {"epoch": epoch}
    for norm, step in zip(meta["networks"], steps, strict=True):
        network = meta["networks"][norm]
        network["step"], network["history"] = step, [e for e in network["history"] if e["step"] <= step]
        counters = [name for name, array in arrays.items() if array.ndim == 0 and name.startswith(f"{norm}/")]
        arrays |= {name: np.array(step) for name in counters}
    refuse(run, meta, arrays)


def refuse(run: Path, meta: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    """Check that a state is refused and no network, counter or generator changed."""
    path = rewritten(run, meta, arrays)
    trainer = Trainer(TrainingConfig(**meta["config"]))
    before = everything(trainer)
    with pytest.raises(CheckpointError) as caught:
        trainer.load_state(*load_run(path)[1:])
    assert everything(trainer) == before
    assert len(str(caught.value)) < 400 + len(str(path))


def everything(trainer: Trainer) -> Any:
    meta, arrays = trainer.state()
    return meta, {name: array.tobytes() for name, array in arrays.items()}


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("config", "hidden"), [10**9]),
        (("config", "models"), 10**9),
        (("config", "batch_size"), 2**50),
        (("sizes",), [2**40, 8, 3]),
        (("sizes",), [6, 8, 2**40]),
    ],
)
def test_a_configuration_larger_than_the_file_builds_nothing(run: Path, place: tuple[str, ...], value: Any) -> None:
    meta, arrays = load_checkpoint(run / "checkpoint.npz")
    path = rewritten(run, changed(meta, place, value), arrays)
    if place[-1] == "batch_size":  # no size of the network, and not needed to evaluate
        assert evaluate(path, device="cpu")["test_examples"] > 0
    else:
        with pytest.raises(CheckpointError):
            evaluate(path, device="cpu")
    with pytest.raises((CheckpointError, ConfigError)):
        resume(path, epochs=3)


def test_more_models_than_arrays_build_nothing(run: Path) -> None:
    """A run at its beginning has no history that tells the number of models."""
    meta, arrays = load_checkpoint(run / "checkpoint.npz")
    meta |= {"epoch": 0, "networks": {norm: {"step": 0, "history": []} for norm in meta["networks"]}}
    path = rewritten(run, changed(meta, ("config", "models"), 10**9), arrays)
    with pytest.raises(CheckpointError, match="its arrays are fewer than its models"):
        load_run(path)


@pytest.mark.parametrize("classes", [["a", "b"], ["a", "c", "b"], [0, 1, 2], ["a", "b", "b"], "abc"])
def test_names_that_are_not_those_of_the_classes_are_refused(run: Path, classes: Any) -> None:
    meta, arrays = load_checkpoint(run / "checkpoint.npz")
    path = rewritten(run, changed(meta, ("classes",), ["a", "b", "c"]), arrays)
    assert load_run(path)[1]["classes"] == ["a", "b", "c"]
    path = rewritten(run, changed(meta, ("classes",), classes), arrays)
    with pytest.raises(CheckpointError, match="its classes are missing or not what a run saves"):
        load_run(path)


def test_the_command_says_it_in_one_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    meta, arrays = load_checkpoint(run / "checkpoint.npz")
    for place in (("config",), ("networks",), ("generator",), ("sizes",), ("epoch",), ("data_digest",)):
        path = rewritten(run, changed(meta, place, remove=True), arrays)
        before = contents(run)
        for command in (["train", "--resume", str(run), "--epochs", "4"], ["evaluate", str(path)]):
            assert cli.main(command) == 2
            err = capsys.readouterr().err
            assert err.startswith(f"bnkernels: error: {path} is not the checkpoint of a run")
            assert err.count("\n") == 1
        assert contents(run) == before


# ---- the folder that a checkpoint names -----------------------------------------------------------------------------


@pytest.mark.parametrize("named", ["../" * 2000 + "x", "x" * 5000, "\x1b[2J\n", "\udcff"])
def test_a_folder_of_an_odd_name_is_one_short_line(
    run: Path, tmp_path: Path, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    meta, arrays = load_checkpoint(run / "checkpoint.npz")
    rewritten(run, meta | {"folder": named}, arrays)
    before = contents(tmp_path)
    assert cli.main(["train", "--resume", str(run), "--epochs", "3", "--quiet"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("bnkernels: error: ")
    assert len(err) < 600 + len(str(run))
    assert err.rstrip("\n").isprintable()
    assert contents(tmp_path) == before


@pytest.mark.parametrize("victim", ["empty", "absent", "another run", "no metrics"])
@pytest.mark.parametrize("absolute", [False, True])
def test_a_planted_folder_is_not_followed(
    run: Path, tmp_path: Path, absolute: bool, victim: str, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = tmp_path / "a" / "victim"
    if victim != "absent":
        elsewhere.mkdir(parents=True)
    if victim == "another run":
        train(config(data, seed=9, models=3), folder=elsewhere)
    if victim == "no metrics":
        (elsewhere / "metrics.json").write_text("[" * 100_000)
        (elsewhere / "curves.png").write_bytes(b"precious")
    meta, arrays = load_checkpoint(run / "checkpoint.npz")
    named = str(elsewhere) if absolute else "../a/victim"
    rewritten(run, meta | {"folder": named}, arrays)
    before = contents(tmp_path), sorted(tmp_path.rglob("*"))
    assert cli.main(["train", "--resume", str(run), "--epochs", "3", "--quiet"]) == 2
    err = capsys.readouterr().err
    assert f"the folder of its run is {elsewhere}, which holds nothing of that run yet" in err
    assert err.count("\n") == 1
    assert (contents(tmp_path), sorted(tmp_path.rglob("*"))) == before


def test_a_checkpoint_elsewhere_knows_its_folder_again_when_that_knows_the_run(data: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "safe" / "c.npz"
    train(config(data), folder=tmp_path / "run", checkpoint=elsewhere)
    for epochs in (3, 4):
        assert resume(elsewhere, epochs=epochs).files["metrics"] == tmp_path / "run" / "metrics.json"
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["config"]["epochs"] == 4


def test_a_stopped_run_with_its_checkpoint_elsewhere_is_continued_as_it_says(data: Path, tmp_path: Path) -> None:
    """Nothing of it is in its folder yet, so that the command names the folder."""
    elsewhere = tmp_path / "safe" / "c.npz"
    asked = iter(range(10**6))
    options = config(data, engine="layers")  # which ask before every step
    stopped = train(options, folder=tmp_path / "run", checkpoint=elsewhere, should_stop=lambda: next(asked) >= 9)
    assert stopped.status == "stopped"
    assert stopped.continuation == f"bnkernels train --resume {elsewhere} --out {tmp_path / 'run'}"
    with pytest.raises(CheckpointError, match=r"if it is right, give it as --out"):
        resume(elsewhere)
    assert resume(elsewhere, folder=tmp_path / "run").status == "finished"
    inside = train(config(data), folder=tmp_path / "a run", should_stop=lambda: True)
    assert inside.continuation == f"bnkernels train --resume '{tmp_path / 'a run' / 'checkpoint.npz'}'"


def test_a_link_to_a_checkpoint_finds_its_run(data: Path, tmp_path: Path) -> None:
    train(config(data), folder=tmp_path / "run")
    latest = tmp_path / "latest.npz"
    latest.symlink_to(os.path.join("run", "checkpoint.npz"))
    assert resume(latest, epochs=3).files["metrics"].parent.samefile(tmp_path / "run")
    assert latest.is_symlink()
    assert load_checkpoint(tmp_path / "run" / "checkpoint.npz")[0]["epoch"] == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest.npz", "run"]
