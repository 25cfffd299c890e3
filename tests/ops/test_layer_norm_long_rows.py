"""Layer norm of rows that several blocks share: around every limit, in any order of blocks, each byte moved once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bnkernels as bn
from bnkernels.ops.layer_norm import launch, long_rows
from bnkernels.ops.layer_norm.launch import choose_backward, choose_forward, partial_sums
from bnkernels.ops.layer_norm.op import BACKWARD_CALLS
from bnkernels.ops.layer_norm.problem import MOST_PARTIALS, Problem
from bnkernels.runtime.occupancy import most_shared, resident
from bnkernels.runtime.seam import WORKSPACE_BYTES, LaunchPlan, Limits
from bnkernels.runtime.workspace import MOST_BARRIERS, PARTIALS
from tests.ops.test_batch_norm_masked import DTYPES, dtype_named
from tests.ops.test_layer_norm import assert_right, make
from tools import backends
from tools.backends import Backend
from tools.emulator import EmulatorRuntime

H200 = Limits(132, 227 * 1024, 228 * 1024, True)
T4 = Limits(40, 65536, 65536, True, reserved_bytes=0)
SMALL = Limits(2, 33 * 1024, 67 * 1024, True)  # two blocks a multiprocessor, each with 7 vectors a thread
ROOMY = Limits(2, 60 * 1024, 122 * 1024, True)  # with twice as many
WIDE, ROOMIEST = ROOMY._replace(sms=8), H200._replace(sms=8)
ALONE = SMALL._replace(cooperative=False)
LONGEST = {2: 16_384, 4: 16_384, 8: 8192}  # columns that the registers of a block hold


def plans(shape: tuple[int, int], dtype: Any, limits: Limits = SMALL) -> list[LaunchPlan]:
    """Return the plans of both directions."""
    problem = Problem(*shape, np.dtype(dtype))
    return [choose_forward(problem, limits), choose_backward(problem, limits)]


def both(backend: Backend, x: Any, dy: Any, *vectors: Any, **options: Any) -> list[np.ndarray]:
    """Return y, statistics and the gradients."""
    y, statistics = bn.layer_norm_forward(x, *vectors, **options)
    grads = bn.layer_norm_backward(dy, x, *vectors, statistics, **options)
    return [backend.asnumpy(array) for array in (y, statistics, *grads)]


@pytest.fixture
def small(emulated: EmulatorRuntime) -> Iterator[Backend]:
    """Yield the emulator as a device of four blocks."""
    with emulated.device_limits(SMALL):
        yield backends.make("emulator")


# ---- results --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("above", [0, 1, 16])
def test_is_what_the_formulas_say_around_the_longest_row_of_a_block(
    backend: Backend, rng: np.random.Generator, dtype: str, above: int
) -> None:
    """At the limit, one column and some whole vectors above it."""
    kind = np.dtype(dtype_named(dtype))
    columns = LONGEST[kind.itemsize] + above
    forward = choose_forward(Problem(3, columns, kind), H200)
    assert ("cooperative" in forward.kernel) == (above > 0)
    assert_right(backend, *make(rng, (3, columns), dtype), "relu")


@pytest.mark.parametrize(("rows", "columns", "dtype"), [(1, 50_001, "float32"), (37, 9000, "float64")])
def test_one_row_and_many(backend: Backend, rng: np.random.Generator, rows: int, columns: int, dtype: str) -> None:
    assert_right(backend, *make(rng, (rows, columns), dtype))


@pytest.mark.emulator
@pytest.mark.parametrize(
    ("dtype", "shape", "limits", "stages", "at_once"),
    [
        ("bfloat16", (7, 40_008), WIDE, (1, 2), 1),
        ("float32", (37, 16_408), WIDE, (2, 2), 1),
        ("bfloat16", (9, 16_408), ROOMIEST._replace(sms=2), (2, 1), 1),
        ("float32", (11, 16_408), ROOMIEST, (1, 2), 2),
        ("float64", (80, 2101), ROOMIEST, (1, 2), 2),
    ],
    ids=lambda value: str(value) if isinstance(value, (str, int)) or len(value) == 2 else "",
)
def test_the_next_rows_are_on_their_way(
    emulated: EmulatorRuntime,
    rng: np.random.Generator,
    dtype: str,
    shape: tuple[int, int],
    limits: Limits,
    stages: tuple[int, int],
    at_once: int,
) -> None:
    """While blocks wait for one another; also of two rows at once, and of more rows than a thread sums in registers."""
    forward, backward = plans(shape, dtype_named(dtype), limits)
    assert (forward.stages, backward.stages) == stages
    assert backward.at_once == at_once
    with emulated.device_limits(limits):
        assert_right(backends.make("emulator"), *make(rng, shape, dtype))


@pytest.mark.emulator
@pytest.mark.parametrize("limits", [SMALL, ALONE], ids=["four blocks", "one block"])
@pytest.mark.parametrize(("dtype", "columns"), [("float16", 90_003), ("float32", 70_000), ("float64", 24_001)])
def test_columns_beyond_the_chip_are_read_again(
    emulated: EmulatorRuntime, rng: np.random.Generator, dtype: str, columns: int, limits: Limits
) -> None:
    """Also with `y` in the place of `x`, and `dx` in that of `dy`."""
    backend, arrays = backends.make("emulator"), make(rng, (2, columns), dtype)
    for plan in plans((2, columns), arrays[0].dtype, limits):
        spans = -(-(-(-columns * arrays[0].itemsize // 16) // plan.splits) // (256 * plan.held))
        assert spans > 1
        assert plan.splits > 1 or not limits.cooperative
    with emulated.device_limits(limits):
        assert_right(backend, *arrays)
        x, dy, *vectors = backend.arrays(*arrays)
        wanted = both(backend, x, dy, *vectors)
        _, statistics = bn.layer_norm_forward(x, *vectors)
        dx, *_ = bn.layer_norm_backward(dy, x, *vectors, statistics, out=(dy, *backend.arrays(*arrays[2:])))
        y, _ = bn.layer_norm_forward(x, *vectors, out=(x, statistics))
    np.testing.assert_array_equal(backend.asnumpy(y), wanted[0])
    np.testing.assert_array_equal(backend.asnumpy(dx), wanted[2])


@pytest.mark.emulator
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_curved_activation(small: Backend, rng: np.random.Generator, dtype: str) -> None:
    assert_right(small, *make(rng, (3, 16_400), dtype), activation="silu")


@pytest.mark.parametrize("given_vectors", [(False, False), (True, False), (False, True)])
def test_scale_and_shift_are_optional(
    backend: Backend, rng: np.random.Generator, given_vectors: tuple[bool, bool]
) -> None:
    x, dy, *vectors = make(rng, (2, 16_400), "float32")
    assert_right(backend, x, dy, *(v if here else None for v, here in zip(vectors, given_vectors, strict=True)))


# ---- numbers that are hard to sum -----------------------------------------------------------------------------------


@pytest.mark.emulator
@pytest.mark.parametrize("columns", [16_400, 70_001], ids=["held", "read again"])
def test_a_mean_far_from_0_and_blocks_far_from_one_another_cost_no_digits(small: Backend, columns: int) -> None:
    """Rows with a large mean, of blocks that are constant, and of an outlier in the first column or the last."""
    x = np.tile(np.arange(columns) % 11, (4, 1)).astype("float32")
    x[0] += 2.0**22
    x[1] = np.arange(columns) * 64 // columns
    x[2, 0], x[3, -1] = 1e4, -1e4
    ones = np.ones(columns, "float32")
    assert_right(small, x, np.cos(x), ones, 0 * ones, eps=1e-5)


@pytest.mark.emulator
@pytest.mark.parametrize("columns", [16_400, 70_001], ids=["held", "read again"])
def test_special_rows_stay_among_themselves(small: Backend, rng: np.random.Generator, columns: int) -> None:
    """Not a number, infinity, numbers of both signs at the end of the range, and a constant."""
    x, dy, gamma, beta = make(rng, (6, columns), "float32")
    x[1, -1], x[2, columns // 2] = np.nan, np.inf
    x[3] = np.where(np.arange(columns) < columns // 3, 3e38, -3e38)
    x[4] = 0.1
    y, statistics, dx, *_ = both(small, *small.arrays(x, dy, gamma, beta))
    others = x[[0, 5]]
    wanted, _, wanted_dx, *_ = both(small, *small.arrays(others, dy[[0, 5]], gamma, beta))
    np.testing.assert_allclose(y[[0, 5]], wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dx[[0, 5]], wanted_dx, rtol=1e-5, atol=1e-5)
    assert np.isnan(y[1:3]).all()
    assert np.isnan(dx[1:3]).all()
    np.testing.assert_array_equal(y[3:5], np.tile(beta, (2, 1)))
    assert (dx[3] == 0).all()
    assert statistics[0, 4] == np.float32(0.1)
    np.testing.assert_allclose(statistics[0, 3], x[3].astype(float).mean(), rtol=1e-6)


@pytest.mark.emulator
def test_alignment_changes_no_bit(small: Backend, rng: np.random.Generator) -> None:
    arrays, found = make(rng, (3, 16_388), "float32"), []
    for shift in (0, 1):
        moved = []
        for array in arrays:
            view = small.asarray(np.zeros(array.size + 4, array.dtype))[shift : shift + array.size].reshape(array.shape)
            view[...] = small.asarray(array)
            moved.append(view)
        found.append(both(small, *moved, activation="gelu"))
    for one, two in zip(*found, strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.emulator
@pytest.mark.parametrize(
    ("shape", "dtype"), [((7, 16_400), "float32"), ((2, 70_000), "float32"), ((9, 2100), "float64")], ids=str
)
def test_the_order_of_blocks_and_threads_changes_no_bit(
    emulated: EmulatorRuntime, rng: np.random.Generator, shape: tuple[int, int], dtype: str
) -> None:
    """Rows on the chip, rows that are read again, and two groups of two blocks in the backward."""
    backend, found = backends.make("emulator"), []
    arrays = backend.arrays(*make(rng, shape, dtype))
    with emulated.device_limits(ROOMY):  # four blocks: ThreadSanitizer has a limit
        for seed in range(4):
            with emulated.schedule(seed, resident=4):
                found.append(both(backend, *arrays, activation="relu"))
    for others in found[1:]:
        for one, two in zip(found[0], others, strict=True):
            np.testing.assert_array_equal(one, two)


# ---- launches -------------------------------------------------------------------------------------------------------


@pytest.mark.emulator
@pytest.mark.parametrize(
    ("limits", "shape", "dtype"),
    [(H200, (3, 262_144), "float32"), (T4, (2, 240_000), "float32"), (WIDE, (9, 20_003), "float16")],
    ids=["H200", "T4", "no whole vectors"],
)
def test_every_byte_is_moved_once(
    counting_emulator: EmulatorRuntime, rng: np.random.Generator, limits: Limits, shape: tuple[int, int], dtype: str
) -> None:
    x, dy, *vectors = map(counting_emulator.asarray, make(rng, shape, dtype))
    with counting_emulator.device_limits(limits):
        counting_emulator.reset()
        y, statistics = bn.layer_norm_forward(x, *vectors)
        dx, *_ = bn.layer_norm_backward(dy, x, *vectors, statistics)
    forward, backward = (record.counts for record in counting_emulator.launches)
    for counts, reads, written in ((forward, (x,), y), (backward, (x, dy), dx)):
        for array in reads:
            assert counts.of(array).bytes_read == counts.of(array).unique_bytes_read == array.nbytes
        assert counts.of(written).bytes_written == written.nbytes
        assert counts.of(written).bytes_read == 0
    assert forward.of(statistics).bytes_written == statistics.nbytes


@pytest.mark.emulator
def test_beyond_the_chip_only_what_it_has_no_room_for_is_read_twice(
    counting_emulator: EmulatorRuntime, rng: np.random.Generator
) -> None:
    x, dy, *_ = map(counting_emulator.asarray, make(rng, (1, 70_000), "float32"))
    with counting_emulator.device_limits(SMALL):
        counting_emulator.reset()
        _, statistics = bn.layer_norm_forward(x)
        bn.layer_norm_backward(dy, x, None, None, statistics)
    records = [record.counts for record in counting_emulator.launches]
    for plan, counts, reads in zip(plans((1, 70_000), "float32"), records, ((x,), (x, dy)), strict=True):
        kept = plan.splits * plan.held * 256 * 16
        assert kept < x.nbytes
        for array in reads:
            assert counts.of(array).bytes_read == 2 * x.nbytes - kept


@pytest.mark.emulator
def test_partial_sums_of_one_call_are_not_those_of_the_next(
    emulated: EmulatorRuntime, rng: np.random.Generator
) -> None:
    """A call that is replayed would write to memory that was given back; a workspace of the caller stays."""
    x, dy, gamma, beta = map(emulated.asarray, make(rng, (2, 9000), "float32"))
    with emulated.device_limits(ALONE):
        _, statistics = bn.layer_norm_forward(x)
        out = bn.layer_norm_backward(dy, x, gamma, beta, statistics)
        workspace = emulated.asarray(np.full(MOST_PARTIALS * 9000, np.nan, "float32"))
        for memory in (None, workspace):
            bn.layer_norm_backward(dy, x, gamma, beta, statistics, workspace=memory, out=out)
            given_arrays = dy, x, gamma, beta, statistics, memory
            replayed = BACKWARD_CALLS.replay(out, given_arrays, 1, "identity", None).replayed
            assert replayed == (memory is not None)


@settings(deadline=None, max_examples=200)
@given(
    rows=st.integers(1, 10**5),
    columns=st.one_of(st.integers(16_385, 300_000), st.integers(300_001, 2**34)),
    dtype=st.sampled_from(["float16", "float32", "float64"]),
    limits=st.sampled_from([H200, T4, SMALL, ALONE, H200._replace(cooperative=False)]),
)
def test_a_choice_covers_all_columns_and_keeps_all_limits(rows: int, columns: int, dtype: str, limits: Limits) -> None:
    problem = Problem(rows, columns, np.dtype(dtype))
    for plan in plans((rows, columns), dtype, limits):
        (groups, splits, _), shared = plan.launch.grid, plan.launch.shared_bytes
        part = -(-problem.vectors // splits)
        assert part * (splits - 1) < problem.vectors, "every block has columns"
        assert groups <= min(rows, MOST_BARRIERS)
        assert plan.launch.cooperative == (splits > 1 or ("backward" in plan.kernel and groups > 1))
        if plan.launch.cooperative:
            assert groups * splits <= resident(limits, 256, shared, long_rows.MIN_BLOCKS) == 2 * limits.sms
        assert shared <= long_rows.ROOM * most_shared(limits, long_rows.MIN_BLOCKS)
        assert plan.held >= 1
        if plan.stages == 2 or plan.at_once > 1:
            assert plan.held * 256 >= part, "whole rows"
            assert groups * plan.at_once < rows, "two turns"
        assert PARTIALS + 2 * groups * splits * max(3, 2 * plan.at_once) * 8 <= WORKSPACE_BYTES
        assert "forward" in plan.kernel or partial_sums(plan, problem) <= MOST_PARTIALS * columns
        most = 262_144 if limits == H200 or ("forward" in plan.kernel and dtype != "float64") else 122_880
        if columns <= most and limits in (H200, T4):
            assert plan.held * 256 >= part, "all is read once"


def test_few_long_rows_are_shared_by_the_whole_device() -> None:
    assert [choose_forward(Problem(rows, 2**20, np.dtype("float32")), H200).launch.grid for rows in (1, 2)] == [
        (1, 171, 1),
        (2, 128, 1),
    ]


@pytest.mark.parametrize(("limits", "most"), [(H200, (6_800_000, 780_000)), (T4, (570_000, 245_000))])
def test_the_longest_rows_that_are_read_once(limits: Limits, most: tuple[int, int]) -> None:
    """As in docs/fused_layers.md, and not 2 % more."""
    for direction, columns in enumerate(most):
        for length, once in ((columns, True), (columns * 51 // 50, False)):
            plan = plans((1, length), "float32", limits)[direction]
            assert (plan.splits * plan.held * 256 * 4 >= length) == once


@pytest.mark.emulator
def test_a_device_without_room_for_a_vector_is_refused(emulated: EmulatorRuntime) -> None:
    x = emulated.asarray(np.ones((1, 16_385), "float32"))
    with (
        emulated.device_limits(Limits(1, 4000, 9000, True)),
        pytest.raises(ValueError, match=r"the device gives a block 3[0-9]+ bytes of shared memory, 4192 are needed"),
    ):
        bn.layer_norm_forward(x)


def test_the_longest_row_of_a_block_is_what_its_kernel_holds() -> None:
    for size, columns in LONGEST.items():
        assert columns == launch.MOST_HELD[size] * launch.MOST_THREADS * 16 // size
