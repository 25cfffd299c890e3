"""A training step in any framework; the check of its losses against float64; and its stopwatch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np

from benchmarks.harness.case import WrongResultError
from bnkernels import MLP

State = dict[str, np.ndarray]
Batches = Sequence[tuple[np.ndarray, np.ndarray]]


class Step(ABC):
    """A network with its optimiser: linear, norm, activation for every hidden layer, linear, softmax cross-entropy.

    With a norm the hidden layers' linear maps have no bias. A subclass takes the state of an `MLP`, the name of the
    optimiser and its learning rate.
    """

    @abstractmethod
    def prepare(self, x: np.ndarray, labels: np.ndarray) -> tuple[Any, Any]:
        """Return the mini-batch as `step` takes it."""

    @abstractmethod
    def step(self, x: Any, labels: Any) -> Any:
        """Train on a prepared mini-batch; return the losses, or their mean, before; they last until the next step."""

    @abstractmethod
    def reset(self) -> None:
        """Return to the initial weights, running statistics and state of the optimiser."""

    def prepare_all(self, batches: Batches) -> Any:
        """Return the mini-batches as `run` takes them; one that comes several times is there once."""
        prepared = {id(batch): self.prepare(*batch) for batch in {id(batch): batch for batch in batches}.values()}
        return [prepared[id(batch)] for batch in batches]

    def run(self, prepared: Any) -> None:
        """Train on every mini-batch, in order, without waiting for the device."""
        for batch in prepared:
            self.step(*batch)

    def losses(self, prepared: Any) -> np.ndarray:
        """Train on every mini-batch like `run`; return the mean loss of each."""
        return np.array([self.to_host(self.step(*batch)).mean(dtype=np.float64) for batch in prepared])

    def to_host(self, losses: Any) -> np.ndarray:
        """Return losses as a NumPy array."""
        return np.asarray(losses)

    def synchronise(self) -> None:  # noqa: B027  hosts have nothing to wait for
        """Wait until all steps are done; on a CPU they are."""


class ArrayStep(Step):
    """A step on the arrays of a module with NumPy's functions: `xp`, which is NumPy or CuPy."""

    xp: Any

    @classmethod
    def on_cupy(cls, state: State, optimizer: str, lr: float, **options: Any) -> ArrayStep:
        """Return the step on a GPU."""
        import cupy

        return cls(state, optimizer, lr, xp=cupy, **options)

    def to_host(self, losses: Any) -> np.ndarray:
        """Return losses as a NumPy array."""
        return getattr(self.xp, "asnumpy", np.asarray)(losses)

    def synchronise(self) -> None:
        """Wait for the GPU, where there is one."""
        if self.xp is not np:
            self.xp.cuda.get_current_stream().synchronize()


@dataclass(frozen=True)
class Maker:
    """Somebody who can make training steps.

    Attributes
    ----------
    name : str
        As the tables show it.
    place : str
        ``cpu`` or ``cuda``.
    make : callable
        ``make(state, optimizer, lr)`` returns a `Step`, with ``activation="sigmoid"`` one of other activations; raises
        `NotSupportedError` for a network it cannot train.
    absent : callable
        Returns why it cannot run on this machine at all, or None.
    slow_start : bool
        Compiles for seconds per network; comes last where time is short.
    default : bool
        Takes part without being asked for by name.
    """

    name: str
    place: str
    make: Callable[..., Step]
    absent: Callable[[], str | None] = lambda: None
    slow_start: bool = False
    default: bool = True


# ---- the state of a network -----------------------------------------------------------------------------------------


def initial_state(sizes: Sequence[int], norm: str, seed: int = 0) -> State:
    """Return the weights that all start from, by the names of `MLP.state`.

    Parameters
    ----------
    sizes : sequence of int
        Inputs, units of every hidden layer, classes.
    norm : {'none', 'batch', 'layer'}
        Norm before the hidden layers' activations. The weights are the same for all.
    seed : int
        Seed of the weights.

    Returns
    -------
    dict of str to numpy.ndarray
        Parameters and, of batch norm, running statistics.
    """
    return MLP(sizes, norm=norm, seed=seed).state()


def norm_of(state: State) -> str:
    """Return the norm of the network with this state."""
    if "0.gamma" not in state:
        return "none"
    return "batch" if "0.running_mean" in state else "layer"


def sizes_of(state: State) -> tuple[int, ...]:
    """Return inputs, units of every hidden layer, and classes of the network with this state."""
    weights = [state[f"{i}.weight"].shape for i in range(linears(state))]
    return (weights[0][0], *(units for _, units in weights))


def linears(state: State) -> int:
    """Return the number of linear maps: one more than there are hidden layers."""
    return sum(name.endswith(".weight") for name in state)


# ---- checking and timing --------------------------------------------------------------------------------------------


def deviation(found: np.ndarray, exact: np.ndarray) -> float:
    """Return the largest deviation of the losses, in roundings of float32 relative to 1 + loss; may be NaN."""
    return float(np.max(np.abs(found - exact) / (1 + exact)) / np.finfo(np.float32).eps)


def check_losses(name: str, found: np.ndarray, exact: np.ndarray, roundings: float) -> float:
    """Return the deviation of the losses from those of float64.

    Parameters
    ----------
    name : str
        Name for the message.
    found, exact : numpy.ndarray, shape (S,)
        Mean loss of every step.
    roundings : float
        Number of roundings that they may be off by.

    Returns
    -------
    float
        See `deviation`.

    Raises
    ------
    WrongResultError
        If they are further off, or not numbers.
    """
    off = deviation(found, exact)
    if not off <= roundings:  # also if it is NaN
        raise WrongResultError(f"{name}: the losses are off by {off:.3g} roundings, more than {roundings}: not timed")
    return off


def stopwatch(step: Step, batches: Batches, warm_up: int) -> Callable[[], float]:
    """Return what trains on the mini-batches from the initial weights on and returns the microseconds per step.

    Parameters
    ----------
    step : Step
        Steps to time. Whatever it compiles or allocates is done on return.
    batches : sequence of mini-batches
        One per step.
    warm_up : int
        Number of first steps that are not timed.

    Returns
    -------
    callable
        From the first timed step's call to the end of the last step on the device.
    """
    timed = step.prepare_all(batches[warm_up:])
    warm = step.prepare_all(batches[:warm_up]) if warm_up else None

    def measure() -> float:
        step.reset()
        if warm_up:
            step.run(warm)
        step.synchronise()
        started = perf_counter()
        step.run(timed)
        step.synchronise()
        return 1e6 * (perf_counter() - started) / (len(batches) - warm_up)

    measure()
    return measure
