"""An optimiser step whose numbers lie in an array, so that it can be captured once and replayed with others."""

from __future__ import annotations

from typing import Any

import numpy as np

from bnkernels.ops.parameter_update.op import (
    BETA1,
    BETA2,
    CONSTANTS,
    STATES,
    USUAL,
    check_shapes,
    launch_update,
    on_numpy,
)
from bnkernels.runtime import checks as check
from bnkernels.runtime.arrays import Array
from bnkernels.runtime.operands import Operands
from bnkernels.runtime.replay import ReplayCache

SCHEDULED = {
    name: Operands(f"parameters {' '.join(state)}", "gradients scalars", check_shapes) for name, state in STATES.items()
}
SCHEDULED_CALLS = ReplayCache()


def scheduled_update(
    optimizer: str, parameters: Array, gradients: Array, state: tuple[Array, ...], scalars: Array
) -> None:
    """Make one optimiser step in place, its numbers in an array: a launch that can be captured and replayed.

    Parameters
    ----------
    optimizer : {"sgd", "momentum", "adam"}
        Optimiser, with the usual constants of `sgd_update`, `momentum_update` and `adam_update`.
    parameters, gradients : array, float32 or float64
        Arguments of these.
    state : tuple of arrays, shape of `parameters`
        State of the optimiser: (), (velocity,) or (first, second); updated in place.
    scalars : array, shape (3,), dtype of `parameters`
        Row of `update_schedule`.

    Raises
    ------
    TypeError, ValueError
        If an argument is wrong; nothing is written then.

    Examples
    --------
    >>> import numpy as np
    >>> p = np.array([1.0, 2.0])
    >>> scheduled_update("sgd", p, np.array([1.0, -1.0]), (), update_schedule("sgd", 0.5, 1)[0])
    >>> p
    array([0.5, 2.5])
    """
    state_names(optimizer, state)
    call = SCHEDULED_CALLS.replay((parameters, *state), (gradients, scalars), optimizer)
    if call.replayed:
        return
    runtime, _ = SCHEDULED[optimizer].check(parameters, *state, gradients, scalars)
    if runtime is not None:
        given = parameters, gradients, *(*state, None, None)[:2], scalars
        launch_update(runtime, call, optimizer, given, (1, *CONSTANTS[optimizer], 1, 1))
        return
    update, constants = getattr(on_numpy(), optimizer), USUAL[optimizer]

    def step(arrays: tuple) -> None:
        lr, *corrections = arrays[-1].tolist()
        update(*arrays[:-1], lr, *constants, *(corrections if optimizer == "adam" else ()))

    call.compute(step, (parameters, *state, gradients, scalars))


def state_names(optimizer: Any, state: Any) -> tuple[str, ...]:
    """Check the name of an optimiser, and for a tuple of as many arrays as it has; return their names."""
    check.one_of("optimizer", optimizer, STATES)
    names = STATES[optimizer]
    if not isinstance(state, (tuple, list)):
        raise TypeError(f"state must be a tuple of arrays, for {optimizer} {len(names)}, got {check.shown(state)}")
    if len(state) != len(names):
        raise ValueError(f"state of {optimizer} must be {len(names)} arrays ({', '.join(names)}), got {len(state)}")
    return names


def update_schedule(optimizer: str, lr: float, steps: int, *, before: int = 0) -> np.ndarray:
    """Return the numbers that depend on the step alone, for several steps.

    Parameters
    ----------
    optimizer : {"sgd", "momentum", "adam"}
        Optimiser; only Adam has corrections.
    lr : float
        Learning rate, per step.
    steps, before : int
        Number of rows, and number of steps already made.

    Returns
    -------
    numpy.ndarray, shape (steps, 3), float64
        Learning rate, ``1 - beta1**step`` and ``sqrt(1 - beta2**step)``: the divisors of Adam's first moment and of the
        root of its second one.

    Raises
    ------
    TypeError
        If an option is not of the right kind.
    ValueError
        If a name is unknown, or a number out of range.
    """
    check.one_of("optimizer", optimizer, STATES)
    steps, before = check.integer("steps", steps, 0), check.integer("before", before, 0, check.MOST_COUNTED)
    schedule = np.ones((steps, 3))
    schedule[:, 0] = check.number("lr", lr, 0)
    if optimizer == "adam":
        number = np.arange(before + 1, before + steps + 1, dtype=np.float64)
        schedule[:, 1], schedule[:, 2] = 1 - BETA1**number, np.sqrt(1 - BETA2**number)
    return schedule
