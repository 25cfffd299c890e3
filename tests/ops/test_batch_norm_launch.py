"""The launch choice is arithmetic on shapes: every row and channel is covered, and the kernels' limits are kept."""

from __future__ import annotations

import re
from itertools import product
from typing import NamedTuple

import numpy as np
import pytest

from bnkernels.ops.batch_norm.launch import SERIAL_WORKERS, one_block, slice_width
from bnkernels.ops.batch_norm.problem import BACKWARD, FORWARD, INFERENCE, INFERENCE_BACKWARD, Pass, Problem
from bnkernels.runtime import source
from bnkernels.runtime.arguments import accumulator, suffix
from bnkernels.runtime.seam import MAX_GRID, MAX_SHARED_BYTES, MAX_THREADS, Launch

ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed: there is no bfloat16")

# One below, at and above the rows of 1, 12, 16, 64 or 512 workers of 4, 8 or 16 values, and slices of 32 channels.
ROWS = [1, 2, 3, 4, 5, 15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 256, 257, 1023, 1024, 1025, 4097, 8192, 8193, 20000]
CHANNELS = [1, 2, 3, 5, 8, 13, 19, 20, 21, 31, 32, 33, 63, 64, 65, 100, 1000, 5000]
INNER = [1, 2, 7, 8, 15, 16, 49, 1000]
SHAPES = [(rows, channels, 1) for rows, channels in product(ROWS, CHANNELS)]
SHAPES += list(product([1, 2, 3, 64, 1000], [1, 3, 20, 33, 1000], INNER))
DTYPES = [np.dtype(dtype) for dtype in ("float16", ml_dtypes.bfloat16, "float32", "float64")]


class Facts(NamedTuple):
    """Facts of a kernel in ``cuda/``: most threads per block, values per thread, whether for inner = 1 alone."""

    threads: int
    values: int | None
    matrix: bool


def kernel_facts() -> dict[str, Facts]:
    """Return the facts of each batch-norm kernel, by its name after ``bnk_batch_norm_``."""
    facts: dict[str, Facts] = {}
    for which in ("forward", "backward"):
        text = (source.folder() / f"batch_norm_{which}.cu").read_text(encoding="utf-8")
        training = rf"^BATCH_NORM_{which.upper()}\((\w+), (\w+), \w+, \w+, \d, (\d+), (\w+), (\w+), \w+\)"
        (threads,) = set(re.findall(r"BNK_KERNEL\(bnk_batch_norm_[\w#]+, \([^)]*\), (\d+)", text))
        for variant, end, values, held, matrix in re.findall(training, text, re.MULTILINE):
            holds = int(values) if held == "true" else None
            facts[f"{which}_{variant}_{end}"] = Facts(int(threads), holds, matrix == "true")
        for variant, end in re.findall(r"^BATCH_NORM_INFERENCE\w*\((\w+), (\w+),", text, re.MULTILINE):
            facts[f"{variant}_{end}"] = Facts(int(threads), None, False)
    return facts


FACTS = kernel_facts()
TRAINING = FORWARD, BACKWARD


def shared_bytes(launch: Launch, dtype: np.dtype) -> int:
    """Return what the headers say: four numbers a worker, and a place more a channel."""
    width, workers, _ = launch.block
    return 4 * width * (workers + 1) * accumulator(dtype).itemsize


def plan(kind: Pass, outer: int, channels: int, dtype: np.dtype, inner: int = 1) -> tuple[str, Launch]:
    """Return the kernel that is chosen, by its name after ``bnk_batch_norm_``, and its launch."""
    found = one_block(kind, Problem(1, outer, channels, inner, dtype))
    return found.kernel.removeprefix("bnk_batch_norm_"), found.launch


def constant(name: str) -> int:
    """Return a constant of ``cuda/lib/reduce/rows.cuh``."""
    text = (source.folder() / "lib/reduce/rows.cuh").read_text(encoding="utf-8")
    return int(re.search(rf"^constexpr int {name} = (\d+);", text, re.MULTILINE)[1])


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
    """Four data types times five forwards, five backwards and four for inference: no line escaped the search."""
    assert len(FACTS) == 4 * (5 + 5 + 4)
    assert FACTS["forward_registers16_bf16"] == (512, 16, False)
    assert FACTS["forward_registers4_f64"] == (512, 4, True)
    assert FACTS["backward_two_pass_f32"] == (512, None, False)


def test_python_and_the_kernels_agree_when_workers_merge_in_groups() -> None:
    assert constant("SERIAL_WORKERS") == SERIAL_WORKERS
    assert constant("SERIAL_WORKERS") % constant("MERGE_FAN_IN") == 0


def test_64_by_20_is_one_block_with_four_values_a_thread() -> None:
    kernel, launch = plan(FORWARD, 64, 20, np.dtype("float32"))
    assert (kernel, launch) == ("forward_registers4_f32", Launch((1, 1, 1), (20, 16, 1), 4 * 20 * 17 * 4))
    kernel, launch = plan(BACKWARD, 64, 20, np.dtype("float32"))
    assert (kernel, launch) == ("backward_registers4_f32", Launch((1, 1, 1), (20, 16, 1), 4 * 20 * 17 * 4))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", TRAINING, ids=["forward", "backward"])
def test_training_plans_cover_everything_within_limits(kind: Pass, dtype: np.dtype) -> None:
    for outer, channels, inner in SHAPES:
        kernel, launch = plan(kind, outer, channels, dtype, inner)
        facts = FACTS[kernel]
        workers = launch.block[1]
        assert_covers_channels(launch, channels)
        assert_within_limits(launch, facts.threads)
        assert launch.grid[1:] == (1, 1)  # a block owns its channels alone
        assert launch.shared_bytes == shared_bytes(launch, dtype)
        assert workers <= outer * inner  # no worker without a row
        assert workers <= SERIAL_WORKERS or workers & (workers - 1) == 0
        assert inner == 1 or not facts.matrix
        if facts.values is not None:
            assert facts.values * workers >= outer * inner


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", TRAINING, ids=["forward", "backward"])
def test_rows_are_two_pass_only_where_no_block_could_hold_them(kind: Pass, dtype: np.dtype) -> None:
    most = max(facts.values or 0 for name, facts in FACTS.items() if name.endswith(f"_{suffix(dtype)}"))
    for outer, channels, inner in SHAPES:
        kernel, launch = plan(kind, outer, channels, dtype, inner)
        values = FACTS[kernel].values
        workers = 512 // launch.block[0]
        workers = workers if workers <= SERIAL_WORKERS else 1 << (workers.bit_length() - 1)
        assert (values is None) == (outer * inner > most * workers), (outer, channels, inner)
        assert (values == 4) == (inner == 1 and outer <= 4 * launch.block[1]), (outer, channels, inner)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_neighbouring_threads_read_neighbouring_addresses(dtype: np.dtype) -> None:
    """Rows of one channel where a sector of 32 bytes or more of them lies together, else channels."""
    for channels, inner in product(CHANNELS, INNER):
        width = slice_width(channels, inner, dtype)
        assert width == (1 if inner * dtype.itemsize >= 32 else min(channels, 32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inference_backward_plans_cover_everything_within_limits(dtype: np.dtype) -> None:
    for outer, channels, inner in SHAPES:
        kernel, launch = plan(INFERENCE_BACKWARD, outer, channels, dtype, inner)
        assert kernel == f"inference_backward_{suffix(dtype)}"
        assert_covers_channels(launch, channels)
        assert_within_limits(launch, FACTS[kernel].threads)
        assert launch.grid[1:] == (1, 1)
        assert launch.shared_bytes == shared_bytes(launch, dtype)
        assert launch.block[1] <= outer * inner


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("outer", [*ROWS, 10**6, 10**9, 2**40])
def test_inference_plans_cover_everything_within_limits(outer: int, dtype: np.dtype) -> None:
    for channels, inner in product(CHANNELS, INNER):
        (kernel, launch), rows = plan(INFERENCE, outer, channels, dtype, inner), outer * inner
        assert_covers_channels(launch, channels)
        assert_within_limits(launch, FACTS[kernel].threads)
        workers, tiles = launch.block[1], launch.grid[2]
        assert launch.shared_bytes == 0
        assert workers * (tiles - 1) < rows  # no block without a row
        assert tiles == MAX_GRID[2] or workers * tiles * 8 >= rows  # a thread strides, but not far
        assert workers * tiles < 2**31  # the kernel counts its workers in 32 bits


@pytest.mark.parametrize(
    ("outer", "channels", "inner"), [(1, 1, 1), (2, 33, 1), (64, 20, 1), (37, 5, 3), (300, 32, 1), (11, 3, 100)]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_element_has_one_owner(outer: int, channels: int, inner: int, dtype: np.dtype) -> None:
    """Thread (i, j) of block b owns channel w b + i and rows j, j + l, ...: together all, and none twice."""
    for _, launch in (plan(kind, outer, channels, dtype, inner) for kind in TRAINING):
        owners = np.zeros((outer * inner, channels), int)
        width, workers, _ = launch.block
        for block, i, j in product(range(launch.grid[0]), range(width), range(workers)):
            if (channel := width * block + i) < channels:
                owners[j::workers, channel] += 1
        np.testing.assert_array_equal(owners, 1)
