"""The emulator itself: every kind of report is proven by a planted bug, every count by a kernel of known traffic.

Long because the kinds are many.
"""

from __future__ import annotations

import gc
import shutil
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest

from bnkernels.runtime.seam import Launch
from tools.emulator import EmulatedArray, EmulatorError, EmulatorRuntime, Traffic, coverage, planted, sanitizers
from tools.emulator.build import ROOT, read_sources
from tools.emulator.mutant_list import MUTANTS
from tools.emulator.mutants import Mutant

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator needs g++")


@pytest.fixture(scope="module")
def module_runtime() -> EmulatorRuntime:
    return EmulatorRuntime("plain", planted.SOURCES)


@pytest.fixture
def runtime(module_runtime: EmulatorRuntime) -> Iterator[EmulatorRuntime]:
    module_runtime.reset()
    yield module_runtime
    module_runtime.check_guards()


# ---- reports of the plain build -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kernel", "report"),
    [
        ("barrier_not_reached_by_all", r"deadlock.*16 of 32 threads wait at __syncthreads.*16 of 32 .* have returned"),
        (
            "divergent_barrier",
            r"divergent __syncthreads: here at cuda/planted.cu:\d+, elsewhere at cuda/planted.cu:\d+",
        ),
        ("absent_lane", "lane 31 of mask 0xffffffff does not exist"),
        ("returned_lane", "lane 0 of mask 0xffffffff has returned"),
        ("caller_outside_mask", "lane 0 of mask 0xfffffffe calls, and is not in the mask"),
        ("source_outside_mask", "lane 20 of mask 0x0000ffff is a source, and is not in the mask"),
        ("differing_masks", "deadlock.*16 of 32 threads wait at __syncwarp.*with mask 0xffffffff"),
        ("divergent_shuffle", r"lane 15 of mask 0xffffffff shuffles at cuda/planted.cu:\d+"),
        ("read_past_the_end", r"read of 4 bytes outside.*0 bytes after a float32.*thread \(31, 0, 0\).*planted.cu:\d+"),
        ("write_before_the_start", r"write of 4 bytes outside.*4 bytes before a float32.*thread \(0, 0, 0\)"),
        ("shared_past_the_end", "write of 4 bytes past the end of the 128 bytes of shared memory"),
        ("write_to_the_argument", "write of 8 bytes to the kernel's argument"),
        ("misaligned", "read of 8 bytes at a misaligned address"),
        ("misaligned_vector", "read of 16 bytes at a misaligned address"),
        ("async_copy:3", "2 asynchronous copies were never waited for"),
        ("async_copy:4", "2 asynchronous copies were never waited for"),
        ("async_copy:5", "asynchronous copy of 4 bytes to outside of the block's shared memory"),
    ],
)
def test_plain_build_reports(runtime: EmulatorRuntime, kernel: str, report: str) -> None:
    with pytest.raises(EmulatorError, match=report):
        planted.launch_case(runtime, kernel)
    # A failed launch leaves nothing behind.
    np.testing.assert_array_equal(planted.launch_case(runtime, "reverse").y, np.arange(32)[::-1])


def test_uninitialised_memory_is_nan(runtime: EmulatorRuntime) -> None:
    assert np.isnan(planted.launch_case(runtime, "uninitialised_shared").y).all()
    assert np.isnan(runtime.empty((3,), np.dtype("f8"))).all()
    assert (runtime.empty((3,), np.dtype("i4")) == -1).all()


def test_missing_barrier_shows_in_the_values_of_some_schedule(runtime: EmulatorRuntime) -> None:
    assert np.isnan(planted.launch_case(runtime, "missing_barrier").y).any()


def test_constants_of_a_launch_are_those_of_its_argument(runtime: EmulatorRuntime) -> None:
    launch = Launch((1, 1, 1), (32, 1, 1), 128, constants=(("n", 32), ("choice", 1)))
    with pytest.raises(EmulatorError, match="compiled for choice = 1, it is given 0"):
        runtime.launch("planted", "bnk_planted_order", launch, np.array((0, 0, 0, 32, 0), planted.ARGUMENTS))


def test_write_to_a_read_only_array_is_reported(runtime: EmulatorRuntime) -> None:
    x = runtime.asarray(np.zeros(32, np.float32), read_only=True)
    with pytest.raises(EmulatorError, match=r"write of 4 bytes to a float32 array .* which is read-only"):
        launch_on(runtime, "reverse", x, x)
    with pytest.raises(ValueError, match="read-only"):
        x[0] = 1


def test_record_of_the_wrong_size_is_refused(runtime: EmulatorRuntime) -> None:
    with pytest.raises(EmulatorError, match="struct of 40 bytes, got a record of 8"):
        runtime.launch("planted", "bnk_planted_reverse", Launch((1, 1, 1), (32, 1, 1)), np.zeros((), "V8"))


def test_unknown_kernel_source_and_build_are_refused(runtime: EmulatorRuntime) -> None:
    launch = Launch((1, 1, 1), (1, 1, 1))
    with pytest.raises(EmulatorError, match="has no kernel bnk_planted_nothing"):
        runtime.launch("planted", "bnk_planted_nothing", launch, np.zeros((), planted.ARGUMENTS))
    with pytest.raises(EmulatorError, match=r"got nothing\.cu"):
        runtime.launch("nothing", "bnk_nothing", launch, np.zeros((), planted.ARGUMENTS))
    with pytest.raises(EmulatorError, match="expected a build among"):
        EmulatorRuntime("fast")
    with pytest.raises(EmulatorError, match=r"python -m tools\.emulator run tsan"):
        EmulatorRuntime("tsan")


def test_impossible_schedules_are_refused(runtime: EmulatorRuntime) -> None:
    with pytest.raises(EmulatorError, match="resident >= 1"), runtime.schedule(resident=0):
        pass
    with runtime.only_blocks([4]), pytest.raises(EmulatorError, match="expected blocks below 4"):
        planted.launch(runtime, "reverse", 128, 128, grid=(4, 1, 1))


def test_launch_bounds_are_enforced(runtime: EmulatorRuntime) -> None:
    with pytest.raises(EmulatorError, match="launch bounds allow 64 threads a block, got 65"):
        planted.launch(runtime, "bounded", block=(65, 1, 1))


def test_kernel_that_does_not_compile_is_reported() -> None:
    broken = EmulatorRuntime("plain", read_sources() | {"planted.cu": "__global__ void kernel() {}"})
    with pytest.raises(EmulatorError, match=r"(?s)does not compile planted.*__global__"):
        broken.launch("planted", "kernel", Launch((1, 1, 1), (1, 1, 1)), np.zeros((), planted.ARGUMENTS))


def test_guard_bands_notice_writes_of_numpy(runtime: EmulatorRuntime) -> None:
    x = runtime.asarray(np.zeros(4, np.float32))
    beyond = np.lib.stride_tricks.as_strided(x, (5,))
    beyond[4] = 1
    with pytest.raises(EmulatorError, match=r"overwritten 0 bytes after a float32 array of shape \(4,\)"):
        runtime.check_guards()
    del beyond, x  # with the array goes the broken guard


# ---- what kernels compute and count ---------------------------------------------------------------------------------


def launch_on(
    runtime: EmulatorRuntime, kernel: str, x: EmulatedArray, y: EmulatedArray, blocks: int = 1, shared_bytes: int = 128
) -> None:
    """Run a kernel of planted.cu, 32 threads a block, on given arrays."""
    arguments = np.zeros((), planted.ARGUMENTS)
    arguments[()] = (runtime.pointer(x), runtime.pointer(y), 0, x.size, 0)
    runtime.launch("planted", f"bnk_planted_{kernel}", Launch((blocks, 1, 1), (32, 1, 1), shared_bytes), arguments)


def test_counts_of_a_kernel_with_known_traffic(runtime: EmulatorRuntime) -> None:
    result = planted.launch(runtime, "reverse", 128, 128, grid=(4, 1, 1))

    counts = runtime.launches[-1].counts
    once = {"bytes_read": 512, "unique_bytes_read": 512}
    assert counts.of(result.x) == Traffic(reads=128, **once)
    assert counts.of(result.y) == Traffic(writes=128, bytes_written=512, unique_bytes_written=512)
    assert counts.total == counts.of(result.x) + counts.of(result.y)
    assert (counts.shared_bytes_read, counts.shared_bytes_written, counts.barriers) == (512, 512, 1)


def test_repeated_reads_count_once_as_unique(runtime: EmulatorRuntime) -> None:
    x = runtime.asarray(np.arange(64, dtype=np.float32))
    launch_on(runtime, "blocks_write_the_same", x, runtime.empty((32,), np.float32), blocks=3)
    traffic = runtime.launches[-1].counts.of(x[5:])
    assert (traffic.bytes_read, traffic.unique_bytes_read) == (3 * 128, 128)


def test_vector_accesses_are_counted(runtime: EmulatorRuntime) -> None:
    result = planted.launch(runtime, "copy_vectors", 128, 128)
    np.testing.assert_array_equal(result.y, result.x)
    counts = runtime.launches[-1].counts
    assert counts.of(result.x) == Traffic(reads=32, bytes_read=512, unique_bytes_read=512, vector_accesses=32)


def test_indices_cover_grid_and_block_in_three_dimensions(runtime: EmulatorRuntime) -> None:
    result = planted.launch(runtime, "where", 720, 720, grid=(2, 3, 5), block=(4, 3, 2))
    np.testing.assert_array_equal(result.y, np.arange(720))


@pytest.mark.parametrize("width", [32, 16, 8])
def test_shuffles_exchange_what_cuda_does(runtime: EmulatorRuntime, width: int) -> None:
    result = planted.launch(runtime, "shuffles", 32, 128, choice=width)
    lane = np.arange(32)
    first, within = lane // width * width, lane % width
    down = np.where(within + 2 < width, lane + 2, lane)
    np.testing.assert_array_equal(result.y.reshape(4, 32), [first + 3, lane ^ 5, down, lane ^ 1])


@pytest.mark.parametrize("seed", range(4))
def test_last_block_pattern_sums_in_every_schedule(runtime: EmulatorRuntime, seed: int) -> None:
    with runtime.schedule(seed=seed, resident=2):
        assert planted.launch_case(runtime, "last_block:3").y[0] == 6


@pytest.mark.parametrize("seed", range(4))
def test_blocks_that_meet_see_what_their_neighbours_left(runtime: EmulatorRuntime, seed: int) -> None:
    with runtime.schedule(seed=seed):
        found = planted.launch_case(runtime, "meeting:3").y.reshape(2, 4, 32)
    np.testing.assert_array_equal(found[1], np.roll(found[0], -1, axis=0))


def test_seed_changes_the_order_of_blocks_and_threads(runtime: EmulatorRuntime) -> None:
    def order(seed: int, resident: int = 3) -> np.ndarray:
        with runtime.schedule(seed, resident):
            return np.asarray(planted.launch(runtime, "order", 32, 320, (5, 1, 1)).y).reshape(5, 32, 2)

    natural = order(0)
    assert (np.diff(natural[:, :, 0]) > 0).all()  # threads in order
    assert (natural[0, :, 1] > natural[1, :, 0].max()).all()  # block 1 runs while block 0 waits
    assert (order(0, resident=1)[0] < order(0, resident=1)[1].min()).all()
    for seed in (1, 2, 3):
        assert not np.array_equal(order(seed), natural)
        np.testing.assert_array_equal(order(seed), order(seed))
    assert not (np.diff(order(1)[:, :, 0]) > 0).all()
    assert len({tuple(order(seed, 1)[:, :, 0].min(1).argsort()) for seed in range(8)}) > 3  # orders of the blocks


def test_only_blocks_runs_no_others(runtime: EmulatorRuntime) -> None:
    with runtime.only_blocks([2]):
        y = planted.launch(runtime, "reverse", 128, 128, grid=(4, 1, 1)).y
    np.testing.assert_array_equal(np.flatnonzero(~np.isnan(y)), np.arange(64, 96))


# ---- arrays ---------------------------------------------------------------------------------------------------------


def test_arrays_keep_offsets_and_strides(runtime: EmulatorRuntime) -> None:
    base = np.arange(60, dtype=np.float64).reshape(6, 10)
    assert runtime.pointer(runtime.asarray(base)) % 256 == 0
    assert runtime.pointer(runtime.asarray(base, offset_elements=3)) % 256 == 24
    for view in (base[::-1, ::3], base.T, base[2:, 1:4], np.broadcast_to(base[0], (4, 10)), base[:0], base[0, 0]):
        copy = runtime.like(view)
        assert isinstance(copy, EmulatedArray)
        np.testing.assert_array_equal(copy, view)
        assert copy.strides == view.strides or view.size == 0


def test_results_of_numpy_are_arrays_for_kernels_too(runtime: EmulatorRuntime) -> None:
    x = runtime.asarray(np.arange(32, dtype=np.float32)) + 1
    assert type(x) is EmulatedArray
    y = runtime.empty((32,), np.float32)
    launch_on(runtime, "reverse", x, y)
    np.testing.assert_array_equal(y, np.arange(32, 0, -1))
    with pytest.raises(EmulatorError, match=r"read of 4 bytes outside.*of NumPy"):
        launch_on(runtime, "read_past_the_end", x, y)


def test_memory_goes_with_the_last_view(runtime: EmulatorRuntime) -> None:
    array = runtime.asarray(np.zeros(8, np.float32))
    address, view = runtime.pointer(array), array[2:]
    del array
    gc.collect()
    assert runtime.holds(address)
    del view
    gc.collect()
    assert not runtime.holds(address)


def test_sparse_arrays_reach_beyond_32_bits(runtime: EmulatorRuntime) -> None:
    try:
        x = runtime.sparse((2**31 + 32,), np.dtype(np.float32))
    except MemoryError as error:
        pytest.skip(str(error))
    x[2**31 :] = np.arange(32)
    y = runtime.empty((32,), np.float32)
    with runtime.only_blocks([2**26]):
        launch_on(runtime, "reverse", x, runtime.sparse(x.shape, x.dtype), blocks=2**26 + 1)
    launch_on(runtime, "reverse", x[2**31 :], y)
    np.testing.assert_array_equal(y, np.arange(32)[::-1])


# ---- the sanitizers, each in a process of its own -------------------------------------------------------------------


def sanitized(build: str, *cases: str) -> tuple[int, dict[str, str], str]:
    """Run cases of planted.cu; return the exit status, what became of each, and the reports."""
    try:
        sanitizers.library(build)
    except EmulatorError as error:
        pytest.skip(str(error))
    command = [sys.executable, "-m", "tools.emulator", "run", build, "--module", "tools.emulator.planted", "--", *cases]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    return run.returncode, dict(line.split(": ", 1) for line in run.stdout.splitlines()), run.stderr


CORRECT = ("reverse", "copy_vectors", "shuffles:8", "last_block:3", "meeting:3", "warp_exchange:1", "order", "where")


@pytest.mark.slow
@pytest.mark.parametrize("build", ["asan", "tsan"])
def test_sanitizers_have_nothing_against_correct_kernels(build: str) -> None:
    status, outcome, reports = sanitized(build, *CORRECT)
    assert (status, reports) == (0, "")
    assert outcome == dict.fromkeys(CORRECT, "not noticed")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "report"),
    [
        ("read_past_the_end", "heap-buffer-overflow"),
        ("write_before_the_start", "heap-buffer-overflow"),
        ("shared_past_the_end", "heap-buffer-overflow"),
        ("misaligned_vector", "misaligned address"),
        ("narrow_index:1073741824", "signed integer overflow"),
    ],
)
def test_address_and_undefined_behaviour_sanitizers_report(case: str, report: str) -> None:
    status, _, reports = sanitized("asan", case)
    assert status != 0
    assert report in reports
    assert "cuda/planted.cu" in reports


@pytest.mark.slow
def test_thread_sanitizer_reports() -> None:
    half_done = *(f"last_block:{i}" for i in (0, 1, 2, 4)), *(f"meeting:{i}" for i in (0, 1, 2))
    races = ("missing_barrier", "blocks_write_the_same", "warp_exchange:0", *half_done)
    status, outcome, reports = sanitized("tsan", *races, *CORRECT)
    assert status != 0
    assert "data race" in reports
    assert {case: "data race" in text for case, text in outcome.items()} == {
        **dict.fromkeys(races, True),
        **dict.fromkeys(CORRECT, False),
    }


# ---- mutants and coverage -------------------------------------------------------------------------------------------


def test_every_mutant_fits_the_kernels_of_today() -> None:
    originals = read_sources()
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 15
    for mutant in MUTANTS:
        assert mutant.sources(originals) != originals


def test_mutant_of_a_text_that_is_not_there_once_is_refused() -> None:
    sources = {"a.cu": "x = 1; x = 2;"}
    assert Mutant("a", "a.cu", "x = 1", "x = 3").sources(sources) == {"a.cu": "x = 3; x = 2;"}
    for absent in ("x =", "y = 1"):
        with pytest.raises(EmulatorError, match="expected once in"):
            Mutant("a", "a.cu", absent, "").sources(sources)


@pytest.mark.parametrize(
    ("executed", "reason", "status"),
    [(True, None, 0), (False, None, 1), (False, "cannot happen", 0), (True, "cannot happen", 1)],
)
def test_coverage_wants_every_line_executed_or_excused(
    capsys: pytest.CaptureFixture[str], executed: bool, reason: str | None, status: int
) -> None:
    excused, texts = "lib/numbers/pair.cuh", read_sources()
    lines = {file: {1: True, 2: executed or file != excused} for file in texts}
    reasons = {} if reason is None else {(excused, texts[excused].splitlines()[1].strip()): reason}
    assert coverage.report(lines, reasons) == status
    assert ("NEVER EXECUTED" in capsys.readouterr().out) == (not executed and reason is None)


def test_coverage_wants_every_file_executed(capsys: pytest.CaptureFixture[str]) -> None:
    assert coverage.report({}, {}) == 1
    assert "cuda/lib/numbers/pair.cuh: not executed at all" in capsys.readouterr().out
