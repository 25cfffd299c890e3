"""A test corpus that had vanished: the runner found nothing to run, and reported success."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]

# Somewhat below what is there: adding a test never fails here, losing a parametrisation does.
FLOORS = {
    "tests/regress/": 2000,
    "tests/test_batch_norm.py": 300,
    "tests/test_batch_norm_errors.py": 60,
    "tests/test_batch_norm_launch.py": 40,
    "tests/test_batch_norm_properties.py": 8,
    "tests/test_parameter_update.py": 100,
    "tests/test_softmax_cross_entropy.py": 80,
    "tests/test_traffic.py": 30,
}


def test_onnxruntime_29504_no_suite_is_empty() -> None:
    """Every generated suite still generates its cases."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *FLOORS],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr
    found: Counter[str] = Counter()
    for test in re.findall(r"^(tests/\S+?)::", run.stdout, re.MULTILINE):
        found[next(suite for suite in FLOORS if test.startswith(suite))] += 1
    missing = {suite: f"{found[suite]} of at least {floor}" for suite, floor in FLOORS.items() if found[suite] < floor}
    assert not missing
