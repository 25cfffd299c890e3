"""One of the compared networks: its model, its optimiser, what it has reached, and where it computes."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from bnkernels.nn.mlp import MLP
from bnkernels.nn.optimizers import make_optimizer
from bnkernels.ops.fused_training.launch import Problem, choose, why_not
from bnkernels.ops.fused_training.op import fused_training
from bnkernels.ops.softmax_cross_entropy import softmax_cross_entropy
from bnkernels.runtime.registry import runtime_of, why_no_cuda
from bnkernels.runtime.seam import Limits
from bnkernels.train.captured_step import CapturedStep, why_not_captured
from bnkernels.train.checkpoint import CheckpointError
from bnkernels.train.config import ConfigError, TrainingConfig

SMALL_PRODUCT = 2**20  # multiplications of a matrix product below which threads wait longer than they compute
STEPS_PER_LAUNCH = 1000  # of the fused engine, between which a run can be interrupted: a few milliseconds
EVALUATION_ROWS = 8192  # evaluated at a time, to bound the memory of the activations


class Network:
    """One of the compared networks: its model, its optimiser, and what it has reached.

    Parameters
    ----------
    norm : {"batch", "none"}
        With batch norm or without.
    config : TrainingConfig
        How to build and train it.
    sizes : sequence of int
        Inputs, width of each hidden layer, classes.
    xp : module
        ``numpy`` or ``cupy``: where the network lives.

    Attributes
    ----------
    engine : str
        ``layers``, ``graph`` or ``fused``, and the reasons where ``auto`` could not take a faster one.

    Raises
    ------
    ConfigError
        If the engine is to be graph or fused, and cannot.
    """

    def __init__(self, norm: str, config: TrainingConfig, sizes: tuple[int, ...], xp: Any) -> None:
        self.model = MLP(sizes, norm=norm, activation=config.activation, dtype=config.dtype, seed=config.seed, xp=xp)
        self.optimizer = make_optimizer(config.optimizer, self.model, config.lr)
        self.step = 0
        self.history: list[dict[str, Any]] = []
        self._batch_size, self._config = config.batch_size, config
        self.engine = self._choose_engine(config.engine)

    @cached_property
    def _out(self) -> tuple[Any, Any]:
        """Losses and their gradient of a mini-batch; only training needs them."""
        xp, batch, classes = self.model.xp, self._batch_size, self.model.sizes[-1]
        return xp.empty(batch, self._config.dtype), xp.empty((batch, classes), self._config.dtype)

    def train(self, x: Any, y: Any, first: int, last: int, should_stop: Callable[[], bool]) -> None:
        """Train up to step `last`, or until asked to stop; row 0 of `x` and `y` belongs to step `first`."""
        if self.engine.startswith("fused"):
            self._train_fused(x, y, first, last, should_stop)
        elif self.engine.startswith("graph"):
            self._train_captured(x, y, first, last, should_stop)
        while self.step < last and not should_stop():
            start = (self.step - first) * self._batch_size
            stop = start + self._batch_size
            logits = self.model.forward(x[start:stop], training=True)
            _, dlogits = softmax_cross_entropy(logits, y[start:stop], out=self._out)
            self.model.backward(dlogits)
            self.optimizer.step()
            self.step += 1

    def _train_fused(self, x: Any, y: Any, first: int, last: int, should_stop: Callable[[], bool]) -> None:
        """Do the same in launches of many steps."""
        config, model, optimizer = self._config, self.model, self.optimizer
        while self.step < last and not should_stop():
            steps = min(last - self.step, STEPS_PER_LAUNCH)
            rows = slice((self.step - first) * self._batch_size, (self.step - first + steps) * self._batch_size)
            fused_training(
                model.fused,
                model.parameters,
                tuple(optimizer.arrays.values()),
                model.running if model.running.size else None,
                x[rows],
                y[rows],
                batch=self._batch_size,
                optimizer=config.optimizer,
                lr=config.lr,
                steps_before=optimizer.steps,
                batches_before=model.batches,
            )
            optimizer.steps += steps
            model.batches += steps
            self.step += steps

    def _train_captured(self, x: Any, y: Any, first: int, last: int, should_stop: Callable[[], bool]) -> None:
        """Do the same as a graph, step by step."""
        model, optimizer, done = self.model, self.optimizer, self.step - first
        rows = (last - first) * self._batch_size
        steps = self._captured.run(x[:rows], y[:rows], lr=self._config.lr, before=optimizer.steps - done, start=done)
        while self.step < last and not should_stop():
            next(steps)
            optimizer.steps += 1
            model.batches += 1
            self.step += 1

    @cached_property
    def _captured(self) -> CapturedStep:
        state = tuple(self.optimizer.arrays.values())
        return CapturedStep(self.model, self._config.optimizer, state, self._batch_size)

    def _choose_engine(self, wanted: str) -> str:
        """Return the engine, which ``auto`` takes by the size of the network, with the reasons against faster ones."""
        if wanted == "layers" or (wanted == "auto" and runtime_of(type(self.model.parameters)) is None):
            return "layers"
        against: list[str] = []
        for name, why_not_so in (("fused", self._why_not_fused), ("graph", self._why_not_graph)):
            if wanted not in ("auto", name):
                continue
            reason = why_not_so()
            if reason is None:
                against += [f"{self._blocks} blocks"] if name == "fused" and self._blocks > 1 else []
                return f"{name} ({'; '.join(against)})" if against else name
            if wanted == name:
                raise ConfigError(f"the engine cannot be {name}: {reason}; take engine layers, or auto")
            against.append(f"not {name}: {reason}")
        return f"layers ({'; '.join(against)})"

    def _why_not_graph(self) -> str | None:
        return why_not_captured(self.model, self._batch_size)

    def _why_not_fused(self) -> str | None:
        limits = self._limits
        return "it needs a GPU" if limits is None else why_not(self._sizes, limits)

    @property
    def _limits(self) -> Limits | None:
        runtime = runtime_of(type(self.model.parameters))
        return None if runtime is None else runtime.limits(self.model.parameters)

    @property
    def _sizes(self) -> Problem:
        model = self.model
        counts = model.parameters.dtype, model.parameters.size, model.running.size
        return Problem(model.fused, self._batch_size, self._config.optimizer, *counts)

    @property
    def _blocks(self) -> int:
        """The blocks that train the network together."""
        return choose(self._sizes, self._limits).splits

    def evaluate(self, x: Any, y: Any) -> tuple[float, float]:
        """Return the mean cross-entropy (nats) and the accuracy on these examples, with running statistics."""
        loss = correct = 0.0
        for start in range(0, len(x), EVALUATION_ROWS):
            labels = y[start : start + EVALUATION_ROWS]
            logits = self.model.forward(x[start : start + EVALUATION_ROWS], training=False)
            correct += float((logits.argmax(axis=1) == labels).sum())
            loss += float(softmax_cross_entropy(logits, labels)[0].sum(dtype="float64"))
        return loss / len(x), correct / len(x)

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


def load_networks(networks: Mapping[str, Any], meta: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Give each network its part of a checkpoint; CheckpointError before the first, if one's part does not fit."""
    for name in arrays:
        if name.partition("/")[0] not in networks:
            raise CheckpointError(f"the checkpoint is of other networks: {name[:60]!r} is unknown")
    for norm, network in networks.items():
        network.check_arrays(below(norm, arrays), meta["networks"][norm]["step"])
    for norm, network in networks.items():
        network.load_arrays(below(norm, arrays))
        network.step = meta["networks"][norm]["step"]
        network.history = list(meta["networks"][norm]["history"])


def array_module(device: str) -> tuple[Any, str]:
    """Return the array module of a device option, and in words what was chosen and why.

    Parameters
    ----------
    device : {"auto", "cpu", "cuda"}
        ``auto`` takes a GPU where one is usable.

    Returns
    -------
    xp : module
        ``cupy`` or ``numpy``.
    description : str
        ``"cuda"`` or ``"cpu"``; a choice of the CPU that ``auto`` made is followed by its reason.

    Raises
    ------
    ConfigError
        If ``cuda`` is asked for and not usable; the message says why.
    """
    if device == "cpu":
        return np, "cpu"
    reason = why_no_cuda()
    if reason is None:
        from bnkernels.runtime.cuda import CudaRuntime

        return CudaRuntime.xp, "cuda"
    if device == "cuda":
        raise ConfigError(f"device cuda is not usable: {reason}, or take device cpu")
    return np, f"cpu, because {reason}"


def blas_threads(sizes: tuple[int, ...], batch_size: int) -> contextlib.AbstractContextManager:
    """Return a context in which NumPy's BLAS takes one thread, if all products of a step are too small to share.

    It needs threadpoolctl, which comes with scikit-learn; without it BLAS does as it likes, and is only slower.
    """
    largest = batch_size * max(inputs * outputs for inputs, outputs in pairwise(sizes))
    if largest >= SMALL_PRODUCT:
        return contextlib.nullcontext()
    try:
        from threadpoolctl import threadpool_limits
    except ImportError:
        return contextlib.nullcontext()
    return threadpool_limits(limits=1, user_api="blas")
