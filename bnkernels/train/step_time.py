"""Time of a training step with batch norm, relative to one without: how it is measured, and when it says anything."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np

from bnkernels.runtime.registry import Device
from bnkernels.train.ensemble import Ensemble
from bnkernels.train.learner import Learner

STEPS_PER_TURN_OF_GPU = 25  # launching, and waiting for the end, take little of such a turn
FEWEST_STEPS = 200  # steps of each network, below which there is no verdict
LARGEST_SPREAD = 0.15  # distance of a quartile from the median, relative to it, above which there is no verdict
MOST_ROUNDS = 2000  # rounds that are kept: more would hardly move the median, and every checkpoint holds them


class StepTimeRatio(NamedTuple):
    """Time of a step with batch norm / time of a step without, over the rounds of a run.

    Attributes
    ----------
    median : float or None
        Median of the rounds' ratios; None without any round.
    quartiles : tuple of float, or None
        Lower and upper quartile of the rounds' ratios.
    rounds : int
        Number of ratios.
    steps : int
        Number of steps of each network that were timed.
    why_no_verdict : str or None
        Reason why the figures say nothing about the cost of batch norm; None if they do.
    """

    median: float | None
    quartiles: tuple[float, float] | None
    rounds: int
    steps: int
    why_no_verdict: str | None

    def __str__(self) -> str:
        """Return the verdict, beside what is said of perceptrons, or why there is none."""
        return self.sentence if self.why_no_verdict else f"{self.sentence} Accepted wisdom: 3 to 5 times."

    @property
    def sentence(self) -> str:
        """The verdict alone, or why there is none."""
        if self.why_no_verdict:
            return f"No verdict on the time of a step with batch norm: {self.why_no_verdict}."
        low, high = self.quartiles
        return (
            f"A step with batch norm takes {self.median:.2f} times a step without "
            f"(quartiles {low:.2f} and {high:.2f} of {self.rounds} rounds)."
        )


class Rounds:
    """The rounds of a run: in each, the networks take turns to make the same few steps, and are timed.

    Parameters
    ----------
    device : Device
        Device that trains.
    engines : sequence of str
        Engines of the networks in words. Rounds on another device or with other engines are not comparable.
    """

    def __init__(self, device: Device, engines: Sequence[str]) -> None:
        self._xp, self._emulated = device.xp, device.emulated
        self._place = "; ".join([device.description, *engines])
        self._steps, self._ratios = 0, []
        self._warm = False
        self._backwards = False  # whether the last network is the first in the next round

    def train(
        self,
        learners: Mapping[str, Learner | Ensemble],
        x: Any,
        y: Any,
        first: int,
        last: int,
        should_stop: Callable[[], bool],
    ) -> dict[str, list[float]]:
        """Train to step `last`, or until asked to stop, in rounds: what else the machine does slows all networks alike.

        Parameters
        ----------
        learners : mapping of str to Learner or Ensemble
            Networks by their norm.
        x, y, first, last, should_stop
            Arguments of `Engine.train`.

        Returns
        -------
        dict of str to list of float
            Microseconds per step of each turn of each network.
        """
        times: dict[str, list[float]] = {norm: [] for norm in learners}
        engines = [learner.engine for learner in learners.values()]
        for engine in engines:
            engine.warm_up(x, y)  # in every epoch: between two of them others have the caches of a CPU
        turn = max(engine.steps_per_turn for engine in engines) if self._xp is np else STEPS_PER_TURN_OF_GPU
        rounds = -(-(last - first) // turn)
        for number in range(rounds):
            start, stop = (first + (last - first) * i // rounds for i in (number, number + 1))
            turns = {}
            for norm in list(learners)[:: -1 if self._backwards else 1]:
                us = self._timed(learners[norm], x, y, first, stop, should_stop)
                if us is not None:
                    turns[norm] = us
                    times[norm].append(us)
            self.add(stop - start, turns)
            self._backwards = not self._backwards  # the first finds the mini-batches out of the cache
            if any(learner.step < stop for learner in learners.values()):
                break
        return times

    def _timed(
        self, learner: Learner | Ensemble, x: Any, y: Any, first: int, stop: int, should_stop: Callable[[], bool]
    ) -> float | None:
        """Train one network to step `stop`; return microseconds per step, or None if it made none."""
        self._synchronize()
        before, started = learner.step, perf_counter()
        learner.train(x, y, first, stop, should_stop)
        self._synchronize()
        seconds, steps = perf_counter() - started, learner.step - before
        return 1e6 * seconds / steps if steps else None

    def _synchronize(self) -> None:
        """Wait for the GPU, where there is one: launches return before the work is done."""
        if self._xp is not np:
            self._xp.cuda.get_current_stream().synchronize()

    def add(self, steps: int, times: Mapping[str, float]) -> None:
        """Take the times of a round.

        Parameters
        ----------
        steps : int
            Number of steps of each network.
        times : mapping of str to float
            Time per step of the networks that made one, in any unit.
        """
        if not {"batch", "none"} <= times.keys() or len(self._ratios) == MOST_ROUNDS:
            return
        self._steps += steps
        if self._warm:
            self._ratios.append(round(times["batch"] / times["none"], 4))
        self._warm = True  # the first round of a process compiles and allocates

    def state(self) -> dict[str, Any]:
        """Return the rounds as a checkpoint holds them."""
        return {"place": self._place, "steps": self._steps, "ratios": list(self._ratios)}

    def load_state(self, state: Mapping[str, Any] | None) -> None:
        """Go on with the rounds of a checkpoint, unless it has none or they were timed in another place."""
        if state is not None and state["place"] == self._place:
            self._steps, self._ratios = state["steps"], list(state["ratios"])

    def ratio(self) -> StepTimeRatio:
        """Return median, spread and verdict of the rounds so far."""
        if not self._ratios:
            return StepTimeRatio(None, None, 0, self._steps, self._why_no_verdict(math.nan, math.nan, math.nan))
        low, median, high = (round(float(q), 4) for q in np.percentile(self._ratios, (25, 50, 75)))
        return StepTimeRatio(
            median, (low, high), len(self._ratios), self._steps, self._why_no_verdict(low, median, high)
        )

    def _why_no_verdict(self, low: float, median: float, high: float) -> str | None:
        if self._emulated:
            return "the emulator has no speed of its own"
        if self._steps < FEWEST_STEPS or not self._ratios:
            return f"{self._steps} steps of each were timed, and {FEWEST_STEPS} are needed"
        if max(median - low, high - median) > LARGEST_SPREAD * median:
            return (
                f"half of {len(self._ratios)} rounds lie between {low:.2f} and {high:.2f}, more than "
                f"{100 * LARGEST_SPREAD:.0f} % from the median, {median:.2f}; "
                "repeat it on a machine that does nothing else"
            )
        return None
