"""Optimisers: each steps all parameters of a network at once, in place, and can save and load its state."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from bnkernels.nn.mlp import MLP
from bnkernels.ops.parameter_update.op import adam_update, momentum_update, sgd_update
from bnkernels.runtime import checks as check


class Optimizer(ABC):
    """Base of the optimisers: the network's arrays, and a state of arrays of the same shape and a step count.

    Parameters
    ----------
    model : MLP
        Network to train.
    lr : float
        Learning rate, per step.
    """

    state_names: tuple[str, ...] = ()

    def __init__(self, model: MLP, *, lr: float) -> None:
        self.parameters, self.gradients, self.xp = model.parameters, model.gradients, model.xp
        self.lr = check.number("lr", lr, 0)
        self.steps = 0
        self.arrays = {name: self.xp.zeros_like(self.parameters) for name in self.state_names}

    def step(self) -> None:
        """Update the parameters from their gradients."""
        self.update(self.steps + 1)
        self.steps += 1

    @abstractmethod
    def update(self, step: int) -> None:
        """Launch the update of this step, the first of which is 1."""

    def state(self) -> dict[str, np.ndarray]:
        """Return copies of the state on the host, by name; `steps` is the number of steps made."""
        to_host = getattr(self.xp, "asnumpy", np.array)
        return {name: np.array(to_host(array)) for name, array in self.arrays.items()} | {"steps": np.array(self.steps)}

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        """Take the state from what `state` returned.

        TypeError or ValueError if it is another optimiser's or network's, or no state; nothing is changed then.
        """
        expected = [*self.state_names, "steps"]
        if set(state) != set(expected):
            names = check.shown(sorted(map(str, state)))
            raise ValueError(f"the state is not of this {type(self).__name__}: expected {expected}, got {names}")
        shape, dtype = self.parameters.shape, self.parameters.dtype
        arrays = {name: check.saved(f"the state's {name}", state[name], shape, dtype) for name in self.arrays}
        steps = check.count("the state's steps", state["steps"])
        arrays = {name: self.xp.asarray(array) for name, array in arrays.items()}
        for name, array in arrays.items():
            self.arrays[name][...] = array
        self.steps = steps


class SGD(Optimizer):
    """Stochastic gradient descent; see `sgd_update`."""

    def update(self, step: int) -> None:
        """Launch the update."""
        sgd_update(self.parameters, self.gradients, lr=self.lr)


class Momentum(Optimizer):
    """Stochastic gradient descent with momentum 0.9; see `momentum_update`."""

    state_names = ("velocity",)

    def update(self, step: int) -> None:
        """Launch the update."""
        momentum_update(self.parameters, self.gradients, self.arrays["velocity"], lr=self.lr)


class Adam(Optimizer):
    """Adam with its usual constants; see `adam_update`."""

    state_names = ("first", "second")

    def update(self, step: int) -> None:
        """Launch the update."""
        moments = self.arrays["first"], self.arrays["second"]
        adam_update(self.parameters, self.gradients, *moments, step=step, lr=self.lr)


OPTIMIZERS: dict[str, type[Optimizer]] = {"sgd": SGD, "momentum": Momentum, "adam": Adam}


def make_optimizer(name: str, model: MLP, lr: float) -> Optimizer:
    """Return the optimiser of this name for a network.

    Parameters
    ----------
    name : {'sgd', 'momentum', 'adam'}
        Name of the optimiser.
    model : MLP
        Network to train.
    lr : float
        Learning rate, per step.

    Returns
    -------
    Optimizer
        Optimiser with a fresh state.

    Raises
    ------
    TypeError
        If the learning rate is no number.
    ValueError
        If there is no such optimiser, or the learning rate is negative or not finite.
    """
    check.one_of("optimizer", name, OPTIMIZERS)
    return OPTIMIZERS[name](model, lr=lr)
