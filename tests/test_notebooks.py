"""The notebooks: executable from top to bottom, and committed with their outputs, free of traces of a machine."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MOST_BYTES = 600_000
OUT_OF_DATE = "run `make notebooks ARGS=--overwrite`"
ABSOLUTE_PATH = re.compile(r"(?<![\w/.:>])/(?:[\w.-]+/)+|\b[A-Z]:\\")


def code_cells(path: Path) -> list[dict[str, Any]]:
    return [cell for cell in read(path)["cells"] if cell["cell_type"] == "code"]


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def texts(value: Any) -> Iterator[str]:
    """Yield every text in a notebook but its pictures; a list of lines is one text."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list) and all(isinstance(line, str) for line in value):
        yield "".join(value)
    elif isinstance(value, list):
        for part in value:
            yield from texts(part)
    elif isinstance(value, dict):
        for key, part in value.items():
            if not key.startswith("image/"):
                yield from texts(part)


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_as_executed_in_one_go(path: Path) -> None:
    cells = code_cells(path)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1)), OUT_OF_DATE
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert not [output for output in outputs if output.get("name") == "stderr"], "a warning is committed"
    assert any("image/png" in output.get("data", {}) for output in outputs), "the pictures are missing"
    assert path.stat().st_size < MOST_BYTES


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_trace_of_a_machine(path: Path) -> None:
    notebook = read(path)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    found = [match[0] for text in texts(notebook) for match in ABSOLUTE_PATH.finditer(text)]
    assert not found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("in /home/somebody/x.py", True),
        ('File "/opt/lib/y.py"', True),
        (r"C:\Users", True),
        ("https://arxiv.org/abs/1502.03167", False),
        ("`cuda/lib/kernel.cuh` and ../tests/emulator", False),
        ("with / without", False),
    ],
)
def test_an_absolute_path_is_recognised(text: str, found: bool) -> None:
    assert bool(ABSOLUTE_PATH.search(text)) is found


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_from_top_to_bottom(path: Path) -> None:
    pytest.importorskip("nbmake", reason="nbmake is not installed: the notebooks are not executed")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--nbmake", str(path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert "1 passed" in run.stdout
