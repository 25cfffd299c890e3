"""What determines a training run: its options, their defaults and their checks."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

from bnkernels.activations import ACTIVATIONS
from bnkernels.data import DATASETS

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


class ConfigError(ValueError):
    """What was asked for cannot be trained; the message says why and what to do."""


@dataclass(frozen=True)
class TrainingConfig:
    """Everything that determines a run, and nothing else: the same configuration gives the same parameters.

    Attributes
    ----------
    dataset : {"digits", "mnist", "npz"}
        What to train on; see `load_dataset`.
    data : str, optional
        The folder of ``mnist`` or the file of ``npz``; kept as an absolute path.
    hidden : tuple of int
        Width of each hidden layer.
    batch_size : int
        Examples per step, at least 2. What an epoch leaves over after whole batches waits for the next permutation:
        statistics over a handful of examples would only add noise.
    norm : {"both", "batch", "layer", "none", "all"}
        Which networks to train: with batch norm, with layer norm, without a norm; ``both`` is with batch norm and
        without, ``all`` all three.
    activation : str
        The activation of the hidden layers: one of `bnkernels.activations.ACTIVATIONS`.
    optimizer : {"sgd", "momentum", "adam"}
        How gradients become steps.
    lr : float, optional
        Learning rate per step, the same for both networks; None takes the optimiser's default.
    epochs, steps : int, optional
        How long to train, in passes over the training set or in steps; at most one of them. None takes 50 epochs.
    seed : int
        Seed of the initial weights and of the order of the examples.
    models : int
        How many of each network to train, on the same batches: their weights begin with this seed, the next, and so on.
    dtype : {"float32", "float64"}
        The type of data and parameters.
    device : {"auto", "cpu", "cuda"}
        Where to train; ``auto`` is a GPU where one is usable.
    engine : {"auto", "layers", "graph", "fused"}
        How to make a step: ``layers`` one op after the other; on a GPU, ``graph`` as a CUDA graph, for layers of at
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
        """Check every value and fill in the defaults that depend on others."""
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name} must be one of {', '.join(choices)}; got {getattr(self, name)!r}")
        if not self.hidden or min(self.hidden) < 1:
            raise ConfigError(f"hidden must be at least one layer of at least one neuron, got {self.hidden}")
        if self.batch_size < 2:
            raise ConfigError(f"batch size must be at least 2, got {self.batch_size}: one example has no variance")
        if self.epochs is not None and self.steps is not None:
            raise ConfigError(f"give epochs or steps, not both; got {self.epochs} epochs and {self.steps} steps")
        for name, least in (("epochs", 1), ("steps", 1), ("seed", 0), ("models", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name} must be at least {least}, got {value}")
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise ConfigError(f"lr must be a positive number, got {self.lr}")
        fill = {"hidden": tuple(self.hidden), "lr": self.lr or DEFAULT_LEARNING_RATES[self.optimizer]}
        if self.epochs is None and self.steps is None:
            fill["epochs"] = DEFAULT_EPOCHS
        if self.data is not None:
            fill["data"] = os.path.abspath(self.data)  # a resumed run may start in another folder
        for name, value in fill.items():
            object.__setattr__(self, name, value)

    @property
    def norms(self) -> tuple[str, ...]:
        """The networks to train, in order."""
        several = {"both": ("batch", "none"), "all": ("batch", "layer", "none")}
        return several.get(self.norm, (self.norm,))
