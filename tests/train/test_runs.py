"""The result of a run: the summary and its folder, which no other run enters meanwhile."""

import errno
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from bnkernels import cli
from bnkernels.train.config import ConfigError, TrainingConfig
from bnkernels.train.files import InUseError
from bnkernels.train.runs import default_folder, summarise
from bnkernels.train.trainer import resume, train
from tests.train.test_file_locks import HOLD
from tests.train.test_files import started


def entry(step, accuracy, us_per_step):
    return {"epoch": step, "step": step, "loss": 0.5, "accuracy": accuracy, "us_per_step": us_per_step}


def test_the_summary_takes_the_first_crossing_and_the_median_without_the_first_epoch():
    history = [entry(10, 0.9, 900), entry(20, 0.95, 30), entry(30, 0.94, 20), entry(40, 0.93, 10)]
    assert summarise(history) == {
        "test_accuracy": 0.93,
        "training_loss": 0.5,
        "steps_to_95_percent": 20,
        "us_per_step": 20,
    }
    assert summarise([entry(10, 0.9499, 900)])["us_per_step"] == 900
    assert summarise([entry(10, 0.9499, 900)])["steps_to_95_percent"] is None


def test_default_folders_never_meet(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("bnkernels.train.runs.strftime", lambda form: "20300102-030405")
    for name in ("digits-20300102-030405", "digits-20300102-030405-2", "digits-20300102-030405-3"):
        folder = default_folder("digits")
        assert folder.as_posix() == f"runs/{name}"
        assert list(folder.iterdir()) == []


def test_default_folders_of_one_moment_are_all_different(tmp_path, monkeypatch):
    """However they are interleaved: the first to make one has it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("bnkernels.train.runs.strftime", lambda form: "20300102-030405")
    mkdir, found = os.mkdir, []

    def slow(path, *mode):
        time.sleep(0.01)
        mkdir(path, *mode)

    monkeypatch.setattr(os, "mkdir", slow)
    threads = [threading.Thread(target=lambda: found.append(default_folder("digits"))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(folder.name for folder in Path("runs").iterdir()) == sorted(folder.name for folder in found)
    assert len(set(found)) == 6


def test_a_default_folder_that_cannot_be_made_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs").write_text("a file")
    with pytest.raises(ConfigError, match="cannot make the folder runs: it is a file: choose another"):
        default_folder("digits")


# ---- a folder is of one run at a time -------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """Leave the picture to test_plots.py; work in an empty folder; return options of a small run."""
    monkeypatch.setattr("bnkernels.train.runs.draw_curves", lambda history, title: b"a picture")
    monkeypatch.chdir(tmp_path)
    np.savez("data.npz", x=np.random.default_rng(0).standard_normal((100, 6)), y=np.arange(100) % 3)
    return {"dataset": "npz", "data": "data.npz", "hidden": (8,), "batch_size": 16, "epochs": 1, "device": "cpu"}


def contents():
    return {str(path): path.read_bytes() for path in Path().rglob("*") if path.is_file()}


@pytest.mark.parametrize("held", ["run/metrics.json", "run/checkpoint.npz"])
@pytest.mark.parametrize("finished", [False, True])
def test_a_second_process_in_a_folder_touches_nothing(quick, capsys, held, finished):
    if finished:
        train(TrainingConfig(**quick), folder="run")
    Path("run").mkdir(exist_ok=True)
    process = started(HOLD, held, 120)
    try:
        before = contents()
        options = ["--dataset", "npz", "--data", "data.npz", "--device", "cpu", "--epochs", "2", "--quiet"]
        commands = [["train", "--out", "run", *options]]
        commands += [["train", "--resume", "run", "--epochs", "2"]] if finished else []
        for command in commands:
            assert cli.main(command) == 2
            said = f"{held} is in use by another run (process {process.pid}): wait for its end or stop it"
            assert capsys.readouterr().err == f"bnkernels: error: {said}\n"
        assert contents() == before
    finally:
        process.kill()
        process.communicate()
    if finished:
        assert resume("run", epochs=2).status == "finished"
    else:
        assert train(TrainingConfig(**quick), folder="run").status == "finished"
    assert sorted(os.listdir("run")) == ["checkpoint.npz", "curves.png", "metrics.json"]


def test_a_run_holds_its_folder_and_its_checkpoint_to_its_end(quick):
    """Also against runs that share but one of the two with it."""
    refused = []

    def try_others(trainer):
        for act in (
            lambda: resume("safe/c.npz", folder="run"),
            lambda: train(TrainingConfig(**quick), folder="other", checkpoint="safe/c.npz"),
            lambda: train(TrainingConfig(**quick), folder="run", checkpoint="safe/other.npz"),
        ):
            with pytest.raises(InUseError, match=rf"in use by another run \(process {os.getpid()}\)"):
                act()
            refused.append(act)

    train(TrainingConfig(**quick), folder="run", checkpoint="safe/c.npz", on_epoch=try_others)
    assert len(refused) == 6
    assert train(TrainingConfig(**quick), folder="run2").status == "finished"
    assert sorted(os.listdir("safe")) == ["c.npz"]
    assert sorted(os.listdir("run")) == ["curves.png", "metrics.json"]


def test_a_dangling_link_is_a_file_that_is_there(quick):
    Path("run").mkdir()
    Path("run/metrics.json").symlink_to(Path.cwd() / "elsewhere")
    with pytest.raises(ConfigError, match=r"run/metrics\.json exists already"):
        train(TrainingConfig(**quick), folder="run")
    assert not Path("elsewhere").exists()


@pytest.mark.parametrize("checkpoint", ["run/metrics.json", "run/../run/curves.png"])
def test_a_checkpoint_is_no_other_file_of_the_run(quick, checkpoint):
    with pytest.raises(ConfigError, match="would be another file of the run: choose another name"):
        train(TrainingConfig(**quick), folder="run", checkpoint=checkpoint)
    assert os.listdir() == ["data.npz"]


def test_what_cannot_be_replaced_is_told_before_the_work(quick):
    train(TrainingConfig(**quick), folder="run")
    Path("run/metrics.json").chmod(0o444)
    before = contents()
    with pytest.raises(PermissionError, match=r"read-only.*metrics\.json"):
        resume("run", epochs=2, on_epoch=lambda trainer: pytest.fail("it began to train"))
    assert contents() == before


def test_a_full_disk_keeps_the_last_checkpoint_and_says_how_to_go_on(quick, capsys, monkeypatch):
    train(TrainingConfig(**quick), folder="run")
    before, fsync = contents(), os.fsync

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert cli.main(["train", "--resume", "run", "--epochs", "2", "--quiet"]) == 2
    said = "No space left on device: free some space; what the file held before is still there, and --resume continues"
    assert capsys.readouterr().err == f"bnkernels: error: {said} from it: run/checkpoint.npz\n"
    assert contents() == before
    monkeypatch.setattr(os, "fsync", fsync)
    assert resume("run", epochs=2).status == "finished"


def test_an_unknown_option_is_named(quick):
    train(TrainingConfig(**quick), folder="run")
    with pytest.raises(ConfigError, match="there is no option epoch: a run has dataset, data"):
        resume("run", epoch=3)


def test_nothing_is_made_before_the_data_are_known_to_be_right(quick):
    with pytest.raises(ConfigError, match="at most the 80 training examples"):
        train(TrainingConfig(**quick | {"batch_size": 99}), folder=lambda: pytest.fail("the folder was asked for"))
    result = train(TrainingConfig(**quick), folder=lambda: default_folder("npz"))
    assert result.files["metrics"].parent.parent == Path("runs")
