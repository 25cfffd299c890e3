"""Optimisers: each steps all parameters of a network at once, in place, and can save and load its state."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from bnkernels.mlp import MLP
from bnkernels.parameter_update import adam_update, momentum_update, sgd_update


class Optimizer(ABC):
    """What the optimisers share: the network's arrays, and a state of arrays of the same shape and a step count.

    Parameters
    ----------
    model : MLP
        The network to train.
    lr : float
        Learning rate, per step.
    """

    state_names: tuple[str, ...] = ()

    def __init__(self, model: MLP, *, lr: float) -> None:
        self.parameters, self.gradients, self.xp = model.parameters, model.gradients, model.xp
        self.lr = lr
        self.steps = 0
        self.arrays = {name: self.xp.zeros_like(self.parameters) for name in self.state_names}

    def step(self) -> None:
        """Update the parameters from their gradients."""
        self.steps += 1
        self.update()

    @abstractmethod
    def update(self) -> None:
        """Launch the update of step `steps`."""

    def state(self) -> dict[str, np.ndarray]:
        """Return copies of the state on the host, by name; `steps` is the number of steps made."""
        host = getattr(self.xp, "asnumpy", np.array)
        return {name: np.array(host(array)) for name, array in self.arrays.items()} | {"steps": np.array(self.steps)}

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        """Take the state from what `state` returned; ValueError if it is another's, and nothing is changed then."""
        expected = {name: self.parameters.shape for name in self.state_names} | {"steps": ()}
        found = {name: np.shape(array) for name, array in state.items()}
        if found != expected:
            raise ValueError(f"the state is not of this {type(self).__name__}: expected {expected}, got {found}")
        steps = np.asarray(state["steps"])
        if steps.dtype.kind not in "iu" or steps < 0:
            raise ValueError(f"the state's steps must be an integer of at least 0, got {steps.dtype} {str(steps)[:20]}")
        taken = {name: self._converted(name, np.asarray(state[name])) for name in self.arrays}
        for name, array in self.arrays.items():
            array[...] = self.xp.asarray(taken[name])
        self.steps = int(steps)

    def _converted(self, name: str, array: np.ndarray) -> np.ndarray:
        """Return an array of a state in the type of the parameters; ValueError if that has no such numbers."""
        dtype = self.parameters.dtype
        if array.dtype.kind != "f":
            raise ValueError(f"the state's {name} must be real numbers, got {array.dtype}: take another state")
        with np.errstate(over="ignore"):
            converted = array.astype(dtype)
        if not np.array_equal(np.isfinite(converted), np.isfinite(array)):
            raise ValueError(f"the state's {name} holds numbers beyond {dtype}: take a network of {array.dtype}")
        return converted


class SGD(Optimizer):
    """Stochastic gradient descent; see `sgd_update`."""

    def update(self) -> None:
        """Launch the update."""
        sgd_update(self.parameters, self.gradients, lr=self.lr)


class Momentum(Optimizer):
    """Stochastic gradient descent with momentum 0.9; see `momentum_update`."""

    state_names = ("velocity",)

    def update(self) -> None:
        """Launch the update."""
        momentum_update(self.parameters, self.gradients, self.arrays["velocity"], lr=self.lr)


class Adam(Optimizer):
    """Adam with its usual constants; see `adam_update`."""

    state_names = ("first", "second")

    def update(self) -> None:
        """Launch the update."""
        moments = self.arrays["first"], self.arrays["second"]
        adam_update(self.parameters, self.gradients, *moments, step=self.steps, lr=self.lr)


OPTIMIZERS: dict[str, type[Optimizer]] = {"sgd": SGD, "momentum": Momentum, "adam": Adam}


def make_optimizer(name: str, model: MLP, lr: float) -> Optimizer:
    """Return the optimiser of this name for a network.

    Parameters
    ----------
    name : {'sgd', 'momentum', 'adam'}
        Which one.
    model : MLP
        The network to train.
    lr : float
        Learning rate, per step.

    Returns
    -------
    Optimizer
        With a fresh state.

    Raises
    ------
    ValueError
        If there is no such optimiser.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}; got {name!r}")
    return OPTIMIZERS[name](model, lr=lr)
