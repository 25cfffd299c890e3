"""``make gpu`` without a GPU: a stand-in for CuPy on the tests' emulator, and documents without figures.

``python -m benchmarks.gpu.dry_run MODULE [ARGUMENTS]`` runs a module on the stand-in.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import functools
import importlib
import importlib.util
import json
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu.device import CLUSTERS
from benchmarks.gpu.launch_facts import ARGUMENTS
from benchmarks.harness.timing import write_json
from bnkernels.runtime.seam import Launch
from bnkernels.train.trainer import TrainingConfig

DEVICE = "emulator"
SHORTER: dict[str, dict[str, Any]] = {  # replacements of a module's names: the emulator is slow
    "benchmarks.steps.bench_train_step": {
        "SEEDS": 1,
        "TIMED": 2,
        "TrainingConfig": functools.partial(TrainingConfig, epochs=1),
    },
    "benchmarks.steps.overhead": {"MOST_BLOCKS": 1, "LAYERS": 2},
}


def stand_in() -> types.ModuleType:
    """Put the stand-in for CuPy in CuPy's place, for this process; return it."""
    from tools import backends
    from tools.fake_cupy import streams

    if importlib.util.find_spec("torch"):
        importlib.import_module("torch")  # imports the bindings of the driver, and must not get the stand-in below
    cupy = streams.make(backends.emulated_runtime())
    cupy.driver.host_kernels.update(HOST_KERNELS)
    sys.modules |= {
        "cupy": cupy,
        "cupy_backends.cuda.api.driver": types.SimpleNamespace(launchKernel=launch_kernel(cupy)),
        "cuda.bindings.driver": types.SimpleNamespace(CUfunction=int, CUstream=int, cuLaunchKernel=launch_kernel(cupy)),
    }
    return cupy


# ---- the kernels of cuda/, in NumPy ---------------------------------------------------------------------------


def words(array: Any) -> np.ndarray:
    """Return the memory of an array of the stand-in as 16-byte words."""
    return np.asarray(array._memory).reshape(-1).view("u4").reshape(-1, 4)


def blocks_of(launch: Launch) -> int:
    """Return how many blocks there are."""
    return launch.grid[0] * launch.grid[1] * launch.grid[2]


def count_struct(launch: Launch, record: Any) -> None:
    """Count the blocks whose arguments are complete."""
    if not isinstance(record, np.ndarray):  # CuPy's address of it
        record = record_at(record.ptr)
    given = {name: record[name].item() for name in record.dtype.names}
    complete = all(given[name] for name in "abcdef") and (given["rows"], given["channels"], given["eps"]) == (
        *(64, 20),
        0.5,
    )
    counter = np.frombuffer((ctypes.c_ubyte * 4).from_address(given["count"]), np.uint32)
    counter += blocks_of(launch) * complete


def record_at(address: int) -> np.ndarray:
    """Return the arguments there."""
    return np.frombuffer(ctypes.string_at(address, ARGUMENTS.itemsize), ARGUMENTS)[0:1].reshape(())


def count_arguments(launch: Launch, *args: Any) -> None:
    """Count the same from ten arguments."""
    addresses = [array.data.ptr for array in args[:7]]
    sizes = [np.dtype(type(value)) for value in args[7:]]
    if sizes != [np.dtype(np.int64), np.dtype(np.int64), np.dtype(np.float32)]:
        raise TypeError(f"the kernel takes two long long and a float, got {sizes}")
    count_struct(launch, np.array((*addresses, *args[7:]), ARGUMENTS))


def grid_barriers(launch: Launch, arrivals: Any, slots: Any, errors: Any, rounds: np.int64, check: np.int32) -> None:
    """Let every block arrive at every barrier."""
    arrivals._memory[0] += blocks_of(launch) * int(rounds)
    if check:
        slots._memory[: blocks_of(launch)] = rounds


def cluster_barriers(size: int) -> Callable[..., None]:
    """Return the kernel for clusters of a size."""

    def kernel(launch: Launch, slots: Any, sizes: Any, errors: Any, rounds: np.int64, check: np.int32) -> None:
        if blocks_of(launch) % size:
            raise RuntimeError(f"CUDA_ERROR_INVALID_CLUSTER_SIZE: {blocks_of(launch)} blocks in clusters of {size}")
        sizes._memory[: blocks_of(launch)] = size
        if check:
            slots._memory[: blocks_of(launch)] = rounds

    return kernel


def copy_words(launch: Launch, source: Any, target: Any, count: np.int64) -> None:
    """Copy 16-byte words."""
    words(target)[:count] = words(source)[:count]


def copy_slices(launch: Launch, source: Any, target: Any, rows: np.int64, words_of_a_row: np.int64) -> None:
    """Copy the slices that the blocks own, of every row."""
    in_flight = 8 * launch.block[1]
    if rows % in_flight:
        raise ValueError(f"the kernel takes {in_flight} rows at a time, got {rows}")
    owned = launch.grid[0] * launch.block[0]
    shape = int(rows), int(words_of_a_row), 4
    words(target).reshape(shape)[:, :owned] = words(source).reshape(shape)[:, :owned]


def nothing(launch: Launch, *args: Any) -> None:
    """Leave no trace."""


HOST_KERNELS: dict[str, Callable[..., None]] = {
    "bnk_count_struct": count_struct,
    "bnk_count_arguments": count_arguments,
    "bnk_nothing": nothing,
    "bnk_hold": nothing,
    "bnk_copy_words": copy_words,
    "bnk_copy_slices": copy_slices,
    "bnk_grid_barriers": grid_barriers,
    **{f"bnk_cluster_barriers_{size}": cluster_barriers(size) for size in CLUSTERS},
}


def launch_kernel(cupy: types.ModuleType) -> Callable[..., None]:
    """Return the driver's ``cuLaunchKernel`` for kernels of one argument, `ARGUMENTS`."""

    def launch(function: int, *sizes_and_more: int) -> None:
        *sizes, shared, _stream, pointers, extra = sizes_and_more
        if extra:
            raise ValueError("the stand-in takes arguments by their addresses")
        (address,) = (ctypes.c_void_p * 1).from_address(pointers)
        cupy.driver.pointers[function](tuple(sizes[:3]), tuple(sizes[3:]), (record_at(address),), shared)

    return launch


# ---- documents ------------------------------------------------------------------------------------------------------


def blank(path: Path) -> None:
    """Take every figure out of a document that a dry run has written, and say what it is.

    A number with a fraction, or NaN, is a figure; whole numbers are sizes and counts. The CSV beside it goes.
    """
    document = json.loads(path.read_text(encoding="utf-8"))
    write_json(path, {"dry_run": True, **without_figures(document), "device": DEVICE})
    table = path.with_suffix(".csv")
    if table.exists():
        rows = list(csv.reader(table.read_text(encoding="utf-8").splitlines()))
        with table.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([[*rows[0], "dry_run"]] if rows else [])


def without_figures(value: Any) -> Any:
    """Return a document with None for every number with a fraction."""
    if isinstance(value, dict):
        return {key: without_figures(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_figures(item) for item in value]
    return None if isinstance(value, float) else value


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a module's `main` on the stand-in."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.dry_run", description=__doc__.splitlines()[0])
    parser.add_argument("module")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    options = parser.parse_args(arguments)
    stand_in()
    module = importlib.import_module(options.module)
    for name, value in SHORTER.get(options.module, {}).items():
        if not hasattr(module, name):
            raise AttributeError(f"{options.module} has no {name} any more: the dry run cannot shorten it")
        setattr(module, name, value)
    return module.main(options.arguments) or 0


if __name__ == "__main__":
    sys.exit(main())
