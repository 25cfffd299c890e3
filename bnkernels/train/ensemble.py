"""Several models of one of the compared networks: the same batches, other weights; what they reach, and its spread."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from bnkernels.nn.mlp import MLP
from bnkernels.ops.fused_training.op import fused_training
from bnkernels.train.checkpoint import CheckpointError
from bnkernels.train.config import TrainingConfig
from bnkernels.train.learner import STEPS_PER_LAUNCH, Network, below

STEPS_IN_TURN = 10  # of a model before it is the next one's turn, between which a run can be interrupted


def make_network(norm: str, config: TrainingConfig, sizes: tuple[int, ...], xp: Any) -> Network | Ensemble:
    """Return the network of a configuration, or the ensemble of as many as it asks for."""
    return (Network if config.models == 1 else Ensemble)(norm, config, sizes, xp)


class Ensemble:
    """Models that a `Trainer` takes for one network.

    Parameters
    ----------
    norm, config, sizes, xp
        As of `Network`; the models begin with the seeds ``config.seed``, ``config.seed + 1``, ...

    Attributes
    ----------
    members : list of Network
        The models.
    engine : str
        As of `Network`, the same for all: ``fused`` trains them in one launch, the others in turn.
    step : int
        How many steps all have made.
    history : list of dict
        Evaluations, as in `TrainingResult`.
    """

    def __init__(self, norm: str, config: TrainingConfig, sizes: tuple[int, ...], xp: Any) -> None:
        seeds = range(config.seed, config.seed + config.models)
        self.members = [Network(norm, replace(config, seed=seed, models=1), sizes, xp) for seed in seeds]
        self.engine = self.members[0].engine
        self.history: list[dict[str, Any]] = []
        self._config, self._xp = config, xp

    @property
    def models(self) -> list[MLP]:
        """The models."""
        return [member.model for member in self.members]

    @property
    def step(self) -> int:
        """How many steps all have made."""
        return self.members[0].step

    @step.setter
    def step(self, number: int) -> None:
        for member in self.members:
            member.step = number

    def train(self, x: Any, y: Any, first: int, last: int, should_stop: Callable[[], bool]) -> None:
        """Train all up to step `last`, or until asked to stop; row 0 of `x` and `y` belongs to step `first`."""
        fused = self.engine.startswith("fused")
        while self.step < last and not should_stop():
            target = min(self.step + (STEPS_PER_LAUNCH if fused else STEPS_IN_TURN), last)
            if fused:
                self._train_fused(x, y, first, target)
                continue
            for member in self.members:
                member.train(x, y, first, target, lambda: False)

    def _train_fused(self, x: Any, y: Any, first: int, target: int) -> None:
        """Train all in one launch."""
        config, models = self._config, self.models
        optimizers = [member.optimizer for member in self.members]
        state = [[optimizer.arrays[name] for optimizer in optimizers] for name in optimizers[0].arrays]
        kept = [[model.parameters for model in models], [model.running for model in models], *state]
        parameters, running, *moments = (self._xp.stack(arrays) for arrays in kept)
        rows = slice((self.step - first) * config.batch_size, (target - first) * config.batch_size)
        fused_training(
            models[0].fused,
            parameters,
            tuple(moments),
            running if running.size else None,
            x[rows],
            y[rows],
            batch=config.batch_size,
            optimizer=config.optimizer,
            lr=config.lr,
            steps_before=optimizers[0].steps,
            batches_before=models[0].batches,
        )
        for arrays, trained in zip(kept, (parameters, running, *moments), strict=True):
            for array, row in zip(arrays, trained, strict=True):
                array[...] = row
        steps = target - self.step
        for member in self.members:
            member.optimizer.steps += steps
            member.model.batches += steps
            member.step += steps

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

    def arrays(self) -> dict[str, np.ndarray]:
        """Return copies of what `Network.arrays` returns, with the number of its model before each name."""
        return {
            f"{number}/{name}": array
            for number, member in enumerate(self.members)
            for name, array in member.arrays().items()
        }

    def check_arrays(self, arrays: Mapping[str, np.ndarray], step: int | None = None) -> None:
        """Refuse what `load_arrays` could not take over as it is, as `Network.check_arrays` does."""
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
