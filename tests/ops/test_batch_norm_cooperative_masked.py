"""Masks in the cooperative batch-norm kernels: the rows that they leave are kept side by side, the others not read."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import bnkernels as bn
from bnkernels.ops.batch_norm.launch import choose, elements_of_access
from bnkernels.ops.batch_norm.problem import BACKWARD, FORWARD, Problem
from bnkernels.runtime.arguments import accumulator
from bnkernels.runtime.seam import Limits
from tests.ops.test_batch_norm_cooperative import DTYPES, KIB, PIPELINED, TINY, as_matrix, kernels, tiny
from tests.ops.test_batch_norm_cooperative_groups import WIDE, assert_same_bits, both, groups_of
from tools import backends, oracle
from tools.backends import Backend
from tools.emulator import EmulatorRuntime

F32, F16, BF16, F64 = *DTYPES, np.dtype("float64")
# Limits, groups and their shape (outer, C, inner), data type: one block and several, slices in turn and a pipeline of
# them, rows that do not fit, groups between columns, and along inner; vectors, pairs, and single elements.
CASES: list[tuple[Limits, int, tuple[int, int, int], np.dtype]] = [
    (WIDE, 1, (700, 64, 1), F32),
    (TINY, 1, (1111, 48, 1), BF16),
    (TINY, 1, (6000, 8, 1), F32),
    (PIPELINED, 1, (2200, 264, 1), F16),
    (PIPELINED, 5, (2200, 40, 1), F32),
    (PIPELINED, 8, (3000, 8, 1), F32),
    (WIDE, 40, (300, 48, 1), F32),
    (WIDE, 3, (50, 9, 512), F32),
    (TINY, 1, (40, 3, 1024), F16),
    (TINY, 2, (5000, 17, 1), F32),
    (Limits(8, 64 * KIB, 66 * KIB, cooperative=True), 1, (3800, 33, 1), F32),
    (TINY, 1, (300, 6, 49), BF16),
    (TINY, 1, (17000, 2, 1), F16),
    (TINY, 2, (900, 52, 1), F64),
]
MASKS = ["some", "few", "tail", "head"]


def mask_of(rng: np.random.Generator, kind: str, groups: int, outer: int) -> np.ndarray:
    """Return a mask: rows drawn, very few of them, none behind a length, or none before a start of each group."""
    if kind in ("some", "few"):
        mask = rng.random((groups, outer)) < (0.6 if kind == "some" else 5 / outer)
        mask[:, outer // 3] = mask[:, -2] = True
        return mask
    lengths = rng.integers(2, outer // 2, (groups, 1))
    rows = np.arange(outer)
    return rows < lengths if kind == "tail" else rows >= outer - lengths


def spoiled(arrays: tuple[np.ndarray, ...], mask: np.ndarray) -> list[np.ndarray]:
    """Return copies that have NaN where the mask is False."""
    return [np.where(mask[:, :, None, None], array, np.array(np.nan, array.dtype)) for array in arrays]


def check_against_oracle(
    backend: Backend, rng: np.random.Generator, groups: int, shape: Any, dtype: np.dtype, kind: str, add: bool
) -> None:
    """Run forward and backward on data that are NaN elsewhere, and compare the valid rows of every group."""
    x, gamma, beta, dy, residual = groups_of(rng, groups, shape, dtype)
    mask = mask_of(rng, kind, groups, shape[0])
    acc, u = accumulator(dtype), oracle.unit_roundoff(accumulator(dtype))
    gamma, beta = gamma.astype(acc), beta.astype(acc)
    running = [np.full((groups, shape[1]), start, acc) for start in (0.5, 2.0)]
    on_x, on_dy, on_residual = backend.arrays(*spoiled((x, dy, residual), mask))
    on = backend.arrays(gamma, beta, *running)
    given = {"mask": backend.asarray(mask), "activation": "silu", "grouped": True}
    given |= {"residual": on_residual} if add else {}
    y, statistics = bn.batch_norm_forward(on_x, *on, momentum=0.25, **given)
    dx, dgamma, dbeta, *dresidual = bn.batch_norm_backward(on_dy, on_x, *on[:2], statistics, **given)
    outputs = [backend.asnumpy(array) for array in (y, dx, *dresidual)]
    statistics, mean, var = map(backend.asnumpy, (statistics, *on[2:]))
    exact_grads = []
    for t in range(groups):
        rows = np.repeat(mask[t], shape[2])
        valid = [as_matrix(array[t])[rows] for array in (x, dy, residual)]
        more = {"residual": valid[2] if add else None}
        exact = oracle.forward(valid[0], gamma, beta, 1e-5, "silu", **more)
        grad = oracle.backward(valid[1], valid[0], gamma, beta, 1e-5, "silu", **more)
        wanted = [(exact.y, exact.z_bound), (grad.dx, grad.dx_bound), (grad.dresidual, grad.dresidual_bound)]
        for got, (right, bound) in zip(outputs, wanted, strict=False):
            oracle.assert_within(as_matrix(got[t])[rows], right, bound, f"an output of group {t}")
            np.testing.assert_array_equal(as_matrix(got[t])[~rows].astype("f8"), 0)
        count = rows.sum()
        new_var = 1.5 + 0.25 * exact.var * count / (count - 1)
        oracle.assert_within(statistics[t, 2], exact.rstd, oracle.SLACK * u * exact.rstd, f"rstd of group {t}")
        oracle.assert_within(mean[t], 0.375 + 0.25 * exact.mean, 4 * u * (1 + np.abs(exact.mean)), "running_mean")
        oracle.assert_within(var[t], new_var, oracle.SLACK * u * new_var, "running_var")
        exact_grads.append(grad)
    for name, got in (("dgamma", dgamma), ("dbeta", dbeta)):
        bound = sum(getattr(grad, f"{name}_bound") for grad in exact_grads)
        oracle.assert_within(backend.asnumpy(got), sum(getattr(grad, name) for grad in exact_grads), bound, name)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1000, 32, 1), (40, 6, 512)], ids=str)
def test_all_backends_match_extended_precision(
    backend: Backend, rng: np.random.Generator, shape: tuple[int, int, int], dtype: np.dtype, kind: str
) -> None:
    check_against_oracle(backend, rng, 2, shape, dtype, kind, True)


@pytest.mark.emulator
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize(("limits", "groups", "shape", "dtype"), CASES, ids=str)
def test_valid_rows_match_extended_precision_however_blocks_share_them(
    emulated: EmulatorRuntime,
    rng: np.random.Generator,
    limits: Limits,
    groups: int,
    shape: tuple[int, int, int],
    dtype: np.dtype,
    kind: str,
) -> None:
    with tiny(emulated, 1, limits):
        check_against_oracle(backends.make("emulator"), rng, groups, shape, dtype, kind, kind in ("some", "tail"))
    assert all("_cooperative_" in name for name in kernels(emulated))


@pytest.mark.emulator
@pytest.mark.parametrize(("limits", "groups", "shape", "dtype"), CASES, ids=str)
def test_a_mask_of_all_true_changes_no_bit(
    emulated: EmulatorRuntime,
    rng: np.random.Generator,
    limits: Limits,
    groups: int,
    shape: tuple[int, int, int],
    dtype: np.dtype,
) -> None:
    x, gamma, beta, dy, residual = groups_of(rng, groups, shape, dtype)
    found = []
    for mask in (None, np.ones((groups, shape[0]), bool)):
        on_x, on_dy, on_residual = map(emulated.asarray, (x, dy, residual))
        on = [emulated.asarray(array.astype(accumulator(dtype))) for array in (gamma, beta)]
        given = {"grouped": True, "residual": on_residual, "mask": mask if mask is None else emulated.asarray(mask)}
        running = [emulated.asarray(np.ones((groups, shape[1]), accumulator(dtype))) for _ in range(2)]
        with tiny(emulated, 1, limits):
            y, statistics = bn.batch_norm_forward(on_x, *on, *running, **given)
            found.append([y, statistics, *running, *bn.batch_norm_backward(on_dy, on_x, *on, statistics, **given)])
    for one, two in zip(*found, strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.emulator
@pytest.mark.parametrize(("limits", "groups", "shape", "dtype"), CASES[1:10], ids=str)
def test_the_order_of_blocks_and_what_is_masked_change_no_bit(
    emulated: EmulatorRuntime,
    rng: np.random.Generator,
    limits: Limits,
    groups: int,
    shape: tuple[int, int, int],
    dtype: np.dtype,
) -> None:
    x, gamma, beta, dy, _ = groups_of(rng, groups, shape, dtype)
    mask, found = mask_of(rng, "some", groups, shape[0]), []
    for seed, data in enumerate(((x, dy), spoiled((x, dy), mask), (x, dy))):
        with tiny(emulated, seed, limits):
            found.append(both(emulated, *data, gamma, beta, mask))
    assert_same_bits(emulated, found)


@pytest.mark.emulator
@pytest.mark.parametrize("limits", [WIDE, TINY], ids=["one block a slice", "several"])
@pytest.mark.parametrize("valid", [0, 1])
def test_no_valid_row_gives_0_and_one_gives_beta(
    emulated: EmulatorRuntime, rng: np.random.Generator, limits: Limits, valid: int
) -> None:
    """The groups beside have all of their rows. The valid one is the last: the first blocks have none."""
    x, gamma, beta, dy, _ = groups_of(rng, 3, (1200, 16, 1), F32)
    mask = np.ones((3, 1200), bool)
    mask[1, : 1200 - valid] = False
    x[1, -1], x[1, :-1] = 1e30, np.nan
    on_x, on_mask, on_dy, *on = map(emulated.asarray, (x, mask, dy, gamma, beta))
    mean, var = (emulated.asarray(np.full((3, 16), number, "f4")) for number in (2, 3))
    with tiny(emulated, 1, limits):
        y, statistics = bn.batch_norm_forward(on_x, *on, mean, var, momentum=0.5, mask=on_mask, grouped=True)
        dx, *_ = bn.batch_norm_backward(on_dy, on_x, *on, statistics, mask=on_mask, grouped=True)
    assert all("_cooperative_" in name for name in kernels(emulated))
    np.testing.assert_array_equal(y[1, : 1200 - valid], 0)
    np.testing.assert_array_equal(dx[1], 0)
    np.testing.assert_array_equal(var[1], 3)
    assert np.isfinite(y[[0, 2]]).all()
    if valid:
        np.testing.assert_array_equal(y[1, -1, :, 0], beta)
        np.testing.assert_array_equal(mean[1], np.float32(0.5e30) + 1)
    else:
        np.testing.assert_array_equal(statistics[1], 0)
        np.testing.assert_array_equal(mean[1], 2)


@pytest.mark.emulator
@pytest.mark.parametrize("kind", ["head", "few"])
def test_blocks_and_workers_without_a_valid_row_cost_no_digits(
    emulated: EmulatorRuntime, rng: np.random.Generator, kind: str
) -> None:
    """They have no mean: distances from 0 would lose what lies beyond the seventh digit."""
    x = (1e6 + rng.standard_normal((8000, 8))).astype("f4")
    mask = mask_of(rng, kind, 1, 8000)[0] if kind == "few" else np.arange(8000) % 512 >= 500
    with tiny(emulated):
        y, _ = bn.batch_norm_forward(emulated.asarray(x), mask=emulated.asarray(mask))
    assert emulated.launches[-1].launch.cooperative
    exact = oracle.forward(x[mask], None, None, 1e-5)
    oracle.assert_within(np.asarray(y)[mask], exact.y, exact.z_bound, "y")


@pytest.mark.emulator
@pytest.mark.parametrize("limits", [WIDE, TINY], ids=["one block a slice", "several"])
def test_valid_sums_beyond_the_range_are_formed_again(
    emulated: EmulatorRuntime, rng: np.random.Generator, limits: Limits
) -> None:
    x = np.where(np.arange(1200)[:, None] % 2, 3e38, -3e38) * np.ones(16)
    mask = mask_of(rng, "some", 1, 1200)[0]
    x[~mask] = np.nan
    with tiny(emulated, 0, limits):
        y, statistics = bn.batch_norm_forward(emulated.asarray(x.astype("f4")), mask=emulated.asarray(mask))
    assert np.isfinite(y).all()
    mean = x[mask].mean(0)
    np.testing.assert_allclose(statistics[0], mean, rtol=1e-5, atol=1e32)


@pytest.mark.emulator
@pytest.mark.parametrize("shape", [(4, 1000, 64), (3, 500, 72)], ids=str)
@pytest.mark.parametrize("time_first", [False, True], ids=["N, T, C", "T, N, C"])
def test_sequences_read_their_valid_rows_once(
    counting_emulator: EmulatorRuntime, rng: np.random.Generator, shape: tuple[int, int, int], time_first: bool
) -> None:
    lengths = rng.integers(2, shape[1], (shape[0], 1))
    mask = np.arange(shape[1]) < lengths
    if time_first:
        shape, mask = (shape[1], shape[0], shape[2]), np.ascontiguousarray(mask.T)
    x, dy = (counting_emulator.asarray(rng.standard_normal(shape).astype("f2")) for _ in range(2))
    on_mask = counting_emulator.asarray(mask)
    counting_emulator.reset()
    with counting_emulator.device_limits(WIDE):
        y, statistics = bn.batch_norm_forward(x, axis=-1, mask=on_mask)
        dx, *_ = bn.batch_norm_backward(dy, x, None, None, statistics, axis=-1, mask=on_mask)
    forward, backward = counting_emulator.launches
    assert all("_cooperative_f16" in record.entry_point for record in (forward, backward))
    valid = int(mask.sum()) * shape[2] * 2
    for counts, array, reads, writes in (
        (forward.counts, x, valid, 0),
        (backward.counts, x, valid, 0),
        (backward.counts, dy, valid, 0),
        (forward.counts, y, 0, y.nbytes),
        (backward.counts, dx, 0, y.nbytes),
    ):
        found = counts.of(array)
        assert (found.bytes_read, found.bytes_written) == (reads, writes)
        assert found.vector_accesses * 16 == reads + writes


@pytest.mark.emulator
@pytest.mark.parametrize("shape", [(3000, 16), (5000, 8), (40, 6, 512)], ids=str)
def test_results_may_replace_what_they_are_made_of(
    emulated: EmulatorRuntime, rng: np.random.Generator, shape: tuple[int, ...]
) -> None:
    """Also where rows are read twice: a thread reads its row before it writes it."""
    x, dy = (rng.standard_normal(shape).astype("f4") for _ in range(2))
    mask, vectors = emulated.asarray(mask_of(rng, "some", 1, shape[0])[0]), shape[1]
    with tiny(emulated):
        on_x, on_dy = map(emulated.asarray, (x, dy))
        y, statistics = bn.batch_norm_forward(on_x, mask=mask)
        grads = bn.batch_norm_backward(on_dy, on_x, None, None, statistics, mask=mask)
        more = [emulated.asarray(np.empty(vectors, "f4")) for _ in range(2)]
        found = bn.batch_norm_backward(on_dy, on_x, None, None, statistics, mask=mask, out=(on_dy, *more))
        bn.batch_norm_forward(on_x, mask=mask, out=(on_x, emulated.asarray(np.empty((3, vectors), "f4"))))
    np.testing.assert_array_equal(on_x, y)
    for one, two in zip(found, grads, strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.emulator
def test_masks_that_differ_along_inner_take_the_kernels_with_options(emulated: EmulatorRuntime) -> None:
    x = emulated.asarray(np.ones((64, 8, 64), "f4"))
    bn.batch_norm_forward(x, mask=emulated.asarray(np.ones(64, bool)))
    bn.batch_norm_forward(x, mask=emulated.asarray(np.ones((64, 64), bool)))
    assert kernels(emulated) == [
        f"bnk_batch_norm_forward_{one}_f32" for one in ("cooperative_inner", "options_registers8")
    ]


def test_small_masked_tensors_keep_their_kernels() -> None:
    limits = Limits(132, 227 * KIB, 228 * KIB, cooperative=True)
    for kind in (FORWARD, BACKWARD):
        for outer, kernel in ((64, "options_registers8"), (512, "cooperative")):
            problem = Problem(1, outer, 1024, 1, F32, ((1024, 1, 0),), options=True, group_strides=(0,), masked=True)
            assert elements_of_access(kind, problem) == 4
            assert f"_{kernel}_f32" in choose(kind, problem, limits).kernel
