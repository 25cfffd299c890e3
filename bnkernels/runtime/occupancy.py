"""Occupancy: how many blocks of a launch a device holds at once.

Blocks of a cooperative launch wait for one another, see ``cuda/lib/sync/grid_barrier.cuh``: a grid that is not resident
as a whole would wait forever. What the registers allow is `min_blocks`, the second number of the kernels' launch
bounds; a test compares it with what the compiler reports, on every device of a table.
"""

from __future__ import annotations

from bnkernels.runtime.seam import Limits, ceil_div

WARP = 32
SHARED_UNIT = 256  # bytes: granularity of shared memory, the coarsest of all devices


def resident(limits: Limits, threads: int, shared_bytes: int, min_blocks: int) -> int:
    """Return the number of blocks that a device holds at once, at least; 0 where one alone is too large.

    Parameters
    ----------
    limits : Limits
        Limits of the device.
    threads, shared_bytes : int
        Threads and shared memory of a block.
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
    """Return the most bytes of shared memory that a block may take if `blocks` share a multiprocessor."""
    of_block = limits.shared_bytes_of_sm // blocks // SHARED_UNIT * SHARED_UNIT
    return min(limits.shared_bytes, of_block - limits.reserved_bytes)
