"""Launch choice of cooperative batch norm: every row is covered, and the limits of any device are respected."""

from __future__ import annotations

from itertools import product
from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bnkernels.ops.batch_norm.launch import MIN_BLOCKS, PLANES, ROOM, SMALL, cooperative, elements_of_access
from bnkernels.ops.batch_norm.problem import BACKWARD, FORWARD, Pass
from bnkernels.runtime.arguments import accumulator
from bnkernels.runtime.occupancy import most_shared, resident
from bnkernels.runtime.seam import MAX_SHARED_BYTES, SHARED_BYTES, WORKSPACE_BYTES, Limits
from bnkernels.runtime.workspace import MOST_BARRIERS, PARTIALS
from tests.ops.test_batch_norm_cooperative import DTYPES, KIB, TINY, problem_of

H200 = Limits(132, 227 * KIB, 228 * KIB, cooperative=True)
A100 = Limits(108, 163 * KIB, 164 * KIB, cooperative=True)
RTX_5090 = Limits(170, 99 * KIB, 100 * KIB, cooperative=True)


@settings(deadline=None, max_examples=300)
@given(
    kind=st.sampled_from([FORWARD, BACKWARD]),
    outer=st.integers(1, 10**6),
    channels=st.integers(1, 600),
    inner=st.one_of(st.just(1), st.integers(1, 5000)),
    dtype=st.sampled_from([*DTYPES, np.dtype("float64")]),
    vectors=st.booleans(),
    limits=st.sampled_from([H200, A100, RTX_5090, TINY, TINY._replace(cooperative=False)]),
)
def test_a_choice_covers_all_rows_and_keeps_all_limits(
    kind: Pass, outer: int, channels: int, inner: int, dtype: np.dtype, vectors: bool, limits: Limits
) -> None:
    if vectors:
        count = 16 // dtype.itemsize
        channels, inner = (channels * count, 1) if inner == 1 else (channels, inner * count)
    along, size = channels if inner == 1 else inner, dtype.itemsize
    count = next(n for n in {2: (8, 2, 1), 4: (4, 1), 8: (1,)}[size] if along % n == 0)
    problem, direction = problem_of((outer, channels, inner), dtype), kind.direction
    if outer * inner * channels * size <= SMALL or (outer > 1 and channels * inner * size >= 2**32):
        assert elements_of_access(kind, problem) == 0
        return
    if outer * inner // (1 if inner == 1 else count) >= 2**31:
        return
    assert elements_of_access(kind, problem) == count
    choice = cooperative(kind, problem, limits, count)
    if choice is None:
        return
    (groups, together, _), (columns, workers, _) = choice.launch.grid, choice.launch.block
    rows = outer * inner // (1 if inner == 1 else count)
    assert choice.kernel.startswith(f"bnk_batch_norm_{direction}_cooperative_" + ("inner_" if inner > 1 else ""))
    assert choice.splits == together
    assert columns * workers <= (192 if direction == "backward" and inner == 1 and count == 8 else 256)
    assert workers * together <= rows, "every worker has a row"
    assert choice.launch.cooperative == (together > 1)
    if together > 1:
        assert limits.cooperative
        held = resident(limits, columns * workers, choice.launch.shared_bytes, MIN_BLOCKS)
        assert groups * together <= held == 2 * limits.sms, "all blocks are resident"
        assert choice.launch.shared_bytes <= ROOM * most_shared(limits, MIN_BLOCKS), "with some room"
        assert groups <= MOST_BARRIERS
    assert 2 * (choice.launch.shared_bytes + limits.reserved_bytes) <= limits.shared_bytes_of_sm
    assert choice.launch.shared_bytes <= min(limits.shared_bytes, MAX_SHARED_BYTES)
    assert choice.held >= 1
    assert choice.stages in (1, 2)
    kept = choice.held * choice.stages * columns * workers * count * size * PLANES[direction]
    width = 1 if inner > 1 else columns * count
    before = choice.launch.shared_bytes - kept
    numbers, number = {"forward": 2, "backward": 15}[direction] * width, accumulator(dtype).itemsize
    assert before == 16 + ((numbers + 3) // 4 * 4 + 2 * width * workers) * number
    assert before % (count * size) == 0, "rows are kept at multiples of their size"
    assert PARTIALS + 2 * groups * (together * 3 + 2) * width * number <= WORKSPACE_BYTES
    slices = channels // width if inner > 1 else -(-channels // width)
    assert choice.stages == 1 or (groups < slices and choice.held * workers * together >= rows), "a stage is a slice"


@pytest.mark.parametrize(
    ("shape", "strides", "dtype", "alignment", "count"),
    [
        ((1024, 64, 48), (64 * 48, 48, 1), "float32", 16, 4),
        ((1024, 65, 1), (65, 1, 0), "float32", 16, 1),  # a row of 65 is not whole vectors
        ((1024, 64, 1), (66, 1, 0), "float32", 16, 1),  # nor does the second row start at one
        ((1024, 64, 1), (66, 1, 0), "float16", 16, 2),
        ((1024, 64, 1), (64, 1, 0), "float32", 4, 1),
        ((1024, 64, 1), (64, 1, 0), "float16", 2, 1),
        ((64, 64, 49), (64 * 49, 49, 1), "float16", 16, 1),
        ((64, 64, 48), (64 * 50, 50, 1), "float32", 16, 1),
        ((64, 64, 3), (64 * 3, 3, 1), "float64", 16, 1),
        ((64, 64, 48), (64 * 48, 48, -1), "float32", 16, 0),
        ((1024, 64, 1), (128, 2, 0), "float32", 16, 0),
        ((64, 64, 1), (64, 1, 0), "float32", 16, 0),  # small
    ],
)
def test_accesses_are_as_wide_as_strides_and_addresses_allow(
    shape: tuple[int, int, int], strides: tuple[int, int, int], dtype: str, alignment: int, count: int
) -> None:
    assert elements_of_access(FORWARD, problem_of(shape, dtype, strides), alignment) == count


def test_a_device_without_cooperation_does_not_share_slices() -> None:
    long = problem_of((10**6, 64, 1), "float32")
    assert cooperative(FORWARD, long, H200, 4).launch.cooperative
    assert cooperative(FORWARD, long, H200._replace(cooperative=False), 4) is None


def test_blocks_that_exchange_nothing_need_no_workspace() -> None:
    """However many slices there are: they were refused, with a RuntimeError, from some thousand on."""
    for kind, shape in product((FORWARD, BACKWARD), [(600, 10**6, 1), (8, 300_000, 1024)]):
        choice = cooperative(kind, problem_of(shape, "float32"), H200, 4)
        assert choice.splits == 1
        assert choice.launch.grid[0] * 128 >= shape[1]


def test_large_shapes_take_the_whole_device_and_stay_on_the_chip() -> None:
    for shape, dtype in [
        ((65536, 4096, 1), "float16"),
        ((100_000, 32, 1), "float32"),
        ((256, 256, 56 * 56), "float16"),
    ]:
        for kind in (FORWARD, BACKWARD):
            count = 16 // np.dtype(dtype).itemsize
            choice = cooperative(kind, problem_of(shape, dtype), H200, count)
            assert prod(choice.launch.grid) >= 0.9 * 2 * H200.sms
            assert choice.launch.shared_bytes > SHARED_BYTES
            workers = choice.launch.grid[1] * choice.launch.block[1]
            assert choice.held * workers * (count if shape[2] > 1 else 1) >= shape[0] * shape[2]
