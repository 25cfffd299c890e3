"""Tiny kernels around a few instructions, for tests of the machine: text in, what every thread computed out."""

from __future__ import annotations

from typing import Any

import numpy as np

from bnkernels.runtime.seam import Launch

from .counts import Counts
from .machine import run
from .memory import GlobalMemory
from .parse import parse

MODULE = """
.version 8.0
.target sm_90
.address_size 64
.extern .shared .align 16 .b8 dynamic[];
.visible .entry k(  // a comment with a brace: {{
    .param .align 8 .b8 p[40]
) .maxntid 1024, 1, 1
{{
    .reg .pred %p<9>;
    .reg .f32 %f<9>;
    .reg .b16 %rs<9>;
    .reg .b32 %r<9>, %tid, %a, %b, %c, %out;
    .reg .b64 %rd<9>, %wide, %at, %from;
    .shared .align 4 .b8 fixed[512];
    mov.u32 %tid, %ctaid.x;
    mov.u32 %r1, %ntid.x;
    mov.u32 %r2, %tid.x;
    mad.lo.s32 %tid, %tid, %r1, %r2;
{inputs}
{body}
    ld.param.u64 %at, [p];
    mul.wide.s32 %from, %tid, {size};
    add.s64 %at, %at, %from;
    st.global.u{bits} [%at], {result};
    ret;
}}
"""
INPUT = """
    ld.param.u64 %at, [p+{offset}];
    mul.wide.s32 %from, %tid, 4;
    add.s64 %at, %at, %from;
    ld.global.u32 %{name}, [%at];
"""


def compute(
    body: str,
    *inputs: Any,
    out: str = "u4",
    threads: int = 0,
    blocks: int = 1,
    shared: int = 0,
    cooperative: bool = False,
) -> tuple[np.ndarray, Counts]:
    """Run `body` for every thread, with its 32-bit inputs in %a, %b, %c; return its %out or %wide, and the counts."""
    given = [np.asarray(array) for array in inputs]
    threads = threads or given[0].size // blocks
    result = np.zeros(threads * blocks, out)
    bits = 8 * result.itemsize
    loads = "".join(INPUT.format(offset=8 * (i + 1), name="abc"[i]) for i in range(len(given)))
    register = "%out" if bits == 32 else "%wide"
    text = MODULE.format(inputs=loads, body=body, size=result.itemsize, bits=bits, result=register)
    memory = GlobalMemory()
    for array in (result, *given):
        memory.allow(array.ctypes.data, array.nbytes)
    addresses = np.array([array.ctypes.data for array in (result, *given)] + [0] * (4 - len(given)), np.uint64)
    launch = Launch((blocks, 1, 1), (threads, 1, 1), shared, cooperative)
    return result, run(parse(text)["k"], launch, addresses.tobytes(), memory)


def ints(*numbers: int) -> np.ndarray:
    """Return 32-bit integers, whatever their sign."""
    return np.array([number % 2**32 for number in numbers], np.uint32)


def floats(*numbers: float) -> np.ndarray:
    """Return float32 numbers."""
    return np.array(numbers, np.float32)
