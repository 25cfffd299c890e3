"""The training step of the question, ours beside others', with and without batch norm, on the CPU with one thread.

``python -m benchmarks.bench_train_step`` prints the figures; ``--json PATH`` also writes them. Every variant first has
to compute the losses that float64 computes from the same weights; then all are timed in many short interleaved rounds,
each of which starts from the initial weights again. Nothing here fails because of a time: targets are met or not met.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np

from benchmarks.harness import WrongResultError, facts, interleave, quantiles, round4, version_of, write_json
from benchmarks.peers import NumPyStep, OurStep, State, Step, TorchStep
from bnkernels import MLP
from bnkernels.config import DEFAULT_LEARNING_RATES
from bnkernels.data import load_dataset
from bnkernels.trainer import TrainingConfig, train

SIZES = (64, 20, 10)
BATCH = 64
WARM_UP, TIMED = 2, 20  # steps of a round; all come from the first epoch, and all are checked
NORMS = ("batch", "none")
LOSS_ROUNDINGS = 64  # of float32, relative to 1 + loss: correct variants stay below 4, a misplaced eps is far above
SEEDS = 5

OURS, TORCH = "bnkernels", "PyTorch"
MAKERS: dict[str, Callable[[State, str, float], Step]] = {
    OURS: OurStep,
    "NumPy expression": NumPyStep,
    TORCH: TorchStep,
    "PyTorch, fused optimiser": lambda state, optimizer, lr: TorchStep(state, optimizer, lr, fused=True),
}

Batches = Sequence[tuple[np.ndarray, np.ndarray]]


class Variant(NamedTuple):
    """One row: who makes the step, with which norm and optimiser, and from which weights."""

    maker: str
    norm: str
    optimizer: str

    def make(self) -> Step:
        """Return a fresh network with its optimiser."""
        return MAKERS[self.maker](initial_state(self.norm), self.optimizer, DEFAULT_LEARNING_RATES[self.optimizer])


def initial_state(norm: str) -> State:
    """Return the weights that all start from."""
    return MLP(SIZES, norm=norm).state()


def mini_batches() -> Batches:
    """Return the mini-batches of a round, from the digits."""
    data = load_dataset("digits")
    starts = range(0, (WARM_UP + TIMED) * BATCH, BATCH)
    return [(data.x_train[start : start + BATCH], data.y_train[start : start + BATCH]) for start in starts]


def losses_of(network: Step, batches: Batches) -> np.ndarray:
    """Train on every batch; return the mean loss of each."""
    steps = (network.step(*network.prepare(*batch)) for batch in batches)
    return np.array([np.asarray(losses, np.float64).mean() for losses in steps])


def check(variants: Sequence[Variant], batches: Batches) -> dict[Variant, float]:
    """Compare every variant's losses with those of float64; return the largest deviations, in roundings of float32.

    Raises
    ------
    WrongResultError
        If a variant is wrong.
    """
    deviations = {}
    for variant in variants:
        rate = DEFAULT_LEARNING_RATES[variant.optimizer]
        exact = losses_of(NumPyStep(initial_state(variant.norm), variant.optimizer, rate, "float64"), batches)
        found = losses_of(variant.make(), batches)
        deviations[variant] = float(np.max(np.abs(found - exact) / (1 + exact)) / np.finfo(np.float32).eps)
        if not deviations[variant] <= LOSS_ROUNDINGS:  # also if it is NaN
            raise WrongResultError(
                f"{variant.maker} (norm {variant.norm}, {variant.optimizer}): the losses are off by "
                f"{deviations[variant]:.3g} roundings, more than {LOSS_ROUNDINGS}: not timed"
            )
    return deviations


def time_steps(variants: Sequence[Variant], batches: Batches, rounds: int) -> dict[Variant, np.ndarray]:
    """Return microseconds per step of every variant in every round."""

    def measurement(variant: Variant) -> Callable[[], float]:
        def measure() -> float:
            network = variant.make()
            prepared = [network.prepare(*batch) for batch in batches]
            for batch in prepared[:WARM_UP]:
                network.step(*batch)
            started = perf_counter()
            for batch in prepared[WARM_UP:]:
                network.step(*batch)
            return 1e6 * (perf_counter() - started) / TIMED

        return measure

    # By number: NumPy, which shuffles the names, would take a named tuple apart.
    figures = interleave({str(i): measurement(variant) for i, variant in enumerate(variants)}, rounds)
    return {variant: figures[str(i)] for i, variant in enumerate(variants)}


def accuracies() -> dict[str, dict[str, Any]]:
    """Return, by norm, what the trainer's defaults reach: accuracy on the test set and steps to 95 %, seed by seed."""
    summaries = [train(TrainingConfig(seed=seed, device="cpu")).summary["networks"] for seed in range(SEEDS)]
    found = {}
    for norm in NORMS:
        reached = [summary[norm]["test_accuracy"] for summary in summaries]
        steps = [summary[norm]["steps_to_95_percent"] for summary in summaries]
        found[norm] = {"mean": round4(np.mean(reached)), "seeds": [round4(a) for a in reached], "steps_to_95": steps}
    return found


def measure(optimizers: Sequence[str], rounds: int) -> dict[str, Any]:
    """Check and time everything that is installed; return the document that the report reads."""
    batches = mini_batches()
    makers = [name for name in MAKERS if not name.startswith(TORCH) or version_of("torch")]
    rows, ratios = [], {}
    for optimizer in optimizers:
        variants = [Variant(maker, norm, optimizer) for maker in makers for norm in NORMS]
        deviations = check(variants, batches)
        times = time_steps(variants, batches, rounds)
        rows += [
            {**variant._asdict(), "us": quantiles(times[variant]), "deviation": round(deviations[variant], 2)}
            for variant in variants
        ]
        ratios[optimizer] = ratios_of(times, optimizer)
    accuracy = accuracies()
    document = {
        **facts("torch"),
        "protocol": {"rounds": rounds, "steps_per_round": TIMED, "sizes": SIZES, "batch": BATCH, "dtype": "float32"},
        "rows": rows,
        "absent": [name for name in MAKERS if name not in makers],
        "ratios": ratios,
        "accuracy": accuracy,
    }
    return document | {"targets": targets(accuracy, ratios)}


def ratios_of(times: Mapping[Variant, np.ndarray], optimizer: str) -> dict[str, dict[str, float]]:
    """Return the ratios of interest, round by round: both sides of each saw the same mood of the machine."""

    def us(maker: str, norm: str) -> np.ndarray | None:
        return times.get(Variant(maker, norm, optimizer))

    pairs = {
        "with / without": (us(OURS, "batch"), us(OURS, "none")),
        "PyTorch with / without": (us(TORCH, "batch"), us(TORCH, "none")),
        "ours / PyTorch, batch norm": (us(OURS, "batch"), us(TORCH, "batch")),
        "ours / NumPy expression, batch norm": (us(OURS, "batch"), us("NumPy expression", "batch")),
    }
    return {name: quantiles(a / b) for name, (a, b) in pairs.items() if a is not None and b is not None}


def targets(accuracy: Mapping[str, Any], ratios: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return each target with what was found (None where nothing was) and whether it is met."""
    sgd = ratios["sgd"]
    torch, without = sgd.get("ours / PyTorch, batch norm"), sgd["with / without"]
    found = [
        ("mean test accuracy with batch norm", ">=", 0.965, accuracy["batch"]["mean"]),
        ("step with batch norm, ours / PyTorch", "<=", 0.5, torch and torch["median"]),
        ("our step, with batch norm / without", "<=", 1.7, without["median"]),
    ]
    return [
        {
            "target": f"{name} {sign} {limit}",
            "found": value,
            "met": None if value is None else bool(value >= limit if sign == ">=" else value <= limit),
        }
        for name, sign, limit, value in found
    ]


def text(document: Mapping[str, Any]) -> str:
    """Return the document as lines for a terminal."""
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items() if version)
    lines = [f"{document['device']}, {document['threads']} thread; {versions}", ""]
    lines.append(f"{'microseconds per step':26}{'norm':7}{'optimiser':11}{'median':>8}{'p20':>8}{'p80':>8}")
    for row in document["rows"]:
        us = row["us"]
        figures = f"{us['median']:8.1f}{us['p20']:8.1f}{us['p80']:8.1f}"
        lines.append(f"{row['maker']:26}{row['norm']:7}{row['optimizer']:11}{figures}")
    lines += [f"{name:26}not installed" for name in document["absent"]]
    lines += ["GPU                       not yet measured", ""]
    for optimizer, ratios in document["ratios"].items():
        lines += [f"{name}, {optimizer}: {ratio['median']:.2f}" for name, ratio in ratios.items()]
    lines.append("")
    for norm, values in document["accuracy"].items():
        lines.append(f"test accuracy, norm {norm}: mean {values['mean']:.4f} of {values['seeds']}")
        lines.append(f"steps to 95 %, norm {norm}: {values['steps_to_95']}")
    lines.append("")
    for target in document["targets"]:
        outcome = {True: "met", False: "not met", None: "not measured"}[target["met"]]
        found = "" if target["found"] is None else f" ({target['found']:.4g})"
        lines.append(f"target: {target['target']}: {outcome}{found}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_train_step", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the figures to this file")
    parser.add_argument("--quick", action="store_true", help="SGD alone, in few rounds: to see that it works")
    options = parser.parse_args(arguments)
    try:
        document = measure(["sgd"] if options.quick else list(DEFAULT_LEARNING_RATES), 20 if options.quick else 200)
    except WrongResultError as error:
        sys.exit(f"error: {error}")
    print(text(document))
    if options.json:
        write_json(options.json, document)


if __name__ == "__main__":
    main()
