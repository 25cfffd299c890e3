"""Finds and reads the kernel sources: the files of ``cuda/``, wherever this package is installed."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from bnkernels.runtime.seam import Constant

# Compiler options of all CUDA sources. Without contraction a kernel rounds exactly where its source says, as on
# the tests' emulator. CuPy adds -ftz=true: float32 numbers below 1.2e-38 are flushed to zero.
OPTIONS = ("--std=c++17", "--fmad=false")

_INCLUDE = re.compile(r'[ \t]*#[ \t]*include[ \t]+"([^"]+)"[ \t]*')
# A macro that makes a kernel, and the name of that with ## in it; and a line that calls a macro.
_MACRO = re.compile(r"^#define (\w+)\(([\w, ]+)\)(?:[^\n]*\\\n)*?[^\n]*\w+\((bnk_[\w#]+),", re.MULTILINE)
_CALL = re.compile(r"([A-Z_]+)\((.*)\)$")
_PRAGMA_ONCE = re.compile(r"[ \t]*#[ \t]*pragma[ \t]+once[ \t]*")

# An installed package carries the sources inside itself, a checkout beside itself.
_CANDIDATES = tuple(parent / "cuda" for parent in Path(__file__).parents[1:3])


@cache
def folder() -> Path:
    """Return the folder of the kernel sources.

    Raises
    ------
    FileNotFoundError
        If no candidate holds them; the message names the places searched.
    """
    for candidate in _CANDIDATES:
        # A folder `cuda` in site-packages may well be NVIDIA's: ours is the one with our header.
        if (candidate / "lib" / "kernel.cuh").is_file():
            return candidate
    places = " and ".join(map(str, _CANDIDATES))
    raise FileNotFoundError(
        f"the kernel sources of bnkernels (lib/kernel.cuh and the .cu files) are missing: searched {places}; "
        "install the package again, from a wheel or a complete checkout"
    )


def stems() -> tuple[str, ...]:
    """Return the sorted names of the translation units, as `read` takes them."""
    return tuple(sorted(path.stem for path in folder().glob("*.cu")))


def read(stem: str, entry_point: str | None = None, constants: Iterable[Constant] = ()) -> str:
    """Return ``cuda/<stem>.cu`` with our headers in place of their ``#include`` lines, each once.

    Kernels that have a place for it take the `constants` for members of their argument: see
    ``cuda/lib/kernel.cuh``. One of several numbers is an array that the member points to.

    Of the kernels that the file makes at its end, one line each, only `entry_point` if that is given: the variants and
    data types that a program does not need would take it seconds to compile.

    One self-contained text, because CuPy's kernel cache looks only at the text: a change in an included header would go
    unnoticed. ``#line`` directives keep compiler messages at the right file and line; they name no folder of this
    machine, which would change the cache's key.

    Raises
    ------
    FileNotFoundError
        If there is no such translation unit, or one of the headers is missing.
    LookupError
        If it makes no such kernel.
    """
    text = _inline(f"{stem}.cu", set())
    tables = {name: value for name, value in constants if isinstance(value, tuple)}
    if members := ", ".join(f"(a).{name} = {value}" for name, value in constants if name not in tables):
        text = f"#define BNK_CONSTANTS(a) ({members})\n{text}"
    for name, numbers in tables.items():
        text = f"#define BNK_TABLE_{name.upper()} {', '.join(map(str, numbers))}\n{text}"
    if entry_point is None:
        return text
    lines = text.split("\n")
    made = _kernels(text)
    if entry_point not in made.values():
        raise LookupError(f"cuda/{stem}.cu makes no kernel {entry_point}; it makes {', '.join(made.values())}")
    return "\n".join("" if made.get(number, entry_point) != entry_point else line for number, line in enumerate(lines))


def entry_points(stem: str) -> tuple[str, ...]:
    """Return the names of the kernels that ``cuda/<stem>.cu`` makes."""
    return tuple(_kernels(read(stem)).values())


def _kernels(text: str) -> dict[int, str]:
    """Return the name of the kernel that each line makes, by the number of the line.

    Such a line begins with a macro: BNK_KERNEL with the name of the kernel, or one whose definition has that name,
    pasted together of the macro's arguments.
    """
    macros = {name: (parameters.split(", "), pasted) for name, parameters, pasted in _MACRO.findall(text)}
    found = {}
    for number, line in enumerate(text.split("\n")):
        call = _CALL.match(line)
        if call is None:
            continue
        arguments = call[2].split(", ")
        if call[1].startswith("BNK_KERNEL"):
            found[number] = arguments[0]
        elif call[1] in macros:
            parameters, pasted = macros[call[1]]
            given = dict(zip(parameters, arguments, strict=True))
            found[number] = "".join(given.get(part, part) for part in pasted.split("##"))
    return found


def _inline(name: str, seen: set[str]) -> str:
    """Return the text of one file, named relative to ``cuda/``, with its headers in place unless they are in `seen`."""
    seen.add(name)
    path = folder() / name
    if not path.is_file():
        raise FileNotFoundError(f"there is no kernel source {name} in {folder()}; it has {', '.join(stems())}")
    lines = [f'#line 1 "cuda/{name}"']
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        include = _INCLUDE.fullmatch(line)
        if include is None:
            # Means nothing in a header that is inlined once, and compilers warn about it in a main file.
            lines.append("" if _PRAGMA_ONCE.fullmatch(line) else line)
        elif include[1] in seen:
            lines.append("")
        else:
            lines += [_inline(include[1], seen).rstrip("\n"), f'#line {number + 1} "cuda/{name}"']
    return "\n".join(lines) + "\n"
