"""A run read back from its checkpoint: everything is checked before anything is built from it or written for it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from bnkernels.train.checkpoint import CheckpointError, load_checkpoint
from bnkernels.train.config import TrainingConfig
from bnkernels.train.run_config import ConfigError, RunConfig
from bnkernels.train.runs import RunFolder
from bnkernels.train.sequence import SequenceConfig
from bnkernels.train.step_time import MOST_ROUNDS

CONFIGS: dict[str, type[RunConfig]] = {config.command: config for config in (TrainingConfig, SequenceConfig)}
CHANGEABLE_ON_RESUME = ("data", "device", "engine", "epochs", "steps")
LARGEST = 2**53  # the largest integer up to which a float holds all
MEASURED = ("epoch", "step", "accuracy", "us_per_step")  # numbers of every entry of a history; its loss may be None


def load_run(path: Path) -> tuple[RunConfig, dict[str, Any], dict[str, np.ndarray]]:
    """Read the checkpoint of a run and check all that continuing or evaluating it relies on.

    A digest says that a file is whole, not who wrote it: one with a right digest may still ask for terabytes.

    Parameters
    ----------
    path : path
        The checkpoint.

    Returns
    -------
    config : RunConfig
        Options of the run. The networks it describes take about as much memory as the arrays.
    meta : dict
        Everything else that is not an array, as `Trainer.state` returned it.
    arrays : dict of str to numpy.ndarray
        The arrays by name; `load_learners` checks them against the networks.

    Raises
    ------
    CheckpointError
        If it cannot be read, or is of no run that this version could continue; the message says which part.
    OSError
        If the file cannot be read.
    """
    meta, arrays = load_checkpoint(path)
    config = _config(path, meta.get("command", "train"), meta.get("config"))
    networks = meta.get("networks")
    wanted = {
        "sizes": _sizes_fit(meta.get("sizes"), config),
        "data_digest": type(meta.get("data_digest")) is str,
        "classes": _classes_fit(meta.get("classes", []), meta.get("sizes")),
        "epoch": _natural(meta.get("epoch")),
        "generator": _generator_fits(meta.get("generator")),
        "folder": _is_path(meta.get("folder", ".")),
        "rounds": _rounds_fit(meta.get("rounds")),
        "networks": type(networks) is dict
        and networks.keys() == set(config.norms)
        and all(_network_fits(network, config.models, meta.get("epoch")) for network in networks.values()),
    }
    for what, fits in wanted.items():
        if not fits:
            raise _unusable(path, f"its {what} are missing or not what a run saves")
    _check_weights(path, config, meta["sizes"], arrays)
    return config, meta, arrays


def run_folder(path: Path, meta: Mapping[str, Any], given: str | Path | None) -> RunFolder:
    """Return the places of a saved run. A checkpoint cannot send its run to a folder that has nothing to do with it.

    Its folder is the checkpoint's own, or the one that the caller names too, or one that holds the ``metrics.json`` of
    the very same run: its history is the beginning of the saved one.

    Raises
    ------
    CheckpointError
        If the checkpoint names another folder.
    """
    folder = Path(os.path.normpath(path.parent / meta.get("folder", ".")))
    own = folder == Path(os.path.normpath(path.parent))
    if own or (given is not None and Path(given).resolve() == folder.resolve()) or _holds(folder, meta["networks"]):
        return RunFolder(folder, path)
    shown = str(folder) if len(str(folder)) <= 300 else f"...{str(folder)[-300:]}"
    shown = shown if shown.isprintable() else ascii(shown)
    raise CheckpointError(
        f"{path} says that the folder of its run is {shown}, which holds nothing of that run yet: "
        "if it is right, give it as --out (folder=)"
    )


def merged(config: RunConfig, options: Mapping[str, Any]) -> RunConfig:
    """Return a run's configuration with the options that may change, after checking that the others do not."""
    saved = asdict(config)
    for name, value in options.items():
        if name not in saved:
            raise ConfigError(f"there is no option {name}: a run has {', '.join(saved)}")
        if name not in CHANGEABLE_ON_RESUME and saved[name] != getattr(replace(config, **{name: value}), name):
            raise ConfigError(f"the run was started with {name} {saved[name]}, not {value}: drop it or start a new run")
    changes = {name: options[name] for name in CHANGEABLE_ON_RESUME if name in options}
    if "epochs" in changes or "steps" in changes:
        changes = {"epochs": None, "steps": None, **changes}
    return replace(config, **changes)


def _holds(folder: Path, networks: Mapping[str, Any]) -> bool:
    """Whether a folder has the metrics of the run: the first entries of every network's history."""
    metrics = folder / "metrics.json"
    try:
        # To open a pipe would wait for its writer.
        histories = json.loads(metrics.read_bytes())["history"] if metrics.is_file() else {}
        found = [(network["history"], histories[norm]) for norm, network in networks.items()]
        return all(0 < len(known) <= len(saved) and saved[: len(known)] == known for saved, known in found)
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return False


def _unusable(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{path} is not the checkpoint of a run that this version can continue: {why}")


def _config(path: Path, command: Any, saved: Any) -> RunConfig:
    """Return the configuration that a command made, each field of its own type."""
    if type(command) is not str or command not in CONFIGS:
        raise _unusable(path, f"it is of the command {str(command)[:40]!r}: upgrade bnkernels")
    if type(saved) is not dict:
        raise _unusable(path, "its config is missing")
    defaults = {field.name: field.default for field in fields(CONFIGS[command])}
    for name, value in saved.items():
        if name not in defaults:
            raise _unusable(path, f"its config has the unknown field {name[:40]!r}: upgrade bnkernels")
        if not _field_fits(name, value, defaults[name]):
            raise _unusable(path, f"{name} of its config is not what a run saves")
    try:
        return CONFIGS[command](**saved)
    except (TypeError, ValueError) as error:
        raise _unusable(path, str(error)[:300]) from error


def _field_fits(name: str, value: Any, default: Any) -> bool:
    """Whether a value is of the type of its field, which JSON leaves open."""
    if type(default) is tuple:
        return type(value) is list and all(_natural(width) for width in value)
    if name == "lr" or type(default) is float:
        return _number(value)
    if name == "seed":
        return type(value) is int
    if name in ("epochs", "steps"):
        return value is None or _natural(value)
    if name == "data":
        return value is None or _is_path(value)
    return type(value) is type(default) and (type(value) is str or _natural(value))


def _is_path(value: Any) -> bool:
    """Whether the file system could have such a name."""
    if type(value) is not str or not value or "\0" in value:
        return False
    try:
        return bool(os.fsencode(value))
    except UnicodeEncodeError:
        return False


def _natural(value: Any) -> bool:
    return type(value) is int and 0 <= value < LARGEST


def _number(value: Any) -> bool:
    return (type(value) is float and math.isfinite(value)) or (type(value) is int and abs(value) < LARGEST)


def _sizes_fit(sizes: Any, config: RunConfig) -> bool:
    if type(sizes) is not list or not all(_natural(size) and size > 0 for size in sizes):
        return False
    return len(sizes) == len(config.widths) + 2 and tuple(sizes[1:-1]) == config.widths


def _classes_fit(classes: Any, sizes: Any) -> bool:
    """Whether these are sorted names of all classes, or none, as where labels are numbers and in earlier versions."""
    if type(classes) is not list or not all(type(name) is str for name in classes):
        return False
    whole = type(sizes) is list and sizes[-1:] == [len(classes)] and classes == sorted(set(classes))
    return not classes or whole


def _generator_fits(state: Any) -> bool:
    """Whether it is the state of a generator such as the trainer's."""
    try:
        np.random.default_rng(0).bit_generator.state = state
    except (TypeError, ValueError, KeyError, OverflowError, AttributeError):
        return False
    return True


def _rounds_fit(rounds: Any) -> bool:
    """Whether it is the state of `Rounds`, which the runs of earlier versions lack."""
    if rounds is None:
        return True
    if type(rounds) is not dict or type(rounds.get("place")) is not str or not _natural(rounds.get("steps")):
        return False
    ratios = rounds.get("ratios")
    return type(ratios) is list and len(ratios) <= MOST_ROUNDS and all(_number(ratio) for ratio in ratios)


def _network_fits(network: Any, models: int, epoch: Any) -> bool:
    """Whether steps and history of a network, or of an ensemble of `models`, are those of a run in that epoch."""
    if type(network) is not dict or not _natural(network.get("step")) or type(network.get("history")) is not list:
        return False
    history = network["history"]
    if (
        not _natural(epoch)
        or len(history) < epoch
        or not all(_entry_fits(entry, MEASURED, models) for entry in history)
    ):
        return False
    steps = [0, *(entry["step"] for entry in history)]
    return all(_natural(step) for step in steps) and steps == sorted(set(steps)) and steps[-1] <= network["step"]


def _entry_fits(entry: Any, measured: tuple[str, ...], models: int) -> bool:
    """Whether an entry of a history has all its numbers, for each model too where there are several."""
    if type(entry) is not dict or not all(_number(entry.get(name)) for name in measured):
        return False
    lost = ("loss", "loss_spread") if models > 1 else ("loss",)
    if not all(name in entry and (entry[name] is None or _number(entry[name])) for name in lost):
        return False
    if models == 1:
        return True
    each = entry.get("models")
    if not _number(entry.get("accuracy_spread")) or type(each) is not list or len(each) != models:
        return False
    return all(_entry_fits(model, ("accuracy",), 1) for model in each)


def _check_weights(path: Path, config: RunConfig, sizes: list[int], arrays: Mapping[str, np.ndarray]) -> None:
    """Refuse a configuration whose networks are larger than the weights that the file brings."""
    if config.models * len(config.norms) > len(arrays):
        raise _unusable(path, "its arrays are fewer than its models")
    try:
        wanted = {norm: list(config.weights(norm, sizes)) for norm in config.norms}
    except ConfigError as error:
        raise _unusable(path, str(error)) from error
    models = [""] if config.models == 1 else [f"{number}/" for number in range(config.models)]
    for norm, weights in wanted.items():
        for model in models:
            for own, shape in weights:
                name = f"{norm}/{model}model/{own}"
                if name not in arrays or arrays[name].shape != shape:
                    raise _unusable(path, f"the array {name} is missing or not of the shape {shape}")
