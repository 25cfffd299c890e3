"""Workspace of a stream: where in it barrier counters and partial results lie.

It begins with counters of blocks that never wait, which are 0 before and after a launch. Then come the counters of grid
barriers, then the partial results.
"""

from __future__ import annotations

MOST_SPLITS = 256  # blocks that share one slice, network or matrix, and read each other's partial results
MOST_BARRIERS = 256  # barriers of one launch, each between other blocks
BARRIER_PITCH = 8  # counters from one barrier to the next, as in cuda/lib/sync/grid_barrier.cuh
COUNTERS = MOST_BARRIERS * BARRIER_PITCH * 4  # bytes
PARTIALS = 2 * COUNTERS  # offset of the partial results


def barrier_counters(workspace: int) -> int:
    """Return the address of the counters of grid barriers."""
    return workspace + COUNTERS
