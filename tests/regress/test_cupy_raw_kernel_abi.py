"""CuPy passes whatever width a Python number has, and nothing compares it with the kernel's parameters.

So every kernel takes one struct, and here its members are compared with the record that Python packs.
"""

from __future__ import annotations

import re
from itertools import pairwise

import numpy as np
import pytest

from bnkernels.runtime import source
from bnkernels.runtime.arguments import SUFFIX
from tests.argument_structs import LAYOUTS
from tests.regress.calls import CALLS, make_arrays
from tests.regress.device import record_of, recording

FLOAT = np.dtype(np.float32)


def argument_structs() -> dict[str, list[tuple[str, str]]]:
    """Return the structs of cuda/ that hold pointers, which only kernel arguments do: (member, type) in order."""
    structs = {}
    shared = "lib/train/network.cuh", *(f"lib/recurrent/lstm_{way}_step.cuh" for way in ("forward", "backward"))
    for file in [*(f"{stem}.cu" for stem in source.stems()), *shared]:
        text = re.sub(r"//.*", "", (source.folder() / file).read_text(encoding="utf-8"))
        for name, body in re.findall(r"^struct (\w+) \{\n(.*?)^\};", text, re.MULTILINE | re.DOTALL):
            if not re.search(r"^    (const )?\w+\* ", body, re.MULTILINE):
                continue
            members = []
            for declaration in re.findall(r"^    ([^;(){}]+);", body, re.MULTILINE):
                kind, names = re.fullmatch(r"((?:const )?(?:long long|\w+)\*?) (.*)", declaration).groups()
                members += [(member.strip(), kind) for member in names.split(",")]
            structs[name] = members
    return structs


def numpy_type(kind: str, accumulator: np.dtype) -> np.dtype:
    """Return what Python must pack for a member of this C++ type."""
    if kind.endswith("*"):
        return np.dtype(np.uint64)
    return {
        "long long": np.dtype(np.int64),
        "int": np.dtype(np.int32),
        "float": FLOAT,
        "A": accumulator,
        "T": accumulator,
    }[kind]


def test_every_argument_struct_has_its_record() -> None:
    assert set(argument_structs()) == set(LAYOUTS)


@pytest.mark.parametrize("accumulator", SUFFIX, ids=str)
@pytest.mark.parametrize("struct", LAYOUTS)
def test_cupy_raw_kernel_abi_members_agree(struct: str, accumulator: np.dtype) -> None:
    declared = argument_structs()[struct]
    layout = LAYOUTS[struct][FLOAT if "float" in dict(declared).values() else accumulator]
    members = [(name, numpy_type(kind, accumulator)) for name, kind in declared]
    assert [(name, layout.fields[name][0]) for name in layout.names] == members
    offsets = [layout.fields[name][1] for name in layout.names]
    for (before, after), (name, kind), (_, next_kind) in zip(pairwise(offsets), members, members[1:], strict=False):
        end = before + kind.itemsize
        assert after == -(-end // next_kind.itemsize) * next_kind.itemsize, (
            f"what follows {name} is not where C++ has it"
        )
    assert layout.itemsize % max(kind.itemsize for _, kind in members) == 0


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("op", CALLS)
def test_cupy_raw_kernel_abi_of_every_launch(op: str, dtype: str) -> None:
    """The argument is packed as the kernel of that data type reads it, and every pointer is where it belongs."""
    on = record_of(make_arrays(op, dtype))
    with recording() as runtime:
        CALLS[op].run(on)
        (launch,) = runtime.launches
    assert launch.entry_point.endswith(SUFFIX[np.dtype(dtype)])
    assert launch.arguments.shape == ()
    assert launch.arguments.dtype in [layouts[np.dtype(dtype)] for layouts in LAYOUTS.values()]
    members = {name: launch.arguments[name] for name in launch.arguments.dtype.names}
    aliases = {"y": "out", "first": "square" if op == "rmsprop_update" else "velocity", "moments": "parts"}
    for name in [name for name in members if launch.arguments.dtype[name] == np.uint64]:
        if members[name]:
            assert members[name] == (on.get(name) or on[aliases[name]]).address
