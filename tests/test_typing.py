"""The types of the public signatures, as mypy sees them from a script of a user's."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = """
import numpy as np
from numpy.typing import NDArray

import bnkernels as bn
from bnkernels import nn

x: NDArray[np.float32] = np.zeros((64, 20), np.float32)
half: NDArray[np.float16] = x.astype(np.float16)
gamma, labels = np.ones(20, np.float32), np.zeros(64, np.int64)
y, statistics = bn.batch_norm_forward(x, gamma, None, activation="relu")
reveal_type(y)
reveal_type(bn.batch_norm_backward(y, x, gamma, None, statistics)[0])
reveal_type(bn.batch_norm_inference(half, gamma, None, gamma, gamma))
reveal_type(bn.layer_norm_forward(half, gamma)[0])
reveal_type(bn.softmax_cross_entropy(x, labels)[1])
bn.sgd_update(x, y, lr=0.1)
model = nn.Sequential(nn.Linear(20, 10), nn.BatchNorm(10, activation="relu"))
optimiser = nn.Adam(model, lr=0.1)
model.backward(model(x))
optimiser.step()
"""
WRONG = """
import numpy as np

import bnkernels as bn

x = np.zeros((64, 20), np.float32)
bn.softmax_cross_entropy(x, "labels")
bn.batch_norm_inference(x, None, None, x[0], x[0], eps="small")
bn.nn.BatchNorm(20, momentun=0.1)
"""


def mypy(folder: Path, script: str) -> str:
    """Return what mypy prints about a script."""
    pytest.importorskip("mypy", reason="mypy is not installed")
    (folder / "user.py").write_text(script)
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "user.py"]
    environment = os.environ | {"MYPYPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True).stdout


@pytest.mark.slow
def test_outputs_have_the_type_of_the_data(tmp_path: Path) -> None:
    printed = mypy(tmp_path, SCRIPT)
    found = re.findall(r'Revealed type is "numpy.ndarray.*_(\d\d)Bit', printed)
    assert found == ["32", "32", "16", "16", "32"], printed
    assert "Success" in printed


@pytest.mark.slow
def test_wrong_arguments_are_found(tmp_path: Path) -> None:
    printed = mypy(tmp_path, WRONG)
    assert re.findall(r"user.py:(\d+): error", printed) == ["7", "8", "9"], printed
