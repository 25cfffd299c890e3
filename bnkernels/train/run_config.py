"""Options that every kind of run has, with their checks, and what the trainer asks of them."""

from __future__ import annotations

import math
import operator
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from bnkernels.distributed.communicator import Communicator
from bnkernels.nn.optimizers import Optimizer, make_optimizer
from bnkernels.train.data import DATASETS
from bnkernels.train.environment import total_memory

CHOICES = {
    "dataset": DATASETS,
    "norm": ("batch", "sync-batch", "layer", "none", "both", "all"),
    "dtype": ("float32", "float64"),
    "device": ("auto", "cpu", "cuda"),
}
LABELS = {  # by `normalization`
    "batch": "with batch norm",
    "sync-batch": "with sync batch norm",
    "layer": "with layer norm",
    "none": "without norm",
}
MOST = 2**63 - 1  # the largest count
MOST_SEED = 2**128 - 1  # the largest seed that NumPy's generators draw for themselves
EVALUATION_ROWS = 8192  # evaluated at a time, to bound the memory of the activations


class ConfigError(ValueError):
    """The options cannot be trained; the message says why and what to do."""


@dataclass(frozen=True)
class RunConfig(ABC):
    """Base of the configurations: everything that determines a run, and how its networks are made and trained.

    Attributes
    ----------
    dataset : {"digits", "mnist", "npz"}
        Name of the data set; see `load_dataset`.
    data : str, optional
        Folder of ``mnist`` or file of ``npz``; kept as an absolute path.
    batch_size : int
        Number of examples per step, at least 2. Examples of an epoch left over after whole batches wait for the next
        permutation: statistics over a handful of examples would only add noise.
    norm : {"both", "batch", "sync-batch", "layer", "none", "all"}
        Networks to train: with batch norm, with layer norm, without a norm; ``both`` is with batch norm and
        without, ``all`` all three. On several ranks ``batch`` normalises each rank's part of a mini-batch by itself,
        and ``sync-batch`` all parts together.
    optimizer : str
        Rule that turns gradients into steps.
    lr : float, optional
        Learning rate per step, the same for all networks; None takes the optimiser's default.
    epochs, steps : int, optional
        Length of the training, in passes over the training set or in steps; at most one of them. None takes the
        default number of epochs.
    seed : int
        Seed of the initial weights and of the order of the examples.
    models : int
        Number of models of each network, trained on the same batches: their weights begin with this seed, the next, and
        so on.
    dtype : {"float32", "float64"}
        Data type of data and parameters.
    device : {"auto", "cpu", "cuda"}
        Device that trains; ``auto`` is a GPU where one is usable.
    command : str
        Command of the command line that makes such runs; their checkpoints name it.
    choices : dict of str to tuple of str
        Values of those options that are names.
    rates : dict of str to float
        Default learning rate of each optimiser.
    default_epochs : int
        Default length of the training.

    Raises
    ------
    ConfigError
        If a value is out of its range.
    """

    command: ClassVar[str]
    choices: ClassVar[dict[str, tuple[str, ...]]] = CHOICES
    rates: ClassVar[dict[str, float]]
    default_epochs: ClassVar[int]

    dataset: str = "digits"
    data: str | None = None
    batch_size: int = 64
    norm: str = "both"
    optimizer: str = "sgd"
    lr: float | None = None
    epochs: int | None = None
    steps: int | None = None
    seed: int = 0
    models: int = 1
    dtype: str = "float32"
    device: str = "auto"

    def __post_init__(self) -> None:
        """Check every value, keep numbers and text as Python's, and fill in the defaults that depend on others."""
        for name, value in self._checked().items():
            object.__setattr__(self, name, value)

    def _checked(self) -> dict[str, Any]:
        """Return the values as they are kept."""
        keep: dict[str, Any] = {name: choice(name, getattr(self, name), names) for name, names in self.choices.items()}
        if self.epochs is not None and self.steps is not None:
            raise ConfigError(f"give epochs or steps, not both; got {shown(self.epochs)} and {shown(self.steps)}")
        keep["batch_size"] = whole_number("batch size", self.batch_size, 2, why=": one example has no variance")
        keep["seed"] = whole_number("seed", self.seed, 0, MOST_SEED)
        keep["models"] = whole_number("models", self.models, 1)
        keep |= {
            name: whole_number(name, getattr(self, name), 1)
            for name in ("epochs", "steps")
            if getattr(self, name) is not None
        }
        keep["lr"] = self.rates[keep["optimizer"]] if self.lr is None else number("lr", self.lr)
        if self.epochs is None and self.steps is None:
            keep["epochs"] = self.default_epochs
        if self.data is not None:
            keep["data"] = os.path.abspath(as_path("data", self.data))  # a resumed run may start in another folder
        return keep

    @property
    def norms(self) -> tuple[str, ...]:
        """The networks to train, in order."""
        several = {"both": ("batch", "none"), "all": ("batch", "layer", "none")}
        return several.get(self.norm, (self.norm,))

    @property
    def name(self) -> str:
        """Beginning of the name of a run's folder."""
        return self.dataset

    @property
    def rule(self) -> str:
        """The optimiser in words."""
        return f"{self.optimizer} at {self.lr:g}"

    @property
    @abstractmethod
    def widths(self) -> tuple[int, ...]:
        """Width of each hidden layer."""

    def for_evaluation(self, device: str) -> RunConfig:
        """Return the configuration of the same networks on a device that makes no steps."""
        return replace(self, device=device)

    def evaluation_rows(self, sizes: tuple[int, ...]) -> int:
        """Return how many examples are evaluated at a time."""
        return EVALUATION_ROWS

    @abstractmethod
    def describe(self, sizes: tuple[int, ...]) -> str:
        """Return the network in words; `sizes` are number of inputs, widths, number of classes."""

    @abstractmethod
    def numbers(self, sizes: tuple[int, ...], rows: int) -> int:
        """Return how many numbers all networks hold at a time, at the least, if `rows` examples are evaluated."""

    @abstractmethod
    def weights(self, norm: str, sizes: Sequence[int]) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield name and shape of the arrays that make up most of a network, as a checkpoint has them."""

    @abstractmethod
    def make_model(
        self, norm: str, sizes: tuple[int, ...], xp: Any, seed: int, ranks: Communicator | None = None
    ) -> Any:
        """Return a network with fresh weights, whose statistics some ranks share."""

    def make_optimizer(self, model: Any) -> Optimizer:
        """Return the optimiser of a network."""
        return make_optimizer(self.optimizer, model, self.lr)

    @abstractmethod
    def make_engine(self, trained: Sequence[tuple[Any, Optimizer]], ranks: Communicator | None = None) -> Any:
        """Return the engine that makes the steps of networks, each with its optimiser; on several ranks, with them."""


def require_memory(config: RunConfig, sizes: tuple[int, ...], rows: int) -> None:
    """Refuse networks that memory cannot hold before any of them is made.

    Parameters
    ----------
    config : RunConfig
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
    needed, total = np.dtype(config.dtype).itemsize * config.numbers(sizes, rows), total_memory()
    if total is not None and needed > total:
        raise ConfigError(
            f"the networks take {needed:,} bytes of memory, more than the {total:,} there are: give narrower layers "
            "(hidden) or fewer models"
        )


def shown(value: Any) -> str:
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
        raise ConfigError(f"{name} must be a path, got {shown(value)}") from None
    if not text or "\0" in text:
        raise ConfigError(f"{name} must be a path, got {'text with a null character' if text else 'empty text'}")
    return text


def choice(name: str, value: Any, choices: tuple[str, ...]) -> str:
    """Return the choice that a value names, as Python's own text."""
    if not isinstance(value, str) or value not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(choices)}; got {shown(value)}")
    return str(value)


def whole_number(name: str, value: Any, least: int, most: int = MOST, why: str = "") -> int:
    """Return a whole number, of Python or NumPy, as Python's own."""
    try:
        if isinstance(value, bool | np.bool_):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise ConfigError(f"{name} must be a whole number, got {shown(value)}: give an int") from None
    if not least <= number <= most:
        bound = f"at least {least}" if number < least else f"at most {most}"
        raise ConfigError(f"{name} must be {bound}, got {shown(number)}{why if number < least else ''}")
    return number


def number(name: str, value: Any, *, zero: bool = False) -> float:
    """Return a positive number (or with `zero`, 0), of Python or NumPy, as Python's own."""
    real = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    try:
        found = float(value) if real else math.nan
    except OverflowError:  # an int too large for a float
        found = math.inf
    if not (0 <= found if zero else 0 < found) or not found < math.inf:
        what = "a number of at least 0" if zero else "a positive number"
        raise ConfigError(f"{name} must be {what}, got {shown(value)}: give a float such as 0.1")
    return found
