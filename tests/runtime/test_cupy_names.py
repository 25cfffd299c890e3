"""Every name of CuPy that the package and the benchmarks use is one that the installed CuPy has, and is called so.

A GPU would find the others at run time, each in its own benchmark. Names are read from the sources: what hangs on the
module `cupy`, and on the arrays, streams, events, devices, kernels and graphs that come from it, as far as a reader of
the text can tell what they are.
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tools.real_cupy import attribute_keys, members, real, signature

ROOT = Path(__file__).parents[2]
FILES = [
    path
    for folder in ("bnkernels", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if path.name != "dry_run.py"  # it puts the stand-in in CuPy's place, and speaks to that
]
# Types of names, in files that use them for nothing else.
VARIABLES = {
    "bnkernels/runtime/cuda.py": {
        **dict.fromkeys(("array", "like", "memory", "found"), "ndarray"),
        "stream": "cuda.Stream",
        "graph": "cuda.Graph",
        "kernel": "RawKernel",
        "function": "cuda.Function",
        "given": "attributes",
    },
    "benchmarks/gpu/device.py": {"self.stream": "cuda.Stream", "graph": "cuda.Graph"},
    "benchmarks/gpu/facts.py": {
        "gpu.stream": "cuda.Stream",
        "gpu.attributes": "attributes",
        **dict.fromkeys(("counting", "short", "long"), "cuda.Graph"),
    },
    "benchmarks/gpu/launch_facts.py": {
        "gpu.stream": "cuda.Stream",
        "function": "cuda.Function",
        "given.count": "ndarray",
    },
    "benchmarks/gpu/sanitize.py": {"kernel": "RawKernel"},
    "benchmarks/peers/three_launches.py": {"kernel": "RawKernel"},
}
RESULTS = {  # types of the results of calls
    **dict.fromkeys(("zeros", "empty", "full", "ones", "arange", "asarray", "from_dlpack", "empty_like"), "ndarray"),
    "cuda.get_current_stream": "cuda.Stream",
    "cuda.Stream.end_capture": "cuda.Graph",
    "cuda.Stream.__enter__": "cuda.Stream",
    "cuda.Device.use": "cuda.Device",
    "RawModule.get_function": "RawKernel",
    "ndarray.astype": "ndarray",
    "ndarray.copy": "ndarray",
}
PARTS = {
    "ndarray.device": "cuda.Device",
    "ndarray.data": "cuda.MemoryPointer",
    "RawKernel.kernel": "cuda.Function",
    "cuda.Device.attributes": "attributes",
}
MODULES = {"cupy_backends.cuda.api.driver": "cuda.driver"}


class Thing(NamedTuple):
    """Meaning of an expression: a name of CuPy by its path, or an instance of the class there."""

    path: str
    instance: bool = False


class Use(NamedTuple):
    """A name of CuPy's in a source."""

    where: str
    path: str
    call: ast.Call | None = None


class Reader(ast.NodeVisitor):
    """Finds the uses in one file."""

    def __init__(self, path: Path) -> None:
        self.name = path.relative_to(ROOT).as_posix()
        self.known = {name: Thing(path, True) for name, path in VARIABLES.get(self.name, {}).items()}
        self.uses: list[Use] = []
        self.visit(ast.parse(path.read_text(encoding="utf-8")))

    def thing(self, node: ast.AST) -> Thing | None:
        """Return what an expression is, or None for what is not CuPy's."""
        text = ast.unparse(node)
        if text in self.known:
            return self.known[text]
        if text in ("cupy", "xp", "_cupy()") or text.endswith((".cupy", ".xp")):
            return Thing("")
        if isinstance(node, ast.Call):
            if ast.unparse(node.func) == "importlib.import_module" and isinstance(node.args[0], ast.Constant):
                path = MODULES.get(node.args[0].value)
                return path and Thing(path)
            made = self.thing(node.func)
            if made is None:
                return None
            if made.path in RESULTS:
                return Thing(RESULTS[made.path], True)
            return Thing(made.path, True) if not made.instance and is_class(made.path) else None
        if isinstance(node, ast.Attribute) and (owner := self.thing(node.value)) is not None:
            path = f"{owner.path}.{node.attr}".lstrip(".")
            return Thing(PARTS[path], True) if path in PARTS else Thing(path)
        return None

    def visit_Attribute(self, node: ast.Attribute) -> None:
        """Note a name that hangs on something of CuPy's."""
        owner = self.thing(node.value)
        if owner is not None:
            self.uses.append(Use(f"{self.name}:{node.lineno}", f"{owner.path}.{node.attr}".lstrip(".")))
        self.generic_visit(node)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        """Note a key of a device's attributes."""
        if self.thing(node.value) == Thing("attributes", True) and isinstance(node.slice, ast.Constant):
            self.uses.append(Use(f"{self.name}:{node.lineno}", f"attributes.{node.slice.value}"))
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        """Note how something of CuPy's is called."""
        called = self.thing(node.func)
        if called is not None:
            path = f"{called.path}.__call__" if called.instance else called.path
            self.uses.append(Use(f"{self.name}:{node.lineno}", path, node))
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        """Remember what a variable stands for."""
        self.generic_visit(node)
        pairs = [(target, node.value) for target in node.targets]
        if isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple):
            pairs = list(zip(node.targets[0].elts, node.value.elts, strict=False))
        for target, value in pairs:
            name, thing = ast.unparse(target), self.thing(value)
            if name in VARIABLES.get(self.name, {}):
                continue
            if thing is not None:
                self.known[name] = thing
            else:
                self.known.pop(name, None)

    def visit_With(self, node: ast.With) -> None:
        """Remember what a device or a stream is called in its context."""
        for item in node.items:
            thing = self.thing(item.context_expr)
            if thing is not None and item.optional_vars is not None:
                self.known[ast.unparse(item.optional_vars)] = thing
        self.generic_visit(node)


def found(path: str) -> Any:
    """Return what CuPy has at a path; AttributeError where there is nothing."""
    thing = real()
    for name in filter(None, path.split(".")):
        if isinstance(thing, type) and name in members(thing):
            thing = getattr(thing, name, None)
        else:
            thing = getattr(thing, name)
    return thing


def is_class(path: str) -> bool:
    """Tell whether CuPy has a class there."""
    try:
        return isinstance(found(path), type)
    except AttributeError:  # which is seen where the name is
        return False


@cache
def uses() -> tuple[Use, ...]:
    """Return all uses."""
    return tuple(use for path in FILES for use in Reader(path).uses)


def test_names_that_are_used_are_found() -> None:
    """As many as this, and of every kind: else the test below would look at nothing."""
    paths = {use.path for use in uses()}
    assert paths > {
        "RawModule.get_function",
        "RawKernel.preferred_shared_memory_carveout",
        "attributes.MultiProcessorCount",
        "cuda.Device.use",
        "cuda.Function.__call__",
        "cuda.Graph.launch",
        "cuda.MemoryPointer.device_id",
        "cuda.Stream.begin_capture",
        "cuda.driver.launchKernel",
        "cuda.driver.occupancyMaxActiveBlocksPerMultiprocessor",
        "cuda.get_elapsed_time",
        "cuda.runtime.memGetInfo",
        "ndarray.fill",
        "random.default_rng",
        "zeros",
    }
    assert len(paths) > 80


def test_every_name_exists() -> None:
    absent = []
    for use in uses():
        if use.path.startswith("attributes."):
            if use.path.removeprefix("attributes.") not in attribute_keys():
                absent.append(use)
            continue
        try:
            found(use.path)
        except AttributeError:
            absent.append(use)
    assert not absent


def test_what_is_called_takes_such_arguments() -> None:
    refused, compared = [], 0
    for where, path, call in uses():
        if call is None or any(isinstance(arg, ast.Starred) for arg in call.args):
            continue
        takes = signature(found(path))
        if takes is None:
            continue
        compared += 1
        first = [None] if [*takes.parameters][:1] == ["self"] else []
        named = {keyword.arg: None for keyword in call.keywords if keyword.arg}
        try:
            takes.bind_partial(*first, *call.args, **named)
        except TypeError as error:
            refused.append((where, path, str(error), str(takes)))
    assert not refused
    assert compared > 60


@pytest.mark.parametrize(
    ("source", "path"),
    [
        ("cupy.cuda.Device().attributes['ComputeCapabilityMajor']", "attributes.ComputeCapabilityMajor"),
        ("cupy.cuda.Stream().is_captured()", "cuda.Stream.is_captured"),
        ("cupy.cuda.cudnn", "cuda.cudnn"),
        ("cupy.zeros(3).device.capability", "cuda.Device.capability"),
    ],
)
def test_a_name_that_cupy_does_not_have_is_seen(source: str, path: str) -> None:
    reader = Reader.__new__(Reader)
    reader.name, reader.known, reader.uses = "a.py", {}, []
    reader.visit(ast.parse(source))
    assert path in [use.path for use in reader.uses]
    name = path.removeprefix("attributes.")
    if name != path:
        assert name not in attribute_keys()
    else:
        with pytest.raises(AttributeError):
            found(path)
