"""NVRTC through NVIDIA's public bindings: source text in; resources of every kernel, or PTX, out."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from cuda.bindings import nvrtc

from bnkernels import _source

# CuPy adds -ftz=true to our options and it cannot be turned off.
OPTIONS = (*_source.OPTIONS, "-ftz=true")

_KERNEL = re.compile(
    r"Compiling entry function '(?P<kernel>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


class CompileError(Exception):
    """The source does not compile; the message is the compiler's log."""


class Resources(NamedTuple):
    """What one kernel needs: registers of a thread, and bytes."""

    registers: int
    spill_stores: int
    spill_loads: int
    stack: int
    static_shared: int


def _checked(answer: tuple[Any, ...]) -> Any:
    """Return the result of an NVRTC call, which answers with a status and perhaps a result."""
    status, *result = answer
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise RuntimeError(f"NVRTC failed: {_checked(nvrtc.nvrtcGetErrorString(status)).decode()}")
    return result[0] if result else None


def version() -> str:
    """Return NVRTC's version, for example ``13.5``."""
    status, major, minor = nvrtc.nvrtcVersion()
    _checked((status,))
    return f"{major}.{minor}"


def architectures() -> list[int]:
    """Return the compute capabilities NVRTC compiles for, 10 major + minor."""
    return list(_checked(nvrtc.nvrtcGetSupportedArchs()))


def _compile(text: str, options: tuple[str, ...]) -> tuple[Any, str]:
    """Return the compiled program, which the caller destroys, and the compiler's log."""
    program = _checked(nvrtc.nvrtcCreateProgram(text.encode(), b"source.cu", 0, [], []))
    encoded = [option.encode() for option in (*OPTIONS, *options)]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(encoded), encoded)
    log = _text(program, nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog)
    if status == nvrtc.nvrtcResult.NVRTC_ERROR_COMPILATION:
        _checked(nvrtc.nvrtcDestroyProgram(program))
        raise CompileError(log)
    _checked((status,))
    return program, log


def _text(program: Any, size: Any, get: Any) -> str:
    """Return one of the program's texts, whose size and content NVRTC gives in two calls."""
    buffer = bytes(_checked(size(program)))
    _checked(get(program, buffer))
    return buffer.rstrip(b"\0").decode()


def resources(text: str, architecture: int) -> dict[str, Resources]:
    """Compile to machine code; return what every kernel needs, as ptxas reports it."""
    program, log = _compile(text, (f"-arch=sm_{architecture}", "--ptxas-options=-v"))
    _checked(nvrtc.nvrtcDestroyProgram(program))
    found = {}
    for kernel in _KERNEL.finditer(log):
        shared = re.search(r"(\d+) bytes smem", kernel["rest"])
        found[kernel["kernel"]] = Resources(
            registers=int(kernel["registers"]),
            spill_stores=int(kernel["stores"]),
            spill_loads=int(kernel["loads"]),
            stack=int(kernel["stack"]),
            static_shared=int(shared[1]) if shared else 0,
        )
    compiled = log.count("Compiling entry function")
    if len(found) != compiled:
        raise RuntimeError(f"ptxas reported {compiled} kernels, of which {len(found)} could be read:\n{log}")
    return found


def ptx(text: str, architecture: int) -> str:
    """Compile to PTX for a virtual architecture."""
    program, _ = _compile(text, (f"-arch=compute_{architecture}",))
    try:
        return _text(program, nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX)
    finally:
        _checked(nvrtc.nvrtcDestroyProgram(program))
