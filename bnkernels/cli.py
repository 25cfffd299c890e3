"""The command line: ``bnkernels train``, ``train-sequence``, ``evaluate``, ``predict``, ``reproduce`` and ``info``."""

from __future__ import annotations

import argparse
import contextlib
import math
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from functools import partial
from typing import NoReturn

import numpy as np

import bnkernels
from bnkernels import _process
from bnkernels.distributed.communicator import OneRank, RankError
from bnkernels.distributed.mpi import launched_by_mpi, mpi
from bnkernels.runtime import cpu
from bnkernels.runtime.registry import DeviceError
from bnkernels.train.checkpoint import CheckpointError
from bnkernels.train.config import TrainingConfig
from bnkernels.train.data import DataError
from bnkernels.train.data_parallel import together
from bnkernels.train.documents import to_json
from bnkernels.train.environment import report
from bnkernels.train.evaluate import evaluate
from bnkernels.train.options import (
    add_reproduction_options,
    add_run_options,
    add_sequence_options,
    add_training_options,
)
from bnkernels.train.plots import require_matplotlib
from bnkernels.train.predict import predict
from bnkernels.train.reproduce import Experiment, require_folder
from bnkernels.train.reproduce import run as reproduce
from bnkernels.train.reproduce import write as write_reproduction
from bnkernels.train.run_config import CHOICES, LABELS, ConfigError
from bnkernels.train.runs import default_folder
from bnkernels.train.sequence import SequenceConfig
from bnkernels.train.tables import answer, heading, row
from bnkernels.train.trainer import Trainer, resume, train

EXIT_BAD_INPUT, EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 2, 130, 141  # the latter two, 128 and a signal, as of a shell
LONGEST = 300  # characters of an error that repeats the command line


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    arguments : list of str, optional
        The arguments after the program's name; by default those of the process.

    Returns
    -------
    int
        The exit code: 0; 2 for bad input; 130 after Ctrl-C, 143 after SIGTERM; 141 where nobody reads what is printed
        any more.
    """
    try:
        try:
            _process.raise_on_interrupt()
            _process.open_streams()
            options = build_parser().parse_args(arguments)
            return options.command(options)
        finally:
            _process.flush()
    except BrokenPipeError:  # `bnkernels train | head`
        return EXIT_BROKEN_PIPE
    except OSError as error:
        reason = error.strerror or str(error)
        return _fail(f"{reason}: {error.filename}" if error.filename else reason)
    except (CheckpointError, ConfigError, DataError, DeviceError, ImportError, RankError) as error:
        return _fail(str(error))
    except MemoryError as error:
        return _fail(f"not enough memory: {error}" if str(error) else "not enough memory")
    except KeyboardInterrupt:
        _say("interrupted")
        return EXIT_INTERRUPTED
    finally:
        _process.end_on_interrupt()


def _say(message: str) -> None:
    with contextlib.suppress(OSError):  # nobody listens
        print(f"bnkernels: {' '.join(message.split())}", file=sys.stderr)


def _fail(message: str) -> int:
    _say(f"error: {message}")
    return EXIT_BAD_INPUT


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and where help is, and exit."""
        message = " ".join(message.split())
        message = message if len(message) <= LONGEST else f"{message[:LONGEST]}..."
        self.exit(EXIT_BAD_INPUT, f"bnkernels: error: {message}; see {self.prog} --help\n")


def build_parser() -> Parser:
    """Return the parser of all commands; options that were not given are absent from what it returns."""
    parser = Parser(prog="bnkernels", description=bnkernels.__doc__, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"bnkernels {bnkernels.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=Parser)

    command = commands.add_parser(
        "train",
        help="train a network with and without batch norm and compare",
        description="Train the same network with and without batch norm, on the same batches, and say what each "
        "reached and what a step of it cost. Writes metrics.json, curves.png and a checkpoint.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    command.set_defaults(command=run_train, kind=TrainingConfig)
    add_training_options(command)
    add_run_options(command)

    command = commands.add_parser(
        "train-sequence",
        help="train LSTMs on images read as sequences: without a norm, with layer norm, with recurrent batch norm",
        description="Train an LSTM to classify images that it reads pixel by pixel, or row by row: without a norm, "
        "with layer norm and with recurrent batch norm, on the same batches. Writes what train writes.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    command.set_defaults(command=run_train, kind=SequenceConfig)
    add_sequence_options(command)
    add_run_options(command)

    evaluates = commands.add_parser("evaluate", help="evaluate a checkpoint on labelled data", allow_abbrev=False)
    evaluates.set_defaults(command=run_evaluate)
    predicts = commands.add_parser("predict", help="print the classes of new data", allow_abbrev=False)
    predicts.set_defaults(command=run_predict)
    for command in (evaluates, predicts):
        command.add_argument("checkpoint", metavar="CHECKPOINT", help="a run's folder or its checkpoint")
        device = {"choices": CHOICES["device"], "default": "auto"}
        command.add_argument("--device", **device, help="where to compute (default: auto)")
        command.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
    evaluates.add_argument(
        "--data", metavar="PATH", help="other data of the same kind, evaluated whole (default: the run's test set)"
    )
    predicts.add_argument("--data", metavar="FILE", required=True, help="an .npz file with x; labels are not needed")
    predicts.add_argument("--norm", choices=tuple(LABELS), help="one network of the run (default: all)")

    command = commands.add_parser(
        "reproduce",
        help="repeat a paper's experiment",
        description="Repeat a published experiment and draw its figure. ioffe2015: 784 inputs, three layers of "
        "100 sigmoids, with and without batch norm (arXiv:1502.03167, section 4.1).",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    command.set_defaults(command=run_reproduce)
    add_reproduction_options(command)

    command = commands.add_parser("info", help="print the environment, for bug reports", allow_abbrev=False)
    command.set_defaults(command=run_info)
    return parser


def run_train(options: argparse.Namespace) -> int:
    """``bnkernels train`` and ``train-sequence``: train or resume, then print the answer."""
    given = vars(options)
    config = {field.name: given[field.name] for field in fields(options.kind) if field.name in given}
    config = {name: tuple(value) if isinstance(value, list) else value for name, value in config.items()}
    places = {"folder": given.get("out"), "checkpoint": given.get("checkpoint")}
    require_matplotlib()  # first: what installs it installs the progress bar too
    should_stop = _process.Stop()
    ranks = mpi() if launched_by_mpi() else OneRank()
    try:
        with should_stop.on_signals(), _progress(options.quiet or options.json or ranks.rank > 0) as on_epoch:
            more = {"communicator": ranks, "on_epoch": on_epoch, "should_stop": should_stop}
            if "resume" in given:
                result = resume(given["resume"], **places, **more, **config)
            else:
                config = together(ranks, partial(options.kind, **config), str)
                places["folder"] = places["folder"] or partial(default_folder, config.name)
                result = train(config, **places, **more)
    except Exception as error:
        if ranks.speaker is None:
            ranks.abort(str(error))  # the others wait for this one
        elif ranks.speaker != ranks.rank:
            return EXIT_BAD_INPUT
        raise
    if result.status == "stopped":
        if ranks.rank == 0:
            print(f"bnkernels: stopped and saved; continue with: {result.continuation}", file=sys.stderr)
        return 128 + (should_stop.received or signal.SIGTERM)  # the signal may have been another rank's
    if ranks.rank == 0:
        print(to_json(result.document()) if options.json else answer(result))
    return 0


def run_predict(options: argparse.Namespace) -> int:
    """``bnkernels predict``: print a line for every row, of several networks under their names."""
    result = predict(options.checkpoint, options.data, norm=options.norm, device=options.device)
    if options.json:
        print(to_json(result))
        return 0
    predictions = result["predictions"]
    if len(predictions) > 1:
        print(*predictions, sep="\t")
    for classes in zip(*predictions.values(), strict=True):
        print(*classes, sep="\t")
    return 0


def run_evaluate(options: argparse.Namespace) -> int:
    """``bnkernels evaluate``: print loss and accuracy."""
    result = evaluate(options.checkpoint, data=options.data, device=options.device)
    if options.json:
        print(to_json(result))
        return 0
    examples = "example" if result["test_examples"] == 1 else "examples"
    print(f"{result['test_examples']} test {examples} of {result['dataset']}")
    for norm, network in result["networks"].items():
        loss = "not finite" if network["test_loss"] is None else f"{network['test_loss']:.4f}"
        accuracy = f"test accuracy {network['test_accuracy']:.2%}"
        print(f"{LABELS[norm]:<18}  {accuracy}, loss {loss}, after {network['step']} steps")
    return 0


def run_reproduce(options: argparse.Namespace) -> int:
    """``bnkernels reproduce``: run the experiment and draw it."""
    given = vars(options)
    experiment = Experiment(**{field.name: given[field.name] for field in fields(Experiment) if field.name in given})
    require_matplotlib()
    require_folder(given.get("out", "runs"))
    document = reproduce(experiment, say=lambda line: print(line, flush=True))
    files = write_reproduction(document, given.get("out") or default_folder(options.experiment))
    for norm, network in document["networks"].items():
        print(f"{LABELS[norm]:<18}  test accuracy {network['test_accuracy'][-1]:.2%}")
    print(*(f"{name}: {path}" for name, path in files.items()), sep="\n")
    return 0


def run_info(options: argparse.Namespace) -> int:
    """``bnkernels info``: print the environment report."""
    print(report())
    return 0


@contextmanager
def _progress(silent: bool) -> Iterator[Callable[[Trainer], None]]:
    """Print a row of the table after every epoch, under a progress bar on the terminal, and what is compiled."""
    if silent:
        yield lambda trainer: None
        return
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError("the progress bar needs tqdm: pip install 'bnkernels[train]', or use --quiet") from error
    with ExitStack() as shown, tqdm(disable=None, unit="epoch", leave=False) as bar:  # None: only on a terminal
        started = False

        def on_epoch(trainer: Trainer) -> None:
            nonlocal started
            if not started:
                started = True
                if trainer.xp is np:
                    shown.enter_context(cpu.compilation_shown(sys.stderr))
                bar.total = math.ceil(trainer.total_steps / trainer.steps_per_epoch)
                bar.update(trainer.epoch)
                tqdm.write(heading(trainer))
            else:
                bar.update()
                tqdm.write(row(trainer))

        yield on_epoch
