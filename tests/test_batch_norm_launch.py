"""The launch choice is arithmetic on shapes: every row and channel is covered, and the kernels' limits are kept."""

from __future__ import annotations

import re
from itertools import product

import numpy as np
import pytest

from bnkernels import _source
from bnkernels._batch_norm_launch import (
    MAX_LANES,
    backward_launch,
    forward_launch,
    inference_backward_launch,
    inference_launch,
)
from bnkernels._runtime import MAX_GRID, MAX_SHARED_BYTES, MAX_THREADS, SUFFIX, Launch

# One below, at and above the rows that 1, 12, 16 or 64 lanes of 4 or 16 values hold, and slices of 32 channels.
ROWS = [1, 2, 3, 4, 5, 15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 256, 257, 1023, 1024, 1025, 4097, 20000]
CHANNELS = [1, 2, 3, 5, 8, 13, 19, 20, 21, 31, 32, 33, 63, 64, 65, 100, 1000, 5000]
SHAPES = list(product(ROWS, CHANNELS))
DTYPES = list(SUFFIX)


def kernel_facts() -> dict[str, tuple[int, int | None]]:
    """Return what ``cuda/`` says of each batch-norm kernel: the most threads of a block, the values a thread holds."""
    forward, backward = (
        (_source.folder() / f"batch_norm_{name}.cu").read_text(encoding="utf-8") for name in ("forward", "backward")
    )
    facts: dict[str, tuple[int, int | None]] = {}
    training = r"^BATCH_NORM_FORWARD\((\w+), (\w+), \w+, \w+, (\d+), (\d+), (true|false)\)"
    for variant, suffix, threads, values, held in re.findall(training, forward, re.MULTILINE):
        facts[f"forward_{variant}_{suffix}"] = int(threads), int(values) if held == "true" else None
    (threads,) = re.findall(r"BNK_KERNEL\(bnk_batch_norm_inference_##suffix, \w+##suffix, (\d+)", forward)
    for suffix in re.findall(r"^BATCH_NORM_INFERENCE\((\w+),", forward, re.MULTILINE):
        facts[f"inference_{suffix}"] = int(threads), None
    gradients = r"^BATCH_NORM_BACKWARD\((\w+), (\w+), \w+, \w+, (\d+), \(\w+<\w+, \w+(?:, (\d+))?>\)\)"
    for variant, suffix, threads, values in re.findall(gradients, backward, re.MULTILINE):
        facts[f"{variant}_{suffix}"] = int(threads), int(values or 0) or None
    return facts


FACTS = kernel_facts()
# The launch function of each pass, its shared values per thread (the Launch field of the headers), and its kernel.
TRAINING = {"forward": (forward_launch, 3, "forward_"), "backward": (backward_launch, 2, "")}


def assert_covers_channels(launch: Launch, channels: int) -> None:
    """Check that every channel belongs to one column of threads, and that no block has none."""
    width, blocks = launch.block[0], launch.grid[0]
    assert width * (blocks - 1) < channels <= width * blocks


def assert_within_limits(launch: Launch, threads: int) -> None:
    """Check that a device grants grid, block and shared memory, and that the kernel was compiled for the block."""
    block_threads = launch.block[0] * launch.block[1]
    assert launch.block[2] == 1
    assert block_threads <= min(threads, MAX_THREADS)
    assert all(1 <= got <= most for got, most in zip(launch.grid, MAX_GRID, strict=True))
    assert launch.shared_bytes <= MAX_SHARED_BYTES


def test_the_sources_tell_of_every_kernel() -> None:
    """Two data types times three forwards, three backwards and two for inference: no line escaped the search."""
    assert len(FACTS) == 2 * (3 + 3 + 2)
    assert FACTS["forward_held16_f64"] == (256, 16)
    assert FACTS["backward_streamed_f32"] == (512, None)


def test_64_by_20_is_one_block_with_four_values_a_thread() -> None:
    variant, launch = forward_launch(64, 20, np.dtype("float32"))
    assert (variant, launch) == ("held4", Launch((1, 1, 1), (20, 16, 1), 3 * 20 * 16 * 4))
    variant, launch = backward_launch(64, 20, np.dtype("float32"))
    assert (variant, launch) == ("backward_held4", Launch((1, 1, 1), (20, 16, 1), 2 * 20 * 16 * 4))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("which", TRAINING)
def test_training_plans_cover_everything_within_limits(which: str, dtype: np.dtype) -> None:
    plan, planes, prefix = TRAINING[which]
    for rows, channels in SHAPES:
        variant, launch = plan(rows, channels, dtype)
        threads, values = FACTS[f"{prefix}{variant}_{SUFFIX[dtype]}"]
        width, lanes, _ = launch.block
        assert_covers_channels(launch, channels)
        assert_within_limits(launch, threads)
        assert launch.grid[1:] == (1, 1)  # a block owns its channels alone
        assert launch.shared_bytes == planes * width * lanes * dtype.itemsize
        assert lanes <= min(rows, MAX_LANES)  # no lane without a row
        if values is not None:
            assert values * lanes >= rows


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("which", TRAINING)
def test_rows_are_held_wherever_they_fit(which: str, dtype: np.dtype) -> None:
    """A variant is passed over only if a block of its most threads could not hold all rows."""
    plan, _, prefix = TRAINING[which]
    order = [f"{'backward_' * (which == 'backward')}{name}" for name in ("held4", "held16", "streamed")]
    for rows, channels in SHAPES:
        chosen, launch = plan(rows, channels, dtype)
        for skipped in order[: order.index(chosen)]:
            threads, values = FACTS[f"{prefix}{skipped}_{SUFFIX[dtype]}"]
            assert rows > values * min(threads // launch.block[0], MAX_LANES), (rows, channels)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inference_backward_plans_cover_everything_within_limits(dtype: np.dtype) -> None:
    for rows, channels in SHAPES:
        variant, launch = inference_backward_launch(rows, channels, dtype)
        assert variant == "inference_backward"
        assert_covers_channels(launch, channels)
        assert_within_limits(launch, FACTS[f"inference_backward_{SUFFIX[dtype]}"][0])
        assert launch.grid[1:] == (1, 1)
        assert launch.shared_bytes == 2 * launch.block[0] * launch.block[1] * dtype.itemsize
        assert launch.block[1] <= rows


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [*ROWS, 10**6, 10**9, 2**40])
def test_inference_plans_cover_everything_within_limits(rows: int, dtype: np.dtype) -> None:
    for channels in CHANNELS:
        launch = inference_launch(rows, channels)
        assert_covers_channels(launch, channels)
        assert_within_limits(launch, FACTS[f"inference_{SUFFIX[dtype]}"][0])
        lanes, tiles = launch.block[1], launch.grid[1]
        assert launch.shared_bytes == 0
        assert lanes * (tiles - 1) < rows  # no block without a row
        assert tiles == MAX_GRID[1] or lanes * tiles * 8 >= rows  # a thread strides, but not far


@pytest.mark.parametrize(("rows", "channels"), [(1, 1), (2, 33), (64, 20), (37, 5), (300, 32), (1100, 3)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_element_has_one_owner(rows: int, channels: int, dtype: np.dtype) -> None:
    """Thread (i, j) of block b owns channel w b + i and rows j, j + l, ...: together all, and none twice."""
    for _, launch in (plan(rows, channels, dtype) for plan, _, _ in TRAINING.values()):
        owners = np.zeros((rows, channels), int)
        width, lanes, _ = launch.block
        for block, i, j in product(range(launch.grid[0]), range(width), range(lanes)):
            if (channel := width * block + i) < channels:
                owners[j::lanes, channel] += 1
        np.testing.assert_array_equal(owners, 1)
