"""Launch choice of cooperative batch norm: every row is covered, and the limits of any device are respected."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bnkernels.ops.batch_norm.launch import FAN_IN, MIN_BLOCKS, SMALL, cooperative, in_vectors
from bnkernels.ops.batch_norm.problem import BACKWARD, FORWARD, Pass
from bnkernels.runtime.occupancy import resident
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
    dtype=st.sampled_from(DTYPES),
    limits=st.sampled_from([H200, A100, RTX_5090, TINY, TINY._replace(cooperative=False)]),
)
def test_a_choice_covers_all_rows_and_keeps_all_limits(
    kind: Pass, outer: int, channels: int, inner: int, dtype: np.dtype, limits: Limits
) -> None:
    count = 16 // dtype.itemsize
    channels, inner = (channels * count, 1) if inner == 1 else (channels, inner * count)
    problem, direction = problem_of((outer, channels, inner), dtype), kind.direction
    assert in_vectors(kind, problem) == (outer * channels * inner * dtype.itemsize > SMALL)
    choice = cooperative(kind, problem, limits) if in_vectors(kind, problem) else None
    if choice is None:
        return
    (groups, together, _), (columns, workers, _) = choice.launch.grid, choice.launch.block
    rows = outer * inner // (1 if inner == 1 else count)
    assert choice.kernel.startswith(f"bnk_batch_norm_{direction}_cooperative_" + ("inner_" if inner > 1 else ""))
    assert choice.splits == together
    assert columns * workers <= (192 if direction == "backward" and inner == 1 and count == 8 else 256)
    assert workers * together <= rows, "every worker has a row"
    assert workers % 4 == 0 or inner == 1
    assert together & (together - 1) == 0
    assert together <= FAN_IN * workers
    assert choice.launch.cooperative == (together > 1)
    if together > 1:
        assert limits.cooperative
        held = resident(limits, columns * workers, choice.launch.shared_bytes, MIN_BLOCKS)
        assert groups * together <= held == 2 * limits.sms, "all blocks are resident"
        assert groups <= MOST_BARRIERS
    assert 2 * (choice.launch.shared_bytes + limits.reserved_bytes) <= limits.shared_bytes_of_sm
    assert choice.launch.shared_bytes <= min(limits.shared_bytes, MAX_SHARED_BYTES)
    assert choice.held >= 1
    partial = choice.launch.shared_bytes - choice.held * columns * workers * 16 * (1 + (direction == "backward"))
    width = 1 if inner > 1 else columns * count
    assert partial == (3 if direction == "forward" else 2) * width * workers * 4
    assert partial % 16 == 0
    assert PARTIALS + 2 * groups * together * 3 * width * 4 <= WORKSPACE_BYTES


@pytest.mark.parametrize(
    ("shape", "strides"),
    [
        ((1024, 65, 1), (65, 1, 0)),  # a row of 65 is not whole vectors
        ((1024, 64, 1), (66, 1, 0)),  # nor does the second row start at one
        ((1024, 64, 1), (128, 2, 0)),
        ((64, 64, 49), (64 * 49, 49, 1)),
        ((64, 64, 48), (64 * 48, 48, -1)),
        ((64, 64, 48), (64 * 50, 50, 1)),
        ((64, 64, 2), (64 * 2, 2, 1)),
        ((64, 64, 1), (64, 1, 0)),  # small
    ],
)
def test_what_does_not_lie_in_vectors_or_is_small_does_not_spread(
    shape: tuple[int, int, int], strides: tuple[int, int, int]
) -> None:
    assert not in_vectors(FORWARD, problem_of(shape, "float32", strides))
    assert in_vectors(FORWARD, problem_of((1024, 64, 48), "float32"))


def test_float64_and_a_device_without_cooperation_do_not_share_slices() -> None:
    assert not in_vectors(FORWARD, problem_of((1024, 64, 1), "float64"))
    long = problem_of((10**6, 64, 1), "float32")
    assert cooperative(FORWARD, long, H200).launch.cooperative
    assert cooperative(FORWARD, long, H200._replace(cooperative=False)) is None


def test_large_shapes_take_the_whole_device_and_stay_on_the_chip() -> None:
    for shape, dtype in [
        ((65536, 4096, 1), "float16"),
        ((100_000, 32, 1), "float32"),
        ((256, 256, 56 * 56), "float16"),
    ]:
        for kind in (FORWARD, BACKWARD):
            choice = cooperative(kind, problem_of(shape, dtype), H200)
            assert prod(choice.launch.grid) >= 0.9 * 2 * H200.sms
            assert choice.launch.shared_bytes > SHARED_BYTES
            count = 16 // np.dtype(dtype).itemsize
            workers = choice.launch.grid[1] * choice.launch.block[1]
            assert choice.held * workers * (count if shape[2] > 1 else 1) >= shape[0] * shape[2]
