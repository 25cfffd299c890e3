"""Optimisers: each steps all parameters of a network at once, in place, and can save and load its state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np

from bnkernels.nn.layer import Layer
from bnkernels.nn.mlp import MLP
from bnkernels.ops.parameter_update.op import adam_update, momentum_update, rmsprop_update, sgd_update
from bnkernels.runtime import checks as check


class Optimizer(ABC):
    """Base of the optimisers: the flat arrays of a network or a layer, a state of such arrays and a step count.

    Parameters
    ----------
    model : MLP or Layer
        Network to train. The arrays of a layer are moved into flat ones, see `Layer.flatten`.
    lr : float
        Learning rate, per step.
    """

    state_names: tuple[str, ...] = ()

    def __init__(self, model: MLP | Layer, *, lr: float) -> None:
        self._model, self.xp = model, model.xp
        self.parameters, self.gradients = model.flatten()
        self.lr = check.number("lr", lr, 0)
        self.steps = 0
        self.arrays = {name: self.xp.zeros_like(self.parameters) for name in self.state_names}

    def step(self) -> None:
        """Update the parameters from their gradients.

        Raises
        ------
        RuntimeError
            If the model has other arrays by now, which an update would not reach.
        """
        if self._model.flatten()[0] is not self.parameters:
            raise RuntimeError("the model has other arrays by now; make the optimiser after to() and astype()")
        self.update(self.steps + 1)
        self.steps += 1

    @abstractmethod
    def update(self, step: int) -> None:
        """Launch the update of a step.

        Parameters
        ----------
        step : int
            Number of the step; the first is 1.
        """

    def state(self) -> dict[str, np.ndarray]:
        """Return copies of the state on the host.

        Returns
        -------
        dict of str to numpy.ndarray
            Arrays by name; `steps` is the number of steps made.
        """
        to_host = getattr(self.xp, "asnumpy", np.array)
        return {name: np.array(to_host(array)) for name, array in self.arrays.items()} | {"steps": np.array(self.steps)}

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        """Take the state from what `state` returned.

        Parameters
        ----------
        state : dict of str to numpy.ndarray
            State.

        Raises
        ------
        TypeError, ValueError
            If it is another optimiser's or network's, or no state; nothing is changed then.
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
    """Stochastic gradient descent; see `sgd_update`.

    Parameters
    ----------
    model : MLP or Layer
        Network to train.
    lr : float
        Learning rate, per step.
    """

    def update(self, step: int) -> None:
        """Launch the update of a step.

        Parameters
        ----------
        step : int
            Number of the step; the first is 1.
        """
        sgd_update(self.parameters, self.gradients, lr=self.lr)


class Momentum(Optimizer):
    """Stochastic gradient descent with momentum 0.9; see `momentum_update`.

    Parameters
    ----------
    model : MLP or Layer
        Network to train.
    lr : float
        Learning rate, per step.
    """

    state_names = ("velocity",)

    def update(self, step: int) -> None:
        """Launch the update of a step.

        Parameters
        ----------
        step : int
            Number of the step; the first is 1.
        """
        momentum_update(self.parameters, self.gradients, self.arrays["velocity"], lr=self.lr)


class RMSProp(Optimizer):
    """RMSProp, its mean of squares decayed by 0.9 a step; see `rmsprop_update`.

    Parameters
    ----------
    model : MLP or Layer
        Network to train.
    lr : float
        Learning rate, per step.
    """

    state_names = ("square",)

    def update(self, step: int) -> None:
        """Launch the update of a step.

        Parameters
        ----------
        step : int
            Number of the step; the first is 1.
        """
        rmsprop_update(self.parameters, self.gradients, self.arrays["square"], lr=self.lr)


class Adam(Optimizer):
    """Adam with its usual constants; see `adam_update`.

    Parameters
    ----------
    model : MLP or Layer
        Network to train.
    lr : float
        Learning rate, per step.
    """

    state_names = ("first", "second")

    def update(self, step: int) -> None:
        """Launch the update of a step.

        Parameters
        ----------
        step : int
            Number of the step; the first is 1.
        """
        moments = self.arrays["first"], self.arrays["second"]
        adam_update(self.parameters, self.gradients, *moments, step=step, lr=self.lr)


OPTIMIZERS: dict[str, type[Optimizer]] = {"sgd": SGD, "momentum": Momentum, "rmsprop": RMSProp, "adam": Adam}


def make_optimizer(name: str, model: MLP | Layer, lr: float) -> Optimizer:
    """Return the optimiser of this name for a network.

    Parameters
    ----------
    name : {'sgd', 'momentum', 'rmsprop', 'adam'}
        Name of the optimiser.
    model : MLP or Layer
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


@np.errstate(all="ignore")  # an overflow shows in the norm
def clip_gradients(model: MLP | Layer, most: float) -> Any:
    """Scale all gradients of a network down, in place, where their norm is larger than `most`.

    Parameters
    ----------
    model : MLP or Layer
        Network whose backward has written its gradients. The arrays of a layer are moved into flat ones, as an
        optimiser does it.
    most : float
        Largest Euclidean norm of all gradients together; more than 0.

    Returns
    -------
    array, shape (), float64
        Norm before. On a GPU it stays there: nothing waits for it.

    Raises
    ------
    TypeError, ValueError
        If `most` is no such number; nothing is changed then.

    Notes
    -----
    The norm is summed in float64. If a gradient is infinite or NaN, so is the norm, and gradients become NaN.

    Examples
    --------
    >>> from bnkernels.nn import Linear
    >>> layer = Linear(2, 1, bias=False, seed=0)
    >>> layer.gradients["weight"][...] = [[3.0], [4.0]]
    >>> float(clip_gradients(layer, 1)), layer.gradients["weight"].ravel().tolist() == np.float32([0.6, 0.8]).tolist()
    (5.0, True)
    """
    most = check.number("most", most, 0)
    if most == 0:
        raise ValueError("most must be more than 0, got 0: without a limit, do not clip")
    _, gradients = model.flatten()
    xp = model.xp
    squares = gradients.astype("float64")
    squares *= squares
    norm = xp.sqrt(squares.sum())
    gradients *= xp.minimum(most / norm, 1).astype(gradients.dtype)
    return norm
