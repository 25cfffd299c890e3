"""Facts of a GPU that plans rest on: what a launch, a graph node and a barrier cost, and how fast memory is.

``python -m benchmarks.gpu.facts --out PATH`` measures them one by one and writes the document after each, so that what
a fault or the end of the time leaves behind is whole. Every kernel is checked to have done what it should.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from time import monotonic, perf_counter
from typing import Any

import numpy as np

from benchmarks.gpu.device import CLUSTERS, Gpu, UnavailableError, expect
from benchmarks.gpu.launch_facts import Arguments, launches, raw_kernel_struct
from benchmarks.harness.timing import facts, write_json

NODES = 200  # empty kernels of the graph
BARRIERS = (200, 1200)  # rounds of a short and of a long row: their difference is that of barriers alone
COPY_BYTES = 2**30
MOST_ROWS_AT_ONCE = 512  # per block that copies slices: 256 threads of 16 bytes, 8 times, for a slice of 64 bytes
SLICES = (64, 128, 256)  # bytes of a row that a block owns
ROWS = {"131072-byte rows": 2**17, "4096-byte rows": 2**12}  # 1024 channels of float32 are 4096 bytes

TORCH = "torch batch norm backend"

Fact = dict[str, Any]


# ---- the facts ------------------------------------------------------------------------------------------------------


def device(gpu: Gpu) -> Fact:
    """Return sizes and limits, as the driver tells them."""
    wanted = {
        "multiprocessors": "MultiProcessorCount",
        "l2_bytes": "L2CacheSize",
        "shared_bytes_per_block_opt_in": "MaxSharedMemoryPerBlockOptin",
        "shared_bytes_per_multiprocessor": "MaxSharedMemoryPerMultiprocessor",
        "threads_per_multiprocessor": "MaxThreadsPerMultiProcessor",
        "registers_per_multiprocessor": "MaxRegistersPerMultiprocessor",
        "cooperative_launch": "CooperativeLaunch",
    }
    found = {name: int(gpu.attributes[attribute]) for name, attribute in wanted.items()}
    free, total = gpu.cupy.cuda.runtime.memGetInfo()
    return {"compute_capability": gpu.capability, "memory_bytes": int(total), "free_bytes": int(free), **found}


def graph(gpu: Gpu) -> Fact:
    """Measure an empty kernel as a node of a CUDA graph, and the launch of the graph from the host.

    That the kernels of a graph run is seen on another one, whose kernels count.
    """
    arguments = Arguments(gpu)
    count_one = raw_kernel_struct(gpu, arguments)
    arguments.count.fill(0)
    counting, _ = gpu.captured(count_one, NODES)
    counting.launch(gpu.stream)
    expect(int(arguments.count[0]), NODES, "kernels that ran in a graph")
    nothing, few = gpu.kernel("launches", "bnk_nothing"), NODES // 10
    argument = (np.int64(0),)
    nothing((1,), (32,), argument)  # compiles
    graphs = [gpu.captured(lambda: nothing((1,), (32,), argument), count) for count in (few, NODES)]
    for (_, nodes), count in zip(graphs, (few, NODES), strict=True):
        if nodes is not None:
            expect(nodes, count, "nodes of the graph")
    (short, _), (long, nodes) = graphs
    per_node, whole, host = [], [], []
    for _ in range(gpu.rounds + 1):
        few_us, all_us = (gpu.timed(lambda g=g: g.launch(gpu.stream)) for g in (short, long))
        gpu.stream.synchronize()
        started = perf_counter()
        long.launch(gpu.stream)
        host.append(1e6 * (perf_counter() - started))
        gpu.stream.synchronize()
        whole.append(all_us)
        per_node.append((all_us - few_us) / (NODES - few))
    return {
        "nodes": NODES,
        "nodes_counted": nodes,
        "us_per_node": gpu.figure(per_node[1:]),
        "us_per_graph": gpu.figure(whole[1:]),
        "host_us_per_graph_launch": gpu.figure(host[1:]),
    }


def grid_barrier(gpu: Gpu) -> Fact:
    """Measure a barrier of the whole grid, one block on every multiprocessor."""
    kernel = gpu.kernel("barriers", "bnk_grid_barriers", cooperative=True)
    blocks = gpu.multiprocessors
    arrivals, slots, errors = gpu.counter(), gpu.counter(blocks), gpu.counter()

    def run(rounds: int, check: int = 0) -> float:
        arrivals.fill(0)
        args = (arrivals, slots, errors, np.int64(rounds), np.int32(check))
        return gpu.timed(lambda: kernel((blocks,), (256,), args))

    run(BARRIERS[0], check=1)
    expect(int(arrivals[0]), blocks * BARRIERS[0], "arrivals at the barriers of the grid")
    expect(int(errors[0]), 0, "blocks that passed a barrier too early")
    return {"blocks": blocks, "us": gpu.figure(per_barrier(gpu, run))}


def per_barrier(gpu: Gpu, run: Callable[[int], float]) -> list[float]:
    """Return microseconds per barrier, round by round."""
    short, long = BARRIERS
    run(short)
    return [(run(long) - run(short)) / (long - short) for _ in range(gpu.rounds)]


def cluster_barrier(gpu: Gpu, size: int) -> Fact:
    """Measure a barrier of clusters, whose size is compiled in; tell whether CuPy's launch makes them at all."""
    if gpu.capability < 90:
        raise UnavailableError(f"clusters need compute capability 9.0, this is {gpu.capability / 10}")
    kernel = gpu.kernel("barriers", f"bnk_cluster_barriers_{size}")
    blocks = gpu.multiprocessors // size * size
    slots, sizes, errors = gpu.counter(blocks), gpu.counter(blocks), gpu.counter()

    def run(rounds: int, check: int = 0) -> float:
        args = (slots, sizes, errors, np.int64(rounds), np.int32(check))
        return gpu.timed(lambda: kernel((blocks,), (256,), args))

    run(BARRIERS[0], check=1)
    found = sorted(set(gpu.cupy.asnumpy(sizes).tolist()))
    expect(found, [size], "sizes of the clusters that a plain launch makes")
    expect(int(errors[0]), 0, "blocks that passed a barrier too early")
    return {"blocks": blocks, "launches_through_cupy": True, "us": gpu.figure(per_barrier(gpu, run))}


def copy(gpu: Gpu) -> Fact:
    """Measure contiguous copies of a GiB, by a kernel and by the driver."""
    source, target = buffers(gpu)
    kernel, words = gpu.kernel("copies", "bnk_copy_words"), source.nbytes // 16
    ways = {
        "kernel": lambda: kernel((8 * gpu.multiprocessors,), (512,), (source, target, np.int64(words))),
        "cudaMemcpy": lambda: target.data.copy_from_device_async(source.data, source.nbytes, gpu.stream),
    }
    return {"bytes": source.nbytes} | {
        f"GB_per_s_{name}": bandwidth(gpu, way, source, target) for name, way in ways.items()
    }


def copy_slices(gpu: Gpu, row_bytes: int) -> Fact:
    """Measure a copy by blocks that own a slice of 64, 128 or 256 bytes of every row."""
    source, target = buffers(gpu, least=MOST_ROWS_AT_ONCE * row_bytes)
    kernel, rows = gpu.kernel("copies", "bnk_copy_slices"), source.nbytes // row_bytes
    found: Fact = {"bytes": source.nbytes, "rows": rows}
    for slice_bytes in SLICES:
        width, blocks = slice_bytes // 16, row_bytes // slice_bytes
        args = (source, target, np.int64(rows), np.int64(row_bytes // 16))
        way = functools.partial(kernel, (blocks,), (width, 256 // width), args)
        figure = bandwidth(gpu, way, source, target)
        found |= {f"GB_per_s_{slice_bytes}_bytes": figure, f"blocks_{slice_bytes}_bytes": blocks}
    return found


def buffers(gpu: Gpu, least: int = 2**22) -> tuple[Any, Any]:
    """Return a source that counts, and a target; of `least` bytes in a rehearsal."""
    count = (least if gpu.rehearsal else COPY_BYTES) // 4
    return gpu.cupy.arange(count, dtype="uint32"), gpu.cupy.empty(count, "uint32")


def bandwidth(gpu: Gpu, way: Callable[[], Any], source: Any, target: Any) -> dict[str, float] | None:
    """Return GB/s of what a copy reads and writes."""
    target.fill(0)
    way()
    expect(bool((target == source).all()), True, "the copy is the same")
    times = [gpu.timed(way) for _ in range(gpu.rounds)]
    return gpu.figure([2 * source.nbytes / us / 1e3 for us in times])


def torch_backend(gpu: Gpu) -> Fact:
    """Ask PyTorch which batch norm it takes for bfloat16."""
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        raise UnavailableError("PyTorch is not installed") from None
    if not torch.cuda.is_available():
        raise UnavailableError("this PyTorch sees no GPU")
    shapes = {"NC 8192x1024": (8192, 1024), "NCHW 16x64x56x56": (16, 64, 56, 56), "NHWC 16x64x56x56": (16, 64, 56, 56)}
    found: Fact = {"torch": torch.__version__}
    for name, shape in shapes.items():
        x = torch.zeros(shape, dtype=torch.bfloat16, device="cuda")
        if name.startswith("NHWC"):
            x = x.contiguous(memory_format=torch.channels_last)
        vectors = [torch.ones(shape[1], device="cuda") for _ in range(4)]
        found[name] = str(torch._C._select_batch_norm_backend(x, *vectors, True, 1e-5))
    return found


FACTS: dict[str, Callable[[Gpu], Fact]] = {
    "device": device,
    "host cost of a launch": launches,
    "graph": graph,
    "copy": copy,
    **{f"copy of slices, {name}": functools.partial(copy_slices, row_bytes=size) for name, size in ROWS.items()},
    TORCH: torch_backend,
    **{f"cluster barrier, {size} blocks": functools.partial(cluster_barrier, size=size) for size in CLUSTERS},
    "grid barrier": grid_barrier,
}


# ---- the document ---------------------------------------------------------------------------------------------------


def measure(
    gpu: Gpu, seconds: float, keep: Callable[[dict], None], about: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Measure every fact by itself; hand the document, which begins with `about`, to `keep` before and after each.

    A fact that fails has ``error``, one that this machine cannot have ``unavailable``, one that the time did not reach
    ``not_measured``.
    """
    end, found = monotonic() + seconds, {}
    document = {**(about or {}), "outcome": "stopped in the middle", "dry_run": gpu.rehearsal, "facts": found}
    for name, fact in FACTS.items():
        if monotonic() > end:
            found[name] = {"not_measured": "out of time"}
            continue
        found[name] = {"error": "stopped in the middle of it"}
        keep(document)
        try:
            with gpu.working():
                found[name] = fact(gpu)
        except UnavailableError as reason:
            found[name] = {"unavailable": str(reason)}
        except Exception as problem:  # any error of a driver; the other facts are measured all the same
            found[name] = {"error": f"{type(problem).__name__}: {' '.join(str(problem).split())[:300]}"}
    bad = [name for name, fact in found.items() if is_bad(fact)]
    document["outcome"] = f"failed: {', '.join(bad)}" if bad else "ok"
    document |= {"figures": telling(found), "rows": [] if gpu.rehearsal else list(rows(found))}
    keep(document)
    return document


def is_bad(fact: Fact) -> bool:
    """Tell whether a fact, or a part of it, is missing although this machine could have it."""
    return any(
        key in ("error", "not_measured") or (isinstance(value, dict) and is_bad(value)) for key, value in fact.items()
    )


def rows(found: Mapping[str, Fact]) -> Iterator[Fact]:
    """Yield every figure as a row: what it is, its value and spread, its unit."""
    for name, fact in found.items():
        for part, value in fact.items():
            title = part if name == "device" else f"{name}: {part}"
            if isinstance(value, dict) and "median" in value:
                unit = "GB/s" if part.startswith("GB_per_s") else "us"
                spread = {"value": value["median"], "p20": value["p20"], "p80": value["p80"], "unit": unit}
                yield {"fact": title.replace("GB_per_s_", "").replace("_", " ")} | spread
            elif name in ("device", TORCH) or part == "launches_through_cupy":
                yield {"fact": title.replace("_", " "), "value": value, "unit": ""}


def telling(found: Mapping[str, Fact]) -> list[str]:
    """Return the figures of most interest, as the last table shows them; nothing that was not measured."""
    wanted = (
        ("launch {:.3g} us", "host cost of a launch", "Function, address of a struct (bnkernels)"),
        ("graph node {:.3g} us", "graph", "us_per_node"),
        ("copy {:.4g} GB/s", "copy", "GB_per_s_kernel"),
        ("grid barrier {:.3g} us", "grid barrier", "us"),
        ("cluster of 8 {:.3g} us", "cluster barrier, 8 blocks", "us"),
    )
    figures = ((text, found.get(fact, {}).get(name)) for text, fact, name in wanted)
    return [text.format(figure["median"]) for text, figure in figures if isinstance(figure, dict)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; return 1 if a fact is missing that this machine could have."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.facts", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="PATH.json")
    parser.add_argument("--seconds", type=float, default=50.0, help="begin no fact after so long")
    parser.add_argument("--dry-run", action="store_true", help="on a stand-in for CuPy, without figures")
    options = parser.parse_args(arguments)
    if options.dry_run:
        from benchmarks.gpu.dry_run import stand_in

        stand_in()
    about = facts("torch", "cuda.bindings", place="cuda")
    document = measure(Gpu(options.dry_run), options.seconds, lambda now: write_json(options.out, now), about)
    for name, fact in document["facts"].items():
        print(f"{name}: {fact}")
    return int(document["outcome"] != "ok")


if __name__ == "__main__":
    sys.exit(main())
