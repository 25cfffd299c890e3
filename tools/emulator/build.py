"""Compiles the engine and the kernels with g++, once per text, build and compiler."""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path

HERE = Path(__file__).absolute().parent
ROOT = HERE.parents[1]
CUDA = ROOT / "cuda"
BUILD_VARIABLE = "BNKERNELS_EMULATOR"
CUDA_VARIABLE = "BNKERNELS_EMULATOR_CUDA"
CACHE_VARIABLE = "BNKERNELS_EMULATOR_CACHE"
RSQRT_VARIABLE = "BNKERNELS_EMULATOR_RSQRT"
ENGINE_SOURCES = sorted((HERE / "engine").glob("*.cpp"))
HEADERS = [HERE / "cuda_on_cpu.h", *sorted((HERE / "engine").glob("*.h"))]

# The kernels' arithmetic is the GPU's: no contraction, no exceptions. -O1 keeps the lines that a report names true, and
# -g1 has no more than those.
KERNEL_FLAGS = ("-std=c++17", "-O1", "-g1", "-fPIC", "-ffp-contract=off", "-fno-exceptions", "-Wno-unknown-pragmas")
ENGINE_FLAGS = ("-std=c++17", "-O2", "-g1", "-fPIC", "-Wall", "-Wextra")


class EmulatorError(Exception):
    """A kernel did something that a GPU would not forgive, or the emulator was asked for something it cannot do."""


@dataclass(frozen=True)
class Build:
    """Options of one build of the emulator."""

    engine: tuple[str, ...]  # flags for the engine, which is never instrumented
    kernel: tuple[str, ...]  # flags for the kernels
    link: tuple[str, ...] = ()
    sanitizer: str | None = None  # its library must be in the process before all others


BUILDS: Mapping[str, Build] = {
    # -fsanitize=thread makes the compiler announce every access; engine/access.cpp answers in TSan's place.
    "plain": Build(engine=("-DBNK_COUNT",), kernel=("-fsanitize=thread",)),
    # Atomic counters announce themselves as atomics: not as accesses of the kernel.
    "coverage": Build(
        engine=("-DBNK_COUNT",),
        kernel=("-fsanitize=thread", "-Og", "--coverage", "-fprofile-update=atomic"),
        link=("--coverage",),
    ),
    "asan": Build(
        engine=("-DBNK_ASAN",),
        # Optimised, they take five times as long to compile, and run no faster.
        kernel=("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O0"),
        link=("-fsanitize=address,undefined",),
        sanitizer="asan",
    ),
    "tsan": Build(engine=("-DBNK_TSAN",), kernel=("-fsanitize=thread",), link=("-fsanitize=thread",), sanitizer="tsan"),
}


@cache
def _compiler_version() -> str:
    return subprocess.run([compiler(), "--version"], capture_output=True, text=True, check=True).stdout


def compiler() -> str:
    """Return the path of g++; raise `EmulatorError` where there is none."""
    found = shutil.which("g++")
    if found is None:
        raise EmulatorError(
            "the emulator compiles the kernels with g++, and there is none on the PATH: install it "
            "(on Debian and Ubuntu: apt-get install g++)"
        )
    return found


@cache
def _machine_flags() -> tuple[str, ...]:
    """Let fma() be an instruction where the processor has one; without it the C library computes the same bits."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return ()
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return ("-mfma",) if " fma " in flags else ()


def cache_folder() -> Path:
    """Return the folder of the compiled libraries."""
    return Path(os.environ.get(CACHE_VARIABLE) or ROOT / "build" / "emulator").absolute()


def read_sources(folder: Path = CUDA) -> dict[str, str]:
    """Return the text of every file of `folder` that belongs to a kernel, by its path in there."""
    sources = {path.relative_to(folder).as_posix(): path.read_text() for path in sorted(folder.rglob("*.cu*"))}
    if not sources:
        raise EmulatorError(f"expected CUDA sources in {folder}, found no *.cu")
    return sources


def write_sources(sources: Mapping[str, str], folder: Path) -> None:
    """Write what `read_sources` returns."""
    for file, text in sources.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(text)


def engine_library(name: str) -> Path:
    """Return the engine of the build `name`, compiled if need be."""
    build = BUILDS[name]
    flags = [*ENGINE_FLAGS, *build.engine]
    texts = [path.read_text() for path in (*HEADERS, *ENGINE_SOURCES)]
    with _folder("engine", name, *flags, *texts) as folder:
        library = folder / "engine.so"
        if not library.exists():
            _compile([*flags, *map(str, ENGINE_SOURCES), "-shared"], library)
    return library


def kernel_library(name: str, source: str, sources: Mapping[str, str]) -> Path:
    """Return the kernels of ``<source>.cu`` in the build `name`, compiled if need be.

    Parameters
    ----------
    name : str
        A key of `BUILDS`.
    source : str
        The stem of one of the files.
    sources : Mapping of str to str
        The text of every file of ``cuda/``, by its path in there.
    """
    if f"{source}.cu" not in sources:
        raise EmulatorError(f"expected one of {sorted(sources)}, got {source}.cu")
    build = BUILDS[name]
    engine = engine_library(name)
    flags = (*KERNEL_FLAGS, *_machine_flags(), *build.kernel)
    used = {file: text for file, text in sources.items() if file == f"{source}.cu" or file.endswith(".cuh")}
    unit = _kernel_unit(source, flags, used)
    with _folder(source, name, str(engine), str(unit)) as folder:
        library = folder / f"{source}.so"
        if not library.exists():
            _compile(["-shared", str(unit), str(engine), *build.link], library)
    return library


def _kernel_unit(source: str, flags: Sequence[str], used: Mapping[str, str]) -> Path:
    """Return the object file of ``<source>.cu``, compiled if need be; builds with the same flags share it."""
    headers = [path.read_text() for path in HEADERS]
    with _folder(source, *flags, *headers, *chain.from_iterable(sorted(used.items()))) as folder:
        unit = folder / f"{source}.o"
        if not unit.exists():
            write_sources(used, folder / "cuda")
            # Compiled from within the folder, so that reports name cuda/<file> wherever the cache is.
            names = ["-include", str(HEADERS[0]), f"-ffile-prefix-map={folder}=.", "-I", "cuda", "-x", "c++"]
            _compile([*flags, *names, "-c", f"cuda/{source}.cu"], unit)
    return unit


@contextmanager
def _folder(name: str, *key: str) -> Iterator[Path]:
    """Give the folder of what `key` describes, to one process at a time."""
    digest = hashlib.sha256("\0".join((_compiler_version(), *key)).encode()).hexdigest()[:16]
    folder = cache_folder() / f"{name}-{digest}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder


def _compile(arguments: list[str], output: Path) -> None:
    """Run g++; the output appears under its name only when it is whole."""
    partial = output.with_suffix(f".partial{output.suffix}")
    command = [compiler(), *arguments, "-o", str(partial)]
    run = subprocess.run(command, cwd=output.parent, capture_output=True, text=True)
    if run.returncode != 0:
        raise EmulatorError(f"g++ does not compile {output.stem}:\n{run.stderr}")
    partial.replace(output)
