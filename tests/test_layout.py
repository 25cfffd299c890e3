"""The mirror rule and the order of the layers: one word finds everything, and every arrow points down."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import bnkernels
from bnkernels import _source

ROOT = Path(__file__).parents[1]
KERNELS = sorted((ROOT / "cuda").glob("*.cu"))
MODULES = sorted((ROOT / "bnkernels").glob("*.py"))
PYTHON = [path for folder in ("bnkernels", "tests", "benchmarks", "tools") for path in (ROOT / folder).rglob("*.py")]
VARIANT = r"(?<!_double)_(forward|backward)(_cooperative|_masked_grouped)?$|_multi_block$"
OPS = sorted({re.sub(VARIANT, "", path.stem) for path in KERNELS})

HEADER_FIELDS = ("Formulas:", "Arrays:", "Launch:", "Traffic:", "Numerics:", "Called by:")
LAYERS = [  # from the bottom; a module imports from its own layer and from those above it in this list
    {"_process"},
    {"_source"},
    {"_runtime", "_cuda"},
    {"_check", "_overlap", "activations", "_cooperative"},
    {path.stem for path in MODULES if path.stem.lstrip("_").startswith(tuple(OPS))},
    {"layers"},
    {"mlp"},
    {"optimizers"},
    {"captured_step"},
    {"__init__"},  # the public names; what is above may ask it for the version
    {"files", "archive", "documents", "memory"},
    {"data_files"},
    {"checkpoint", "data", "plots"},
    {"config"},
    {"network", "runs"},
    {"saved_run"},
    {"ensemble"},
    {"trainer", "predict", "environment", "reproduce"},
    {"tables"},
    {"cli"},
    {"__main__"},
]
CUPY_IMPORTERS = {"_cuda", "environment"}


def imports(path: Path) -> Iterator[str]:
    """Yield the dotted names of everything a module imports, at its top or inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rank(stem: str) -> int:
    """Return how far up a module is; it must be in exactly one layer."""
    (found,) = (i for i, layer in enumerate(LAYERS) if stem in layer)
    return found


def own_imports(path: Path) -> Iterator[str]:
    """Yield the stems of the modules of ours that a module imports."""
    stems = {module.stem for module in MODULES}
    for name in imports(path):
        package, *rest = name.split(".")
        if package == "bnkernels":
            yield rest[0] if rest and rest[0] in stems else "__init__"


@pytest.mark.parametrize("op", OPS)
def test_one_word_finds_everything(op: str) -> None:
    for mirror in (f"bnkernels/{op}.py", f"tests/test_{op}.py", f"benchmarks/bench_{op}.py"):
        assert (ROOT / mirror).is_file(), f"cuda/{op}*.cu needs {mirror}"


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.name)
def test_the_header_of_a_kernel_is_its_contract(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    header = lines[: next(i for i, line in enumerate(lines) if not line.startswith("//"))]
    found = [field for line in header for field in HEADER_FIELDS if line.startswith(f"// {field}")]
    assert tuple(found) == HEADER_FIELDS
    (wrapper,) = (line.split(":", 1)[1].strip() for line in header if line.startswith("// Called by:"))
    assert (ROOT / wrapper).is_file()


def test_only_kernel_sources_are_in_the_kernel_folder() -> None:
    files = {path.relative_to(ROOT / "cuda") for path in (ROOT / "cuda").rglob("*") if path.is_file()}
    assert {(path.parts[0] == "lib", path.suffix) for path in files} == {(False, ".cu"), (True, ".cuh")}


def test_every_module_has_its_layer() -> None:
    assert sorted(path.stem for path in MODULES) == sorted(stem for layer in LAYERS for stem in layer)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_imports_point_down(path: Path) -> None:
    for imported in own_imports(path):
        assert rank(imported) <= rank(path.stem), f"{path.stem} is below {imported} and must not import it"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_only_the_runtime_imports_cupy_and_nothing_imports_tests(path: Path) -> None:
    packages = {name.partition(".")[0] for name in imports(path)}
    assert "cupy" not in packages or path.stem in CUPY_IMPORTERS
    assert not packages & {"tests", "benchmarks", "torch", "jax"}


def test_the_compiler_options_are_in_one_place() -> None:
    flag = _source.OPTIONS[1]
    assert [path.stem for path in PYTHON if f'"{flag}"' in path.read_text(encoding="utf-8")] == ["_source"]


def test_public_names_are_sorted_and_there() -> None:
    assert bnkernels.__all__ == sorted(bnkernels.__all__)
    assert all(hasattr(bnkernels, name) for name in bnkernels.__all__)


@pytest.mark.parametrize("path", [*KERNELS, *PYTHON], ids=lambda path: path.name)
def test_a_file_is_one_thing(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 350


@pytest.mark.parametrize("path", PYTHON, ids=lambda path: path.name)
def test_a_function_fits_a_screen(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            start = node.body[1].lineno if ast.get_docstring(node) and node.body[1:] else node.lineno
            assert node.end_lineno - start < 60, f"{node.name} has {node.end_lineno - start + 1} lines"
