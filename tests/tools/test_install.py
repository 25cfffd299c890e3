"""``make train`` and ``make test`` install what the machine needs, once, and say clearly what stands in the way."""

from __future__ import annotations

import ast
import ctypes
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from tools import backends
from tools.compile import nvrtc

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tools" / "install.py"


@pytest.fixture
def install() -> ModuleType:
    spec = importlib.util.spec_from_file_location("install", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fake_python(path: Path, body: str) -> Path:
    """Write an executable that stands for a Python interpreter."""
    path.parent.mkdir(parents=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def driver(version: int, status: int = 0) -> SimpleNamespace:
    """Return what ctypes makes of an NVIDIA driver that knows CUDA `version`."""

    def get(pointer: object) -> int:
        ctypes.cast(pointer, ctypes.POINTER(ctypes.c_int))[0] = version
        return 0

    return SimpleNamespace(cuInit=lambda flags: status, cuDriverGetVersion=get)


@pytest.mark.parametrize(
    ("version", "extra"), [(None, None), (11080, None), (12000, "cuda12"), (12090, "cuda12"), (13020, "cuda13")]
)
def test_the_driver_decides_the_flavour_of_cupy(install: ModuleType, version: int | None, extra: str | None) -> None:
    assert install.cuda_extra(version) == extra


def test_the_driver_is_asked(install: ModuleType) -> None:
    assert install.driver_version(lambda name: driver(13020)) == 13020


def test_a_driver_without_a_gpu_counts_as_none(install: ModuleType) -> None:
    assert install.driver_version(lambda name: driver(13020, status=100)) is None


def test_a_machine_without_a_driver(install: ModuleType) -> None:
    def absent(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    assert install.driver_version(absent) is None


def test_an_old_python_gets_a_message_and_not_a_syntax_error(
    install: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    ast.parse(SCRIPT.read_text(encoding="utf-8"), feature_version=(3, 6))
    monkeypatch.setattr(install, "OLDEST", (99, 1))
    with pytest.raises(SystemExit, match=r"bnkernels needs Python 99\.1 or newer, and .* make PYTHON="):
        install.main(["train"])


def test_a_missing_venv_module_leaves_no_half_made_environment(
    install: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(fake_python(tmp_path / "bin" / "python3", 'mkdir -p "$4/bin"; exit 1')))
    with pytest.raises(SystemExit, match="apt-get install python3-venv"):
        install.make_venv(tmp_path / "venv")
    assert not (tmp_path / "venv").exists()


def test_a_broken_environment_is_made_again(install: ModuleType, tmp_path: Path) -> None:
    fake_python(tmp_path / "venv" / "bin" / "python", "exit 1")
    python = install.make_venv(tmp_path / "venv")
    assert subprocess.run([python, "-m", "pip", "--version"], capture_output=True).returncode == 0


@pytest.mark.parametrize(
    ("version", "extras", "wanted"),
    [
        (None, ["train"], ".[train]"),
        (11080, ["train"], ".[train]"),
        (12080, ["train"], ".[train,cuda12]"),
        (13000, ["train"], ".[train,cuda13]"),
        (None, ["test", "benchmarks"], ".[test,benchmarks,without-gpu]"),
        (12080, ["test"], ".[test,cuda12]"),  # one CuPy, never two
    ],
)
def test_an_environment_that_works_is_kept_and_installed_into(
    install: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    version: int | None,
    extras: list[str],
    wanted: str,
) -> None:
    log = tmp_path / "log"
    fake_python(tmp_path / "venv" / "bin" / "python", f'echo "$@" >> {log}')
    monkeypatch.setattr(install, "VENV", tmp_path / "venv")
    monkeypatch.setattr(install, "driver_version", lambda: version)
    monkeypatch.chdir(tmp_path)
    install.main(extras)
    probe, pip, *_ = log.read_text().splitlines()
    assert probe.startswith("-c import pip")
    assert pip.startswith("-m pip install ")
    assert pip.endswith(f" --editable {wanted}")


def test_the_tests_get_compilers_of_their_own_each_in_its_folder(
    install: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    venv, log, compilers = tmp_path / "venv", tmp_path / "log", tmp_path / "compilers.txt"
    fake_python(venv / "bin" / "python", f'echo "$@" >> {log}')
    (venv / "nvrtc" / "11.0").mkdir(parents=True)
    compilers.write_text('# of old\nnvrtc-cu12==12.0.76; platform_machine == "x86_64"\nnvrtc==13.5.37\n')
    for name, value in {"VENV": venv, "COMPILERS": compilers, "driver_version": lambda: None}.items():
        monkeypatch.setattr(install, name, value)
    monkeypatch.chdir(tmp_path)
    install.main(["test", "benchmarks"])
    assert [line.split("--disable-pip-version-check ")[1] for line in log.read_text().splitlines()[1:]] == [
        "--editable .[test,benchmarks,without-gpu]",
        f'--no-deps --target {venv}/nvrtc/12.0.76 nvrtc-cu12==12.0.76; platform_machine == "x86_64"',
        f"--no-deps --target {venv}/nvrtc/13.5.37 nvrtc==13.5.37",
    ]
    assert not (venv / "nvrtc" / "11.0").exists(), "a compiler that is no longer wanted"


def test_the_compilers_are_the_oldest_and_the_newest_that_cupy_works_with(install: ModuleType) -> None:
    assert install.COMPILERS.parent / "nvrtc.py" == Path(nvrtc.__file__)
    assert nvrtc.NEWEST.startswith("13.")
    assert nvrtc.OLDEST.startswith("12.0." if platform.machine() == "x86_64" else "13.")


def test_a_failing_pip_stops_with_the_way_out(
    install: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_python(tmp_path / "venv" / "bin" / "python", '[ "$1" = -c ]')
    monkeypatch.setattr(install, "VENV", tmp_path / "venv")
    monkeypatch.setattr(install, "driver_version", lambda: None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"pip could not install bnkernels\[train\], see above; run make again"):
        install.main(["train"])


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Make a checkout with as much as make looks at."""
    if shutil.which("make") is None:
        pytest.skip("needs make")
    (tmp_path / ".venv").mkdir()
    for name in ("Makefile", "setup.py", "pyproject.toml", "tools/install.py", "tools/compile/compilers.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def make(tree: Path, python: Path) -> int:
    stamp = ".venv/installed-train"
    return subprocess.run(["make", "-C", tree, stamp, f"PYTHON={python}"], capture_output=True).returncode


def test_make_installs_once_until_the_packaging_changes(tree: Path) -> None:
    python = fake_python(tree / "bin" / "python3", f"echo $@ >> {tree}/log")
    assert make(tree, python) == make(tree, python) == 0
    assert (tree / "log").read_text() == "tools/install.py train\n"
    newer = (tree / ".venv" / "installed-train").stat().st_mtime + 10
    os.utime(tree / "setup.py", (newer, newer))
    assert make(tree, python) == 0
    assert (tree / "log").read_text() == "tools/install.py train\n" * 2


@pytest.mark.parametrize("target", ["gpu", "gpu-test", "gpu-sanitize", "gpu-bench"])
@pytest.mark.parametrize(
    ("venv", "arguments", "python"),
    [
        ("exit 0", [], ".venv/bin/python"),
        ("exit 1", [], "python3"),  # without CuPy
        (None, [], "python3"),
        ("exit 0", ["PYTHON=mine"], "mine"),
    ],
)
def test_make_gpu_finds_the_python_that_has_cupy(
    tree: Path, target: str, venv: str | None, arguments: list[str], python: str
) -> None:
    if venv is not None:
        fake_python(tree / ".venv" / "bin" / "python", f'[ "$2" = "import cupy" ] && {venv}')
    environment = {name: value for name, value in os.environ.items() if name != "PYTHON"}
    command = ["make", "-n", "--no-print-directory", "-C", tree, target, *arguments]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.startswith(f"{python} -m benchmarks.gpu --out build/gpu")
    assert run.stderr == ""


def test_make_repeats_an_installation_that_failed(tree: Path) -> None:
    python = fake_python(tree / "bin" / "python3", f"echo $@ >> {tree}/log; exit 1")
    assert make(tree, python) != 0
    assert make(tree, python) != 0
    assert (tree / "log").read_text() == "tools/install.py train\n" * 2
    assert not (tree / ".venv" / "installed-train").exists()


# ---- without g++ ----------------------------------------------------------------------------------------------------

NO_COMPILER = r"the emulator compiles the kernels with g\+\+, and there is none on the PATH: install it \(.*\)\n"


@pytest.mark.parametrize("module", ["tools.emulator mutants", "tools.emulator coverage", "benchmarks.counts.traffic"])
def test_a_command_that_needs_a_compiler_says_so_in_one_line(module: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"} | {"PATH": ""}
    run = subprocess.run(
        [sys.executable, "-m", *module.split()], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert run.returncode in (1, 2)
    assert re.fullmatch(NO_COMPILER, run.stderr)


def test_a_test_that_needs_a_compiler_is_skipped_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(pytest.skip.Exception, match="none on the PATH: install it"):
        backends.emulated_runtime.__wrapped__()
