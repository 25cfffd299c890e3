"""CPU kernels of batch norm: forward, backward, inference and the stages of both.

Forward    y = phi(((x - mean) - mean_low) scale + shift + residual), and 0 where the mask is False,
           with scale = gamma rstd r and shift = gamma d + beta
Backward   g = phi'(z) dy, dbeta = sum g, dgamma = r rstd sum g (x - mean) + d sum g, dresidual = g,
           dx = scale (g - sum g / N - (x - mean) rstd^2 sum g (x - mean) / N)
Arrays     those of ``cuda/batch_norm_*_masked_grouped.cu``, in the same struct, its scalars in float64
Calls      one that forms all sums of some slices and one that writes their outputs, while their rows are in the cache
Tasks      slices of channels, which share nothing; where there are few, blocks of rows, whose sums are merged in order
Traffic    x, and in the backward dy, are read once where the rows of a slice fit into the cache, else twice (float64:
           three times); y, dx and dresidual are written once
Numerics   numbers in the accumulator's type; sums, and dx, in float64; float64 data are summed about a first mean, with
           the rounding errors added
Bits       depend on shapes and strides alone: neither on the number of threads nor on a column's place
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import numpy as np

from bnkernels.ops.batch_norm.cpu.backward import gradient_sums, input_gradients
from bnkernels.ops.batch_norm.cpu.double_backward import double_backward
from bnkernels.ops.batch_norm.cpu.forward import statistics, write
from bnkernels.ops.batch_norm.cpu.rows import STORAGE, count_valid, slices_of
from bnkernels.ops.batch_norm.cpu.sums import ALL, CENTRE, CHOOSE, CONCLUDE, OF_BLOCK, SUM, SUMS, TOTALS
from bnkernels.ops.batch_norm.launch import ARGUMENTS
from bnkernels.ops.batch_norm.problem import DOUBLE_BACKWARD, MORE_PLACES, Options, Plan, Problem, Stage
from bnkernels.runtime.arguments import Template
from bnkernels.runtime.cpu.language import kernel
from bnkernels.runtime.cpu.threads import WORTH_SHARING, share

MOST_BLOCKS, BLOCK = 16, 2**17  # blocks of rows, and the numbers that each has at least
FEW_SLICES = 4  # up to which rows are divided among threads, and not slices
IN_CACHE = 2**17  # numbers of the slices that are summed before their output is written
STATE = 2**16  # numbers of a state, about: half a mebibyte
KERNELS = {"forward": (statistics, write), "backward": (gradient_sums, input_gradients)}
# The argument of all kernels here: the members of their CUDA twins', and how a call is divided. All have 8 bytes.
DIVISION = "storage", "wide", "rows", "slice_channels", "slices", "blocks", "state_channels", "state_groups"
GROUPS = "first_group", "last_group"  # groups that one call of a kernel works on
_TWINS = [
    ARGUMENTS[name][np.dtype(np.float64)]
    for name in ("forward_masked_grouped", "backward_masked_grouped", "double_backward")
]
_MEMBERS = {name: twin[name] for twin in _TWINS for name in twin.names}
_ADDRESSES = [name for name, dtype in _MEMBERS.items() if dtype == np.uint64 and name not in MORE_PLACES]
LAYOUT = np.dtype(
    [(name, np.uint64) for name in _ADDRESSES]
    + [(name, np.int64 if dtype == np.int32 else dtype) for name, dtype in _MEMBERS.items() if dtype != np.uint64]
    + [(name, np.int64) for name in DIVISION + GROUPS]
)


@kernel
def count_all(arguments, counts):
    """Write the number of positions that count, of every group."""
    for group in range(len(counts)):
        counts[group] = count_valid(arguments[()], group)


@lru_cache(maxsize=1024)
def _division(problem: Problem, masked: bool) -> tuple[dict[str, int], int]:
    """Return the members that divide a call, and the number of slices whose rows are in the cache together."""
    wide, rows, channels, count = slices_of(problem, masked)
    size, blocks = problem.rows * problem.channels, 1
    if problem.groups == 1 and problem.inner == 1 and count < FEW_SLICES and size >= WORTH_SHARING:
        blocks = max(1, min(MOST_BLOCKS, size // BLOCK))
    together = max(1, min(IN_CACHE * count // (size * problem.groups), STATE // (SUMS + OF_BLOCK) // channels))
    width = problem.channels if blocks > 1 else min(problem.channels, together * channels)
    groups = max(1, min(problem.groups, STATE // (SUMS + OF_BLOCK) // width))
    division = (STORAGE[problem.dtype.name], wide, rows, channels, count, blocks, width, groups)
    return dict(zip(DIVISION, division, strict=True)), together


def _binder(plan: Plan, options: Options, division: dict[str, int]) -> Callable[[Callable], Callable]:
    """Return a function that turns ``work(chunks, arrays)`` into what `prepare` returns.

    The chunks are the argument for some groups at a time, as many as a state has room for.
    """
    groups, of_state, templates = plan.problem.groups, division["state_groups"], []
    for first in range(0, groups, of_state):
        some = {"first_group": first, "last_group": min(groups, first + of_state)}
        templates.append(Template(LAYOUT, plan.members(options) | division | some, plan.places))
    return lambda work: lambda addresses: partial(work, [template.filled(addresses) for template in templates])


@lru_cache(maxsize=1024)
def prepare(plan: Plan, options: Options) -> Callable[[tuple[int, ...]], Callable[[Any], None]]:
    """Return what makes of a call's addresses, those of `Plan.places`, what computes it.

    That may be called again, and by several threads. Its one argument is ignored.
    """
    problem, stage, masked = plan.problem, plan.kind.stage, plan.masked
    division, together = _division(problem, masked)
    blocks, slices, of_state = division["blocks"], division["slices"], division["state_groups"]
    bound, size = _binder(plan, options, division), problem.rows * problem.channels * problem.groups
    if plan.kind is DOUBLE_BACKWARD:
        return bound(lambda chunks, _: share(double_backward, slices, size, chunks[0]))
    form, write = KERNELS[plan.kind.direction]
    forms = stage in (Stage.WHOLE, Stage.COLLECT) or (stage == Stage.FROZEN and plan.kind.direction == "backward")
    writes = stage != Stage.COLLECT
    numbers = (of_state * (SUMS + OF_BLOCK * blocks) + TOTALS) * division["state_channels"]
    all_rows = np.full(problem.groups, problem.rows)
    steps = [(CHOOSE, 1), (SUM, blocks), (CONCLUDE, 1)]
    if problem.dtype == np.float64:
        steps[2:2] = [(CENTRE, 1), (SUM, blocks)]

    def slice_by_slice(chunks: list[np.ndarray], counts: np.ndarray, first: int, last: int) -> None:
        """Compute slices, a few at a time."""
        state = np.empty(numbers)
        for start in range(first, last, together):
            stop = min(last, start + together)
            for arguments in chunks:
                if forms:
                    form(arguments, counts, state, ALL, start, stop)
                if writes:
                    write(arguments, counts, state, start, stop)

    def compute(chunks: list[np.ndarray], _: Any) -> None:
        counts = all_rows
        if masked:
            counts = all_rows.copy()
            count_all(chunks[0], counts)
        if size < WORTH_SHARING:
            slice_by_slice(chunks, counts, 0, slices)
            return
        if blocks == 1:
            share(slice_by_slice, slices, size, chunks, counts)
            return
        state = np.empty(numbers)
        for step, tasks in steps if forms else []:
            share(form, tasks, size if tasks > 1 else 0, chunks[0], counts, state, step)
        if writes:
            share(write, blocks, size, chunks[0], counts, state)

    def at_once(chunks: list[np.ndarray], _: Any) -> None:
        """Compute all slices of a small call."""
        state = np.empty(numbers)
        for arguments in chunks:
            if forms:
                form(arguments, all_rows, state, ALL, 0, slices)
            if writes:
                write(arguments, all_rows, state, 0, slices)

    return bound(at_once if size < WORTH_SHARING and slices <= together and not masked else compute)
