"""The naive answer to the question on a GPU: sum up, finalise, apply, where each phase is a launch of its own.

No block waits for another: the end of a launch is the barrier. ``three_launches.cu`` holds the kernels.
"""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness.case import Arrays, Call, Case, NotSupportedError, Provider
from benchmarks.harness.places import why_absent
from benchmarks.peers import EPSILON, MOMENTUM
from bnkernels.runtime.arguments import address_of, arguments_type, pack
from bnkernels.runtime.seam import Launch, ceil_div
from bnkernels.runtime.source import OPTIONS, folder

SOURCE = Path(__file__).with_suffix(".cu")
SIZES = "rows channels rows_of_block blocks"
FORWARD = arguments_type("x gamma beta running_mean running_var mean rstd partial y", SIZES, "momentum eps", "relu")
BACKWARD = arguments_type("x dy gamma beta mean rstd dgamma dbeta partial dx", SIZES, "", "relu")
WIDTH, WORKERS, WORKERS_TO_FINALISE = 32, 8, 32  # threads of a block: channels, and examples or blocks of examples
FEWEST_ROWS, MOST_BLOCKS = 64, 512  # so that a block has work, and the few that finalise have not too much
PHASES = ("sums", "finalise", "apply")
GRADIENTS = ("dx", "dgamma", "dbeta")


def source() -> str:
    """Return the kernels' text with the project's header in place of its ``#include`` line, for CuPy's cache."""
    header = (folder() / "lib/kernel.cuh").read_text(encoding="utf-8").replace("#pragma once", "")
    text = SOURCE.read_text(encoding="utf-8")
    before, _, after = text.partition('#include "lib/kernel.cuh"\n')
    number = before.count("\n") + 2
    return f'{before}#line 1 "cuda/lib/kernel.cuh"\n{header}#line {number} "{SOURCE.name}"\n{after}'


@cache
def kernels(direction: str) -> tuple[Any, ...]:
    """Return the kernels of the three phases; CuPy compiles them at the first launch on a device."""
    import cupy

    module = cupy.RawModule(code=source(), options=OPTIONS)
    return tuple(module.get_function(f"three_launches_{direction}_{phase}") for phase in PHASES)


def launches(case: Case) -> tuple[Launch, Launch, Launch]:
    """Return the launches of the three phases: pure function of the shape, chosen without measurements."""
    rows, channels = case.shape
    planes = 3 if case.direction == "forward" else 2
    columns, blocks = ceil_div(channels, WIDTH), ceil_div(rows, rows_of_block(case))

    def launch(blocks: int, workers: int, planes: int) -> Launch:
        return Launch((columns, blocks, 1), (WIDTH, workers, 1), planes * WIDTH * workers * 4)

    return launch(blocks, WORKERS, planes), launch(1, WORKERS_TO_FINALISE, planes), launch(blocks, WORKERS, 0)


def rows_of_block(case: Case) -> int:
    """Return how many examples a block adds up."""
    return max(FEWEST_ROWS, ceil_div(case.shape[0], MOST_BLOCKS))


def prepare(case: Case, arrays: Arrays) -> Call:
    """Prepare a case.

    Raises
    ------
    NotSupportedError
        For anything but float32 matrices, and for a residual.
    """
    if (case.layout, case.dtype) != ("NC", "float32") or case.epilogue not in ("", "relu"):
        raise NotSupportedError("not supported: written for float32 matrices without a residual")
    import cupy

    forward = case.direction == "forward"
    layout = (FORWARD if forward else BACKWARD)[np.dtype(np.float32)]
    phases = tuple(zip(kernels(case.direction), launches(case), strict=True))
    sizes = (*case.shape, rows_of_block(case), phases[0][1].grid[1])
    vector, out = partial(cupy.empty, case.shape[1], np.float32), cupy.empty_like(arrays["x"])
    used = arrays | {"partial": cupy.empty((3, sizes[3], case.shape[1]), np.float32)}
    if forward:
        used |= {"mean": vector(), "rstd": vector(), "y": out}
    else:
        x = arrays["x"]
        used |= {"mean": x.mean(axis=0), "rstd": (x.var(axis=0) + EPSILON) ** -0.5}
        used |= {"dgamma": vector(), "dbeta": vector(), "dx": out}
    scalars = (MOMENTUM, EPSILON) if forward else ()
    pointers = [used[name].data.ptr for name in layout.names if name in used]
    arguments = pack(layout, *pointers, *sizes, *scalars, case.epilogue == "relu")
    outputs = tuple(used[name] for name in (("y", "running_mean", "running_var") if forward else GRADIENTS))

    pointer = cupy.cuda.function.CPointer

    def call() -> tuple:
        for kernel, launch in phases:
            kernel(launch.grid, launch.block, (pointer(address_of(arguments)),), shared_mem=launch.shared_bytes)
        return outputs

    call.arrays = used  # the kernels have addresses only
    return call


def describe(case: Case, arrays: Arrays) -> str:
    """Return how many blocks of examples there are."""
    return f"blocks of examples: {launches(case)[0].grid[1]}"


PROVIDERS = (
    Provider(
        "three phases, three launches",
        "cuda",
        prepare,
        partial(why_absent, "cuda"),
        engine="cupy",
        describe=describe,
    ),
)
