"""Training steps, ours beside others', with and without batch norm: of the question's network, and of the paper's.

``python -m benchmarks.steps.bench_train_step`` prints the figures; ``--json PATH`` also writes them, ``--place cuda``
measures a GPU. On the CPU everybody has one thread. Every variant first has to compute the losses that float64 computes
from the same weights; then all are timed in many short interleaved rounds, each of which starts from the initial
weights again. Nothing here fails because of a time: targets are met or not met.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import steps
from benchmarks.harness.case import NotSupportedError, WrongResultError
from benchmarks.harness.places import keep_memory
from benchmarks.harness.timing import facts, interleave, quantiles, round4, write_json
from benchmarks.steps.expression import ExpressionStep
from benchmarks.steps.step import Batches, Maker, Step, check_losses, initial_state, stopwatch
from bnkernels.runtime.cpu.threads import set_num_threads
from bnkernels.train.config import DEFAULT_LEARNING_RATES
from bnkernels.train.data import load_dataset
from bnkernels.train.reproduce import BATCH as PAPERS_BATCH
from bnkernels.train.reproduce import HIDDEN as PAPERS_HIDDEN
from bnkernels.train.trainer import TrainingConfig, train

WARM_UP, TIMED = 2, 20  # steps of a round; all come from the first epoch, and all are checked
NORMS = ("batch", "none")
LOSS_ROUNDINGS = 64  # float32 roundings of 1 + loss: correct variants stay below 4, a misplaced eps is far above
SEEDS = 5

OURS, FUSED, TORCH = "bnkernels", "bnkernels fused", "PyTorch"
EXPRESSIONS = {"cpu": "NumPy expression", "cuda": "CuPy expression"}


class Network(NamedTuple):
    """A network and its mini-batches.

    Attributes
    ----------
    sizes : tuple of int
        Inputs, units of every hidden layer, classes.
    batch : int
        Examples of a mini-batch.
    activation : str
        Activation of the hidden layers.
    optimizers : tuple of str
        Optimisers that it is trained by.
    """

    sizes: tuple[int, ...]
    batch: int
    activation: str
    optimizers: tuple[str, ...]

    def __str__(self) -> str:
        """Return the sizes as the tables show them."""
        return "-".join(map(str, self.sizes))

    def mini_batches(self) -> Batches:
        """Return the mini-batches of a round: from the digits, or random images and labels."""
        rows = (WARM_UP + TIMED) * self.batch
        if self is QUESTION:
            data = load_dataset("digits")
            x, labels = data.x_train, data.y_train
        else:
            rng = np.random.default_rng(0)
            x = rng.random((rows, self.sizes[0]), np.float32)
            labels = rng.integers(self.sizes[-1], size=rows, dtype=np.int32)
        return [(x[i : i + self.batch], labels[i : i + self.batch]) for i in range(0, rows, self.batch)]


QUESTION = Network((64, 20, 10), 64, "relu", tuple(DEFAULT_LEARNING_RATES))
PAPER = Network((784, *PAPERS_HIDDEN, 10), PAPERS_BATCH, "sigmoid", ("sgd",))
NETWORKS = (QUESTION, PAPER)


class Variant(NamedTuple):
    """One row: who makes the step, of which network, with which norm and optimiser."""

    maker: str
    network: Network
    norm: str
    optimizer: str

    def __str__(self) -> str:
        """Return it as messages show it."""
        return f"{self.maker} ({self.network}, norm {self.norm}, {self.optimizer})"

    def step(self, make: Any, **options: Any) -> Step:
        """Return a fresh network with its optimiser."""
        state = initial_state(self.network.sizes, self.norm)
        rate = DEFAULT_LEARNING_RATES[self.optimizer]
        return make(state, self.optimizer, rate, **options, activation=self.network.activation)


def check(variant: Variant, step: Step, batches: Batches) -> float:
    """Compare a step's losses with those of float64; return the largest deviation, in roundings of float32.

    Raises
    ------
    WrongResultError
        If it is wrong.
    """
    exact = variant.step(ExpressionStep, dtype="float64")
    expected = exact.losses(exact.prepare_all(batches))
    return check_losses(str(variant), step.losses(step.prepare_all(batches)), expected, LOSS_ROUNDINGS)


def time_steps(networks: Mapping[Variant, Step], batches: Batches, rounds: int) -> dict[Variant, np.ndarray]:
    """Return microseconds per step of every variant in every round."""
    # By number: NumPy, which shuffles the names, would take a named tuple apart.
    watches = {str(i): stopwatch(step, batches, WARM_UP) for i, step in enumerate(networks.values())}
    figures = interleave(watches, rounds)
    return {variant: figures[str(i)] for i, variant in enumerate(networks)}


def checked(
    makers: Mapping[str, Maker], network: Network, optimizer: str, batches: Batches
) -> tuple[dict, dict, dict[str, str]]:
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
                variant = Variant(name, network, norm, optimizer)
                made[variant] = variant.step(maker.make)
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


def tasks(quick: bool) -> Iterator[tuple[Network, str, int]]:
    """Yield networks, optimisers, and the number of times that each variant is timed."""
    for network in NETWORKS:
        for optimizer in ("sgd",) if quick else network.optimizers:
            yield network, optimizer, 20 if quick else 200 if network is QUESTION else 60


def measure(quick: bool = False, place: str = "cpu", only: Sequence[str] = ()) -> dict[str, Any]:
    """Check and time everything that is installed; return the document that the report reads.

    Parameters
    ----------
    quick : bool
        SGD alone, in few rounds.
    place : str
        ``cpu`` or ``cuda``.
    only : sequence of str
        Names of the makers; if empty, all but those left out by default.

    Returns
    -------
    dict
        Facts, protocol, rows, by name why somebody is absent, ratios, accuracies, targets (of the CPU).
    """
    invited = steps.makers(place, tuple(only))
    absent = {name: reason for name, maker in invited.items() if (reason := maker.absent())}
    rows, ratios = [], []
    for network, optimizer, rounds in tasks(quick):
        batches = network.mini_batches()
        makers = {name: maker for name, maker in invited.items() if name not in absent}
        networks, deviations, failed = checked(makers, network, optimizer, batches)
        absent |= failed
        times = time_steps(networks, batches, rounds)
        case = {"network": str(network), "batch": network.batch, "optimizer": optimizer, "rounds": rounds}
        rows += [
            {"maker": variant.maker, "norm": variant.norm}
            | case
            | {"us": quantiles(times[variant]), "deviation": round(deviations[variant], 2)}
            for variant in networks
        ]
        by_maker = {(variant.maker, variant.norm): us for variant, us in times.items()}
        ratios.append(case | {"ratios": ratios_of(by_maker, place)})
    accuracy = accuracies(place) if place == "cpu" or OURS not in absent else {}
    document = {
        **facts("torch", "jax", place=place),
        "protocol": {"steps_per_round": TIMED, "dtype": "float32"},
        "rows": rows,
        "absent": absent,
        "ratios": ratios,
        "accuracy": accuracy,
    }
    return document | {"targets": targets(accuracy, ratios) if place == "cpu" else []}


Times = Mapping[tuple[str, str], np.ndarray]  # microseconds of every round, by maker and norm


def fastest(times: Times, names: str, norm: str) -> np.ndarray | None:
    """Return the times of the fastest of those whose names begin so: `--engine auto` takes the faster of ours."""
    found = [us for (maker, of), us in times.items() if maker.startswith(names) and of == norm]
    return min(found, key=np.median, default=None)


def ratios_of(times: Times, place: str = "cpu") -> dict[str, dict[str, float]]:
    """Return the ratios of interest, round by round: both sides of each saw the same clocks and load."""
    ours, torch = ({norm: fastest(times, names, norm) for norm in NORMS} for names in (OURS, TORCH))
    pairs = {
        "with / without": (ours["batch"], ours["none"]),
        "layers, with / without": (times.get((OURS, "batch")), times.get((OURS, "none"))),
        "PyTorch with / without": (torch["batch"], torch["none"]),
        "ours / PyTorch, batch norm": (ours["batch"], torch["batch"]),
        "ours / PyTorch, no norm": (ours["none"], torch["none"]),
        f"ours / {EXPRESSIONS[place]}, batch norm": (ours["batch"], times.get((EXPRESSIONS[place], "batch"))),
    }
    return {name: quantiles(a / b) for name, (a, b) in pairs.items() if a is not None and b is not None}


def targets(accuracy: Mapping[str, Any], ratios: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return each target with what was found (None where nothing was) and whether it is met."""

    def ratio(network: Network, name: str) -> float | None:
        of = next(row["ratios"] for row in ratios if (row["network"], row["optimizer"]) == (str(network), "sgd"))
        return of[name]["median"] if name in of else None

    wanted = [
        (QUESTION, "ours / PyTorch, batch norm", 0.035),
        (QUESTION, "with / without", 1.15),
        (PAPER, "with / without", 1.15),
        (PAPER, "ours / PyTorch, batch norm", 0.7),
        (PAPER, "ours / PyTorch, no norm", 0.7),
    ]
    found = [("digits, mean test accuracy with batch norm", ">=", 0.965, accuracy["batch"]["mean"])]
    found += [(f"{network}, SGD: {name}", "<=", limit, ratio(network, name)) for network, name, limit in wanted]
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
    header = f"{'microseconds per step':26}{'network':24}{'norm':7}{'optimiser':11}"
    lines.append(f"{header}{'median':>8}{'p20':>8}{'p80':>8}")
    for row in document["rows"]:
        us = row["us"]
        figures = f"{us['median']:8.1f}{us['p20']:8.1f}{us['p80']:8.1f}"
        lines.append(f"{row['maker']:26}{row['network']:24}{row['norm']:7}{row['optimizer']:11}{figures}")
    lines += [f"{name:26}{reason}" for name, reason in document["absent"].items()]
    lines += ["GPU                       not yet measured", ""] if document["place"] == "cpu" else [""]
    for row in document["ratios"]:
        of = f"{row['network']}, {row['optimizer']}"
        lines += [f"{of}: {name}: {ratio['median']:.3g}" for name, ratio in row["ratios"].items()]
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
    set_num_threads(1)
    try:
        document = measure(options.quick, options.place, options.only)
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
    keep_memory()
    main()
