"""NVRTC through ctypes: source text in; resources of every kernel, its machine code or PTX out.

The compilers are those of ``compilers.txt``, loaded by their path, so that it does not matter which NVRTC this
environment has besides: PyTorch brings one of its own.
"""

from __future__ import annotations

import ctypes
import platform
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

from bnkernels.runtime import source
from tools.compile import ptx as assembly
from tools.compile import sass

# Exactly what CuPy compiles with on a device: it adds to our options, and none of it can be turned off.
OPTIONS = (*source.OPTIONS, "-ftz=true", "--device-as-default-execution-space")

FOLDER = Path(sys.prefix) / "nvrtc"  # where tools/install.py puts them, a folder for each version


def _pinned() -> tuple[str, ...]:
    """Return the versions of ``compilers.txt`` that there are for this machine."""
    text = Path(__file__).with_name("compilers.txt").read_text(encoding="utf-8")
    lines = [line.partition(";") for line in text.splitlines() if not line.startswith("#")]
    return tuple(
        package.rpartition("==")[2] for package, _, marker in lines if not marker or platform.machine() in marker
    )


VERSIONS = _pinned()
OLDEST, NEWEST = VERSIONS[0], VERSIONS[-1]
OLDEST_ARCHITECTURE = 75  # that kernels are written for; old compilers know older ones

_ERROR_COMPILATION = 6  # NVRTC_ERROR_COMPILATION of enum nvrtcResult
_KERNEL = re.compile(
    r"Compiling entry function '(?P<kernel>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


class CompileError(Exception):
    """The source does not compile; the message is the compiler's log."""


class Resources(NamedTuple):
    """Resources of one kernel: registers per thread, bytes, and its machine code if that was disassembled.

    `contractible` and `float_atomics` are numbers of instructions of its PTX, see `tools.compile.ptx`.
    """

    registers: int
    spill_stores: int
    spill_loads: int
    stack: int
    static_shared: int
    contractible: int = 0
    float_atomics: int = 0
    code: sass.MachineCode | None = None


@cache
def _library(version: str) -> ctypes.CDLL:
    """Return a compiler."""
    found = sorted((FOLDER / version).glob("nvidia/*/lib/libnvrtc.so.*"))
    if len(found) != 1:
        raise FileNotFoundError(
            f"expected one libnvrtc.so of NVRTC {version} in {FOLDER / version}, found {len(found)}; "
            "python3 tools/install.py test installs it"
        )
    for builtins in found[0].parent.glob("libnvrtc-builtins.so.*"):
        ctypes.CDLL(str(builtins))  # or else some compilers look for it only where the system has its libraries
    library = ctypes.CDLL(str(found[0]))
    library.nvrtcGetErrorString.restype = ctypes.c_char_p
    return library


def _checked(library: ctypes.CDLL, status: int) -> None:
    if status:
        raise RuntimeError(f"NVRTC failed: {library.nvrtcGetErrorString(status).decode()}")


def architectures(version: str = NEWEST) -> list[int]:
    """Return the compute capabilities the compiler and the kernels know, 10 major + minor."""
    library, count = _library(version), ctypes.c_int()
    _checked(library, library.nvrtcGetNumSupportedArchs(ctypes.byref(count)))
    known = (ctypes.c_int * count.value)()
    _checked(library, library.nvrtcGetSupportedArchs(known))
    return [one for one in known if one >= OLDEST_ARCHITECTURE]


@contextmanager
def _locale_kept() -> Iterator[None]:
    """Give the thread its locale back: NVRTC 12.0 leaves it at C, in which Python decodes as ASCII from then on."""
    libc = ctypes.CDLL(None)
    libc.uselocale.argtypes, libc.uselocale.restype = [ctypes.c_void_p], ctypes.c_void_p
    before = libc.uselocale(None)
    try:
        yield
    finally:
        libc.uselocale(before)


@_locale_kept()
def _compile(text: str, options: tuple[str, ...], version: str, *wanted: str) -> list[bytes]:
    """Compile; return what of the program is `wanted`: its ``ProgramLog``, ``PTX`` or ``CUBIN``."""
    library, program = _library(version), ctypes.c_void_p()
    encoded = [option.encode() for option in (*OPTIONS, *options)]
    create = library.nvrtcCreateProgram
    _checked(library, create(ctypes.byref(program), text.encode(), b"source.cu", 0, None, None))
    try:
        given = (ctypes.c_char_p * len(encoded))(*encoded)
        status = library.nvrtcCompileProgram(program, len(encoded), given)
        if status == _ERROR_COMPILATION:
            raise CompileError(_text(_result(library, program, "ProgramLog")))
        _checked(library, status)
        return [_result(library, program, one) for one in wanted]
    finally:
        _checked(library, library.nvrtcDestroyProgram(ctypes.byref(program)))


def _result(library: ctypes.CDLL, program: ctypes.c_void_p, wanted: str) -> bytes:
    """Return one of the program's results, whose size and content NVRTC gives in two calls."""
    size = ctypes.c_size_t()
    _checked(library, library[f"nvrtcGet{wanted}Size"](program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _checked(library, library[f"nvrtcGet{wanted}"](program, buffer))
    return buffer.raw


def _text(result: bytes) -> str:
    return result.rstrip(b"\0").decode()


def resources(text: str, architecture: int, version: str = NEWEST, disassemble: bool = False) -> dict[str, Resources]:
    """Compile to machine code; return what every kernel needs, as ptxas reports it, and its code on demand."""
    options = f"-arch=sm_{architecture}", "--ptxas-options=-v"
    log, cubin, ptx_text = _compile(text, options, version, "ProgramLog", "CUBIN", "PTX")
    log, entries = _text(log), assembly.entries(_text(ptx_text))
    codes = sass.disassemble(cubin) if disassemble else {}
    found = {}
    for kernel in _KERNEL.finditer(log):
        shared = re.search(r"(\d+) bytes smem", kernel["rest"])
        found[kernel["kernel"]] = Resources(
            registers=int(kernel["registers"]),
            spill_stores=int(kernel["stores"]),
            spill_loads=int(kernel["loads"]),
            stack=int(kernel["stack"]),
            static_shared=int(shared[1]) if shared else 0,
            contractible=len(assembly.contractible(entries[kernel["kernel"]])),
            float_atomics=len(assembly.float_atomics(entries[kernel["kernel"]])),
            code=codes[kernel["kernel"]] if disassemble else None,
        )
    compiled = log.count("Compiling entry function")
    if len(found) != compiled:
        raise RuntimeError(f"ptxas reported {compiled} kernels, of which {len(found)} could be read:\n{log}")
    return found


def cubin(text: str, architecture: int) -> bytes:
    """Compile to machine code that knows its source lines, with the newest compiler."""
    (found,) = _compile(text, (f"-arch=sm_{architecture}", "-lineinfo"), NEWEST, "CUBIN")
    return found


def ptx(text: str, architecture: int, version: str = NEWEST) -> str:
    """Compile to PTX for a virtual architecture."""
    (found,) = _compile(text, (f"-arch=compute_{architecture}",), version, "PTX")
    return _text(found)
