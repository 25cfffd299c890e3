"""A compiler cache that never hit: every process compiled what another had just compiled."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SAY = "from bnkernels.runtime import source; print(source.OPTIONS, *map(source.read, source.stems()), sep='\\0')"


def test_cupy_7391_every_process_compiles_the_same_text() -> None:
    """The key of CuPy's cache on disk is text and options: no address, date or order of a set may be in them."""
    said = set()
    for seed in ("1", "2", "3"):
        environment = os.environ | {"PYTHONHASHSEED": seed}
        run = subprocess.run([sys.executable, "-c", SAY], cwd=ROOT, env=environment, capture_output=True, check=True)
        said.add(run.stdout)
    (text,) = said
    assert text.count(b"__global__") > 0
    assert text.count(b"\0") >= 6, "options and the sources"
