"""Shows the machine code of the kernels, without a GPU: ``python -m benchmarks.counts.sass`` (``make sass``).

The newest pinned NVRTC compiles them with CuPy's options, NVIDIA's nvdisasm reads the result. The numbers are static:
what a warp executes depends on the launch and on the data. Instructions are compared with the baseline of ``make
compile``.
"""

from __future__ import annotations

import argparse
import sys

from benchmarks.counts.devices import DEVICES
from benchmarks.counts.limits import occupancy
from bnkernels.runtime import source
from tools.compile import __main__ as compiled
from tools.compile import nvrtc, sass

HEAD = "sm", "instructions", "code bytes", "registers", "threads", "occupancy", "local bytes", "LDG.CONSTANT"
ABOUT = """\
threads: the most of a block, by the launch bounds. occupancy: the share of a multiprocessor's warps that registers
leave room for in such blocks; shared memory, which a launch asks for, may allow fewer. local bytes (stack and spills)
and loads by LDG.CONSTANT, which do not see what the launch itself writes, must be 0.
"""


def text(table: compiled.Table) -> str:
    """Return a line for every kernel and architecture, in columns."""
    architectures = {device.architecture.name: device.architecture for device in DEVICES}
    width = max(map(len, table))
    lines = ["kernel".ljust(width) + "".join(f"{head:>14}" for head in HEAD)]
    for kernel, row in table.items():
        for name, found in row.items():
            code, registers = found.code, found.registers
            share = occupancy(architectures[name], code.threads, registers, 0).share
            numbers = code.instructions, code.code_bytes, registers, code.threads
            cells = name, *numbers, f"{share:.0%}", found.stack, code.constant_loads
            lines.append(kernel.ljust(width) + "".join(f"{cell:>14}" for cell in cells))
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Print the table and what is wrong; return 0 if nothing is."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.counts.sass", description=__doc__)
    known = sass.ARCHITECTURES
    parser.add_argument("--only", type=int, nargs="+", metavar="SM", choices=known, default=known, help=f"of {known}")
    parser.add_argument("--kernel", nargs="+", metavar="STEM", choices=source.stems(), default=source.stems())
    options = parser.parse_args(arguments)
    try:
        sass.nvdisasm()
        table = compiled.measure(nvrtc.NEWEST, options.only, options.kernel)
    except FileNotFoundError as missing:
        print(missing, file=sys.stderr)
        return 1
    print(text(table), ABOUT, sep="\n\n")
    return 1 if compiled.check(nvrtc.NEWEST, table, compiled.of_kernels(table, compiled.baseline(nvrtc.NEWEST))) else 0


if __name__ == "__main__":
    sys.exit(main())
