"""The mirror rule and the order of the layers: one word finds everything, and every arrow points down."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

import bnkernels
from bnkernels.runtime import source

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "bnkernels"
KERNELS = sorted((ROOT / "cuda").glob("*.cu"))
SOURCES = sorted((ROOT / "cuda").rglob("*.cu*"))
PYTHON = [
    path
    for folder in ("bnkernels", "tests", "benchmarks", "tools", "examples")
    for path in (ROOT / folder).rglob("*.py")
]
VARIANT = r"(?<!_double)_(forward|backward)(_cooperative)?$|_multi_block$"
OPS = sorted(
    {re.sub(VARIANT, "", path.stem) for path in KERNELS} - {"batch_norm_double_backward", "batch_norm_statistics"}
)

HEADER_FIELDS = ("Formulas:", "Arrays:", "Launch:", "Traffic:", "Numerics:", "Called by:")
FLOORS = [  # from the bottom: a module imports from its own room, and from those on lower floors
    {"_process", "_version"},
    {"runtime"},
    {"ops.activations", "ops.activations_cpu", "ops.exact_sums", "ops.gemm"},
    {"ops.matmul"},
    {"ops.*"},  # every op that is not listed
    {"ops.linear_batch_norm", "ops.rms_norm", "ops.instance_norm", "ops.group_norm"},
    {"ops.linear_softmax_cross_entropy"},
    {"ops.fused_training"},
    {"distributed"},
    {"nn"},
    {"compat"},
    {""},  # the public names
    {"train"},
    {"cli"},
    {"__main__"},
]
MOST_LINES = 350  # most, without a reason at the top of the file
CUPY_IMPORTERS = {"runtime.cuda", "train.environment"}
TORCH_IMPORTERS = {"compat.torch", "compat.torch_autograd"}


def module_of(path: Path) -> str:
    """Return the dotted name of a module inside the package; that of a folder for its ``__init__.py``."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".")


MODULES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(path: Path) -> Iterator[str]:
    """Yield the dotted names of everything a module imports, at its top or inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(path: Path) -> Iterator[str]:
    """Yield the modules of ours that a module imports."""
    for name in imports(path):
        package, _, rest = name.partition(".")
        if package == "bnkernels":
            while rest not in MODULES:
                rest = rest.rpartition(".")[0]
            yield rest


def room(module: str) -> str:
    """Return the room that a module is in: the first word of its name, of an op the first two."""
    return ".".join(module.split(".")[: 2 if module.startswith("ops.") else 1])


def floor(module: str) -> int:
    """Return how far up a module is."""
    levels = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    one = room(module)
    return levels["ops.*" if one.startswith("ops.") and one not in levels else one]


@pytest.mark.parametrize("op", OPS)
def test_one_word_finds_everything(op: str) -> None:
    assert f"ops.{op}" in MODULES, f"cuda/{op}*.cu needs bnkernels/ops/{op}"
    for mirror in (f"tests/ops/test_{op}.py", f"benchmarks/ops/bench_{op}.py"):
        assert (ROOT / mirror).is_file(), f"cuda/{op}*.cu needs {mirror}"


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.name)
def test_the_header_of_a_kernel_is_its_contract(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    header = lines[: next(i for i, line in enumerate(lines) if not line.startswith("//"))]
    found = [field for line in header for field in HEADER_FIELDS if line.startswith(f"// {field}")]
    assert tuple(found) == HEADER_FIELDS
    (wrapper,) = (line.split(":", 1)[1].strip() for line in header if line.startswith("// Called by:"))
    assert (ROOT / wrapper).is_file()


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_lines_of_kernels_have_120_columns_and_comments_begin_with_a_term(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [number for number, line in enumerate(lines, 1) if len(line) > 120] == []
    blocks = [line for before, line in pairwise(["", *lines]) if "//" in line and not before.lstrip().startswith("//")]
    assert [line for line in blocks if re.search(r"// (Of|What|Who|Whose|So many|How)\b", line)] == []


def test_only_kernel_sources_are_in_the_kernel_folder() -> None:
    files = {path.relative_to(ROOT / "cuda") for path in (ROOT / "cuda").rglob("*") if path.is_file()}
    assert {(path.parts[0] == "lib", path.suffix) for path in files} == {(False, ".cu"), (True, ".cuh")}


def test_every_room_is_on_a_floor() -> None:
    rooms, listed = {room(module) for module in MODULES}, {room for rooms in FLOORS for room in rooms}
    assert listed - rooms == {"ops.*"}
    assert [room for room in rooms - listed if not room.startswith("ops.")] == ["ops"]


@pytest.mark.parametrize("module", sorted(MODULES.keys() - {"ops"}))
def test_imports_point_down(module: str) -> None:
    for imported in own_imports(MODULES[module]):
        below = floor(imported) < floor(module)
        assert below or room(imported) == room(module), f"{module} is not above {imported} and must not import it"


def test_no_imports_go_in_circles() -> None:
    arrows = {module: set(own_imports(path)) - {module} for module, path in MODULES.items()}
    while free := {module for module, others in arrows.items() if not others & arrows.keys()}:
        for module in free:
            del arrows[module]
    assert not arrows, "these import one another"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_only_the_runtime_imports_cupy_and_nothing_imports_tests(module: str) -> None:
    packages = {name.partition(".")[0] for name in imports(MODULES[module])}
    assert "cupy" not in packages or module in CUPY_IMPORTERS
    assert not packages & {"tests", "tools", "benchmarks", "jax"}
    assert "torch" not in packages or module in TORCH_IMPORTERS
    if module:  # the public names load the layers when they are asked for
        assert "typing.TYPE_CHECKING" not in imports(MODULES[module]), "it would hide an arrow"


def test_nothing_imports_the_tests() -> None:
    for path in PYTHON:
        assert "tests" in path.parts or not any(name.partition(".")[0] == "tests" for name in imports(path)), path


def test_the_compiler_options_are_in_one_place() -> None:
    flag = source.OPTIONS[1]
    assert [path.stem for path in PYTHON if f'"{flag}"' in path.read_text(encoding="utf-8")] == ["source"]


def test_public_names_are_sorted_and_there() -> None:
    assert bnkernels.__all__ == sorted(bnkernels.__all__)
    assert all(hasattr(bnkernels, name) for name in bnkernels.__all__)


def test_a_file_is_one_sentence() -> None:
    for path in PYTHON:
        text = path.read_text(encoding="utf-8")
        docstring = ast.get_docstring(ast.parse(text)) or ""
        sentence = docstring.partition("\n\n")[0]
        assert sentence.endswith((".", ":")), f"{path}: its docstring begins with one sentence that says what it is"
        assert len(text.splitlines()) <= MOST_LINES or "Long because" in docstring, f"{path} does not say why"


def test_a_function_fits_a_screen() -> None:
    for path in PYTHON:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                start = node.body[1].lineno if ast.get_docstring(node) and node.body[1:] else node.lineno
                assert node.end_lineno - start < 60, f"{path}: {node.name} has {node.end_lineno - start + 1} lines"
