"""The stand-in for CuPy against the real package: it has no name, parameter or key that CuPy does not have.

The real one is imported, which needs neither a driver nor a GPU. Of everything that takes a launch as far as the driver
it is asked what it accepts, too.
"""

from __future__ import annotations

import ast
import functools
import inspect
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from bnkernels.runtime.arguments import address_of, pack
from tools import backends, fake_cupy
from tools.fake_cupy import arrays, graphs, kernels
from tools.fake_cupy import streams as fake_cupy_streams
from tools.real_cupy import attribute_keys, members, real, signature

MAKERS = {"fake_cupy": fake_cupy.make, "fake_cupy_streams": fake_cupy_streams.make}
CLASSES = {  # class of the stand-in, and the path of CuPy's
    fake_cupy.Device: "cuda.Device",
    fake_cupy.Array: "ndarray",
    arrays.Array: "ndarray",
    arrays.Pointer: "cuda.MemoryPointer",
    graphs.Stream: "cuda.Stream",
    graphs.Graph: "cuda.Graph",
    kernels.CPointer: "cuda.function.CPointer",
    kernels.CNumpyArray: "cuda.function.CNumpyArray",
    kernels.Function: "cuda.Function",
    kernels.RawKernel: "RawKernel",
    kernels.RawModule: "RawModule",
    fake_cupy_streams.Event: "cuda.Event",
    fake_cupy_streams.Random: "random.Generator",
}
OWN = {  # for tests, and for other parts of the stand-in
    "module": {"driver"},
    "ndarray": {"driver", "view_of"},
    "RawKernel": {"driver", "run"},
    "cuda.Graph": {"work"},
    "cuda.Event": {"recorded"},
}
POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
FREE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


@pytest.fixture(params=MAKERS)
def cupy(request: pytest.FixtureRequest) -> types.ModuleType:
    """Return a stand-in."""
    return MAKERS[request.param](backends.emulated_runtime())


def at(path: str) -> Any:
    """Return what CuPy has at a path."""
    return functools.reduce(getattr, path.split("."), real())


def contents(space: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Return what a module of the stand-in holds, with paths."""
    for name, value in vars(space).items():
        if name.startswith("_") or (not path and name in OWN["module"]):
            continue
        yield path + name, value
        if isinstance(value, types.SimpleNamespace):
            yield from contents(value, f"{path}{name}.")


def taken(function: Callable[..., Any]) -> inspect.Signature:
    """Return what the stand-in's function takes, without what is bound."""
    if isinstance(function, functools.partial):
        given = [*taken(function.func).parameters.values()][len(function.args) :]
        return inspect.Signature([parameter for parameter in given if parameter.name not in function.keywords])
    return inspect.signature(function)


def compare(what: str, ours: inspect.Signature, theirs: inspect.Signature) -> None:
    """Fail where the stand-in takes what CuPy does not."""
    known = theirs.parameters
    free = {parameter.kind for parameter in known.values()} & set(FREE)
    places = [parameter.name for parameter in known.values() if parameter.kind in POSITIONAL]
    for place, (name, parameter) in enumerate(ours.parameters.items()):
        if parameter.kind in FREE:
            continue
        assert name in known or free, f"{what}: CuPy has no parameter {name}, it takes {theirs}"
        if name in known and parameter.kind in POSITIONAL:
            assert not places or places.index(name) == place, f"{what}: {name} comes elsewhere in CuPy's {theirs}"
        if name in known and parameter.default is not inspect.Parameter.empty:
            assert known[name].default is not inspect.Parameter.empty, f"{what}: CuPy needs {name}: {theirs}"


@pytest.mark.emulator
def test_every_name_of_the_stand_in_is_one_of_cupys(cupy: types.ModuleType) -> None:
    paths = dict(contents(cupy))
    assert {"cuda.Stream", "cuda.driver.occupancyMaxActiveBlocksPerMultiprocessor", "RawModule"} <= set(paths)
    for path, value in paths.items():
        theirs = at(path)
        if path in ("ndarray", "cuda.Function", "cuda.function.Function"):  # which the stand-in makes in its own way
            continue
        if callable(value) and (known := signature(theirs)) is not None:
            compare(path, taken(value), known)


@pytest.mark.parametrize("ours", CLASSES, ids=lambda kind: f"{kind.__module__.split('.')[-1]}.{kind.__name__}")
def test_every_member_of_the_stand_in_is_one_of_cupys(ours: type) -> None:
    path = CLASSES[ours]
    theirs = at(path)
    names = {name for kind in ours.__mro__[:-1] for name in vars(kind)} | set_by(ours)
    public = {name for name in names if not name.startswith("_")} - OWN.get(path, set())
    assert public <= members(theirs)
    for name in sorted(public):
        member, known = getattr(ours, name, None), getattr(theirs, name, None)
        if inspect.isfunction(member) and (parameters := signature(known)) is not None:
            compare(f"{path}.{name}", inspect.signature(member), parameters)


def set_by(kind: type) -> set[str]:
    """Return the attributes that methods of the stand-in set on themselves."""
    trees = (ast.walk(ast.parse(inspect.getsource(part))) for part in kind.__mro__[:-1])
    stores = [node for tree in trees for node in tree if isinstance(getattr(node, "ctx", None), ast.Store)]
    return {node.attr for node in stores if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self"}


def test_the_attributes_of_a_device_have_cupys_keys() -> None:
    """ComputeCapabilityMajor, which a stand-in once had, is not among them."""
    keys = attribute_keys()
    assert len(keys) > 100
    assert set(fake_cupy.ATTRIBUTES) <= set(fake_cupy_streams.ATTRIBUTES) <= keys


def test_errors_of_cuda_are_runtime_errors_as_the_stand_ins_are() -> None:
    assert issubclass(real().cuda.runtime.CUDARuntimeError, RuntimeError)
    assert issubclass(real().cuda.driver.CUDADriverError, RuntimeError)


# ---- launches, as far as the driver ---------------------------------------------------------------------------------

RECORD = pack(np.dtype([("x", np.uint64), ("n", np.int32)], align=True), 1, 2)
ARGUMENTS = {
    "nothing": None,
    "a number": 1,
    "a float": 1.5,
    "a bool": True,
    "a NumPy number": np.float32(1),
    "an array of one": np.zeros((1, 1)),
    "a struct": RECORD,
    "an array of two": np.zeros(2),
    "two structs": np.zeros(2, RECORD.dtype),
    "text": "text",
    "a list": [1],
    "an object": object(),
}
CALLS: dict[str, Callable[[Any, Any], Any]] = {
    "an address": lambda f, p: f((1,), (1, 1), (p,), 0, STREAM, enable_cooperative_groups=True),
    "by name": lambda f, p: f(grid=(1, 1, 1), block=(1,), args=[p], shared_mem=0, stream=STREAM),
    "no tuple": lambda f, p: f([1], (1,), (p,), 0, STREAM),
    "a number for a block": lambda f, p: f((1,), 1, (p,), 0, STREAM),
    "another option": lambda f, p: f((1,), (1,), (p,), 0, STREAM, cooperative=True),
    "too much": lambda f, p: f((1,), (1,), (p,), 0, STREAM, True, None),
    **{f"{name} for an argument": lambda f, _, a=a: f((1,), (1,), (a,), 0, STREAM) for name, a in ARGUMENTS.items()},
}
STREAM = types.SimpleNamespace(ptr=0)


def outcome(module: Any, call: Callable[[Any, Any], Any]) -> type:
    """Return the error of a launch: TypeError for what CuPy refuses, RuntimeError from the driver for the rest."""
    function = module.Function.__new__(module.Function)  # without a kernel, so that no driver runs it
    with pytest.raises((TypeError, RuntimeError)) as caught:
        call(function, module.CPointer(address_of(RECORD)))
    return TypeError if issubclass(caught.type, TypeError) else RuntimeError


@pytest.mark.parametrize("name", CALLS)
def test_the_stand_in_launches_what_cupy_launches(name: str) -> None:
    theirs = outcome(real().cuda.function, CALLS[name])
    assert outcome(kernels.MODULE, CALLS[name]) is theirs
    if name in ("an address", "by name"):
        assert theirs is RuntimeError, "what every launch of ours passes, CuPy refuses"


def test_an_address_is_what_cupy_passes_to_the_driver() -> None:
    assert real().cuda.function.CPointer(address_of(RECORD)).ptr == RECORD.ctypes.data
    assert kernels.CPointer(address_of(RECORD)).ptr == RECORD.ctypes.data


def test_streams_can_own_their_workspace() -> None:
    """By a weak reference; and the default streams have the handles that the CUDA runtime here knows."""
    runtime, streams = real().cuda.runtime, real().cuda.Stream
    assert weakref.ref(streams.null)() is streams.null
    assert (streams.null.ptr, streams.ptds.ptr) == (0, runtime.streamPerThread)
    assert (runtime.streamLegacy, runtime.streamPerThread) == (1, 2)
