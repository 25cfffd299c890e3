"""The training step of the question, ours beside others', with and without batch norm, on the CPU with one thread.

``python -m benchmarks.steps.bench_train_step`` prints the figures; ``--json PATH`` also writes them, ``--place cuda``
measures a GPU. Every variant first has to compute the losses that float64 computes from the same weights; then all are
timed in many short interleaved rounds, each of which starts from the initial weights again. Nothing here fails because
of a time: targets are met or not met.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import steps
from benchmarks.harness.case import NotSupportedError, WrongResultError
from benchmarks.harness.timing import facts, interleave, quantiles, round4, write_json
from benchmarks.steps.expression import ExpressionStep
from benchmarks.steps.step import Batches, Maker, Step, check_losses, initial_state, stopwatch
from bnkernels.train.config import DEFAULT_LEARNING_RATES
from bnkernels.train.data import load_dataset
from bnkernels.train.trainer import TrainingConfig, train

SIZES = (64, 20, 10)
BATCH = 64
WARM_UP, TIMED = 2, 20  # steps of a round; all come from the first epoch, and all are checked
NORMS = ("batch", "none")
LOSS_ROUNDINGS = 64  # float32 roundings of 1 + loss: correct variants stay below 4, a misplaced eps is far above
SEEDS = 5

OURS, TORCH = "bnkernels", "PyTorch"
EXPRESSIONS = {"cpu": "NumPy expression", "cuda": "CuPy expression"}


class Variant(NamedTuple):
    """One row: who makes the step, with which norm and optimiser."""

    maker: str
    norm: str
    optimizer: str

    def __str__(self) -> str:
        """Return it as messages show it."""
        return f"{self.maker} (norm {self.norm}, {self.optimizer})"


def mini_batches() -> Batches:
    """Return the mini-batches of a round, from the digits."""
    data = load_dataset("digits")
    starts = range(0, (WARM_UP + TIMED) * BATCH, BATCH)
    return [(data.x_train[start : start + BATCH], data.y_train[start : start + BATCH]) for start in starts]


def make(variant: Variant, maker: Maker) -> Step:
    """Return a fresh network with its optimiser."""
    state = initial_state(SIZES, variant.norm)
    return maker.make(state, variant.optimizer, DEFAULT_LEARNING_RATES[variant.optimizer])


def check(variant: Variant, step: Step, batches: Batches) -> float:
    """Compare a step's losses with those of float64; return the largest deviation, in roundings of float32.

    Raises
    ------
    WrongResultError
        If it is wrong.
    """
    rate = DEFAULT_LEARNING_RATES[variant.optimizer]
    exact = ExpressionStep(initial_state(SIZES, variant.norm), variant.optimizer, rate, dtype="float64")
    expected = exact.losses(exact.prepare_all(batches))
    return check_losses(str(variant), step.losses(step.prepare_all(batches)), expected, LOSS_ROUNDINGS)


def time_steps(networks: Mapping[Variant, Step], batches: Batches, rounds: int) -> dict[Variant, np.ndarray]:
    """Return microseconds per step of every variant in every round."""
    # By number: NumPy, which shuffles the names, would take a named tuple apart.
    watches = {str(i): stopwatch(step, batches, WARM_UP) for i, step in enumerate(networks.values())}
    figures = interleave(watches, rounds)
    return {variant: figures[str(i)] for i, variant in enumerate(networks)}


def checked(makers: Mapping[str, Maker], optimizer: str, batches: Batches) -> tuple[dict, dict, dict[str, str]]:
    """Return the networks of all makers, their deviations, and by name why a maker has none.

    Raises
    ------
    WrongResultError
        If one is wrong: then nothing is timed.
    """
    networks, deviations, failed = {}, {}, {}
    for name, maker in makers.items():
        made = {}
        try:
            for norm in NORMS:
                variant = Variant(name, norm, optimizer)
                made[variant] = make(variant, maker)
                deviations[variant] = check(variant, made[variant], batches)
        except WrongResultError:
            raise
        except NotSupportedError as error:
            failed[name] = str(error)
        except Exception as error:  # any error of a framework is shown; the others go on
            failed[name] = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        else:
            networks |= made
    return networks, deviations, failed


def accuracies(place: str = "cpu") -> dict[str, dict[str, Any]]:
    """Return, by norm, what the trainer's defaults reach: accuracy on the test set and steps to 95 %, seed by seed."""
    summaries = [train(TrainingConfig(seed=seed, device=place)).summary["networks"] for seed in range(SEEDS)]
    found = {}
    for norm in NORMS:
        reached = [summary[norm]["test_accuracy"] for summary in summaries]
        steps = [summary[norm]["steps_to_95_percent"] for summary in summaries]
        found[norm] = {"mean": round4(np.mean(reached)), "seeds": [round4(a) for a in reached], "steps_to_95": steps}
    return found


def measure(optimizers: Sequence[str], rounds: int, place: str = "cpu", only: Sequence[str] = ()) -> dict[str, Any]:
    """Check and time everything that is installed; return the document that the report reads.

    Parameters
    ----------
    optimizers : sequence of str
        Names of the optimisers.
    rounds : int
        Number of times that each variant is timed.
    place : str
        ``cpu`` or ``cuda``.
    only : sequence of str
        Names of the makers; if empty, all but those left out by default.

    Returns
    -------
    dict
        Facts, protocol, rows, by name why somebody is absent, ratios, accuracies, targets (of the CPU).
    """
    batches = mini_batches()
    invited = steps.makers(place, tuple(only))
    absent = {name: reason for name, maker in invited.items() if (reason := maker.absent())}
    rows, ratios = [], {}
    for optimizer in optimizers:
        makers = {name: maker for name, maker in invited.items() if name not in absent}
        networks, deviations, failed = checked(makers, optimizer, batches)
        absent |= failed
        times = time_steps(networks, batches, rounds)
        rows += [
            {**variant._asdict(), "us": quantiles(times[variant]), "deviation": round(deviations[variant], 2)}
            for variant in networks
        ]
        ratios[optimizer] = ratios_of(times, optimizer, place)
    accuracy = accuracies(place) if place == "cpu" or OURS not in absent else {}
    document = {
        **facts("torch", "jax", place=place),
        "protocol": {"rounds": rounds, "steps_per_round": TIMED, "sizes": SIZES, "batch": BATCH, "dtype": "float32"},
        "rows": rows,
        "absent": absent,
        "ratios": ratios,
        "accuracy": accuracy,
    }
    return document | {"targets": targets(accuracy, ratios) if place == "cpu" else []}


def ratios_of(times: Mapping[Variant, np.ndarray], optimizer: str, place: str = "cpu") -> dict[str, dict[str, float]]:
    """Return the ratios of interest, round by round: both sides of each saw the same mood of the machine."""

    def us(maker: str, norm: str) -> np.ndarray | None:
        return times.get(Variant(maker, norm, optimizer))

    pairs = {
        "with / without": (us(OURS, "batch"), us(OURS, "none")),
        "PyTorch with / without": (us(TORCH, "batch"), us(TORCH, "none")),
        "ours / PyTorch, batch norm": (us(OURS, "batch"), us(TORCH, "batch")),
        f"ours / {EXPRESSIONS[place]}, batch norm": (us(OURS, "batch"), us(EXPRESSIONS[place], "batch")),
    }
    return {name: quantiles(a / b) for name, (a, b) in pairs.items() if a is not None and b is not None}


def targets(accuracy: Mapping[str, Any], ratios: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return each target with what was found (None where nothing was) and whether it is met."""
    sgd = ratios["sgd"]
    torch, without = sgd.get("ours / PyTorch, batch norm"), sgd.get("with / without")
    found = [
        ("mean test accuracy with batch norm", ">=", 0.965, accuracy["batch"]["mean"]),
        ("step with batch norm, ours / PyTorch", "<=", 0.5, torch and torch["median"]),
        ("our step, with batch norm / without", "<=", 1.7, without and without["median"]),
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
    lines += [f"{name:26}{reason}" for name, reason in document["absent"].items()]
    lines += ["GPU                       not yet measured", ""] if document["place"] == "cpu" else [""]
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
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.steps.bench_train_step", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--place", choices=("cpu", "cuda"), default="cpu", help="where; default cpu")
    parser.add_argument("--only", nargs="+", default=(), metavar="NAME", help="who takes part, as the table names them")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the figures to this file")
    parser.add_argument("--quick", action="store_true", help="SGD alone, in few rounds: to see that it works")
    options = parser.parse_args(arguments)
    optimizers, rounds = (["sgd"], 20) if options.quick else (list(DEFAULT_LEARNING_RATES), 200)
    try:
        document = measure(optimizers, rounds, options.place, options.only)
    except (WrongResultError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(text(document))
    if not document["rows"]:
        sys.exit("error: nobody could be measured")
    if options.json:
        write_json(options.json, document)
    if failed := [name for name, reason in document["absent"].items() if reason.startswith("failed")]:
        sys.exit(f"error: {', '.join(failed)} failed")


if __name__ == "__main__":
    main()
