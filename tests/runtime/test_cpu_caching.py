"""The cache of compiled kernels on disk: renewed with every file, in a folder that can be written, or not there."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]
CODE = """
import sys, numpy as np, bnkernels as bn
from bnkernels.runtime import cpu
p = np.ones(3)
with cpu.compilation_shown(sys.stderr):
    bn.sgd_update(p, np.ones(3), lr=1.0)
    bn.momentum_update(p, np.ones(3), np.zeros(3), lr=1.0)
print(p.tolist())
"""
COMPILING = "compiling CPU kernels (once per machine): parameter update ...\n"

pytest.importorskip("numba")
pytest.importorskip("scipy")


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """Return a folder with a copy of the package in which nothing can be cached, not even by root."""
    shutil.copytree(ROOT / "bnkernels", tmp_path / "bnkernels", ignore=shutil.ignore_patterns("__pycache__"))
    for folder in [tmp_path / "bnkernels", *filter(Path.is_dir, (tmp_path / "bnkernels").rglob("*"))]:
        (folder / "__pycache__").touch()
    return tmp_path


def update(package: Path, **environment: str) -> str:
    """Make two updates in a new process with no home, and return what it says on standard error."""
    kept = {name: value for name, value in os.environ.items() if name not in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME")}
    kept |= {"PYTHONPATH": str(package), "HOME": os.devnull, **environment}
    done = subprocess.run([sys.executable, "-c", CODE], cwd=package, env=kept, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "[-1.0, -1.0, -1.0]\n"), done.stderr
    return done.stderr


def test_where_nothing_can_be_written_kernels_compute_and_say_what_to_set(package: Path) -> None:
    said = update(package)
    assert said.count("RuntimeWarning: compiled CPU kernels cannot be kept") == 1
    assert "set NUMBA_CACHE_DIR to a folder that can" in said
    assert said.count(COMPILING) == 1


def test_a_folder_of_ones_own_keeps_them_until_a_file_of_theirs_changes(package: Path, tmp_path: Path) -> None:
    folder = tmp_path / "kernels"
    assert update(package, NUMBA_CACHE_DIR=str(folder)) == COMPILING
    assert any(folder.rglob("*.nbc"))
    assert update(package, NUMBA_CACHE_DIR=str(folder)) == ""
    language = package / "bnkernels" / "runtime" / "cpu" / "language.py"
    language.write_text(language.read_text(encoding="utf-8") + "\n# Another text.\n", encoding="utf-8")
    assert update(package, NUMBA_CACHE_DIR=str(folder)) == COMPILING


def test_a_read_only_installation_takes_the_cache_folder_of_its_user(package: Path, tmp_path: Path) -> None:
    assert update(package, HOME=str(tmp_path)) == COMPILING
    assert any((tmp_path / ".cache" / "numba").rglob("*.nbc"))


class Terminal(io.StringIO):
    """A terminal."""

    def isatty(self) -> bool:
        """Return that it is one."""
        return True


def events(*names: str) -> list[SimpleNamespace]:
    return [
        SimpleNamespace(data={"dispatcher": SimpleNamespace(py_func=SimpleNamespace(__module__=name))})
        for name in names
    ]


@pytest.mark.parametrize(
    ("stream", "said"),
    [
        (io.StringIO(), "compiling CPU kernels (once per machine): batch norm ...\n"),
        (
            Terminal(),
            "\r\x1b[Kcompiling CPU kernels (once per machine): batch norm ...\r\x1b[K"
            "\r\x1b[Kcompiling CPU kernels (once per machine): activations ...\r\x1b[K",
        ),
    ],
)
def test_a_terminal_is_told_of_every_kernel_and_a_file_once(stream: io.StringIO, said: str) -> None:
    """Nothing of those within a kernel, or of another package's."""
    from bnkernels.runtime.cpu.progress import _Line

    line = _Line(stream)
    outer, inner, other, last = events(
        "bnkernels.ops.batch_norm.cpu.forward",
        "bnkernels.ops.activations_cpu",
        "mine.cpu",
        "bnkernels.ops.activations_cpu",
    )
    for call, event in (
        (line.on_start, outer),
        (line.on_start, inner),
        (line.on_end, inner),
        (line.on_end, outer),
        (line.on_start, last),
        (line.on_end, last),
    ):
        call(event)
    assert stream.getvalue() == said
    line.on_start(other)
    line.on_end(other)
    assert re.sub(r"\r\x1b\[K", "", stream.getvalue()) == re.sub(r"\r\x1b\[K", "", said)
