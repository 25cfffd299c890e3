"""CPU kernels of batch norm: forward, backward, inference and the stages of both.

Forward    y = phi(((x - mean) - mean_low) scale + shift + residual), and 0 where the mask is False,
           with scale = gamma rstd r and shift = gamma d + beta
Backward   g = phi'(z) dy, dbeta = sum g, dgamma = r rstd sum g (x - mean) + d sum g, dresidual = g,
           dx = scale (g - sum g / N - (x - mean) rstd^2 sum g (x - mean) / N)
Arrays     those of ``cuda/batch_norm_*.cu``, in the same struct, its scalars in float64
Tasks      slices of channels, which share nothing: all their sums, then their outputs, while the rows are in the cache;
           where there are few, blocks of rows, step by step, whose sums are merged in order
Traffic    x, and in the backward dy, are read once where the rows of a slice fit into the cache, else twice (float64:
           three times); y, dx and dresidual are written once
Numerics   numbers in the accumulator's type; sums in float64; float64 data are summed about a first mean, with
           the rounding errors added
Bits       depend on shapes and strides alone: neither on the number of threads nor on a column's place
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial

import numpy as np

from bnkernels.ops.batch_norm.cpu import backward, double_backward, forward
from bnkernels.ops.batch_norm.cpu.rows import TOGETHER, count_valid, slices_of
from bnkernels.ops.batch_norm.cpu.sums import CENTRE, CHOOSE, CONCLUDE, OF_BLOCK, STATE, SUM, WRITE
from bnkernels.ops.batch_norm.launch import ARGUMENTS
from bnkernels.ops.batch_norm.problem import DOUBLE_BACKWARD, MORE_PLACES, Options, Plan, Problem, Stage
from bnkernels.runtime.arguments import Template
from bnkernels.runtime.cpu.language import LIKE, kernel
from bnkernels.runtime.cpu.threads import WORTH_SHARING, share
from bnkernels.runtime.seam import ceil_div

MOST_BLOCKS, BLOCK = 16, 2**17  # blocks of rows, and the numbers that each has at least
FEW_SLICES = 4  # up to which rows are divided among threads, and not slices
KERNELS = {"forward": forward, "backward": backward}
# The argument of all kernels here: the members of their CUDA twins', and how a call is divided. All have 8 bytes.
DIVISION = "wide", "rows", "piece", "slice_channels", "slices", "blocks", "block_rows", "state_channels"
_TWINS = [ARGUMENTS[name][np.dtype(np.float64)] for name in ("forward", "backward", "double_backward")]
_MEMBERS = {name: twin[name] for twin in _TWINS for name in twin.names if name not in DIVISION}
_ADDRESSES = [name for name, dtype in _MEMBERS.items() if dtype == np.uint64 and name not in MORE_PLACES]
LAYOUT = np.dtype(
    [(name, np.uint64) for name in _ADDRESSES]
    + [(name, np.int64 if dtype == np.int32 else dtype) for name, dtype in _MEMBERS.items() if dtype != np.uint64]
    + [(name, np.int64) for name in DIVISION]
)


@kernel
def count_all(arguments, counts):
    """Write the number of positions that count, of every group."""
    for group in range(len(counts)):
        counts[group] = count_valid(arguments[()], group)


@lru_cache(maxsize=1024)
def _division(problem: Problem, masked: bool) -> dict[str, int]:
    """Return the members that divide a call."""
    found = slices_of(problem, masked)
    size, blocks = problem.rows * problem.channels, 1
    if problem.groups == 1 and problem.inner == 1 and found.count < FEW_SLICES and size >= WORTH_SHARING:
        blocks = max(1, min(MOST_BLOCKS, size // BLOCK))
    block_rows = ceil_div(found.rows, blocks * TOGETHER) * TOGETHER
    of_state = problem.channels if blocks > 1 else found.channels
    return dict(zip(DIVISION, (*found, blocks, block_rows, of_state), strict=True))


@lru_cache(maxsize=1024)
def prepare(plan: Plan, options: Options) -> Callable[[tuple[int, ...]], Callable[[tuple], None]]:
    """Return what makes of a call's addresses, those of `Plan.places`, what computes it.

    That may be called again, and by several threads. Its one argument is ignored.
    """
    problem, stage, example = plan.problem, plan.kind.stage, LIKE[plan.problem.dtype.name]
    division = _division(problem, plan.masked)
    slices, blocks, size = division["slices"], division["blocks"], problem.rows * problem.channels * problem.groups
    template = Template(LAYOUT, plan.members(options) | division, plan.places)

    def bound(compute: Callable[[np.ndarray, tuple], None]) -> Callable[[tuple[int, ...]], Callable[[tuple], None]]:
        return lambda addresses: partial(compute, template.filled(addresses))

    if plan.kind is DOUBLE_BACKWARD:
        return bound(lambda arguments, _: share(double_backward.by_slices, slices, size, example, arguments))
    kernels = KERNELS[plan.kind.direction]
    forms = stage in (Stage.WHOLE, Stage.COLLECT) or (stage == Stage.FROZEN and plan.kind.direction == "backward")
    steps = [CHOOSE, SUM, CENTRE, SUM, CONCLUDE] if problem.dtype == np.float64 else [CHOOSE, SUM, CONCLUDE]
    steps = (steps if forms else []) + ([WRITE] if stage != Stage.COLLECT else [])
    all_rows = np.full(problem.groups, problem.rows)

    def whole(arguments: np.ndarray, _: tuple) -> None:
        """Compute a small call."""
        kernels.by_slices(example, arguments, all_rows, 0, slices)

    def divided(arguments: np.ndarray, _: tuple) -> None:
        counts = all_rows
        if plan.masked:
            counts = all_rows.copy()
            count_all(arguments, counts)
        if blocks == 1:
            share(kernels.by_slices, slices, size, example, arguments, counts)
            return
        state = np.empty((STATE + OF_BLOCK * (blocks - 1)) * problem.channels)
        for step in steps:
            tasks = blocks if step in (SUM, WRITE) else 1
            share(kernels.by_blocks, tasks, size, example, arguments, counts, state, step)

    return bound(divided if plan.masked or size >= WORTH_SHARING else whole)
