"""Real ranks under mpiexec: what they compute together, and that no fault of one lets the others wait for ever."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bnkernels.distributed import launched_by_mpi, mpi
from bnkernels.train.checkpoint import load_checkpoint
from bnkernels.train.config import TrainingConfig
from bnkernels.train.trainer import train

ROOT = Path(__file__).parents[2]
LIMIT = 60  # seconds, after which a test has found ranks that wait for ever
BESIDE = Path(sys.executable).parent


def command(size: int, *arguments: str) -> list[str]:
    """Return the command that starts ranks; skip where there is no MPI."""
    found = shutil.which("mpiexec", path=os.pathsep.join([str(BESIDE), os.environ.get("PATH", "")]))
    if found is None or find_spec("mpi4py") is None:
        end = pytest.fail if os.environ.get("BNKERNELS_REQUIRE_MPI") == "1" else pytest.skip
        end("needs mpiexec and mpi4py: pip install 'bnkernels[mpi]'")
    return [found, "--allow-run-as-root", "--oversubscribe", "-n", str(size), *arguments]


def environment() -> dict[str, str]:
    return os.environ | {"BNKERNELS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def run(size: int, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command on several ranks to its end."""
    given = {"capture_output": True, "text": True, "timeout": LIMIT, "env": environment()} | options
    return subprocess.run(command(size, *arguments), **given)


def program(size: int, name: str) -> subprocess.CompletedProcess[str]:
    return run(size, sys.executable, "-m", "tests.distributed.programs", name, cwd=ROOT)


def bnkernels(size: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run(size, sys.executable, "-m", "bnkernels", *arguments)


@pytest.mark.mpi
@pytest.mark.parametrize(("name", "size"), [("concatenated", 4), ("model", 2), ("differ", 3)])
def test_ranks_come_to_their_end(name: str, size: int) -> None:
    done = program(size, name)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split("\n"))[1:] == [f"rank {rank} of {size} has finished" for rank in range(size)]


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("name", "size", "text"),
    [
        ("lengths", 3, "the ranks gather arrays of different lengths"),
        ("raises", 3, "rank 1 of 3 ends all ranks: ValueError: a mistake on one rank"),
        ("killed", 3, "process rank 2"),  # mpiexec says so
        ("sleeps", 3, "rank 1 did not come to it within 2 s"),
        ("stopped", 3, "rank 2 did not come to it within 2 s"),
    ],
)
def test_a_fault_of_one_rank_ends_all_with_a_message(name: str, size: int, text: str) -> None:
    started = time.monotonic()
    done = program(size, name)
    assert done.returncode != 0
    said = " ".join((done.stderr + done.stdout).split())
    assert text in said, said
    assert time.monotonic() - started < LIMIT / 2


@pytest.mark.mpi
def test_train_on_four_ranks_and_resume_on_two(tmp_path: Path) -> None:
    out = str(tmp_path / "run")
    common = "--norm", "sync-batch", "--dtype", "float64", "--quiet", "--json"
    done = bnkernels(4, "train", *common, "--steps", "30", "--out", out)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)  # one rank prints
    assert document["status"] == "finished"
    done = bnkernels(2, "train", "--resume", out, "--steps", "50", "--json")
    assert done.returncode == 0, done.stderr
    resumed = json.loads(done.stdout)["history"]["sync-batch"]
    alone = train(TrainingConfig(norm="batch", dtype="float64", steps=50, engine="layers", device="cpu"))
    for mine, right in zip(resumed, alone.history["batch"], strict=False):
        if mine["step"] == right["step"]:
            np.testing.assert_allclose(mine["loss"], right["loss"], rtol=1e-9)
    _, arrays = load_checkpoint(Path(out) / "checkpoint.npz")
    right = alone.models["batch"].state()["0.weight"]
    np.testing.assert_allclose(arrays["sync-batch/model/0.weight"], right, rtol=1e-8, atol=1e-10)


@pytest.mark.mpi
def test_what_cannot_be_trained_is_said_once(tmp_path: Path) -> None:
    done = bnkernels(3, "train", "--norm", "batch", "--batch-size", "5", "--out", str(tmp_path / "run"))
    assert done.returncode == 2
    assert done.stderr.count("error:") == 1
    assert "batch size must be at least 6 on 3 ranks" in done.stderr
    assert not (tmp_path / "run").exists()


def started_training(folder: Path, size: int) -> subprocess.Popen[str]:
    """Return ranks that train for long, as soon as their first epochs are saved."""
    arguments = "train", "--norm", "sync-batch", "--epochs", "100000", "--out", str(folder), "--quiet"
    whole = command(size, sys.executable, "-m", "bnkernels", *arguments)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment()}
    process = subprocess.Popen(whole, **pipes)
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if load_checkpoint(folder / "checkpoint.npz")[0]["epoch"] >= 1:
                return process
        except (OSError, ValueError):
            pass
        time.sleep(0.05)
    process.kill()
    pytest.fail(f"no checkpoint: {process.communicate()}")


def ranks_of(process: subprocess.Popen[str]) -> list[int]:
    """Return the process numbers of the ranks."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="ascii").split()
    return [int(child) for child in children]


@pytest.mark.mpi
def test_sigterm_of_one_rank_stops_all_behind_a_step_and_saves(tmp_path: Path) -> None:
    process = started_training(tmp_path / "run", 2)
    os.kill(ranks_of(process)[1], signal.SIGTERM)
    _, stderr = process.communicate(timeout=LIMIT)
    assert process.returncode == 143, stderr
    assert "stopped and saved; continue with: bnkernels train --resume" in stderr
    meta, _ = load_checkpoint(tmp_path / "run" / "checkpoint.npz")
    assert meta["networks"]["sync-batch"]["step"] > 0


@pytest.mark.mpi
def test_ctrl_c_ends_all_ranks_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    """Mpiexec turns it into SIGTERM for the ranks, as it does with a SIGTERM of its own, and soon kills them."""
    process = started_training(tmp_path / "run", 2)
    ranks = ranks_of(process)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=LIMIT)
    assert process.returncode != 0
    deadline = time.monotonic() + LIMIT / 2
    while any(Path(f"/proc/{rank}").exists() for rank in ranks) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)
    meta, _ = load_checkpoint(tmp_path / "run" / "checkpoint.npz")
    assert meta["epoch"] >= 1


def test_without_mpi_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(ImportError, match=r"pip install 'bnkernels\[mpi\]'"):
        mpi()


def test_a_process_knows_whether_mpiexec_started_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS"):
        monkeypatch.delenv(name, raising=False)
    assert not launched_by_mpi()
    monkeypatch.setenv("PMI_SIZE", "2")
    assert launched_by_mpi()
