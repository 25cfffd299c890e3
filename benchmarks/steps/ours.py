"""The training step of bnkernels, on NumPy or CuPy arrays, as its trainer makes it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np

from benchmarks.steps.step import ArrayStep, Batches, Maker, State, norm_of, sizes_of
from bnkernels import MLP, fused_training, softmax_cross_entropy
from bnkernels.nn.optimizers import OPTIMIZERS, make_optimizer
from bnkernels.runtime.registry import why_no_cuda
from bnkernels.train.captured_step import CapturedStep


class OurStep(ArrayStep):
    """The ops of bnkernels, composed as its trainer does.

    Parameters
    ----------
    state : dict of str to numpy.ndarray
        Initial weights of the network, see `initial_state`.
    optimizer : {'sgd', 'momentum', 'adam'}
        Name of the optimiser.
    lr : float
        Learning rate.
    xp : module
        ``numpy`` or ``cupy``: what computes.
    activation : {'relu', 'sigmoid'}
        Activation of the hidden layers.
    """

    def __init__(self, state: State, optimizer: str, lr: float, *, xp: Any = np, activation: str = "relu") -> None:
        self.state, self.xp = state, xp
        self.model = MLP(sizes_of(state), norm=norm_of(state), activation=activation, xp=xp)
        self.optimizer = make_optimizer(optimizer, self.model, lr)
        self.initial = self.optimizer.state()
        self.out: tuple[Any, Any] | None = None
        self.reset()

    def reset(self) -> None:
        """Take the initial weights again."""
        self.model.load_state(self.state)
        self.optimizer.load_state(self.initial)

    def prepare(self, x: np.ndarray, labels: np.ndarray) -> tuple[Any, Any]:
        """Return them as arrays of `xp`."""
        if self.out is None or len(self.out[0]) != len(x):
            classes = self.model.sizes[-1]
            self.out = self.xp.empty(len(x), x.dtype), self.xp.empty((len(x), classes), x.dtype)
        return self.xp.asarray(x), self.xp.asarray(labels)

    def step(self, x: Any, labels: Any) -> Any:
        """Train on the mini-batch."""
        logits = self.model.forward(x, training=True)
        losses, dlogits = softmax_cross_entropy(logits, labels, out=self.out)
        self.model.backward(dlogits)
        self.optimizer.step()
        return losses


class FusedStep(OurStep):
    """Many steps in one call, on a GPU one launch: all mini-batches of a `run`."""

    def prepare_all(self, batches: Batches) -> tuple[Any, Any]:
        """Return all examples and all labels, one mini-batch behind the other."""
        self.batch = len(batches[0][0])
        return tuple(self.xp.asarray(np.concatenate(parts)) for parts in zip(*batches, strict=True))

    def run(self, prepared: tuple[Any, Any]) -> None:
        """Train on every mini-batch."""
        self._train(*prepared)

    def losses(self, prepared: tuple[Any, Any]) -> np.ndarray:
        """Train on every mini-batch; return the mean loss of each."""
        return self.to_host(self._train(*prepared)).astype(np.float64)

    @property
    def _name(self) -> str:
        return next(name for name, kind in OPTIMIZERS.items() if type(self.optimizer) is kind)

    def _train(self, x: Any, labels: Any) -> Any:
        model, optimizer = self.model, self.optimizer
        state = tuple(optimizer.arrays.values())
        running = model.running if model.running.size else None
        options = {"batch": self.batch, "optimizer": self._name, "lr": optimizer.lr, "steps_before": optimizer.steps}
        losses = fused_training(model.fused, model.parameters, state, running, x, labels, **options)
        optimizer.steps += len(losses)
        return losses


class GraphStep(FusedStep):
    """A step as a graph, replayed for all mini-batches of a `run`."""

    def losses(self, prepared: tuple[Any, Any]) -> np.ndarray:
        """Train on every mini-batch; return the mean loss of each."""
        return np.array([float(self.to_host(loss).mean(dtype="float64")) for loss in self._steps(*prepared)])

    def _train(self, x: Any, labels: Any) -> Any:
        for _ in self._steps(x, labels):
            pass

    def _steps(self, x: Any, labels: Any) -> Iterator[Any]:
        optimizer = self.optimizer
        for _ in self._captured.run(x, labels, lr=optimizer.lr, before=optimizer.steps):
            optimizer.steps += 1
            yield self._captured.losses

    @cached_property
    def _captured(self) -> CapturedStep:
        return CapturedStep(self.model, self._name, tuple(self.optimizer.arrays.values()), self.batch)


MAKERS = (
    Maker("bnkernels", "cpu", OurStep),
    Maker("bnkernels fused", "cpu", FusedStep),
    Maker("bnkernels", "cuda", OurStep.on_cupy, why_no_cuda),
    Maker("bnkernels graph", "cuda", GraphStep.on_cupy, why_no_cuda),
    Maker("bnkernels fused", "cuda", FusedStep.on_cupy, why_no_cuda),
)
