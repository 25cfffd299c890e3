"""Killed with SIGKILL at any moment and resumed, a run ends with the bits of an uninterrupted one."""

import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from bnkernels.runtime import cpu
from bnkernels.train.checkpoint import load_checkpoint

TRAIN = [sys.executable, "-m", "bnkernels", "train", "--quiet", "--device", "cpu"]
# Kills itself at the n-th call of a function of `os`: the moments around a write that a kill from outside would hardly
# ever meet. fsync 2 k - 1 is that of the content of checkpoint k, fsync 2 k of its folder.
SUICIDE = """
import os, signal, sys
from bnkernels.cli import main
name, count = sys.argv[1], int(sys.argv[2])
original, calls = getattr(os, name), []
def replacement(*arguments):
    calls.append(None)
    if len(calls) == count:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments)
setattr(os, name, replacement)
raise SystemExit(main(sys.argv[3:]))
"""
# A file object that dies after half of the content is written.
HALF_WRITTEN = """
import builtins, os, signal, sys
from bnkernels.train import files
from bnkernels.cli import main
count, calls = int(sys.argv[1]), []
class Dying:
    def __init__(self, file): self.file = file
    def __getattr__(self, name): return getattr(self.file, name)
    def write(self, content):
        calls.append(None)
        if len(calls) == count:
            self.file.write(content[: len(content) // 2])
            self.file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        self.file.write(content)
files.open = lambda descriptor, mode: Dying(builtins.open(descriptor, mode))
raise SystemExit(main(sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    """Return a small data file."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("data") / "data.npz"
    np.savez(path, x=rng.standard_normal((200, 8)), y=np.arange(200) % 4)
    return path


def options(npz, epochs):
    return [
        "--dataset",
        "npz",
        "--data",
        str(npz),
        "--batch-size",
        "16",
        "--optimizer",
        "adam",
        "--epochs",
        str(epochs),
    ]


def start(command, **streams):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, **streams
    )


def finish(command):
    """Run a command to its end; return its exit code and what it said on stderr."""
    with start(command) as process:
        _, errors = process.communicate(timeout=120)
    return process.returncode, errors


def final(folder):
    """Return the bits of all arrays, and the order of examples that comes next."""
    meta, arrays = load_checkpoint(folder / "checkpoint.npz")
    steps = {norm: network["step"] for norm, network in meta["networks"].items()}
    return meta["generator"], steps, {name: array.tobytes() for name, array in arrays.items()}


@pytest.fixture(scope="module")
def uninterrupted(npz, tmp_path_factory):
    """Return what an uninterrupted run of 4 epochs ends with."""
    folder = tmp_path_factory.mktemp("whole")
    assert finish([*TRAIN, *options(npz, 4), "--out", str(folder)]) == (0, "")
    return final(folder)


@pytest.mark.slow
def test_killed_at_random_moments(npz, tmp_path, monkeypatch):
    monkeypatch.setenv(cpu.VARIABLE, "reference")  # the other tests have compiled kernels
    epochs = 200
    slowly = [*TRAIN, *options(npz, epochs), "--engine", "layers"]
    assert finish([*slowly, "--out", str(tmp_path / "whole")]) == (0, "")
    run, kills, rng = tmp_path / "run", [], random.Random(0)
    command = [*slowly, "--out", str(run)]
    while len(kills) < 4:
        checkpoint = run / "checkpoint.npz"
        before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else None
        with start(command) as process:
            while process.poll() is None and (not checkpoint.exists() or checkpoint.stat().st_mtime_ns == before):
                time.sleep(0.002)  # until it makes progress, so that every kill meets another state
            time.sleep(rng.uniform(0, 0.1))
            process.kill()
        if process.returncode != -signal.SIGKILL:
            break  # so fast a machine that it came to the end
        kills.append(load_checkpoint(checkpoint)[0]["epoch"])
        command = [*TRAIN, "--resume", str(run)]
    assert len(kills) >= 2, "the run was too short to be killed: give it more epochs"
    assert 0 < kills[-1] < epochs
    assert finish([*TRAIN, "--resume", str(run)]) == (0, "")
    assert final(run) == final(tmp_path / "whole")
    assert sorted(path.name for path in run.iterdir()) == ["checkpoint.npz", "curves.png", "metrics.json"]


# Checkpoint 1 is written before the first step and 3 after the second epoch; write 7 is the last of the run.
@pytest.mark.parametrize(
    "killer",
    [
        pytest.param([SUICIDE, "replace", "3"], id="before the rename"),
        pytest.param([SUICIDE, "fsync", "6"], id="before the rename is on the disk"),
        pytest.param([SUICIDE, "replace", "7"], id="before the last file"),
        pytest.param([HALF_WRITTEN, "3"], id="in the middle of a checkpoint"),
    ],
)
def test_killed_while_writing(npz, tmp_path, uninterrupted, killer):
    run = tmp_path / "run"
    train = ["train", "--quiet", "--device", "cpu", *options(npz, 4), "--out", str(run)]
    assert finish([sys.executable, "-c", *killer, *train])[0] == -signal.SIGKILL
    load_checkpoint(run / "checkpoint.npz")  # whole, whatever happened to its successor
    assert finish([*TRAIN, "--resume", str(run)]) == (0, "")
    assert final(run) == uninterrupted
    assert sorted(path.name for path in run.iterdir()) == ["checkpoint.npz", "curves.png", "metrics.json"]


def test_killed_before_the_first_checkpoint_the_folder_can_be_used_again(npz, tmp_path, uninterrupted):
    run = tmp_path / "run"
    train = ["train", "--quiet", "--device", "cpu", *options(npz, 4), "--out", str(run)]
    assert finish([sys.executable, "-c", SUICIDE, "replace", "1", *train])[0] == -signal.SIGKILL
    code, errors = finish([*TRAIN, "--resume", str(run)])
    assert code == 2
    assert "there is no checkpoint" in errors
    assert finish([*TRAIN, *options(npz, 4), "--out", str(run)]) == (0, "")
    assert final(run) == uninterrupted


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_a_signal_saves_and_says_how_to_continue(npz, tmp_path, stop):
    run = tmp_path / "run"
    with start([*TRAIN, *options(npz, 100_000), "--out", str(run)]) as process:
        while not (run / "checkpoint.npz").exists():
            time.sleep(0.002)
        time.sleep(0.2)
        process.send_signal(stop)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + stop
    checkpoint = run / "checkpoint.npz"
    assert errors == f"bnkernels: stopped and saved; continue with: bnkernels train --resume {checkpoint}\n"
    epoch = load_checkpoint(checkpoint)[0]["epoch"]
    assert finish([*TRAIN, "--resume", str(run), "--epochs", str(epoch + 2)]) == (0, "")
    assert finish([*TRAIN, *options(npz, epoch + 2), "--out", str(tmp_path / "whole")]) == (0, "")
    assert final(run) == final(tmp_path / "whole")
