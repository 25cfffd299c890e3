"""Engines: the ways to make training steps. Their results agree up to rounding."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np

from bnkernels.nn.mlp import MLP
from bnkernels.nn.optimizers import Optimizer
from bnkernels.ops.fused_training.launch import Problem, choose, why_not
from bnkernels.ops.fused_training.op import fused_training
from bnkernels.ops.softmax_cross_entropy.op import softmax_cross_entropy
from bnkernels.runtime.arguments import empty
from bnkernels.runtime.cpu import why_reference
from bnkernels.runtime.cpu.threads import WORTH_SHARING
from bnkernels.runtime.registry import runtime_of
from bnkernels.train.captured_step import CapturedStep, why_not_captured
from bnkernels.train.run_config import ConfigError, RunConfig

STEPS_IN_TURN = 10  # steps of one of several models before it is the next one's turn
STEPS_PER_LAUNCH = 1000  # a few milliseconds, after which training can be interrupted
RATE = 2e10  # multiplications and additions per second of a thread: a low guess, so that calls end early
SECONDS_PER_CALL, SECONDS_PER_TURN = 0.05, 0.005  # compiled steps, to be interrupted and to be timed
LARGE_WEIGHTS = 2**18  # weights of a layer whose product takes nearly all of its time


class Engine(ABC):
    """Makes training steps of one or more models on the same mini-batches.

    Parameters
    ----------
    trained : sequence of (MLP, Optimizer)
        Models that differ only in their weights, each with its optimiser. All have made the same number of steps.
    config : RunConfig
        Mini-batch size, optimiser and learning rate.
    remarks : sequence of str
        Reasons why no faster engine was chosen.

    Attributes
    ----------
    name : str
        Name in `TrainingConfig.engine`.
    steps_at_once : int
        Largest number of steps of one `run`; between runs training can be interrupted.
    steps_per_turn : int
        Number of steps on a CPU beside which the cost of a `run` does not count, where steps are timed.
    """

    name: ClassVar[str]

    def __init__(
        self, trained: Sequence[tuple[MLP, Optimizer]], config: RunConfig, remarks: Sequence[str] = ()
    ) -> None:
        self.trained, self.config, self.remarks = trained, config, list(remarks)
        self.steps_at_once = 1 if len(trained) == 1 else STEPS_IN_TURN
        self.steps_per_turn = 1

    def __str__(self) -> str:
        """Return the name, with the remarks if there are any."""
        return f"{self.name} ({'; '.join(self.remarks)})" if self.remarks else self.name

    @property
    def step(self) -> int:
        """Number of steps made."""
        return self.trained[0][1].steps

    def train(self, x: Any, y: Any, first: int, last: int, should_stop: Callable[[], bool]) -> None:
        """Train up to step `last`, or until asked to stop.

        Parameters
        ----------
        x, y : array
            Examples and labels, in the order of the mini-batches.
        first : int
            Step that takes the first mini-batch of `x`.
        last : int
            Step to end at.
        should_stop : callable
            Asked before every run.
        """
        while self.step < last and not should_stop():
            self.run(x, y, self.step - first, min(self.steps_at_once, last - self.step))

    @staticmethod
    @abstractmethod
    def why_not(model: MLP, config: RunConfig) -> str | None:
        """Return why the engine cannot train a model, or None if it can."""

    def warm_up(self, x: Any, y: Any) -> None:  # noqa: B027  most engines compile what they call op by op
        """Compile, or load what is compiled, before steps are timed; no model changes."""

    def before_evaluation(self, x: Any) -> None:  # noqa: B027  most models are ready
        """Prepare the models for an evaluation, with the examples of an epoch in the order of the mini-batches."""

    @abstractmethod
    def run(self, x: Any, y: Any, start: int, steps: int) -> None:
        """Make `steps` steps of every model, beginning with mini-batch `start` of `x` and `y`."""


class LayersEngine(Engine):
    """Makes a step layer by layer, one call per op; works everywhere."""

    name = "layers"

    @staticmethod
    def why_not(model: MLP, config: RunConfig) -> str | None:
        """Return None: every model can be trained so."""
        return None

    _out: tuple[Any, Any] | None = None  # losses of a mini-batch and the gradient of its logits

    def run(self, x: Any, y: Any, start: int, steps: int) -> None:
        """Make the steps, model by model."""
        batch, (first, end) = self.config.batch_size, self.part
        for model, optimizer in self.trained:
            for row in range(start * batch, (start + steps) * batch, batch):
                mine = slice(row + first, row + end)
                logits, labels = self.forward(model, x[mine], optimizer.steps), y[mine]
                if model.xp is np:
                    labels = labels.copy()  # at an address that comes again, so that the call is replayed
                if self._out is None:
                    runtime = runtime_of(type(logits))
                    self._out = empty(runtime, logits.shape[:1], logits), empty(runtime, logits.shape, logits)
                _, dlogits = softmax_cross_entropy(logits, labels, out=self._out)
                self.backward(model, dlogits)
                self.update(model, optimizer)

    @property
    def part(self) -> tuple[int, int]:
        """The first of the rows of a mini-batch that this process takes, and the one behind the last: all of them."""
        return 0, self.config.batch_size

    def backward(self, model: Any, dlogits: Any) -> None:
        """Write the gradients of the parameters."""
        model.backward(dlogits)

    def forward(self, model: Any, x: Any, step: int) -> Any:
        """Return the logits of a mini-batch, after so many steps."""
        return model.forward(x, training=True)

    def update(self, model: Any, optimizer: Optimizer) -> None:
        """Update the parameters from their gradients."""
        optimizer.step()


class GraphEngine(Engine):
    """Repeats a step that was captured as a CUDA graph."""

    name = "graph"
    _data: tuple[Any, Any] | None = None  # examples and labels that the runs below read
    _runs: Sequence[Iterator[None]] = ()

    @staticmethod
    def why_not(model: MLP, config: RunConfig) -> str | None:
        """Return why a step cannot be captured, or None."""
        return why_not_captured(model, config.batch_size)

    @cached_property
    def _captured(self) -> list[CapturedStep]:
        config = self.config
        return [
            CapturedStep(model, config.optimizer, tuple(optimizer.arrays.values()), config.batch_size)
            for model, optimizer in self.trained
        ]

    def run(self, x: Any, y: Any, start: int, steps: int) -> None:
        """Make the steps, model by model."""
        before = self.step - start
        if self._data is None or self._data[0] is not x or self._data[1] is not y or self._at != (start, before):
            self._data = x, y
            self._runs = [each.run(x, y, lr=self.config.lr, before=before, start=start) for each in self._captured]
        for (model, optimizer), captured in zip(self.trained, self._runs, strict=True):
            for _ in range(steps):
                next(captured)
                optimizer.steps += 1
                model.batches += 1
        self._at = start + steps, before
        if start + steps == len(x) // self.config.batch_size:
            self._data, self._runs = None, ()  # they would keep the examples alive


class FusedEngine(Engine):
    """Makes many steps of all models in one launch, or on a CPU in one call of a compiled kernel."""

    name = "fused"

    def __init__(
        self, trained: Sequence[tuple[MLP, Optimizer]], config: RunConfig, remarks: Sequence[str] = ()
    ) -> None:
        super().__init__(trained, config, remarks)
        model = trained[0][0]
        runtime = runtime_of(type(model.parameters))
        if runtime is None:
            seconds = 6 * config.batch_size * model.parameters.size * len(trained) / RATE
            self.steps_at_once, self.steps_per_turn = (
                max(1, int(most / seconds)) for most in (SECONDS_PER_CALL, SECONDS_PER_TURN)
            )
            return
        self.steps_at_once = STEPS_PER_LAUNCH
        blocks = choose(_problem(model, config), runtime.limits(model.parameters)).splits
        self.remarks += [f"{blocks} blocks"] if blocks > 1 else []

    @staticmethod
    def why_not(model: MLP, config: RunConfig) -> str | None:
        """Return why neither a launch nor a compiled kernel can train the model, or None."""
        runtime = runtime_of(type(model.parameters))
        if runtime is None:
            return None if why_reference() is None else "it needs the compiled kernels of bnkernels[cpu]"
        return why_not(_problem(model, config), runtime.limits(model.parameters))

    def warm_up(self, x: Any, y: Any) -> None:
        """Train a copy of the first model for a step on a CPU, where a kernel would else be compiled in the first."""
        config, (model, optimizer) = self.config, self.trained[0]
        if runtime_of(type(model.parameters)) is None:
            parameters, running, *state = (
                array.copy() for array in (model.parameters, model.running, *optimizer.arrays.values())
            )
            given = (
                parameters,
                tuple(state),
                running if running.size else None,
                *(a[: config.batch_size] for a in (x, y)),
            )
            fused_training(model.fused, *given, batch=config.batch_size, optimizer=config.optimizer, lr=config.lr)

    def run(self, x: Any, y: Any, start: int, steps: int) -> None:
        """Make the steps in one launch; several models are copied into the rows of one array, and back."""
        config, (model, optimizer) = self.config, self.trained[0]
        states = [(m.parameters, m.running, *o.arrays.values()) for m, o in self.trained]
        several = len(states) > 1
        parameters, running, *moments = map(model.xp.stack, zip(*states, strict=True)) if several else states[0]
        rows = slice(start * config.batch_size, (start + steps) * config.batch_size)
        fused_training(
            model.fused,
            parameters,
            tuple(moments),
            running if running.size else None,
            x[rows],
            y[rows],
            batch=config.batch_size,
            optimizer=config.optimizer,
            lr=config.lr,
            steps_before=optimizer.steps,
            batches_before=model.batches,
        )
        for number, ((m, o), state) in enumerate(zip(self.trained, states, strict=True)):
            if several:
                for array, trained in zip(state, (parameters, running, *moments), strict=True):
                    array[...] = trained[number]
            o.steps += steps
            m.batches += steps


def _why_layers(trained: Sequence[tuple[MLP, Optimizer]], config: RunConfig) -> str | None:
    """Return why single ops are as fast as fused training, or faster; None where they are not.

    On a CPU fused training has one thread a model, but for the BLAS. The number of threads decides nothing: results
    would depend on it.
    """
    model = trained[0][0]
    if runtime_of(type(model.parameters)) is not None or len(trained) > 1:
        return None
    for inputs, outputs in pairwise(model.sizes):
        if inputs * outputs >= LARGE_WEIGHTS and config.batch_size * outputs >= WORTH_SHARING:
            return f"threads share a layer of {inputs} inputs and {outputs} outputs, {config.batch_size} examples"
    return None


def _problem(model: MLP, config: RunConfig) -> Problem:
    """Return the sizes that the launch of fused training depends on."""
    counts = model.parameters.dtype, model.parameters.size, model.running.size
    return Problem(model.fused, config.batch_size, config.optimizer, *counts)


ENGINES = {engine.name: engine for engine in (FusedEngine, GraphEngine, LayersEngine)}  # the fastest first


def choose_engine(trained: Sequence[tuple[MLP, Optimizer]], config: RunConfig) -> Engine:
    """Return the engine of a configuration; with ``auto``, the fastest that can train the models.

    Parameters
    ----------
    trained : sequence of (MLP, Optimizer)
        Models that differ only in their weights, each with its optimiser.
    config : RunConfig
        Engine, mini-batch size, optimiser and learning rate.

    Returns
    -------
    Engine
        The engine, which remarks why a faster one could not be chosen.

    Raises
    ------
    ConfigError
        If the engine that the configuration names cannot train them.
    """
    model, wanted, reasons = trained[0][0], config.engine, []
    names = list(ENGINES) if wanted == "auto" else [wanted]
    if wanted == "auto" and runtime_of(type(model.parameters)) is None:
        names.remove("graph")  # which no CPU has
    for name in names:
        reason = ENGINES[name].why_not(model, config)
        if reason is None and name == "fused" and name != wanted:
            reason = _why_layers(trained, config)
        if reason is None:
            return ENGINES[name](trained, config, reasons)
        reasons.append(f"not {name}: {reason}")
    raise ConfigError(f"the engine cannot be {wanted}: {reason}; take engine layers, or auto")
