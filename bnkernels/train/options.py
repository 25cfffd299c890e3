"""Options of the command line that say what is trained, and how: those of the commands that train."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

from bnkernels.train.config import TrainingConfig
from bnkernels.train.reproduce import PIXELS, SHORTENED, STEPS, Experiment
from bnkernels.train.run_config import CHOICES, RunConfig
from bnkernels.train.sequence import SequenceConfig


def add_training_options(command: argparse.ArgumentParser) -> None:
    """Add the options that are fields of `TrainingConfig`."""
    default = TrainingConfig()
    _add_data(command)
    group = command.add_argument_group("network")
    add = partial(_add, TrainingConfig)
    add(
        group,
        "hidden",
        "width of a hidden layer; repeat it or give several (default: 20)",
        type=_widths,
        action="extend",
        metavar="N[,N...]",
    )
    add(group, "norm", f"networks to train (default: {default.norm})")
    add(group, "activation", f"activation of the hidden layers (default: {default.activation})")
    add(group, "dtype", f"type of data and parameters (default: {default.dtype})")
    group = command.add_argument_group("training")
    _add_training(group, TrainingConfig)
    text = f"steps op by op, as a graph, or many in one launch; auto is the fastest (default: {default.engine})"
    add(group, "engine", text)


def add_sequence_options(command: argparse.ArgumentParser) -> None:
    """Add the options that are fields of `SequenceConfig`."""
    default, add = SequenceConfig(), partial(_add, SequenceConfig)
    group = _add_data(command)
    add(group, "read", f"steps of a sequence: every pixel, or every row of an image (default: {default.read})")
    text = "order of the pixels: as they are, a permutation, or drawn with replacement, which leaves out 37 %% of them"
    add(group, "permute", f"{text} (default: {default.permute})")
    group = command.add_argument_group("network")
    add(group, "hidden", f"number of hidden units (default: {default.hidden})", type=int, metavar="N")
    add(group, "norm", f"networks to train (default: {default.norm})")
    add(group, "dtype", f"type of data and parameters (default: {default.dtype})")
    group = command.add_argument_group("training")
    _add_training(group, SequenceConfig)
    text = f"largest norm of all gradients together; 0 leaves them as they are (default: {default.clip:g})"
    add(group, "clip", text, type=float, metavar="NORM")
    text = f"standard deviation of the noise on the first hidden state in training (default: {default.noise:g})"
    add(group, "noise", text, type=float, metavar="STD")


def _add(kind: type[RunConfig], group: Any, name: str, text: str, **options: Any) -> None:
    """Add an option that is a field of a configuration."""
    if name in kind.choices:
        options["choices"] = kind.choices[name]
    group.add_argument(f"--{name.replace('_', '-')}", help=text, **options)


def _add_data(command: argparse.ArgumentParser) -> Any:
    """Add the options that say what to train on; return their group."""
    group = command.add_argument_group("data")
    _add(RunConfig, group, "dataset", f"data set to train on (default: {RunConfig.dataset})")
    text = "the folder of MNIST's IDX files, gzipped or not, or an .npz with x and y; x_test and y_test if it has them"
    _add(RunConfig, group, "data", text, metavar="PATH")
    return group


def _add_training(group: Any, kind: type[RunConfig]) -> None:
    """Add the options of the training itself."""
    default, add = kind(), partial(_add, kind, group)
    add("batch_size", f"examples per step (default: {default.batch_size})", type=int, metavar="N")
    add("optimizer", f"rule that turns gradients into steps (default: {default.optimizer})")
    rates = ", ".join(f"{rate:g} for {name}" for name, rate in kind.rates.items())
    rates = f"{default.lr:g}" if len(set(kind.rates.values())) == 1 else rates
    add("lr", f"learning rate, the same for all networks (default: {rates})", type=float, metavar="RATE")
    length = group.add_mutually_exclusive_group()
    text = f"passes over the training set (default: {kind.default_epochs})"
    _add(kind, length, "epochs", text, type=int, metavar="N")
    _add(kind, length, "steps", "steps, instead of epochs", type=int, metavar="N")
    add("seed", f"seed of weights and order of the examples (default: {default.seed})", type=int, metavar="N")
    add("models", "models of each network, with other weights; reports mean and spread", type=int, metavar="N")
    add("device", f"where to train; auto is a GPU where there is one (default: {default.device})")


def add_reproduction_options(command: argparse.ArgumentParser) -> None:
    """Add the options of `Experiment`."""
    default = Experiment()
    command.add_argument("experiment", choices=("ioffe2015",), help="which experiment")
    command.add_argument(
        "--mnist",
        metavar="DIR",
        help="IDX files of MNIST or Fashion-MNIST, gzipped or not (default: those of Debian's package "
        "dataset-fashion-mnist where it is installed, else the digits)",
    )
    command.add_argument(
        "--pixels", choices=PIXELS, help=f"images in black and white, or grey (default: {default.pixels})"
    )
    command.add_argument(
        "--steps", type=int, metavar="N", help=f"number of steps (default: {STEPS} on a GPU, {SHORTENED} on a CPU)"
    )
    command.add_argument("--lr", type=float, metavar="RATE", help=f"learning rate (default: {default.lr})")
    command.add_argument("--seed", type=int, metavar="N", help=f"seed of weights and batches (default: {default.seed})")
    command.add_argument("--device", choices=CHOICES["device"], help=f"where to train (default: {default.device})")
    command.add_argument(
        "--engine", choices=TrainingConfig.choices["engine"], help=f"engine, as for train (default: {default.engine})"
    )
    command.add_argument("--out", metavar="DIR", help="folder of document and pictures (default: runs/ioffe2015-...)")


def add_run_options(command: argparse.ArgumentParser) -> None:
    """Add the options about files and output."""
    group = command.add_argument_group("run")
    group.add_argument("--out", metavar="DIR", help="the run's folder (default: runs/DATASET-DATE-TIME)")
    group.add_argument("--checkpoint", metavar="PATH", help="the checkpoint (default: checkpoint.npz in the folder)")
    group.add_argument(
        "--resume", metavar="PATH", help="continue the run of this folder or checkpoint; --epochs or --steps extend it"
    )
    group = command.add_argument_group("output")
    group.add_argument("--quiet", action="store_true", default=False, help="print the answer only")
    group.add_argument("--json", action="store_true", default=False, help="print one JSON document and nothing else")


def _widths(text: str) -> list[int]:
    """Parse ``20`` or ``100,100,100``."""
    try:
        return [int(width) for width in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected widths such as 20 or 100,100,100, got {text!r}") from None
