"""A test that needs a GPU is left out with its reason, and fails where a GPU is required."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = """
import pytest

@pytest.mark.cuda
@pytest.mark.parametrize("n", range(3))
def test_on_the_gpu(n):
    pass

def test_elsewhere():
    pytest.skip("another reason")
"""


def run(folder: Path, *options: str, **environment: str) -> tuple[int, str]:
    """Run two tests with our conftest, on a machine that hides its GPUs; return the exit status and what is printed."""
    (folder / "test_two.py").write_text(TESTS)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "-1"} | environment
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.conftest", *options, "test_two.py"]
    done = subprocess.run(command, cwd=folder, env=environment, text=True, capture_output=True, timeout=120)
    return done.returncode, done.stdout


def test_what_does_not_run_is_counted_by_reason(tmp_path: Path) -> None:
    options = ["-n", "1"] if importlib.util.find_spec("xdist") else []  # its processes have to send the counts
    status, printed = run(tmp_path, *options, BNKERNELS_REQUIRE_GPU="0")
    assert status == 0
    assert "\n    3 x needs a GPU: " in printed
    assert "\n    1 x another reason\n" in printed
    assert "1 skipped" in printed


def test_a_required_gpu_that_is_missing_is_a_failure(tmp_path: Path) -> None:
    status, printed = run(tmp_path, BNKERNELS_REQUIRE_GPU="1")
    assert status == 1
    assert "BNKERNELS_REQUIRE_GPU=1, but " in printed
    assert "3 errors" in printed
