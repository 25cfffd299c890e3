"""However bnkernels is installed, it finds its kernel sources, and nothing else of the checkout comes along."""

from __future__ import annotations

import configparser
import json
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from email.parser import Parser
from importlib.metadata import EntryPoint, distribution
from pathlib import Path

import pytest

from bnkernels.runtime import source

ROOT = Path(__file__).parents[1]
PIP = ("-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--ignore-installed")
READ_SOURCES = """
import json
from bnkernels.runtime import source
print(json.dumps([source.__file__, {stem: source.read(stem) for stem in source.stems()}]))
"""


def run(command: list[str | Path], cwd: Path, **environment: str) -> str:
    """Run a command without the variables of this process; return what it prints."""
    done = subprocess.run(command, cwd=cwd, env=environment, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(kind: str, tree: Path, folder: Path) -> Path:
    """Build a wheel or an sdist as pip would, without the network."""
    code = f"import sys; from setuptools import build_meta as b; print(b.build_{kind}(sys.argv[1]))"
    return folder / run([sys.executable, "-c", code, folder], cwd=tree).splitlines()[-1]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the checkout: building leaves files behind."""
    ignored = shutil.ignore_patterns(".git", ".venv", "build", "dist", "runs", "*.egg-info", "__pycache__", ".*_cache")
    return shutil.copytree(ROOT, tmp_path_factory.mktemp("checkout") / "tree", ignore=ignored)


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", checkout, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def sdist(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("sdist", checkout, tmp_path_factory.mktemp("sdist"))


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """Make an environment without bnkernels that borrows NumPy, pip and setuptools from this one."""
    venv.create(tmp_path / "venv", symlinks=True)
    (site_packages,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    borrowed = {str(distribution(name).locate_file("")) for name in ("numpy", "pip", "setuptools")}
    (site_packages / "borrowed.pth").write_text("\n".join(sorted(borrowed)))
    return tmp_path / "venv" / "bin" / "python"


def assert_finds_its_sources(python: Path, inside: Path, cwd: Path, **environment: str) -> None:
    """Check that bnkernels is imported from `inside` and reads the same sources as here."""
    module, sources = json.loads(run([python, "-c", READ_SOURCES], cwd=cwd, **environment))
    assert Path(module).is_relative_to(inside)
    assert sources == {stem: source.read(stem) for stem in source.stems()}


def test_installed_wheel(wheel: Path, python: Path, tmp_path: Path) -> None:
    run([python, *PIP, wheel], cwd=tmp_path)
    assert_finds_its_sources(python, tmp_path / "venv", cwd=tmp_path)


def test_installed_sdist(sdist: Path, python: Path, tmp_path: Path) -> None:
    run([python, *PIP, sdist], cwd=tmp_path)
    assert_finds_its_sources(python, tmp_path / "venv", cwd=tmp_path)


@pytest.mark.parametrize("mode", ["lenient", "strict"])
def test_editable_install(mode: str, checkout: Path, python: Path, tmp_path: Path) -> None:
    tree = shutil.copytree(checkout, tmp_path / "tree")
    run([python, *PIP, "--config-settings", f"editable_mode={mode}", "--editable", tree], cwd=tmp_path)
    assert_finds_its_sources(python, tree, cwd=tmp_path)


def test_uninstalled_checkout(checkout: Path, python: Path, tmp_path: Path) -> None:
    assert_finds_its_sources(python, checkout, cwd=tmp_path, PYTHONPATH=str(checkout))


def test_the_command_is_installed(wheel: Path, python: Path, tmp_path: Path) -> None:
    run([python, *PIP, wheel], cwd=tmp_path)
    version = run([sys.executable, "setup.py", "--version"], cwd=ROOT).strip()
    assert run([python.with_name("bnkernels"), "--version"], cwd=tmp_path) == f"bnkernels {version}\n"
    assert run([python, "-m", "bnkernels", "--version"], cwd=tmp_path) == f"bnkernels {version}\n"


def test_a_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    # A top-level `cuda` would land in NVIDIA's namespace package.
    assert {name.partition("/")[0] for name in names} == {
        "bnkernels",
        f"{'-'.join(wheel.stem.split('-')[:2])}.dist-info",
    }
    expected = {path.relative_to(ROOT).as_posix() for path in (ROOT / "bnkernels").rglob("*.py")}
    expected |= {"bnkernels/py.typed"}
    expected |= {f"bnkernels/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "cuda").rglob("*.cu*")}
    assert {name for name in names if name.startswith("bnkernels/")} == expected
    assert any(name.endswith("LICENSE") for name in names)


def test_numpy_is_the_only_hard_dependency(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = Parser().parsestr(archive.read(name).decode())
    requirements = metadata.get_all("Requires-Dist")
    assert set(metadata.get_all("Provides-Extra")) == {
        *("cpu", "train", "safetensors", "thinc", "torch", "cuda12", "cuda13", "without-gpu", "test", "notebooks"),
        *("benchmarks", "docs", "browser", "mpi", "nccl"),
    }
    assert metadata["Requires-Python"] == ">=3.10"
    assert [line for line in requirements if "extra ==" not in line] == ["numpy>=2"]
    numba = [line for line in requirements if line.startswith("numba")]
    assert {re.search(r'extra == "(\w+)"', line)[1] for line in numba} == {
        *("cpu", "train", "test", "notebooks", "benchmarks")
    }
    assert all('python_version < "3.15"' in line for line in numba)  # later ones compute by the reference


def test_thinc_finds_the_layers_by_their_entry_points(wheel: Path) -> None:
    registry = pytest.importorskip("thinc.api", reason="thinc is not installed").registry
    archive, found = zipfile.ZipFile(wheel), configparser.ConfigParser(delimiters=["="], interpolation=None)
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/entry_points.txt"))
    found.optionxform = str  # names keep their capitals
    found.read_string(archive.read(name).decode())
    points = [EntryPoint(*item, group="thinc_layers") for item in found["thinc_layers"].items()]
    assert {point.name for point in points} == {"bnkernels.BatchNorm.v1", "bnkernels.LayerNorm.v1"}
    assert registry.layers.entry_point_namespace == "thinc_layers"
    for point in points:
        assert point.load() is registry.layers.get(point.name)


def test_the_badge_names_the_versions_of_the_classifiers() -> None:
    lines = run([sys.executable, "setup.py", "--classifiers"], cwd=ROOT).splitlines()
    versions = [line.rpartition(" ")[2] for line in lines if re.search(r"Python :: 3\.\d", line)]
    assert versions == [f"3.{minor}" for minor in range(10, 15)]
    assert f"![Python {versions[0]} to {versions[-1]}]" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("url", ["", "https://example.org/bnkernels/"])
def test_no_link_on_a_package_index_leads_nowhere(url: str) -> None:
    text = run([sys.executable, "setup.py", "--long-description"], cwd=ROOT, BNKERNELS_URL=url)
    targets = re.findall(r"\]\(([^)]+)\)", text)
    assert all(target.startswith("https://") for target in targets)
    assert ("https://example.org/bnkernels/blob/HEAD/docs/semantics.md" in targets) == bool(url)
    assert ("https://example.org/bnkernels/raw/HEAD/docs/pictures/partition.svg" in targets) == bool(url)
    assert "bn.batch_norm_forward(" in text


def test_an_sdist_holds_what_its_tests_need(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for folder in ("cuda", "bnkernels", "tests", "tools", "benchmarks", "examples", "notebooks", "docs"):
        files = (path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
        assert {path.relative_to(ROOT).as_posix() for path in files} <= names
    assert names >= {"LICENSE", "README.md", "Makefile", "setup.py", "pyproject.toml"}


def test_importing_needs_only_numpy(python: Path, tmp_path: Path) -> None:
    code = "import sys, bnkernels; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    imported = set(run([python, "-c", code], cwd=tmp_path, PYTHONPATH=str(ROOT)).split())
    assert "numpy" in imported
    assert not imported & {"cupy", "numba", "sklearn", "scipy", "tqdm", "matplotlib", "torch"}


def test_the_kernel_folder_is_no_package() -> None:
    # With an __init__.py it would shadow NVIDIA's `cuda` on sys.path, and `import cupy` would fail.
    assert not (ROOT / "cuda" / "__init__.py").exists()
