"""Launches of group norm: several blocks, long groups, order, traffic, alignment; and its arguments."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import bnkernels as bn
from bnkernels.runtime.seam import Limits
from tests.ops.test_batch_norm_masked import DTYPES, dtype_named
from tests.ops.test_group_norm import AXES, assert_right, make, plans
from tests.ops.test_layer_norm import H200
from tests.ops.test_layer_norm_long_rows import ALONE, ROOMIEST, SMALL, WIDE
from tests.regress.refusal import refused
from tools import backends
from tools.backends import Backend
from tools.emulator import EmulatorRuntime


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 4, 100, 90), (3, 6, 6001), (2, 40_000), (2, 2, 40_000)], ids=str)
def test_long_groups(backend: Backend, rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> None:
    """Which several blocks share: of whole vectors and not, and without positions."""
    backward = plans(shape, 2, dtype, H200)[1]
    assert "cooperative" in backward.kernel
    assert_right(backend, 2, *make(rng, shape, dtype), "relu")


@pytest.mark.emulator
@AXES
@pytest.mark.parametrize(
    ("dtype", "shape", "groups", "limits"),
    [
        ("bfloat16", (7, 4, 20_004), 2, WIDE),  # channels that two splits have
        ("float64", (40, 4, 1051), 2, ROOMIEST),  # more than a thread sums in registers
        ("float32", (17, 4, 4101), 2, ROOMIEST),  # two rows at once
        ("float32", (2, 4, 35_000), 2, SMALL),  # columns that are read again
        ("float32", (2, 4, 18_000), 2, ALONE),  # a block for each group, none of which may wait
        ("float32", (9, 10, 4100), 5, SMALL),  # more groups than blocks that are resident
        ("float32", (3, 10, 4096), 2, WIDE),
        ("float32", (3, 16, 2050), 2, SMALL),
        ("float32", (24, 16, 1026), 2, ROOMIEST),
    ],
    ids=["splits", "many sums", "two at once", "read again", "alone", "many groups", *["whole vectors"] * 3],
)
def test_long_groups_of_several_blocks(
    emulated: EmulatorRuntime,
    rng: np.random.Generator,
    dtype: str,
    shape: tuple[int, ...],
    groups: int,
    limits: Limits,
    axis: int,
) -> None:
    backward = plans(shape, groups, dtype, limits, axis)[1]
    assert "cooperative" in backward.kernel
    assert backward.launch.grid[0] % groups == 0
    with emulated.device_limits(limits):
        assert_right(backends.make("emulator"), groups, *make(rng, shape, dtype), axis=axis)


@pytest.mark.parametrize(("dtype", "most"), [("float32", (2, 3)), ("float16", (2, 1)), ("float64", (1, 1))])
def test_rows_at_once_are_as_many_as_there_are_registers_for(dtype: str, most: tuple[int, int]) -> None:
    """With more, kernels as they are launched spilled up to 48 bytes; rows of layer norm have no such limit."""
    found = [plans((40, 4, length), 2, dtype, ROOMIEST, 1)[1] for length in range(1051, 9000, 250)]
    shared = [(plan.stages, plan.at_once) for plan in found if "cooperative" in plan.kernel]
    assert max(shared) == most


@AXES
@pytest.mark.parametrize(("shape", "groups"), [((900, 8, 6), 2), ((300, 16, 16), 4), ((5000, 8), 2)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_several_blocks_meet(
    backend: Backend, rng: np.random.Generator, shape: tuple[int, ...], groups: int, dtype: str, axis: int
) -> None:
    grid = plans(shape, groups, dtype, H200, axis)[1].launch.grid
    assert grid[0] > groups
    assert grid[0] % groups == 0
    assert_right(backend, groups, *make(rng, shape, dtype), axis=axis)


@pytest.mark.parametrize(("shape", "groups"), [((64, 300, 4), 300), ((4, 64, 300), 32)])
def test_blocks_of_different_groups_do_not_wait(
    backend: Backend, rng: np.random.Generator, shape: tuple[int, ...], groups: int
) -> None:
    launch = plans(shape, groups, "float32", H200)[1].launch
    assert launch.grid[0] >= groups
    if shape[0] == 64:
        assert (launch.grid[0], launch.cooperative) == (groups, False), "there are more groups than resident blocks"
    assert_right(backend, groups, *make(rng, shape, "float32"))


@pytest.mark.emulator
@pytest.mark.parametrize(("shape", "groups"), [((200, 8, 20), 2), ((20, 20, 60), 2), ((5, 4, 4100), 2)])
def test_the_order_of_blocks_and_threads_changes_no_bit(
    emulated: EmulatorRuntime, rng: np.random.Generator, shape: tuple[int, ...], groups: int
) -> None:
    x, dy, *vectors = (emulated.asarray(array) for array in make(rng, shape, "float32"))
    found = []
    limits = SMALL if shape[2] > 1000 else Limits(4, 60 * 1024, 61 * 1024, True)  # four blocks
    with emulated.device_limits(limits):
        assert plans(shape, groups, "float32", limits)[1].launch.cooperative
        for seed in range(4):
            with emulated.schedule(seed, resident=4):
                y, statistics = bn.group_norm_forward(x, groups, *vectors, activation="silu")
                grads = bn.group_norm_backward(dy, x, groups, *vectors, statistics, activation="silu")
            found.append([np.array(array) for array in (y, statistics, *grads)])
    for others in found[1:]:
        for one, two in zip(found[0], others, strict=True):
            np.testing.assert_array_equal(one, two)


@pytest.mark.emulator
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_every_byte_is_moved_once(counting_emulator: EmulatorRuntime, rng: np.random.Generator, dtype: str) -> None:
    x, dy, *vectors = (counting_emulator.asarray(array) for array in make(rng, (64, 16, 40), dtype))
    counting_emulator.reset()
    y, statistics = bn.group_norm_forward(x, 4, *vectors)
    dx, dgamma, dbeta = bn.group_norm_backward(dy, x, 4, *vectors, statistics)
    forward, backward = (record.counts for record in counting_emulator.launches)
    assert forward.of(x).bytes_read == x.nbytes + 64 * 4 * x.itemsize  # the first number of a row twice
    for array in (x, dy):
        assert backward.of(array).bytes_read == backward.of(array).unique_bytes_read == array.nbytes
    assert forward.total.bytes_written == y.nbytes + statistics.nbytes
    assert backward.of(dx).bytes_written == x.nbytes
    assert backward.of(dgamma).bytes_written == backward.of(dbeta).bytes_written == dgamma.nbytes


@AXES
@pytest.mark.parametrize("shift", [1, 3])
def test_alignment_changes_no_bit(backend: Backend, rng: np.random.Generator, shift: int, axis: int) -> None:
    arrays, found = make(rng, (40, 12, 12), "float32"), []
    for start in (0, shift):
        moved = []
        for array in arrays:
            flat = backend.asarray(np.zeros(array.size + 4, array.dtype))
            view = flat[start : start + array.size].reshape(array.shape)
            view[...] = backend.asarray(array)
            moved.append(view)
        x, dy, *vectors = moved
        y, statistics = bn.group_norm_forward(x, 3, *vectors, axis=axis)
        grads = bn.group_norm_backward(dy, x, 3, *vectors, statistics, axis=axis)
        found.append([backend.asnumpy(array) for array in (y, statistics, *grads)])
    for one, two in zip(*found, strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("shape", [(7, 12, 5), (3, 16), (70, 8, 16), (2, 4, 9000)], ids=str)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit_parameters_are_those_numbers_in_float32(
    backend: Backend, rng: np.random.Generator, shape: tuple[int, ...], dtype: str
) -> None:
    data = dtype_named(dtype)
    x, dy, gamma, beta = (array.astype(data) for array in make(rng, shape, dtype))
    found = []
    for kind in (data, np.dtype("float32")):
        on_x, on_dy, *vectors = backend.arrays(x, dy, gamma.astype(kind), beta.astype(kind))
        y, statistics = bn.group_norm_forward(on_x, 2, *vectors)
        grads = bn.group_norm_backward(on_dy, on_x, 2, *vectors, statistics)
        found.append([backend.asnumpy(array) for array in (y, *grads)])
    assert [array.dtype for array in found[0]] == [data] * 4
    for got, want in zip(*found, strict=True):
        np.testing.assert_array_equal(got.astype(float), want.astype(data).astype(float))


# ---- arguments ------------------------------------------------------------------------------------------------------


def test_in_place_and_replayed(backend: Backend, rng: np.random.Generator) -> None:
    """Also with other numbers in the same arrays."""
    arrays = make(rng, (6, 4, 5), "float64")
    x, dy, *vectors = backend.arrays(*arrays)
    out = backend.arrays(np.empty((6, 4, 5)), np.empty((3, 6, 2)))
    grads = backend.arrays(np.empty((6, 4, 5)), *arrays[2:])
    for factor in (1.0, 2.0, 3.0):
        vectors[0][...] = backend.asarray(arrays[2] * factor)
        y, statistics = bn.group_norm_forward(x, 2, *vectors, out=tuple(out))
        assert (y is out[0], statistics is out[1]) == (True, True)
        bn.group_norm_backward(dy, x, 2, *vectors, statistics, out=tuple(grads))
        fresh, _ = bn.group_norm_forward(x, 2, *vectors)
        np.testing.assert_array_equal(backend.asnumpy(y), backend.asnumpy(fresh))
        for got, want in zip(grads, bn.group_norm_backward(dy, x, 2, *vectors, statistics), strict=True):
            np.testing.assert_array_equal(backend.asnumpy(got), backend.asnumpy(want))
    bn.group_norm_backward(dy, x, 2, *vectors, statistics, out=(dy, *grads[1:]))
    np.testing.assert_array_equal(backend.asnumpy(dy), backend.asnumpy(grads[0]))
    bn.group_norm_forward(x, 2, *vectors, out=(x, statistics))
    np.testing.assert_array_equal(backend.asnumpy(x), backend.asnumpy(y))


@AXES
def test_of_no_examples_there_is_nothing(backend: Backend, axis: int) -> None:
    x = backend.asarray(np.zeros((0, 4, 4), "float32"))
    y, statistics = bn.group_norm_forward(x, 2, axis=axis)
    dx, dgamma, _ = bn.group_norm_backward(x, x, 2, None, None, statistics, axis=axis)
    assert (y.shape, statistics.shape, dx.shape, dgamma.shape) == ((0, 4, 4), (3, 0, 2), (0, 4, 4), (4,))
    assert not backend.asnumpy(dgamma).any()


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"x": np.zeros(4, "float32")}, ValueError, r"x must have the shape \(N, C, \.\.\.\)"),
        ({"x": np.zeros((4, 6, 0), "float32")}, ValueError, "nothing to normalise"),
        ({"x": np.zeros((4, 6, 5), "int32")}, TypeError, "x must be float16"),
        ({"x": np.zeros((4, 5, 6), "float32").transpose(0, 2, 1)}, ValueError, "x must be contiguous"),
        ({"groups": 4}, ValueError, "groups must divide the 6 channels of x, got 4"),
        ({"groups": 0}, ValueError, "groups must be at least 1, got 0"),
        ({"groups": 2.0}, TypeError, "groups must be an integer"),
        ({"gamma": np.ones(5, "float32")}, ValueError, r"gamma must have the shape \(6,\)"),
        ({"gamma": np.ones(6, "float64")}, TypeError, "gamma must be float32"),
        ({"dy": np.zeros((4, 6, 4), "float32")}, ValueError, "dy must have the shape"),
        ({"statistics": np.zeros((3, 4), "float32")}, ValueError, r"statistics must have the shape \(3, 4, 2\)"),
        ({"workspace": np.zeros(5, "float32")}, ValueError, "at least 7680 numbers"),
        ({"eps": 0.0}, ValueError, "eps must be at least"),
        ({"activation": "swish"}, ValueError, "activation"),
        ({"out": 3}, TypeError, "out must be a tuple"),
    ],
)
def test_what_is_wrong_is_said(backend: Backend, changes: dict[str, Any], kind: type, message: str) -> None:
    given: dict[str, Any] = {
        "x": np.zeros((4, 6, 5), "float32"),
        "dy": np.zeros((4, 6, 5), "float32"),
        "groups": 2,
        "gamma": np.ones(6, "float32"),
        "statistics": np.zeros((3, 4, 2), "float32"),
        "workspace": None,
        "eps": 1e-5,
        "activation": "relu",
        "out": None,
    } | changes
    arrays = {name: backend.like(a) if isinstance(a, np.ndarray) else a for name, a in given.items()}
    x, groups, gamma = (arrays[name] for name in ("x", "groups", "gamma"))
    options = {name: arrays[name] for name in ("activation", "out")}
    with refused(backend, kind, message, x, gamma):
        if not changes.keys() & {"dy", "statistics", "workspace"}:
            bn.group_norm_forward(x, groups, gamma, eps=arrays["eps"], **options)
        saved, workspace = arrays["statistics"], arrays["workspace"]
        bn.group_norm_backward(arrays["dy"], x, groups, gamma, None, saved, workspace=workspace, **options)
