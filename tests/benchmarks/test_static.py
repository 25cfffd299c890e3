"""The static report: limits against hand-computed values, counts against fresh ones, every case in its place."""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from benchmarks.counts import counting, limits, static
from benchmarks.counts.devices import A100, B200, DEVICES, H200, SM_75, SM_80, SM_90, SM_100, SM_120, Architecture
from benchmarks.counts.limits import Work
from benchmarks.harness.case import Case, NotSupportedError
from tools.compile import nvrtc
from tools.emulator import EmulatorRuntime

SMALL = 2**15  # elements: such cases are counted anew by every run of the tests


@pytest.fixture(scope="module")
def committed() -> dict[str, Any]:
    return json.loads(static.PATH.read_text(encoding="utf-8"))


@pytest.fixture
def counting_build(emulated: EmulatorRuntime) -> EmulatorRuntime:
    if emulated.build not in ("plain", "coverage"):
        pytest.skip(f"the build {emulated.build!r} does not count accesses")
    return emulated


# ---- limits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "threads", "registers", "shared", "blocks", "bound"),
    [
        # 38 x 32 = 1216 -> 1280 registers a warp; 12 warps in each of 4 partitions of 16384; 48 / 16 warps a block
        (SM_90, 512, 38, 6144, 3, "registers"),
        # 92 x 32 = 2944 -> 3072; 16384 / 3072 = 5; 20 / 16. 21 / 16 without partitions is one, too.
        (SM_80, 512, 92, 6144, 1, "registers"),
        # 168 x 32 = 5376; 16384 / 5376 = 3; 12 / 4 warps: 97 threads take a fourth warp
        (SM_90, 97, 168, 0, 3, "registers"),
        # 65 x 32 = 2080 -> 2304; 2304 x 32 warps > 65536: not even one block
        (SM_100, 1024, 65, 0, 0, "registers"),
        # 64 x 32 = 2048; 16384 / 2048 = 8; 32 / 32 warps: exactly one
        (SM_100, 1024, 64, 0, 1, "registers"),
        # 200 x 32 = 6400; two in each partition; 8 / 5 warps. Without partitions it would be 10 / 5.
        (SM_90, 160, 200, 0, 1, "registers"),
        # 100 KiB + 1 KiB of the system's; 228 / 101
        (SM_90, 64, 16, 100 * 1024, 2, "shared memory"),
        # 16384 + 1024 = 17408 bytes; 102400 / 17408 = 5.9
        (SM_120, 64, 16, 16384, 5, "shared memory"),
        # 1 + 1024 bytes -> 1152, not 1025; 102400 / 1152 = 88: no bound, that is the 24 blocks
        (SM_120, 32, 16, 1, 24, "blocks"),
        (SM_80, 32, 16, 0, 32, "blocks"),
        (SM_75, 64, 16, 32 * 1024, 2, "shared memory"),  # none is the system's
        (SM_75, 64, 16, 9344, 6, "shared memory"),  # in units of 256: 65536 / 9472
        (SM_75, 32, 16, 0, 16, "blocks"),
        (SM_80, 256, 32, 0, 8, "warps"),  # 64 / 8
        (SM_120, 256, 32, 0, 6, "warps"),  # 48 / 8
        (SM_120, 1024, 0, 0, 1, "warps"),  # 48 / 32
    ],
)
def test_occupancy_is_that_of_the_rules(
    architecture: Architecture, threads: int, registers: int, shared: int, blocks: int, bound: str
) -> None:
    found = limits.occupancy(architecture, threads, registers, shared)
    warps = blocks * -(-threads // 32)
    assert found == (blocks, warps, warps / architecture.warps, bound)


def test_a_block_may_have_all_shared_memory_but_the_reserved() -> None:
    most = SM_90.shared_bytes - SM_90.reserved_bytes
    assert limits.occupancy(SM_90, 32, 16, most).blocks == 1
    assert limits.occupancy(SM_90, 32, 16, most + 1) == (0, 0, 0.0, "shared memory")


@pytest.mark.parametrize("launch", [(0, 32, 0), (1025, 32, 0), (32, 256, 0), (32, -1, 0), (32, 32, -1)])
def test_what_no_kernel_has_is_refused(launch: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="expected 1 to 1024 threads"):
        limits.occupancy(SM_90, *launch)


def test_waves_and_work_for_the_sms() -> None:
    assert limits.waves(H200, blocks=264, resident=2) == 1
    assert limits.waves(H200, blocks=33, resident=1) == 0.25
    assert [limits.busy_sms(H200, blocks) for blocks in (1, 132, 133)] == [1, 132, 132]


@pytest.mark.parametrize(
    ("work", "cold", "bound", "seconds"),
    [
        (Work(1, 1000, 1000, 1), True, "launch", 1.1e-6),
        (Work(132, 480_000_000, 480_000_000, 1), True, "DRAM", 1e-4),  # at 4.8e12 bytes a second
        (Work(132, 48_000_000, 48_000_000, 1), True, "DRAM", 1e-5),
        (Work(132, 33_454_080, 33_454_080, 1), False, "launch", 1.1e-6),  # fits in L2: 1e-6 s through 132 SMs
        (Work(132, 480_000_000, 480_000_000, 1), False, "DRAM", 1e-4),  # does not
        (Work(1, 1000, 2_534_400, 0), True, "SMs", 1e-5),  # 128 bytes a clock of 1.98e9 Hz
        (Work(66, 1000, 66 * 2_534_400, 0), True, "SMs", 1e-5),
        (Work(1, 1000, 1000, 100), True, "latency", (263 + 2900) / 1.98e9),
    ],
)
def test_the_greatest_limit_binds(work: Work, cold: bool, bound: str, seconds: float) -> None:
    found = limits.predict(H200, work, cold=cold)
    assert found.bound == bound
    assert found.seconds == pytest.approx(seconds, rel=1e-12)


def test_without_a_published_launch_floor_nothing_is_predicted() -> None:
    for device in DEVICES:
        known = device.launch_floor is not None
        assert (limits.predict(device, Work(1, 1, 1, 0), cold=True) is not None) == known
        assert (limits.best_possible(device, 1) is not None) == known
    assert A100.launch_floor is None
    assert B200.launch_floor is None


def test_nothing_undercuts_the_launch_or_the_fewest_bytes() -> None:
    assert limits.best_possible(H200, 100) == 1.1e-6
    assert limits.best_possible(H200, 480_000_000) == pytest.approx(1e-4)


# ---- counting -------------------------------------------------------------------------------------------------------


@pytest.mark.emulator
@pytest.mark.parametrize("shape", [(64, 128), (130, 126), (70, 100)], ids=str)
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("op", ["batch_norm", "batch_norm_inference"])
def test_two_slices_scaled_are_the_whole(
    counting_build: EmulatorRuntime, op: str, direction: str, shape: tuple[int, int]
) -> None:
    case = Case(op, direction, shape)
    found = counting.fewer_slices(case)
    assert found is not None
    counts, where = counting.counted_by_slices(case, *found)
    assert where == f"{shape[0]}x{shape[1] // 2}, times 2"
    assert counts == counting.counted_in_full(case)


@pytest.mark.emulator
@pytest.mark.parametrize(
    ("direction", "shape", "sms", "times"),
    [
        ("forward", (6000, 256), 4, 8),
        ("backward", (6000, 256), 4, 2),
        ("forward", (4000, 160), 6, Fraction(5, 2)),  # two slices of each group, as the next one is copied ahead
    ],
)
def test_a_slice_of_each_group_scaled_is_the_whole(
    counting_build: EmulatorRuntime,
    monkeypatch: pytest.MonkeyPatch,
    direction: str,
    shape: tuple[int, int],
    sms: int,
    times: Fraction,
) -> None:
    """But for what the blocks exchange, whose memory all slices share: each byte counted once, that is no more."""
    monkeypatch.setattr(counting, "DEVICE", replace(H200, sms=sms))
    case = Case("batch_norm", direction, shape)
    small, found = counting.fewer_slices(case)
    assert found == times
    ((count,), _), (whole,) = counting.counted_by_slices(case, small, times), counting.counted_in_full(case)
    assert whole.launch.cooperative
    scaled = count._replace(barriers=whole.barriers, read=whole.read, written=whole.written)
    assert scaled == whole
    assert whole.read <= count.read <= 1.02 * whole.read
    assert whole.written <= count.written <= 1.02 * whole.written


@pytest.mark.parametrize("shape", [(64, 20), (64, 96), (64, 97)], ids=str)
def test_what_does_not_repeat_is_not_scaled(shape: tuple[int, int]) -> None:
    assert counting.fewer_slices(Case("batch_norm", "forward", shape)) is None


@pytest.mark.parametrize("shape", [(64, 20), (64, 128)], ids=["one slice", "two slices"])
def test_what_is_too_large_even_in_slices_is_not_counted(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int]
) -> None:
    monkeypatch.setattr(counting, "WHOLE", 100)
    monkeypatch.setattr(static, "MOST", 100)
    (row,) = static.rows([Case("batch_norm", "forward", shape)])
    assert row["status"].startswith("not counted: too large for the emulator")
    assert "kernel" not in row


@pytest.mark.emulator
@pytest.mark.parametrize("case", [case for case in counting.EXTRA if case.size <= SMALL], ids=str)
def test_planned_launches_are_those_that_run(counting_build: EmulatorRuntime, case: Case) -> None:
    ran = [(count.source, count.kernel, count.launch) for count in counting.counted_in_full(case)]
    assert counting.planned(case) == ran


def test_planning_takes_no_memory_and_no_time() -> None:
    ((_, kernel, launch),) = counting.planned(Case("batch_norm", "backward", (65_536, 4096)))
    assert kernel == "bnk_batch_norm_backward_cooperative_f32"
    assert launch.grid == (1, 256, 1)


@pytest.mark.parametrize(
    ("case", "arrays"),
    [
        (Case("batch_norm", "forward", (64, 20)), 2),
        (Case("batch_norm", "backward", (64, 20)), 3),
        (Case("batch_norm", "forward", (64, 20), epilogue="add_relu"), 3),
        (Case("batch_norm_inference", "forward", (64, 20)), 2),
        (Case("batch_norm_inference", "backward", (64, 20)), 3),
        (Case("sgd_update", "", (1280,)), 3),
        (Case("momentum_update", "", (1280,)), 5),
        (Case("adam_update", "", (1280,)), 7),
    ],
    ids=str,
)
def test_the_fewest_bytes_are_the_data_in_and_out(case: Case, arrays: int) -> None:
    assert counting.fewest_bytes(case) == arrays * 64 * 20 * 4


def test_the_fewest_bytes_of_the_loss_are_logits_labels_losses_and_gradients() -> None:
    assert counting.fewest_bytes(Case("softmax_cross_entropy", "", (64, 10))) == 64 * (10 * 4 + 8 + 4 + 10 * 4)


# ---- the report -----------------------------------------------------------------------------------------------------


def test_every_case_has_a_row(committed: dict[str, Any]) -> None:
    found = [{name: row[name] for name in static.describe(counting.CASES[0])} for row in committed["rows"]]
    assert [row for i, row in enumerate(found) if row not in found[:i]] == list(map(static.describe, counting.CASES))


@pytest.mark.emulator
def test_the_committed_rows_are_those_of_these_kernels(
    counting_build: EmulatorRuntime, committed: dict[str, Any]
) -> None:
    small = [case for case in counting.CASES if case.size <= SMALL and case.dtype == "float32"]
    names = list(map(static.describe, small))
    kept = [row for row in committed["rows"] if {name: row[name] for name in names[0]} in names]
    assert static.rows(small) == kept, "run python -m benchmarks.counts.static"
    assert committed["predicted_for"] == static.PREDICTED.name
    assert committed["nvrtc"] == nvrtc.NEWEST


def test_what_the_op_refuses_is_what_the_committed_rows_say(committed: dict[str, Any]) -> None:
    waits = {}
    for case in counting.CASES:
        try:
            counting.planned(replace(case, shape=tuple(min(size, 3) for size in case.shape)))
            waits[str(static.describe(case))] = False
        except NotSupportedError as reason:
            if "ml_dtypes" not in str(reason):
                waits[str(static.describe(case))] = True
    assert waits
    names = static.describe(counting.CASES[0])
    for row in committed["rows"]:
        found = row["status"] == static.WAITING
        assert waits.get(str({name: row[name] for name in names}), found) == found, (
            "run python -m benchmarks.counts.static"
        )


def test_no_prediction_undercuts_its_limits(committed: dict[str, Any]) -> None:
    shown = [row for row in committed["rows"] if row["status"] == static.COUNTED]
    assert shown
    rounding = 1 - 5e-4  # to four digits
    for row in shown:
        seconds = (row["read"] + row["written"]) / static.PREDICTED.dram
        assert row["predicted_cold_us"] >= 1e6 * seconds * rounding
        assert row["predicted_cold_us"] >= row["best_possible_us"] * rounding
        assert row["predicted_cold_us"] >= row["predicted_hot_us"] >= 1e6 * static.PREDICTED.launch_floor
        assert row["read"] + row["written"] >= row["fewest_bytes"]
        assert row["accessed_read"] >= row["read"]
        assert row["accessed_written"] >= row["written"]


def row(**changes: Any) -> dict[str, Any]:
    """Return a row as it might have been counted, of a case that does not exist."""
    case = Case("batch_norm", "forward", (64, 33))
    launch = counting.Launch((2, 1, 1), (32, 16, 1), 6144)
    count = counting.Count("batch_norm_forward", "bnk", launch, 1, 9000, 8500, 18_000, 8500, 8448, 8448)
    registers = {"80": 32, "90": 38, "100": 64, "120": 128}
    about = static.describe(case) | {"status": static.COUNTED, "counted_on": "64x33", "launches": 1}
    return about | static.row_of(case, count, registers) | changes


def lines_of(*rows: dict[str, Any]) -> list[str]:
    return static.table(static.document_of(list(rows))).splitlines()


def test_the_table_shows_a_launch_and_says_that_times_are_predicted() -> None:
    header, _, line, _, note = lines_of(row())
    assert line == (
        "| `batch_norm` forward 64 x 33 float32 | 2 of 32 x 16 | 6,144 | 9,000 (18,000) | 8,500 | 1.57 | 1 | 1 | "
        "32 / 38 / 64 / 128 | 100 / 75 / 50 / 33 | 2 of 132 | 1.1 (1.1) | launch | 1.1 |"
    )
    assert header.count("|") == line.count("|")
    assert "predicted, not measured" in note
    assert "H200" in note


@pytest.mark.parametrize(
    ("rows", "names"),
    [
        ([row(), row(epilogue="relu")], ["`batch_norm` forward 64 x 33 float32, then nothing or relu"]),
        (
            [row(), row(epilogue="relu", barriers=2)],
            ["`batch_norm` forward 64 x 33 float32", "`batch_norm` forward 64 x 33 float32, then relu"],
        ),
        (
            [row(launches=2, kernel="first"), row(launches=2, kernel="second")],
            ["`batch_norm` forward 64 x 33 float32 (first)", "`batch_norm` forward 64 x 33 float32 (second)"],
        ),
        ([row(layout="NCHW", shape="2x3x4x5")], ["`batch_norm` forward 2 x 3 x 4 x 5 float32 NCHW"]),
    ],
    ids=["same", "different", "launches", "layout"],
)
def test_lines_of_the_table_are_told_apart(rows: list[dict[str, Any]], names: list[str]) -> None:
    lines = lines_of(*rows)[2:]
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines[: len(names)]] == names
    assert lines[len(names)] == ""


def test_the_table_says_what_was_counted_on_a_part() -> None:
    assert "others do the same: 64x33 on 64x3, times 11." in lines_of(row(counted_on="64x3, times 11"))[-1]


def test_the_table_lists_what_waits() -> None:
    def waiting(**changes: str) -> dict[str, Any]:
        case = Case("batch_norm", "forward", (64, 33), "float16")
        return static.describe(case) | {"status": static.WAITING} | changes

    *_, first, second = lines_of(
        row(),
        waiting(),
        waiting(direction="backward", epilogue="relu"),
        waiting(shape="1x2"),
        waiting(shape="3x4", direction="forward"),
    )
    assert first == "* not supported yet: `batch_norm` float16 NC 64x33 (forward, backward +relu)"
    assert second == "* not supported yet: `batch_norm` float16 NC 1x2, 3x4 (forward)"


def test_planned_arrays_are_of_the_asked_type() -> None:
    array = counting.planner().asarray(np.broadcast_to(np.float32(1), (3, 4)))
    assert (type(array), array.shape, array.dtype) == (counting.Planned, (3, 4), np.float32)
    assert array.flags.c_contiguous
