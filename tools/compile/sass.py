"""Machine code: NVIDIA's nvdisasm reads what NVRTC made; neither needs a driver or a GPU."""

from __future__ import annotations

import re
import subprocess
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import NamedTuple

PACKAGE = "nvidia-cuda-nvdisasm"
ARCHITECTURES = (80, 90, 120)  # architectures of the baseline

_SECTION = re.compile(r"^\t\.section\t\.(nv\.info|text)\.(\w+),", re.MULTILINE)
_THREADS = re.compile(r"EIATTR_MAX_THREADS.*?\.word\s+0x([0-9a-f]+)", re.DOTALL)
_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)


class MachineCode(NamedTuple):
    """The machine code of one kernel.

    Attributes
    ----------
    instructions : int
        Instructions, without the NOPs that fill up the last lines.
    code_bytes : int
        Size in memory, with them.
    constant_loads : int
        Loads through the read-only cache (``LDG.CONSTANT``), which does not see what the launch itself writes.
    threads : int
        The most threads of a block, by the kernel's launch bounds.
    """

    instructions: int
    code_bytes: int
    constant_loads: int
    threads: int


def nvdisasm() -> Path:
    """Return the disassembler.

    Raises
    ------
    FileNotFoundError
        If it is not installed; the message says how it gets there.
    """
    try:
        (found,) = (file for file in files(PACKAGE) or () if file.stem == "nvdisasm")
    except (PackageNotFoundError, ValueError):
        raise FileNotFoundError(
            f"nvdisasm is missing: python3 tools/install.py test installs {PACKAGE}, of which there are wheels for "
            "Linux on x86_64 and aarch64 and for Windows on x86_64"
        ) from None
    return Path(found.locate())


def disassemble(cubin: bytes) -> dict[str, MachineCode]:
    """Return the machine code of every kernel in a cubin."""
    return parse(text_of(cubin))


def text_of(cubin: bytes, *options: str) -> str:
    """Return what nvdisasm makes of a cubin."""
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = subprocess.run([nvdisasm(), "--no-dataflow", *options, file.name], capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"nvdisasm failed: {run.stderr}")
    return run.stdout


def parse(text: str) -> dict[str, MachineCode]:
    """Return the machine code of every kernel in the output of nvdisasm."""
    _, *parts = _SECTION.split(text)  # kind, kernel, text; kind, kernel, text; ...
    sections = {(kind, kernel): body for kind, kernel, body in zip(*[iter(parts)] * 3, strict=True)}
    found = {}
    for (kind, kernel), body in sections.items():
        if kind != "text":
            continue
        code = _INSTRUCTION.findall(body)
        names = [name for _, name in code]
        found[kernel] = MachineCode(
            instructions=len(names) - names.count("NOP"),
            code_bytes=16 * len(code),
            constant_loads=sum(name.startswith("LDG.") and ".CONSTANT" in name for name in names),
            threads=int(_THREADS.search(sections["nv.info", kernel])[1], 16),
        )
    return found
