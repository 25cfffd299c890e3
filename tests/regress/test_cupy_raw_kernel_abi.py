"""CuPy passes whatever width a Python number has, and nothing compares it with the kernel's parameters.

So every kernel takes one struct, and here its members are compared with the record that Python packs.
"""

from __future__ import annotations

import re
from itertools import pairwise

import numpy as np
import pytest

from bnkernels.ops.batch_norm.in_parts import ARGUMENTS as STATISTICS
from bnkernels.ops.batch_norm.launch import ARGUMENTS as BATCH_NORM
from bnkernels.ops.fused_training.launch import ARGUMENTS as FUSED_TRAINING
from bnkernels.ops.layer_norm.launch import ARGUMENTS as LAYER_NORM
from bnkernels.ops.linear_batch_norm.launch import ARGUMENTS as LINEAR_BATCH_NORM
from bnkernels.ops.mini_batch import ARGUMENTS as MINI_BATCH
from bnkernels.ops.parameter_update import ARGUMENTS as PARAMETER_UPDATE
from bnkernels.ops.softmax_cross_entropy import ARGUMENTS as SOFTMAX_CROSS_ENTROPY
from bnkernels.runtime import source
from bnkernels.runtime.arguments import SUFFIX
from tests.regress.calls import CALLS, make_arrays
from tests.regress.device import record_of, recording

LAYOUTS = {
    "BatchNormForward": BATCH_NORM["forward"],
    "BatchNormInference": BATCH_NORM["inference"],
    "BatchNormBackward": BATCH_NORM["backward"],
    "BatchNormDoubleBackward": BATCH_NORM["double_backward"],
    "BatchNormForwardCooperative": dict.fromkeys(SUFFIX, BATCH_NORM["forward_cooperative"][np.dtype("f4")]),
    "BatchNormBackwardCooperative": dict.fromkeys(SUFFIX, BATCH_NORM["backward_cooperative"][np.dtype("f4")]),
    "BatchNormForwardMaskedGrouped": BATCH_NORM["forward_masked_grouped"],
    "BatchNormBackwardMaskedGrouped": BATCH_NORM["backward_masked_grouped"],
    "BatchNormStatistics": STATISTICS,
    "FusedTraining": FUSED_TRAINING,
    "LayerNormForward": LAYER_NORM["forward"],
    "LayerNormBackward": LAYER_NORM["backward"],
    "LinearBatchNormForward": LINEAR_BATCH_NORM["forward"],
    "LinearBatchNormBackward": LINEAR_BATCH_NORM["backward"],
    "MiniBatch": MINI_BATCH,
    "SoftmaxCrossEntropy": SOFTMAX_CROSS_ENTROPY,
    "ParameterUpdate": PARAMETER_UPDATE,
}


def argument_structs() -> dict[str, list[tuple[str, str]]]:
    """Return the structs of cuda/ that hold pointers, which only kernel arguments do: (member, type) in order."""
    structs = {}
    for file in [*(f"{stem}.cu" for stem in source.stems()), "lib/train/network.cuh"]:
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
        "float": np.dtype(np.float32),
        "A": accumulator,
        "T": accumulator,
    }[kind]


def test_every_argument_struct_has_its_record() -> None:
    assert set(argument_structs()) == set(LAYOUTS)


@pytest.mark.parametrize("accumulator", SUFFIX, ids=str)
@pytest.mark.parametrize("struct", LAYOUTS)
def test_cupy_raw_kernel_abi_members_agree(struct: str, accumulator: np.dtype) -> None:
    layout = LAYOUTS[struct][accumulator]
    members = [(name, numpy_type(kind, accumulator)) for name, kind in argument_structs()[struct]]
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
    aliases = {"y": "out", "first": "velocity", "mean": "running_mean", "rstd": "running_var", "moments": "parts"}
    for name in [name for name in members if launch.arguments.dtype[name] == np.uint64]:
        if members[name] and name not in ("mean_low", "rstd", "mean"):
            assert members[name] == (on.get(name) or on[aliases[name]]).address
    if op == "backward":
        start, row = on["statistics"].address, on["statistics"].strides[0]
        assert [members[name] for name in ("mean", "mean_low", "rstd")] == [start, start + row, start + 2 * row]
    if op == "inference_backward":
        expected = [on["running_mean"].address, 0, on["running_var"].address]
        assert [members[name] for name in ("mean", "mean_low", "rstd")] == expected
