"""Options of a training run, their defaults and their checks."""

from __future__ import annotations

import math
import operator
import os
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from bnkernels.ops.activations import ACTIVATIONS
from bnkernels.train.data import DATASETS
from bnkernels.train.environment import total_memory

DEFAULT_EPOCHS = 50
# Chosen on a fifth of the digits' training set held out for it, never on the test set: for each optimiser the one rate,
# of a coarse grid, at which both networks together do best. Plain gradient descent is the default because its update
# is the cheapest, so that it hides the least of what batch norm costs.
DEFAULT_LEARNING_RATES = {"sgd": 0.5, "momentum": 0.1, "adam": 0.01}
CHOICES = {
    "dataset": DATASETS,
    "norm": ("batch", "layer", "none", "both", "all"),
    "activation": ACTIVATIONS,
    "optimizer": tuple(DEFAULT_LEARNING_RATES),
    "dtype": ("float32", "float64"),
    "device": ("auto", "cpu", "cuda"),
    "engine": ("auto", "layers", "graph", "fused"),
}
LABELS = {"batch": "with batch norm", "layer": "with layer norm", "none": "without norm"}  # by `normalization`
MOST = 2**63 - 1  # the largest count
MOST_SEED = 2**128 - 1  # the largest seed that NumPy's generators draw for themselves


class ConfigError(ValueError):
    """The options cannot be trained; the message says why and what to do."""


@dataclass(frozen=True)
class TrainingConfig:
    """Everything that determines a run, and nothing else: the same configuration gives the same parameters.

    Attributes
    ----------
    dataset : {"digits", "mnist", "npz"}
        Name of the data set; see `load_dataset`.
    data : str, optional
        Folder of ``mnist`` or file of ``npz``; kept as an absolute path.
    hidden : tuple of int
        Width of each hidden layer.
    batch_size : int
        Number of examples per step, at least 2. Examples of an epoch left over after whole batches wait for the next
        permutation: statistics over a handful of examples would only add noise.
    norm : {"both", "batch", "layer", "none", "all"}
        Networks to train: with batch norm, with layer norm, without a norm; ``both`` is with batch norm and
        without, ``all`` all three.
    activation : str
        Activation of the hidden layers: one of `bnkernels.ops.activations.ACTIVATIONS`.
    optimizer : {"sgd", "momentum", "adam"}
        Rule that turns gradients into steps.
    lr : float, optional
        Learning rate per step, the same for both networks; None takes the optimiser's default.
    epochs, steps : int, optional
        Length of the training, in passes over the training set or in steps; at most one of them. None takes 50 epochs.
    seed : int
        Seed of the initial weights and of the order of the examples.
    models : int
        Number of models of each network, trained on the same batches: their weights begin with this seed, the next, and
        so on.
    dtype : {"float32", "float64"}
        Data type of data and parameters.
    device : {"auto", "cpu", "cuda"}
        Device that trains; ``auto`` is a GPU where one is usable.
    engine : {"auto", "layers", "graph", "fused"}
        Way to make a step: ``layers`` one op after the other; on a GPU, ``graph`` as a CUDA graph, for layers of at
        most 512 examples and 1024 neurons, and ``fused`` many steps in one launch, on one multiprocessor or, up to the
        same sizes, several. ``auto`` is the last of these that can be. The results agree up to rounding.

    Raises
    ------
    ConfigError
        If a value is out of its range.
    """

    dataset: str = "digits"
    data: str | None = None
    hidden: tuple[int, ...] = (20,)
    batch_size: int = 64
    norm: str = "both"
    activation: str = "relu"
    optimizer: str = "sgd"
    lr: float | None = None
    epochs: int | None = None
    steps: int | None = None
    seed: int = 0
    models: int = 1
    dtype: str = "float32"
    device: str = "auto"
    engine: str = "auto"

    def __post_init__(self) -> None:
        """Check every value, keep numbers and text as Python's, and fill in the defaults that depend on others."""
        keep = {name: _choice(name, getattr(self, name), choices) for name, choices in CHOICES.items()}
        keep["hidden"] = _widths(self.hidden)
        if self.epochs is not None and self.steps is not None:
            raise ConfigError(f"give epochs or steps, not both; got {_shown(self.epochs)} and {_shown(self.steps)}")
        keep["batch_size"] = _whole_number("batch size", self.batch_size, 2, why=": one example has no variance")
        keep["seed"] = _whole_number("seed", self.seed, 0, MOST_SEED)
        keep["models"] = _whole_number("models", self.models, 1)
        keep |= {
            name: _whole_number(name, getattr(self, name), 1)
            for name in ("epochs", "steps")
            if getattr(self, name) is not None
        }
        keep["lr"] = DEFAULT_LEARNING_RATES[keep["optimizer"]] if self.lr is None else _learning_rate(self.lr)
        if self.epochs is None and self.steps is None:
            keep["epochs"] = DEFAULT_EPOCHS
        if self.data is not None:
            keep["data"] = os.path.abspath(as_path("data", self.data))  # a resumed run may start in another folder
        for name, value in keep.items():
            object.__setattr__(self, name, value)

    @property
    def norms(self) -> tuple[str, ...]:
        """The networks to train, in order."""
        several = {"both": ("batch", "none"), "all": ("batch", "layer", "none")}
        return several.get(self.norm, (self.norm,))


def require_memory(config: TrainingConfig, sizes: tuple[int, ...], rows: int) -> None:
    """Refuse networks that memory cannot hold before any of them is made.

    Parameters
    ----------
    config : TrainingConfig
        Options of the run.
    sizes : tuple of int
        Number of inputs, width of each hidden layer, number of classes.
    rows : int
        Number of examples that are evaluated at a time.

    Raises
    ------
    ConfigError
        If parameters, gradients and outputs of the layers take more bytes than there are.
    """
    parameters = sum((inputs + 1) * outputs for inputs, outputs in pairwise(sizes))
    outputs = max(config.batch_size * sum(sizes[1:]), rows * max(sizes[1:]))
    networks = config.models * len(config.norms)
    needed, total = np.dtype(config.dtype).itemsize * (2 * networks * parameters + outputs), total_memory()
    if total is not None and needed > total:
        raise ConfigError(
            f"the networks take {needed:,} bytes of memory, more than the {total:,} there are: give narrower layers "
            "(hidden) or fewer models"
        )


def _shown(value: Any) -> str:
    """Return a value as a message may show it: never long, and never what an array holds."""
    if not isinstance(value, str | int | float | np.generic | None):
        return f"a value of type {type(value).__name__}"
    if isinstance(value, int) and value.bit_length() > 200:
        return f"a number of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:40]}... ({len(text)} characters)"


def as_path(name: str, value: Any) -> str:
    """Return a path as text."""
    try:
        text = os.fsdecode(value)
    except TypeError:
        raise ConfigError(f"{name} must be a path, got {_shown(value)}") from None
    if not text or "\0" in text:
        raise ConfigError(f"{name} must be a path, got {'text with a null character' if text else 'empty text'}")
    return text


def _widths(hidden: Any) -> tuple[int, ...]:
    """Return the widths of hidden layers as Python's own numbers."""
    try:
        found = () if isinstance(hidden, str | bytes) else tuple(hidden)
    except TypeError:
        found = ()
    if not found:
        raise ConfigError(f"hidden must be the widths of at least one layer, such as (20,), got {_shown(hidden)}")
    return tuple(_whole_number("hidden", width, 1) for width in found)


def _choice(name: str, value: Any, choices: tuple[str, ...]) -> str:
    """Return the choice that a value names, as Python's own text."""
    if not isinstance(value, str) or value not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(choices)}; got {_shown(value)}")
    return str(value)


def _whole_number(name: str, value: Any, least: int, most: int = MOST, why: str = "") -> int:
    """Return a whole number, of Python or NumPy, as Python's own."""
    try:
        if isinstance(value, bool | np.bool_):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise ConfigError(f"{name} must be a whole number, got {_shown(value)}: give an int") from None
    if not least <= number <= most:
        bound = f"at least {least}" if number < least else f"at most {most}"
        raise ConfigError(f"{name} must be {bound}, got {_shown(number)}{why if number < least else ''}")
    return number


def _learning_rate(value: Any) -> float:
    """Return a learning rate, of Python or NumPy, as Python's own number."""
    number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    try:
        rate = float(value) if number else math.nan
    except OverflowError:  # an int too large for a float
        rate = math.inf
    if not 0 < rate < math.inf:
        raise ConfigError(f"lr must be a positive number, got {_shown(value)}: give a float such as 0.1")
    return rate
