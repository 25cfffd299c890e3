"""The machine that runs PTX, on tiny kernels whose results and counts are known, and our kernels on it."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest

import bnkernels as bn
from bnkernels.nn.mlp import MLP
from tests.ptx import PtxArray, PtxError, PtxRuntime, kind_of, registered
from tests.ptx.tiny import compute, ints
from tools import oracle
from tools.emulator import EmulatorRuntime

# ---- control --------------------------------------------------------------------------------------------------------

LOOP = """
    mov.u32 %out, 0;
$L_loop:
    add.s32 %out, %out, 5;
    setp.lt.s32 %p1, %out, %a;
    @%p1 bra $L_loop;
    add.s32 %out, %out, 1000;
"""


def test_lanes_leave_a_loop_when_they_are_done_and_go_on_together() -> None:
    limits = np.arange(64, dtype=np.int32)
    found, counts = compute(LOOP, limits)
    np.testing.assert_array_equal(found, 1000 + 5 * np.maximum(1, -(-limits // 5)))
    _, once = compute(LOOP, np.zeros(64, np.int32))
    # A warp as often as its slowest lane: limits of 31 and 63 take 7 and 13 rounds of 3 instructions, not 1 and 1.
    assert (counts - once).total == (7 + 13 - 2) * 3
    assert (counts - once).by_kind["control"] == 7 + 13 - 2


def test_both_sides_of_a_branch_are_executed_by_who_takes_them() -> None:
    body = """
        setp.gt.u32 %p1, %a, 15;
        @!%p1 bra $L_else;
        mul.lo.s32 %out, %a, 3;
        bra.uni $L_end;
    $L_else:
        sub.s32 %out, 0, %a;
    $L_end:
    """
    a = np.arange(32)
    np.testing.assert_array_equal(compute(body, a.astype("u4"), out="i4")[0], np.where(a > 15, 3 * a, -a))
    uniform, divergent = (compute(body, ints(*numbers))[1] for numbers in ([20] * 32, range(32)))
    assert (divergent - uniform).total == 1


@pytest.mark.parametrize("guard", ["@%p1", "@!%p1"])
def test_a_guarded_instruction_changes_only_whom_it_is_for_and_counts_once(guard: str) -> None:
    body = f"mov.u32 %out, 7; setp.lt.s32 %p1, %a, 0; {guard} mov.u32 %out, 8;"
    a = np.array([-1, 0, 1, -5], np.int32)
    found, counts = compute(body, a)
    np.testing.assert_array_equal(found, np.where((a < 0) == (guard == "@%p1"), 8, 7))
    assert counts == compute(body, np.abs(a))[1]


def test_a_barrier_lets_every_warp_see_what_the_others_wrote() -> None:
    body = """
        shl.b32 %r3, %tid, 2;
        mov.u32 %r4, fixed;
        add.s32 %r5, %r4, %r3;
        setp.lt.u32 %p1, %tid, 32;
        @%p1 bra $L_late;
        st.shared.u32 [%r5], %a;
        bra.uni $L_meet;
    $L_late:
        st.shared.u32 [%r5], %a;
    $L_meet:
        bar.sync 0;
        sub.s32 %r6, 384, %r3;
        ld.shared.u32 %out, [%r6+-4];
    """
    a = np.arange(96, dtype=np.uint32)
    found, counts = compute(body, a)
    np.testing.assert_array_equal(found, a[::-1])
    assert (counts.by_kind["barrier"], counts.by_kind["shared"]) == (3, 6)


def test_blocks_of_a_cooperative_launch_wait_for_one_another() -> None:
    body = """
        ld.param.u64 %rd1, [p+16];
        atom.global.add.u32 %r3, [%rd1], %a;
    $L_wait:
        ld.volatile.global.u32 %out, [%rd1];
        setp.lt.u32 %p1, %out, 6;
        @%p1 bra $L_wait;
    """
    assert compute(body, ints(1, 1, 1, 1, 1, 1), np.zeros(6, "u4"), blocks=3, cooperative=True)[0].tolist() == [6] * 6
    with pytest.raises(PtxError, match=r"k: deadlock: .* 6 for others"):
        compute(body, ints(1, 1, 1, 1, 1, 0), np.zeros(6, "u4"), blocks=3, cooperative=True)


def test_blocks_that_are_independent_run_some_at_a_time() -> None:
    a = np.arange(9 * 1000, dtype=np.int32)
    found, counts = compute("mul.lo.s32 %out, %a, 3;", a, blocks=9)
    np.testing.assert_array_equal(found, 3 * a)
    assert counts.total == 9 * compute("mul.lo.s32 %out, %a, 3;", a[:1000])[1].total


def test_threads_that_wait_for_each_other_are_a_deadlock() -> None:
    split = "setp.lt.u32 %p1, %tid, 16; @%p1 bra $L_other; {one} bra $L_end; $L_other: {other} $L_end: mov.u32 %out, 0;"
    with pytest.raises(PtxError, match="k: deadlock: 16 threads wait at a barrier, 16 for others of their warp"):
        compute(split.format(one="bar.warp.sync -1;", other="bar.sync 0;"), threads=32)
    compute(split.format(one="bar.warp.sync 0xffff0000;", other="bar.warp.sync 65535;"), threads=32)
    with pytest.raises(PtxError, match="not in its own mask"):
        compute("bar.warp.sync 1; mov.u32 %out, 0;", threads=32)


# ---- shuffles -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("way", "places", "clamp", "source"),
    [
        ("bfly", 5, 0x1F, lambda lane: lane ^ 5),
        ("bfly", 8, 0x181F, lambda lane: lane ^ 8 if lane & 8 else lane),  # segments of 8: only downwards
        ("up", 3, 0, lambda lane: lane - 3 if lane >= 3 else lane),
        ("down", 2, 0x1C1F, lambda lane: lane + 2 if lane % 4 < 2 else lane),  # segments of 4
        ("idx", 6, 0x181F, lambda lane: lane // 8 * 8 + 6),
    ],
)
def test_a_shuffle_takes_the_value_of_the_lane_it_names(way: str, places: int, clamp: int, source: Any) -> None:
    body = f"shfl.sync.{way}.b32 %out|%p1, %a, {places}, {clamp}, -1;"
    a = 100 + np.arange(64, dtype=np.uint32)
    wanted = [100 + lane // 32 * 32 + source(lane % 32) for lane in range(64)]
    assert compute(body, a)[0].tolist() == wanted


def test_lanes_that_have_parted_meet_for_a_shuffle() -> None:
    body = LOOP + "shfl.sync.bfly.b32 %out, %out, 1, 31, -1;"
    limits = np.arange(32)
    plain = 1000 + 5 * np.maximum(1, -(-limits // 5))
    np.testing.assert_array_equal(compute(body, limits.astype("i4"))[0], plain.reshape(-1, 2)[:, ::-1].reshape(-1))


def test_a_shuffle_from_who_takes_no_part_is_reported() -> None:
    body = "setp.eq.u32 %p1, %tid, 3; @%p1 bra $L; shfl.sync.bfly.b32 %out, %a, 1, 31, 0xfffffff7; $L: mov.u32 %r1, 0;"
    with pytest.raises(PtxError, match=r"shfl.* from a lane that takes no part"):
        compute(body, np.arange(32, dtype="u4"))


# ---- what must be refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "report"),
    [
        (
            "ld.param.u64 %rd1, [p+8]; ld.global.u32 %out, [%rd1+8];",
            "k: ld.global.u32 .* 4 bytes at 0x.* outside of all",
        ),
        (
            "ld.param.u64 %rd1, [p+8]; st.global.u32 [%rd1+-4], %a;",
            "k: st.global.u32 .* 4 bytes at 0x.* outside of all",
        ),
        ("ld.param.u64 %rd1, [p+8]; ld.global.v2.u32 {%r1, %r2}, [%rd1+4];", "8 bytes at the misaligned address"),
        ("mov.u32 %r1, dynamic; ld.shared.u32 %out, [%r1+16];", r"k: ld.shared.u32 .* 4 bytes at 528 of 528"),
        ("ld.shared.u32 %out, [fixed+2];", "k: ld.shared.u32 .* 4 bytes at the misaligned address 0x2"),
        ("ld.param.u32 %out, [p+40];", "4 bytes at 40 of 40"),
        ("dp4a.u32.u32 %out, %a, %a, %a;", r"not supported: dp4a.u32.u32 %out, %a, %a, %a;"),
        ("add.cc.u32 %out, %a, %a;", r"not supported: add.cc.u32 %out, %a, %a;"),
        ("@%p1 add.rz.f32 %f1, %f2, %f2;", r"not supported: @%p1 add.rz.f32"),
        ("add.u32 %wide, %nowhere, %a;", r"not supported: add.u32 %wide, %nowhere, %a;"),
        ("bar.sync 1, 32;", r"not supported: bar.sync 1, 32;"),
        ("bra $L_nowhere;", "no label for bra"),
        (".local .align 4 .b8 depot[8];", "cannot read '.local"),
    ],
)
def test_what_a_gpu_or_the_machine_cannot_do_is_refused(body: str, report: str) -> None:
    with pytest.raises(PtxError, match=report):
        compute(body, ints(1, 2), shared=16)


@pytest.mark.parametrize(
    ("opcode", "kind"),
    [
        *(("fma.rn.ftz.f32", "float"), ("add.s64", "integer"), ("and.b32", "integer"), ("and.pred", "other")),
        *(
            ("div.rn.ftz.f32", "special"),
            ("rem.s32", "special"),
            ("ld.shared.v4.f32", "shared"),
            ("bra.uni", "control"),
        ),
        *(("ld.volatile.global.u32", "global"), ("ld.param.u64", "other"), ("atom.global.add.u32", "global")),
        *(
            ("shfl.sync.bfly.b32", "shuffle"),
            ("bar.sync", "barrier"),
            ("membar.gl", "barrier"),
            ("mov.u32", "move"),
            ("selp.b32", "other"),
        ),
    ],
)
def test_kinds_of_instructions(opcode: str, kind: str) -> None:
    assert kind_of(opcode) == kind


# ---- our kernels ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ptx(nvrtc: ModuleType) -> PtxRuntime:
    return registered()


@pytest.mark.parametrize("shape", [(64, 20), (7, 3), (300, 2)])
def test_batch_norm_is_right_within_its_bounds(
    ptx: PtxRuntime, rng: np.random.Generator, shape: tuple[int, int]
) -> None:
    x, dy = (rng.standard_normal(shape).astype(np.float32) for _ in range(2))
    gamma, beta = (rng.uniform(0.5, 1.5, shape[1]).astype(np.float32) for _ in range(2))
    on_x, on_dy, on_gamma, on_beta = map(ptx.asarray, (x, dy, gamma, beta))
    ptx.reset()
    y, statistics = bn.batch_norm_forward(on_x, on_gamma, on_beta, activation="tanh")
    dx, dgamma, dbeta = bn.batch_norm_backward(on_dy, on_x, on_gamma, on_beta, statistics, activation="tanh")
    assert all("_f32" in record.entry_point and record.counts.total for record in ptx.launches)
    exact = oracle.forward(x, gamma, beta, 1e-5, "tanh")
    oracle.assert_within(np.asarray(y), exact.y, exact.z_bound, "y")
    right = oracle.backward(dy, x, gamma, beta, 1e-5, "tanh")
    oracle.assert_within(np.asarray(dx), right.dx, right.dx_bound, "dx")
    oracle.assert_within(np.asarray(dgamma), right.dgamma, right.dgamma_bound, "dgamma")
    oracle.assert_within(np.asarray(dbeta), right.dbeta, right.dbeta_bound, "dbeta")


# Not among the tests of the emulator, which also run under sanitizers: NVRTC cannot.
@pytest.mark.parametrize("norm", ["batch", "layer", None])
def test_linear_layers_are_those_of_the_emulator_bit_by_bit(
    ptx: PtxRuntime, emulated: EmulatorRuntime, rng: np.random.Generator, norm: str | None
) -> None:
    """The forward, and the backward of many blocks that meet, with one rounding for all that fma is written for."""
    shapes = (64, 64), (64, 20), (20,), (20,), (64, 20)
    given = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    given[2] = given[2] if norm else None
    results = []
    with emulated.device_limits(ptx.limits(given[0])):
        for runtime in (ptx, emulated):
            x, weight, gamma, beta, dy = (None if array is None else runtime.asarray(array) for array in given)
            how = {"norm": norm, "activation": "relu"}
            y, z, statistics = bn.linear_batch_norm_forward(x, weight, gamma, beta, **how)
            gradients = bn.linear_batch_norm_backward(dy, x, weight, gamma, beta, z, statistics, **how)
            results.append([y, z, statistics, *gradients])
    assert ptx.launches[-1].launch.cooperative
    for ours, theirs in zip(*results, strict=True):
        if ours is not None:
            assert np.isfinite(ours).all()
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("norm", ["batch", "none"])
def test_steps_of_the_fused_trainer_are_those_of_numpy(ptx: PtxRuntime, rng: np.random.Generator, norm: str) -> None:
    model = MLP((64, 20, 10), norm=norm, seed=3)
    x, labels = rng.standard_normal((128, 64)).astype(np.float32), rng.integers(0, 10, 128).astype(np.int32)
    found = []
    for asarray in (np.array, ptx.asarray):
        parameters, running = asarray(model.parameters), asarray(model.running)
        given = (model.fused, parameters, (), running if running.size else None, asarray(x), asarray(labels))
        found.append((bn.fused_training(*given, batch=64, lr=0.1), parameters, running))
    for wanted, got in zip(*found, strict=True):
        assert isinstance(got, PtxArray)
        # Numbers of about 1 at most, after sums of 64 terms twice: a few roundings of 2^-24.
        np.testing.assert_allclose(got, wanted, rtol=8 * 2**-24, atol=8 * 2**-24)
    assert np.abs(found[1][1] - model.parameters).max() > 1e-3, "something has been learnt"


def test_memory_that_numpy_has_freed_may_not_be_touched(ptx: PtxRuntime) -> None:
    array = ptx.empty((4,), np.dtype("f4"))
    assert np.isnan(array).all()
    address = ptx.pointer(array[1:])
    assert address == array.ctypes.data + 4
    assert ptx.holds(address)
    del array
    assert not ptx.holds(address)
