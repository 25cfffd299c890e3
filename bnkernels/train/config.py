"""Options of ``bnkernels train``: a multilayer perceptron on rows of features."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar

from bnkernels.distributed.communicator import Communicator
from bnkernels.nn.mlp import MLP
from bnkernels.nn.optimizers import Optimizer
from bnkernels.ops.activations import ACTIVATIONS
from bnkernels.train.data_parallel import DataParallelEngine
from bnkernels.train.engines import Engine, choose_engine
from bnkernels.train.run_config import CHOICES, ConfigError, RunConfig, shown, whole_number

DEFAULT_EPOCHS = 50
# Chosen on a fifth of the digits' training set held out for it, never on the test set: for each optimiser the one rate,
# of a coarse grid, at which both networks together do best. Plain gradient descent is the default because its update
# is the cheapest, so that it hides the least of what batch norm costs.
DEFAULT_LEARNING_RATES = {"sgd": 0.5, "momentum": 0.1, "adam": 0.01}


@dataclass(frozen=True)
class TrainingConfig(RunConfig):
    """Everything that determines a run, and nothing else: the same configuration gives the same parameters.

    Attributes
    ----------
    dataset, data, batch_size, norm, lr, epochs, steps, seed, models, dtype, device
        Options of every run, see `RunConfig`; 50 epochs where no length is given.
    hidden : tuple of int
        Width of each hidden layer.
    activation : str
        Activation of the hidden layers: one of `bnkernels.ops.activations.ACTIVATIONS`.
    optimizer : {"sgd", "momentum", "adam"}
        Rule that turns gradients into steps.
    engine : {"auto", "layers", "graph", "fused"}
        Way to make a step: ``layers`` one op after the other; on a GPU, ``graph`` as a CUDA graph, for layers of at
        most 512 examples and 1024 neurons, and ``fused`` many steps in one launch, on one multiprocessor or, up to the
        same sizes, several. ``auto`` is the last of these that can be. The results agree up to rounding.

    Raises
    ------
    ConfigError
        If a value is out of its range.
    """

    command: ClassVar[str] = "train"
    choices: ClassVar[dict[str, tuple[str, ...]]] = CHOICES | {
        "activation": ACTIVATIONS,
        "optimizer": tuple(DEFAULT_LEARNING_RATES),
        "engine": ("auto", "layers", "graph", "fused"),
    }
    rates: ClassVar[dict[str, float]] = DEFAULT_LEARNING_RATES
    default_epochs: ClassVar[int] = DEFAULT_EPOCHS

    hidden: tuple[int, ...] = (20,)
    activation: str = "relu"
    engine: str = "auto"

    def _checked(self) -> dict[str, Any]:
        return super()._checked() | {"hidden": _widths(self.hidden)}

    @property
    def widths(self) -> tuple[int, ...]:
        """Width of each hidden layer."""
        return self.hidden

    def for_evaluation(self, device: str) -> TrainingConfig:
        """Return the configuration of the same networks on a device, with the engine that every device has."""
        return replace(self, device=device, engine="layers")

    def describe(self, sizes: tuple[int, ...]) -> str:
        """Return the network in words."""
        return f"network {'-'.join(map(str, sizes))}, {self.activation}"

    def numbers(self, sizes: tuple[int, ...], rows: int) -> int:
        """Return how many numbers parameters, gradients and outputs of the layers are."""
        parameters = sum((inputs + 1) * outputs for inputs, outputs in pairwise(sizes))
        outputs = max(self.batch_size * sum(sizes[1:]), rows * max(sizes[1:]))
        return 2 * self.models * len(self.norms) * parameters + outputs

    def weights(self, norm: str, sizes: Sequence[int]) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield name and shape of each matrix of weights."""
        for number, shape in enumerate(pairwise(sizes)):
            yield f"{number}.weight", shape

    def make_model(
        self, norm: str, sizes: tuple[int, ...], xp: Any, seed: int, ranks: Communicator | None = None
    ) -> MLP:
        """Return a network with fresh weights."""
        options = {"activation": self.activation, "dtype": self.dtype, "seed": seed, "xp": xp}
        if norm == "sync-batch":
            return MLP(sizes, norm="batch", **options, communicator=ranks)
        return MLP(sizes, norm=norm, **options)

    def make_engine(self, trained: Sequence[tuple[MLP, Optimizer]], ranks: Communicator | None = None) -> Engine:
        """Return the engine of this name; with ``auto``, the fastest that can train the networks."""
        return choose_engine(trained, self) if ranks is None else DataParallelEngine(trained, self, ranks)


def _widths(hidden: Any) -> tuple[int, ...]:
    """Return the widths of hidden layers as Python's own numbers."""
    try:
        found = () if isinstance(hidden, str | bytes) else tuple(hidden)
    except TypeError:
        found = ()
    if not found:
        raise ConfigError(f"hidden must be the widths of at least one layer, such as (20,), got {shown(hidden)}")
    return tuple(whole_number("hidden", width, 1) for width in found)
