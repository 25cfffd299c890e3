"""The next mini-batch of NumPy arrays: the specification of the kernel."""

from __future__ import annotations

import numpy as np


def mini_batch(
    x_out: np.ndarray,
    labels_out: np.ndarray,
    scalars: np.ndarray,
    x: np.ndarray,
    labels: np.ndarray,
    schedule: np.ndarray,
    counter: np.ndarray,
    indices: np.ndarray | None,
) -> None:
    """Copy a mini-batch and a row of the schedule, and count.

    Raises
    ------
    IndexError
        If there is no such step, or no such row; nothing is written then.
    """
    step, batch = int(counter[0]), len(x_out)
    steps = len(schedule) if indices is None else min(len(schedule), len(indices))
    if step >= steps or (indices is None and (step + 1) * batch > len(x)):
        raise IndexError(no_such_step(step, batch))
    rows = slice(step * batch, (step + 1) * batch) if indices is None else indices[step]
    x_out[...], labels_out[...] = x[rows], labels[rows]
    scalars[...] = schedule[step]
    counter[0] += 1


def no_such_step(step: int, batch: int) -> str:
    """Return the message of a counter that has come too far."""
    return f"counter is at step {step}, and there is no such mini-batch of {batch}"
