"""The trainer: the same network with and without batch norm, on the same batches, timed, saved and resumable."""

from __future__ import annotations

import copy
import json
import math
import os
import platform
import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter, strftime
from typing import Any

import numpy as np

import bnkernels
from bnkernels.checkpoint import load_checkpoint, save_checkpoint, write_atomically
from bnkernels.config import ConfigError, TrainingConfig
from bnkernels.data import DataError, Dataset, load_dataset
from bnkernels.mlp import MLP
from bnkernels.optimizers import make_optimizer
from bnkernels.plots import draw_curves, require_matplotlib
from bnkernels.softmax_cross_entropy import softmax_cross_entropy

TARGET_ACCURACY = 0.95  # "steps to 95 %"
EVALUATION_ROWS = 8192  # evaluated at a time, to bound the memory of the activations
CHANGEABLE_ON_RESUME = ("data", "device", "epochs", "steps")


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
    """

    def __init__(self, norm: str, config: TrainingConfig, sizes: tuple[int, ...], xp: Any) -> None:
        self.model = MLP(
            sizes, norm=norm, activation=config.activation, dtype=config.dtype, seed=config.seed, xp=xp
        )
        self.optimizer = make_optimizer(config.optimizer, self.model, config.lr)
        self.step = 0
        self.history: list[dict[str, Any]] = []
        self._batch_size = config.batch_size
        self._out = (xp.empty(config.batch_size, config.dtype), xp.empty((config.batch_size, sizes[-1]), config.dtype))

    def train(self, x: Any, y: Any, first: int, last: int, should_stop: Callable[[], bool]) -> None:
        """Train up to step `last`, or until asked to stop; row 0 of `x` and `y` belongs to step `first`."""
        while self.step < last and not should_stop():
            start = (self.step - first) * self._batch_size
            stop = start + self._batch_size
            logits = self.model.forward(x[start:stop], training=True)
            _, dlogits = softmax_cross_entropy(logits, y[start:stop], out=self._out)
            self.model.backward(dlogits)
            self.optimizer.step()
            self.step += 1

    def evaluate(self, x: Any, y: Any) -> tuple[float, float]:
        """Return the mean cross-entropy (nats) and the accuracy on these examples, with running statistics."""
        loss = correct = 0.0
        for start in range(0, len(x), EVALUATION_ROWS):
            labels = y[start : start + EVALUATION_ROWS]
            logits = self.model.forward(x[start : start + EVALUATION_ROWS], training=False)
            correct += float((logits.argmax(axis=1) == labels).sum())
            loss += float(softmax_cross_entropy(logits, labels)[0].sum(dtype="float64"))
        return loss / len(x), correct / len(x)

    def arrays(self) -> dict[str, np.ndarray]:
        """Return copies of all parameters, running statistics and optimiser state, by name, on the host."""
        parts = {"model": self.model.state(), "optimizer": self.optimizer.state()}
        return {f"{part}/{name}": np.asarray(value) for part, state in parts.items() for name, value in state.items()}

    def load_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Take over what `arrays` returned."""
        for part, owner in (("model", self.model), ("optimizer", self.optimizer)):
            prefix = f"{part}/"
            owner.load_state({name[len(prefix) :]: value for name, value in arrays.items() if name.startswith(prefix)})


class Trainer:
    """All the state of a run: the networks, the order of the examples, and how far it is.

    Parameters
    ----------
    config : TrainingConfig
        What to train.
    dataset : Dataset, optional
        The data; by default what the configuration names is loaded.

    Raises
    ------
    ConfigError, DataError, ImportError
        If the configuration does not fit the data or the machine, or the data are unusable.
    """

    def __init__(self, config: TrainingConfig, dataset: Dataset | None = None) -> None:
        self.config = config
        self.dataset = dataset or load_dataset(config.dataset, config.data, config.dtype)
        self.steps_per_epoch = len(self.dataset.x_train) // config.batch_size
        if self.steps_per_epoch == 0:
            raise ConfigError(
                f"batch size must be at most the {len(self.dataset.x_train)} training examples, got {config.batch_size}"
            )
        self.total_steps = config.steps or config.epochs * self.steps_per_epoch
        self.xp, self.device = array_module(config.device)
        self.sizes = (self.dataset.n_features, *config.hidden, self.dataset.n_classes)
        self.networks = {norm: Network(norm, config, self.sizes, self.xp) for norm in config.norms}
        self.epoch = 0  # complete ones
        self._generator = np.random.default_rng(config.seed)  # as it was at the start of the current epoch
        self._train = self._to_device(self.dataset.x_train, self.dataset.y_train)
        self._test = self._to_device(self.dataset.x_test, self.dataset.y_test)

    @property
    def finished(self) -> bool:
        """Whether every network has done all its steps."""
        return all(network.step >= self.total_steps for network in self.networks.values())

    def run_epoch(self, should_stop: Callable[[], bool] = lambda: False) -> bool:
        """Train each network to the end of the current epoch (or of the run) and evaluate it.

        Parameters
        ----------
        should_stop : callable
            Asked before every step; when it says True, the epoch is left as it is and can be taken up again.

        Returns
        -------
        bool
            Whether the end was reached.
        """
        first = self.epoch * self.steps_per_epoch
        last = min(first + self.steps_per_epoch, self.total_steps)
        generator = copy.deepcopy(self._generator)
        order = self.xp.asarray(generator.permutation(len(self.dataset.x_train)))
        x, y = (array[order] for array in self._train)  # shuffled once: batches are views, the same for every network
        for network in self.networks.values():
            if network.step < last:
                self._train_and_evaluate(network, x, y, first, last, should_stop)
        if any(network.step < last for network in self.networks.values()):
            return False
        if last == first + self.steps_per_epoch:
            self.epoch, self._generator = self.epoch + 1, generator
        return True

    def _train_and_evaluate(
        self, network: Network, x: Any, y: Any, first: int, last: int, should_stop: Callable[[], bool]
    ) -> None:
        """Train one network to step `last`, timing the steps alone, and append to its history if it gets there."""
        # Overflow is no accident to warn about line by line: it shows in the history as a loss of None.
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            self._synchronize()
            before, started = network.step, perf_counter()
            network.train(x, y, first, last, should_stop)
            self._synchronize()
            seconds = perf_counter() - started
            if network.step < last:
                return
            loss, _ = network.evaluate(*self._train)
            _, accuracy = network.evaluate(*self._test)
        network.history.append(
            {
                "epoch": last / self.steps_per_epoch,
                "step": last,
                "loss": loss if math.isfinite(loss) else None,
                "accuracy": accuracy,
                "us_per_step": 1e6 * seconds / (last - before),
            }
        )

    def _to_device(self, x: np.ndarray, y: np.ndarray) -> tuple[Any, Any]:
        return self.xp.asarray(x), self.xp.asarray(y)

    def _synchronize(self) -> None:
        """Wait for the GPU, where there is one: launches return before the work is done."""
        if self.xp is not np:
            self.xp.cuda.get_current_stream().synchronize()

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Return everything that a checkpoint holds: what JSON can say, and the arrays by name."""
        meta = {
            "config": asdict(self.config),
            "sizes": self.sizes,
            "data_digest": self.dataset.digest(),
            "epoch": self.epoch,
            "generator": self._generator.bit_generator.state,
            "networks": {
                norm: {"step": network.step, "history": network.history} for norm, network in self.networks.items()
            },
        }
        arrays = {
            f"{norm}/{name}": array
            for norm, network in self.networks.items()
            for name, array in network.arrays().items()
        }
        return meta, arrays

    def load_state(self, meta: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
        """Continue from what `state` returned.

        Raises
        ------
        DataError
            If the data are not those the state comes from.
        ConfigError
            If the run is meant to end before the point the state has reached.
        """
        if meta["data_digest"] != self.dataset.digest():
            raise DataError("the data are not those the checkpoint was trained on: restore them, or start a new run")
        self.epoch = meta["epoch"]
        self._generator.bit_generator.state = meta["generator"]
        load_networks(self.networks, meta, arrays)
        done = max(network.step for network in self.networks.values())
        if done > self.total_steps:
            raise ConfigError(f"the run has already done {done} steps, more than the {self.total_steps} asked for: give more")


def load_networks(networks: Mapping[str, Network], meta: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Give each network its part of a checkpoint."""
    for norm, network in networks.items():
        prefix = f"{norm}/"
        network.load_arrays({name[len(prefix) :]: array for name, array in arrays.items() if name.startswith(prefix)})
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
        For example ``"cpu (CuPy is not installed)"``.

    Raises
    ------
    ConfigError
        If ``cuda`` is asked for and not usable; the message says why.
    """
    if device == "cpu":
        return np, "cpu"
    try:
        from bnkernels import _cuda

        reason = _cuda.available()
    except ImportError as error:
        installed = not (isinstance(error, ModuleNotFoundError) and error.name == "cupy")
        reason = f"CuPy cannot be imported: {error}".splitlines()[0] if installed else "CuPy is not installed"
    if reason is None:
        return _cuda.CudaRuntime.xp, "cuda"
    if device == "cuda":
        raise ConfigError(f"device cuda is not usable: {reason}; install bnkernels[cuda12] or [cuda13], or take device cpu")
    return np, f"cpu ({reason})"
