"""The program of a rank: layers beside PyTorch's, bare all-gathers, delays, and training steps."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

import bnkernels as bn
from benchmarks.harness.measure import WrongResultError
from benchmarks.harness.places import keep_memory
from benchmarks.harness.timing import interleave, quantiles
from benchmarks.peers import torch_gloo
from bnkernels import nn
from bnkernels.distributed import (
    Communicator,
    GradientExchange,
    mpi,
    sync_batch_norm_backward,
    sync_batch_norm_forward,
)

OURS, PYTORCH = "ours", "PyTorch's ops over gloo"
SHAPES = ((64, 20), (256, 128), (1024, 256), (1024, 1024), (4096, 1024))
SIZES = (64, 1024, 2**14, 2**18, 2**20)  # bytes of a bare all-gather
STEPS = {"64-20-10": ((64, 20, 10), 64), "256-512-512-10": ((256, 512, 512, 10), 64)}  # sizes, examples of a rank
DELAYS = 4000  # pieces of work whose times give the distribution of delays
MOMENT = 5e-3  # seconds of calls that are timed together
TOLERANCE = 2e-4  # largest error of dx: the composite keeps only one float of each mean


class Counted(Communicator):
    """Ranks that note how many bytes this one brings to each collective."""

    def __init__(self, ranks: Communicator) -> None:
        self.rank, self.size, self._ranks, self.sent = ranks.rank, ranks.size, ranks, []

    def allgather(self, values: Any) -> Any:
        """Gather, and note."""
        self.sent.append(values.nbytes)
        return self._ranks.allgather(values)


def stopwatch(ranks: Communicator, call: Callable[[], Any]) -> Callable[[], float]:
    """Return what makes as many calls, on all ranks, as fill a moment and returns the microseconds of one."""

    def run(count: int) -> float:
        ranks.allgather(np.zeros(1))
        started = perf_counter()
        for _ in range(count):
            call()
        return 1e6 * (perf_counter() - started) / count

    each = ranks.allgather(np.array(run(5)))
    count = int(np.clip(1e6 * MOMENT / each.max(), 1, 500))
    return lambda: run(count)


def layers(ranks: Communicator, torch: Any, shape: tuple[int, int], rounds: int) -> list[dict[str, Any]]:
    """Return a row for each provider of a layer's forward and backward, right before fast."""
    whole, dy = np.random.default_rng(0).standard_normal((2, *shape)).astype("float32")
    mine = slice(shape[0] * ranks.rank // ranks.size, shape[0] * (ranks.rank + 1) // ranks.size)
    x, gradient, channels = whole[mine].copy(), dy[mine].copy(), shape[1]
    exact = bn.batch_norm_backward(dy.astype(float), whole.astype(float), None, None, exact_statistics(whole))[0][mine]
    vectors = [np.full(channels, value, "float32") for value in (1, 0, 0, 1)]
    out = np.empty_like(x), np.empty((3, channels), "float32")
    gradients = np.empty_like(x), *(np.empty(channels, "float32") for _ in range(2))

    def ours(ranks: Communicator = ranks) -> np.ndarray:
        _, statistics = sync_batch_norm_forward(ranks, x, *vectors, out=out)
        return sync_batch_norm_backward(ranks, gradient, x, *vectors[:2], statistics, out=gradients)[0]

    counted = Counted(ranks)
    ours(counted), counted.sent.clear()
    calls, sent = {OURS: ours}, {OURS: counted.sent}
    results = {OURS: ours(counted)}
    if torch is not None:
        layer, tx, tdy = torch_gloo.SyncBatchNorm(torch, channels), torch.from_numpy(x), torch.from_numpy(gradient)

        def pytorch() -> Any:
            layer.forward(tx)
            return layer.backward(tdy, tx)[0]

        results[PYTORCH], sent[PYTORCH], calls[PYTORCH] = pytorch().numpy(), list(layer.sent), pytorch
    for name, found in results.items():
        error = float(np.abs(found - exact).max(initial=0))
        if not error <= TOLERANCE:
            raise WrongResultError(f"{name}, {shape}: an error of {error:.3g}; not timed")
    figures = interleave({name: stopwatch(ranks, call) for name, call in calls.items()}, rounds)
    where = {"ranks": ranks.size, "shape": "x".join(map(str, shape))}
    return [
        where | {"provider": name, "collectives": len(sent[name]), "bytes": sent[name], "us": quantiles(of)}
        for name, of in figures.items()
    ]


def exact_statistics(x: np.ndarray) -> np.ndarray:
    """Return the statistics of the whole mini-batch in float64."""
    return bn.batch_norm_forward(x.astype(float))[1]


def gathers(ranks: Communicator, rounds: int) -> list[dict[str, Any]]:
    """Return the times of bare all-gathers."""
    arrays = {str(size): np.zeros(size, np.uint8) for size in SIZES}
    watches = {name: stopwatch(ranks, lambda array=array: ranks.allgather(array)) for name, array in arrays.items()}
    figures = interleave(watches, rounds)
    return [{"ranks": ranks.size, "bytes": int(name), "us": quantiles(of)} for name, of in figures.items()]


def delays(ranks: Communicator, count: int) -> dict[str, Any]:
    """Return quantiles of the time of a piece of work relative to its median, while all ranks work."""
    work = np.random.default_rng(0).standard_normal((64, 64)).astype("float32")
    times = np.empty(count)
    ranks.allgather(np.zeros(1))
    for number in range(count):
        started = perf_counter()
        for _ in range(4):
            work @ work
        times[number] = perf_counter() - started
    relative = np.sort(ranks.allgather(times / np.median(times)).ravel())
    at = [*(0.01 * number for number in range(100)), 0.995, 0.999, 0.9995, 0.9999, 1]
    return {"ranks": ranks.size, "us": 1e6 * float(np.median(times)), "at": at} | {
        "relative": [round(float(value), 4) for value in np.quantile(relative, at)]
    }


def steps(ranks: Communicator, rounds: int) -> list[dict[str, Any]]:
    """Return the times of training steps with synchronised and with ghost batches, each rank with its examples."""
    rows = []
    for name, (sizes, examples) in STEPS.items():
        rng = np.random.default_rng(ranks.rank)
        x = rng.standard_normal((examples, sizes[0])).astype("float32")
        labels = rng.integers(0, sizes[-1], examples).astype("int32")
        calls = {}
        for way, communicator in (("synchronised", ranks), ("ghost batches", None), ("alone", None)):
            model = nn.MLP(sizes, communicator=communicator)
            exchange = GradientExchange(ranks, [model.gradients])
            calls[way] = step(model, x, labels, None if way == "alone" else exchange)
        figures = interleave({way: stopwatch(ranks, call) for way, call in calls.items()}, rounds)
        where = {"ranks": ranks.size, "network": name, "parameters": model.gradients.size}
        rows += [where | {"way": way, "us": quantiles(of)} for way, of in figures.items()]
    return rows


def step(model: nn.MLP, x: np.ndarray, labels: np.ndarray, exchange: GradientExchange | None) -> Callable[[], None]:
    """Return what makes a training step."""

    def call() -> None:
        _, dlogits = bn.softmax_cross_entropy(model.forward(x, training=True), labels)
        model.backward(dlogits)
        if exchange is not None:
            exchange()
        bn.sgd_update(model.parameters, model.gradients, lr=1e-3)

    return call


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write what rank 0 found."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.distributed.rank", description=__doc__)
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="where rank 0 writes its figures")
    parser.add_argument("--port", type=int, required=True, help="where PyTorch's ranks meet")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--shapes", type=int, default=len(SHAPES), metavar="N", help="only the first shapes")
    options = parser.parse_args(arguments)
    keep_memory()
    bn.set_num_threads(1)
    ranks = mpi(timeout=300)
    torch = torch_gloo.start(ranks.rank, ranks.size, options.port) if find_spec("torch") else None
    found: Mapping[str, Any] = {
        "layers": [row for shape in SHAPES[: options.shapes] for row in layers(ranks, torch, shape, options.rounds)],
        "gathers": gathers(ranks, options.rounds),
        "delays": [delays(ranks, DELAYS if options.rounds > 5 else 50)],
        "steps": steps(ranks, options.rounds),
    }
    if ranks.rank == 0:
        options.json.write_text(json.dumps(found), encoding="utf-8")
    if torch is not None:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
