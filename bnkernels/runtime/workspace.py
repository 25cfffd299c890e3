"""What cooperative launches share: how many blocks are resident at once, and where in a stream's workspace they meet.

Their blocks wait for one another, see ``grid_barrier.cuh``: a grid that is not resident as a whole would wait for ever.
So whoever plans one asks `resident`. What the registers allow is a promise of the kernels' launch bounds; a test
compares it with what the compiler reports, on every device of a table.
"""

from __future__ import annotations

from bnkernels.runtime.seam import Limits, ceil_div

WARP = 32
SHARED_UNIT = 256  # bytes of shared memory that are given out at once: the coarsest of all devices
MOST_BLOCKS = 256  # of a group that leaves partial results to all of it
MOST_GROUPS = 256
BARRIER_PITCH = 8  # counters of a group, as in cuda/lib/sync/grid_barrier.cuh
COUNTERS = MOST_GROUPS * BARRIER_PITCH * 4  # bytes of a counter for every group
# A workspace begins with counters of blocks that never wait (0 before and after a launch); then come those of meetings.
PARTIALS = 2 * COUNTERS  # where in the workspace the partial results begin


def resident(limits: Limits, threads: int, shared_bytes: int, min_blocks: int) -> int:
    """Return how many blocks of a kernel a device holds at once, at least; 0 where one alone is too large.

    Parameters
    ----------
    limits : Limits
        Of the device.
    threads, shared_bytes : int
        Of a block.
    min_blocks : int
        Blocks on a multiprocessor that the registers allow: the second number of the kernel's launch bounds.

    Examples
    --------
    >>> h200 = Limits(132, 227 * 1024, 228 * 1024, True)
    >>> resident(h200, 256, 24_640, 2), resident(h200, 256, 120_000, 2)
    (264, 132)
    """
    if shared_bytes > limits.shared_bytes:
        return 0
    shared = ceil_div(shared_bytes + limits.reserved_bytes, SHARED_UNIT) * SHARED_UNIT
    by_shared = limits.shared_bytes_of_sm // shared if shared else min_blocks
    by_threads = limits.threads_of_sm // (ceil_div(threads, WARP) * WARP)
    return limits.sms * min(min_blocks, by_shared, by_threads, limits.blocks_of_sm)


def most_shared(limits: Limits, blocks: int) -> int:
    """Return the bytes of shared memory that a block may take, so that so many are resident on a multiprocessor."""
    of_block = limits.shared_bytes_of_sm // blocks // SHARED_UNIT * SHARED_UNIT
    return min(limits.shared_bytes, of_block - limits.reserved_bytes)


def counters(workspace: int) -> int:
    """Return the address of the counters at which groups meet, `BARRIER_PITCH` apart."""
    return workspace + COUNTERS
