"""An ensemble: several learners of the same network, with other weights, on the same mini-batches."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from bnkernels.distributed.communicator import Communicator
from bnkernels.train.checkpoint import CheckpointError
from bnkernels.train.learner import Learner, below
from bnkernels.train.run_config import RunConfig


def make_learner(
    norm: str, config: RunConfig, sizes: tuple[int, ...], xp: Any, ranks: Communicator | None = None
) -> Learner | Ensemble:
    """Return the learner of a configuration, or an ensemble if it asks for several models."""
    return (Learner if config.models == 1 else Ensemble)(norm, config, sizes, xp, ranks=ranks)


class Ensemble:
    """Several models that a `Trainer` trains as it trains one learner.

    Parameters
    ----------
    norm, config, sizes, xp, ranks
        Arguments of `Learner`; the models begin with the seeds ``config.seed``, ``config.seed + 1``, ...

    Attributes
    ----------
    members : list of Learner
        The learners.
    engine : Engine
        Engine of all of them: ``fused`` trains all in one launch, the others train them in turn.
    history : list of dict
        Evaluations, as in `TrainingResult`.
    """

    def __init__(
        self, norm: str, config: RunConfig, sizes: tuple[int, ...], xp: Any, ranks: Communicator | None = None
    ) -> None:
        seeds = range(config.seed, config.seed + config.models)
        self.members = [Learner(norm, config, sizes, xp, seed, ranks) for seed in seeds]
        self.engine = config.make_engine([(member.model, member.optimizer) for member in self.members], ranks)
        self.history: list[dict[str, Any]] = []

    @property
    def models(self) -> list[Any]:
        """The models."""
        return [member.model for member in self.members]

    @property
    def step(self) -> int:
        """Number of steps that every model has made."""
        return self.members[0].step

    def train(self, x: Any, y: Any, first: int, last: int, should_stop: Callable[[], bool]) -> None:
        """Train all up to step `last`, or until asked to stop; see `Engine.train`."""
        self.engine.train(x, y, first, last, should_stop)

    def assess(self, train: tuple[Any, Any], test: tuple[Any, Any]) -> dict[str, Any]:
        """Return mean and spread of loss (None if one is not finite) and accuracy, and those of each."""
        each = [member.assess(train, test) for member in self.members]
        found: dict[str, Any] = {}
        for name in ("loss", "accuracy"):
            values = [model[name] for model in each]
            finite = None not in values
            found[name] = statistics.fmean(values) if finite else None
            found[f"{name}_spread"] = statistics.stdev(values) if finite else None
        return found | {"models": each}

    def evaluate(self, x: Any, y: Any) -> tuple[float, float]:
        """Return the means over the models of cross-entropy (nats) and accuracy on these examples."""
        losses, accuracies = zip(*(member.evaluate(x, y) for member in self.members), strict=True)
        return statistics.fmean(losses), statistics.fmean(accuracies)

    def probabilities(self, x: Any) -> np.ndarray:
        """Return the mean over the models of the probability of every class."""
        return np.mean([member.probabilities(x) for member in self.members], axis=0)

    def arrays(self) -> dict[str, np.ndarray]:
        """Return copies of what `Learner.arrays` returns, with the number of its model before each name."""
        return {
            f"{number}/{name}": array
            for number, member in enumerate(self.members)
            for name, array in member.arrays().items()
        }

    def check_arrays(self, arrays: Mapping[str, np.ndarray], step: int | None = None) -> None:
        """Refuse what `load_arrays` could not take over as it is, as `Learner.check_arrays` does."""
        numbers = [str(number) for number in range(len(self.members))]
        for name in arrays:
            if name.partition("/")[0] not in numbers:
                raise CheckpointError(f"the checkpoint is of another ensemble: {name[:60]!r} is unknown")
        for number, member in enumerate(self.members):
            member.check_arrays(below(str(number), arrays), step)

    def load_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Take over what `arrays` returned; CheckpointError where it is another ensemble's, which changes nothing."""
        self.check_arrays(arrays)
        for number, member in enumerate(self.members):
            member.load_arrays(below(str(number), arrays))
