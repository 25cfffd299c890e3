"""One kernel in three stages, ``stages.cu``, and ours: bytes counted on the emulator, instructions of the machine code.

``python -m benchmarks.stages`` prints the table for 64 examples of 20 and of 1024 neurons. All loops of the stages are
unrolled, so that a kernel's instructions are those that a thread executes. Times on a GPU: not yet measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

import bnkernels as bn
from benchmarks.counts.devices import H200
from bnkernels.runtime import source
from bnkernels.runtime.arguments import arguments_type, pack
from bnkernels.runtime.seam import Launch, ceil_div
from tools.backends import emulated_runtime
from tools.compile import nvrtc
from tools.emulator import EmulatorRuntime
from tools.emulator.build import read_sources
from tools.emulator.runtime import LaunchRecord

SOURCE = Path(__file__).with_suffix(".cu")
ROWS, NEURONS = 64, (20, 1024)
ARGUMENTS = arguments_type("x gamma beta y", "channels", "eps", "")[np.dtype(np.float32)]
ARCHITECTURE = 90
STAGES = {  # neurons of a block, its threads, bytes of its shared memory
    "three_reads": (32, (32, 1, 1), 0),
    "on_chip": (32, (32, 16, 1), 4 * 512),
    "vectors": (128, (32, 16, 1), 16 * 512),
}


class Stage(NamedTuple):
    """Counts of a launch, and of its code.

    Attributes
    ----------
    name : str
        The stage, or the name of our kernel.
    neurons, warps : int
        Neurons of the layer, and warps of the launch.
    read, written : float
        Bytes of x that are read, and of y that are written, over those of the array.
    barriers, registers : int
        Barriers of a block; registers of a thread, on sm_90.
    instructions : int or None
        Instructions that a thread executes, on sm_90; None where the code has parts that a call does not take.
    """

    name: str
    neurons: int
    warps: int
    read: float
    written: float
    barriers: int
    registers: int
    instructions: int | None


def measure(neurons: int) -> Iterator[Stage]:
    """Yield the three stages, and our kernel, for a layer.

    Raises
    ------
    AssertionError
        If one of them computes something else than the formula.
    """
    values = np.random.default_rng(0).normal(3, 2, (ROWS, neurons)).astype(np.float32)
    expected = (values - values.mean(0)) / np.sqrt(values.var(0) + 1e-5)
    runtime = EmulatorRuntime(sources=read_sources() | {SOURCE.name: SOURCE.read_text(encoding="utf-8")})
    x, gamma, beta = (runtime.asarray(array) for array in (values, np.ones_like(values[0]), np.zeros_like(values[0])))
    code = nvrtc.resources(text(), ARCHITECTURE, disassemble=True)
    for name, (width, *launched) in STAGES.items():
        y = runtime.empty(x.shape, x.dtype)
        arguments = pack(ARGUMENTS, *map(runtime.pointer, (x, gamma, beta, y)), neurons, 1e-5)
        launch = Launch((ceil_div(neurons, width), 1, 1), *launched)
        runtime.launch(SOURCE.stem, f"stages_{name}", launch, arguments)
        np.testing.assert_allclose(y, expected, atol=1e-5)
        yield stage(name, runtime.launches[-1], x, y, code[f"stages_{name}"])
    runtime = emulated_runtime()
    x, gamma, beta = (runtime.asarray(np.asarray(array)) for array in (x, gamma, beta))
    with runtime.device_limits(H200.choice):
        y, _ = bn.batch_norm_forward(x, gamma, beta)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    record = runtime.launches[-1]
    ours = source.read(record.source, record.entry_point)
    (resources,) = nvrtc.resources(ours, ARCHITECTURE).values()
    yield stage(record.entry_point, record, x, y, resources)


def stage(name: str, record: LaunchRecord, x: np.ndarray, y: np.ndarray, code: nvrtc.Resources) -> Stage:
    """Return the counts of a launch."""
    warps = record.launch.blocks * ceil_div(record.launch.threads, 32)
    read, written = record.counts.of(x).bytes_read / x.nbytes, record.counts.of(y).bytes_written / y.nbytes
    instructions = code.code.instructions if code.code else None
    return Stage(name, x.shape[1], warps, read, written, record.counts.barriers, code.registers, instructions)


def text() -> str:
    """Return the stages with the header in place of its ``#include`` line."""
    header = (source.folder() / "lib/kernel.cuh").read_text(encoding="utf-8").replace("#pragma once", "")
    return SOURCE.read_text(encoding="utf-8").replace('#include "lib/kernel.cuh"\n', header)


def table(stages: list[Stage]) -> str:
    """Return the stages as lines of text."""
    titles = "neurons", "kernel", "x read", "y written", "barriers", "registers", "warps", "instructions", "in all"
    formats = "{:>7}  {:<38}{:>7}{:>11}{:>10}{:>11}{:>7}{:>14}{:>9}"
    lines = [formats.format(*titles)]
    for each in stages:
        found = each.instructions
        counts = ("", "") if found is None else (found, found * each.warps)
        sizes = f"{each.read:.3g}", f"{each.written:.3g}", each.barriers, each.registers, each.warps
        lines.append(formats.format(each.neurons, each.name, *sizes, *counts).rstrip())
    return "\n".join(lines)


if __name__ == "__main__":
    print(table([each for neurons in NEURONS for each in measure(neurons)]))
