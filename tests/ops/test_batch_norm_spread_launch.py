"""When and how batch norm spreads over the device: every row is covered, and the limits of any device are kept."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bnkernels.ops.batch_norm import cooperative as spread
from bnkernels.ops.batch_norm.cooperative import choose_spread
from bnkernels.runtime.occupancy import resident
from bnkernels.runtime.seam import MAX_SHARED_BYTES, SHARED_BYTES, WORKSPACE_BYTES, Limits
from tests.ops.test_batch_norm_spread import DTYPES, KIB, TINY, tensor_of

H200 = Limits(132, 227 * KIB, 228 * KIB, cooperative=True)
A100 = Limits(108, 163 * KIB, 164 * KIB, cooperative=True)
RTX_5090 = Limits(170, 99 * KIB, 100 * KIB, cooperative=True)


@settings(deadline=None, max_examples=300)
@given(
    direction=st.sampled_from(["forward", "backward"]),
    outer=st.integers(1, 10**6),
    channels=st.integers(1, 600),
    inner=st.one_of(st.just(1), st.integers(1, 5000)),
    dtype=st.sampled_from(DTYPES),
    limits=st.sampled_from([H200, A100, RTX_5090, TINY, TINY._replace(cooperative=False)]),
)
def test_a_choice_covers_all_rows_and_keeps_all_limits(
    direction: str, outer: int, channels: int, inner: int, dtype: np.dtype, limits: Limits
) -> None:
    count = 16 // dtype.itemsize
    channels, inner = (channels * count, 1) if inner == 1 else (channels, inner * count)
    tensor = tensor_of((outer, channels, inner), dtype)
    assert tensor.may_spread == (outer * channels * inner * dtype.itemsize > spread.SMALL)
    choice = choose_spread(direction, tensor, limits) if tensor.may_spread else None
    if choice is None:
        return
    (groups, together, _), (columns, lanes, _) = choice.launch.grid, choice.launch.block
    rows = outer * inner // (1 if inner == 1 else count)
    assert choice.variant == f"{direction}_cooperative" + ("_inner" if inner > 1 else "")
    assert columns * lanes <= (192 if direction == "backward" and inner == 1 and count == 8 else 256)
    assert lanes * together <= rows, "every lane has a row"
    assert lanes % 4 == 0 or inner == 1
    assert together & (together - 1) == 0
    assert together <= spread.FAN_IN * lanes
    assert choice.launch.cooperative == (together > 1)
    if together > 1:
        assert limits.cooperative
        held = resident(limits, columns * lanes, choice.launch.shared_bytes, spread.MIN_BLOCKS)
        assert groups * together <= held == 2 * limits.sms, "all blocks are resident"
        assert groups <= spread.MOST_BARRIERS
    assert 2 * (choice.launch.shared_bytes + limits.reserved_bytes) <= limits.shared_bytes_of_sm
    assert choice.launch.shared_bytes <= min(limits.shared_bytes, MAX_SHARED_BYTES)
    assert choice.held >= 1
    partial = choice.launch.shared_bytes - choice.held * columns * lanes * 16 * (1 + (direction == "backward"))
    width = 1 if inner > 1 else columns * count
    assert partial == (3 if direction == "forward" else 2) * width * lanes * 4
    assert partial % 16 == 0
    assert spread.PARTIALS + 2 * groups * together * 3 * width * 4 <= WORKSPACE_BYTES


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
    assert not tensor_of(shape, "float32", strides).may_spread
    assert tensor_of((1024, 64, 48), "float32").may_spread


def test_float64_and_a_device_without_cooperation_do_not_share_slices() -> None:
    assert not tensor_of((1024, 64, 1), "float64").may_spread
    long = tensor_of((10**6, 64, 1), "float32")
    assert choose_spread("forward", long, H200).launch.cooperative
    assert choose_spread("forward", long, H200._replace(cooperative=False)) is None


def test_large_shapes_take_the_whole_device_and_stay_on_the_chip() -> None:
    for shape, dtype in [
        ((65536, 4096, 1), "float16"),
        ((100_000, 32, 1), "float32"),
        ((256, 256, 56 * 56), "float16"),
    ]:
        for direction in ("forward", "backward"):
            choice = choose_spread(direction, tensor_of(shape, dtype), H200)
            assert prod(choice.launch.grid) >= 0.9 * 2 * H200.sms
            assert choice.launch.shared_bytes > SHARED_BYTES
            count = 16 // np.dtype(dtype).itemsize
            lanes = choice.launch.grid[1] * choice.launch.block[1]
            assert choice.held * lanes * (count if shape[2] > 1 else 1) >= shape[0] * shape[2]
