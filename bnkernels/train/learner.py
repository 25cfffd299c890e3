"""A learner: one of the compared networks, with its optimiser and what it has reached."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from bnkernels.distributed.communicator import Communicator
from bnkernels.nn.state import host
from bnkernels.ops.softmax_cross_entropy.op import softmax_cross_entropy
from bnkernels.train.checkpoint import CheckpointError
from bnkernels.train.run_config import RunConfig


class Learner:
    """One of the compared networks: its model, its optimiser, and what it has reached.

    Parameters
    ----------
    norm : {"batch", "sync-batch", "layer", "none"}
        Norm of the hidden layers.
    config : RunConfig
        Options of the model and of its training.
    sizes : sequence of int
        Number of inputs, width of each hidden layer, number of classes.
    xp : module
        Array module that computes: ``numpy`` or ``cupy``.
    seed : int, optional
        Seed of the weights; by default that of the configuration.
    ranks : Communicator, optional
        Several ranks that train the model together, each with its part of every mini-batch.

    Attributes
    ----------
    model : MLP or SequenceClassifier
        Network that is trained.
    optimizer : Optimizer
        Optimiser of the model.
    engine : Engine
        Engine that makes its steps.
    history : list of dict
        Evaluations, as in `TrainingResult`.

    Raises
    ------
    ConfigError
        If the engine of the configuration cannot train the model.
    """

    def __init__(
        self,
        norm: str,
        config: RunConfig,
        sizes: tuple[int, ...],
        xp: Any,
        seed: int | None = None,
        ranks: Communicator | None = None,
    ) -> None:
        self.model = config.make_model(norm, sizes, xp, config.seed if seed is None else seed, ranks)
        self.optimizer = config.make_optimizer(self.model)
        self.engine = config.make_engine([(self.model, self.optimizer)], ranks)
        self._rows = config.evaluation_rows(sizes)
        self.history: list[dict[str, Any]] = []

    @property
    def step(self) -> int:
        """Number of steps made."""
        return self.optimizer.steps

    def train(self, x: Any, y: Any, first: int, last: int, should_stop: Callable[[], bool]) -> None:
        """Train up to step `last`, or until asked to stop; see `Engine.train`."""
        self.engine.train(x, y, first, last, should_stop)

    def evaluate(self, x: Any, y: Any) -> tuple[float, float]:
        """Return the mean cross-entropy (nats) and the accuracy on these examples, with running statistics."""
        loss = correct = 0.0
        for start in range(0, len(x), self._rows):
            labels = y[start : start + self._rows]
            logits = self.model.forward(x[start : start + self._rows], training=False)
            correct += float((logits.argmax(axis=1) == labels).sum())
            loss += float(softmax_cross_entropy(logits, labels)[0].sum(dtype="float64"))
        return loss / len(x), correct / len(x)

    def probabilities(self, x: Any) -> np.ndarray:
        """Return the probability of every class for these examples, on the host, with running statistics."""
        parts = [x[start : start + self._rows] for start in range(0, len(x), self._rows)]
        logits = np.concatenate([host(self.model.forward(part, training=False)) for part in parts]).astype(np.float64)
        exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
        return exponentials / exponentials.sum(axis=1, keepdims=True)

    def assess(self, train: tuple[Any, Any], test: tuple[Any, Any]) -> dict[str, Any]:
        """Return the loss on the training examples (None if not finite) and the accuracy on the others."""
        loss, _ = self.evaluate(*train)
        _, accuracy = self.evaluate(*test)
        return {"loss": loss if math.isfinite(loss) else None, "accuracy": accuracy}

    def arrays(self) -> dict[str, np.ndarray]:
        """Return copies of all parameters, running statistics and optimiser state, by name, on the host."""
        parts = {"model": self.model.state(), "optimizer": self.optimizer.state()}
        return {f"{part}/{name}": np.asarray(value) for part, state in parts.items() for name, value in state.items()}

    def check_arrays(self, arrays: Mapping[str, np.ndarray], step: int | None = None) -> None:
        """Refuse what `load_arrays` could not take over as it is.

        Raises
        ------
        CheckpointError
            If a name is missing or unknown, or an array has another type or shape than the network's; or a counter is
            negative, or another than `step` if that is given.
        """
        expected = self.arrays()
        for name in sorted(expected.keys() ^ arrays.keys()):
            raise CheckpointError(f"the checkpoint is of another network: {name[:60]!r} is missing or unknown")
        for name, mine in expected.items():
            found = arrays[name]
            if (found.dtype.newbyteorder("="), found.shape) != (mine.dtype, mine.shape):
                raise CheckpointError(
                    f"the checkpoint's {name} must be {mine.dtype} of the shape {mine.shape}, got {found.dtype} of "
                    f"{str(found.shape)[:60]}: it is of another network"
                )
            if mine.ndim == 0 and (found < 0 if step is None else found != step):
                raise CheckpointError(
                    f"the checkpoint's {name} must be {'at least 0' if step is None else step}, got {found}: its "
                    "counters contradict each other"
                )

    def load_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Take over what `arrays` returned; CheckpointError where it is another network's, which changes nothing."""
        self.check_arrays(arrays)
        for part, owner in (("model", self.model), ("optimizer", self.optimizer)):
            owner.load_state(below(part, arrays))


def below(prefix: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the arrays whose names begin with a part, without that part."""
    start = f"{prefix}/"
    return {name[len(start) :]: array for name, array in arrays.items() if name.startswith(start)}


def load_learners(learners: Mapping[str, Any], meta: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Give each learner its part of a checkpoint; CheckpointError before the first, if one's part does not fit."""
    for name in arrays:
        if name.partition("/")[0] not in learners:
            raise CheckpointError(f"the checkpoint is of other networks: {name[:60]!r} is unknown")
    for norm, learner in learners.items():
        learner.check_arrays(below(norm, arrays), meta["networks"][norm]["step"])
    for norm, learner in learners.items():
        learner.load_arrays(below(norm, arrays))
        learner.history = list(meta["networks"][norm]["history"])
