"""Launches of the layer norm of long rows, which several blocks share: a pure function of problem and limits.

The thresholds follow from what the kernels of ``cuda/layer_norm_*_cooperative.cu`` hold on the chip; none has been
tuned.
"""

from __future__ import annotations

from typing import NamedTuple

from bnkernels.ops.layer_norm.problem import VECTOR, Problem
from bnkernels.runtime.occupancy import WARP, most_shared, resident
from bnkernels.runtime.seam import Launch, Limits, ceil_div
from bnkernels.runtime.workspace import MOST_SPLITS

MIN_BLOCKS = 2  # resident blocks of a multiprocessor, promised by most launch bounds: one works while the other waits
THREADS = 256  # threads of a block, as in these launch bounds
ROOM = 0.95  # share of the shared memory that is used: no launch depends on its last bytes
EXCHANGE = 6  # vectors that each thread could move while blocks wait for one another, some 3 us
PLANES = {"forward": 1, "backward": 2}  # arrays that a block keeps in shared memory
SUMS = {"forward": 3, "backward": 4}  # numbers of every warp in the sums of a row


class Share(NamedTuple):
    """Part of the blocks in the rows: `groups` take them in turn, whose `splits` blocks have so many columns each.

    A thread has `own` vectors of a row. It keeps `held` of each of the rows of a turn, which are `at_once`, and with
    two stages as many of the turn after.
    """

    groups: int
    splits: int
    own: int
    held: int
    stages: int = 1
    at_once: int = 1

    def time(self, rows: int) -> tuple[bool, float]:
        """Return whether columns are read twice, and the time of a thread, in that of a vector read and written."""
        again = max(self.own - self.held, 0)
        exchange = EXCHANGE + self.splits / WARP if self.splits > 1 else 0  # a lane reads every 32nd block's numbers
        turns, time = ceil_div(rows, self.groups * self.at_once), self.at_once * (self.own + again / 2)
        waits = 1 if self.stages == 2 else turns  # the others while the next rows are copied
        return again > 0, turns * max(time, exchange if self.stages == 2 else 0) + waits * exchange


def min_blocks(direction: str, problem: Problem) -> int:
    """Return the resident blocks that launch bounds promise: a backward of channels that come last has one."""
    return 1 if direction == "backward" and problem.channels_last else MIN_BLOCKS


def share(direction: str, problem: Problem, limits: Limits, most_held: int, most_groups: int) -> Share:
    """Return how blocks share rows, in the least time by a simple model; one block has a row where none may wait.

    A thread holds `most_held` vectors of a row at most, and there are no more than `most_groups` groups.

    Examples
    --------
    >>> import numpy as np
    >>> h200 = Limits(132, 227 * 1024, 228 * 1024, True)
    >>> share("forward", Problem(4096, 65_536, np.dtype("float32")), h200, 99, 256)
    Share(groups=33, splits=8, own=8, held=8, stages=2, at_once=1)
    """
    most, beside, vector = _block(direction, problem, limits)
    room = (most - beside) // vector
    if room < 1:
        raise ValueError(f"the device gives a block {most} bytes of shared memory, {beside + vector} are needed")
    blocks = resident(limits, THREADS, most, min_blocks(direction, problem))
    of_channels = problem.channel_groups if direction == "backward" else 1  # groups with other rows each
    # Several columns a channel and as many rows take too many registers; with float64 a row on its way does.
    of_columns = direction == "backward" and problem.inner > 1 and not problem.channels_last
    crowded = of_columns and problem.dtype.itemsize != 4
    splits = min(blocks // of_channels, problem.vectors // THREADS, MOST_SPLITS) if limits.cooperative else 1

    def choice(splits: int) -> Share:
        own = ceil_div(ceil_div(problem.vectors, splits), THREADS)
        groups = min(problem.rows, min(blocks // splits, most_groups) // of_channels * of_channels)
        found = Share(max(groups, of_channels), splits, own, min(own, most_held, room))
        turns = ceil_div(problem.rows, found.groups)
        if turns == 1 or found.held < own or 2 * own > room or (crowded and problem.dtype.itemsize == 8):
            return found
        enough = ceil_div(EXCHANGE, own) if splits > 1 and direction == "backward" and not crowded else 1
        return found._replace(stages=2, at_once=max(1, min(enough, room // (2 * own), turns // 2)))

    return min(map(choice, range(1, max(splits, 1) + 1)), key=lambda one: one.time(problem.rows))


def launch_of(direction: str, problem: Problem, limits: Limits, chosen: Share) -> Launch:
    """Return the launch of blocks that share rows so."""
    _, beside, vector = _block(direction, problem, limits)
    shared = beside + chosen.stages * chosen.at_once * chosen.held * vector
    waits = chosen.splits > 1 or (direction == "backward" and chosen.groups > problem.channel_groups)
    return Launch((chosen.groups, chosen.splits, 1), (THREADS, 1, 1), shared, cooperative=waits)


def _block(direction: str, problem: Problem, limits: Limits) -> tuple[int, int, int]:
    """Return a block's shared memory in bytes: all, what sums take of it, and what a vector of every thread takes."""
    sums = SUMS[direction] * THREADS // WARP * problem.acc_dtype.itemsize
    return int(ROOM * most_shared(limits, min_blocks(direction, problem))), sums, PLANES[direction] * VECTOR * THREADS
