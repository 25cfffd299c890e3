"""Runs the PTX that NVRTC makes of the kernels, and counts its instructions; needs neither a driver nor a GPU.

It is always the newest of ``tools/compile/compilers.txt``: others put the same program into other instructions.
PTX is what ptxas makes machine code of. It has the sums, accesses and branches of the program; but a quotient is one
instruction here and several there, addresses may cost less there, and what happens at the same time is not said at all.

* `parse` takes the text apart, `run` runs a launch, with the lanes of its blocks side by side in NumPy arrays.
* `PtxRuntime` is the seam of `bnkernels.runtime.seam`: with its arrays the public ops run that way.
* `Counts` says what is counted. Lanes of a warp that have parted go on together from where the text brings them
  together; ptxas may choose another place.

What the float32 kernels consist of is supported, cooperative launches too; but neither float64 and 16-bit floats nor
tensor cores, asynchronous copies, local memory and barriers of some of the threads. Whatever is not supported raises
`PtxError` with its text. A race of threads is not noticed, but numbers that nobody has written are NaN.
"""

from __future__ import annotations

from .counts import KINDS, Counts, kind_of
from .machine import run
from .memory import GlobalMemory
from .parse import Instruction, Kernel, PtxError, parse
from .runtime import ARCHITECTURE, PtxArray, PtxRecord, PtxRuntime, registered

__all__ = [
    "ARCHITECTURE",
    "KINDS",
    "Counts",
    "GlobalMemory",
    "Instruction",
    "Kernel",
    "PtxArray",
    "PtxError",
    "PtxRecord",
    "PtxRuntime",
    "kind_of",
    "parse",
    "registered",
    "run",
]
