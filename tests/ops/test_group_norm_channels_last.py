"""Group norm of channels that come last: the formulas, launches and traffic, without a copy; and its arguments."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest

import bnkernels as bn
from bnkernels.ops.layer_norm import call
from bnkernels.ops.layer_norm import cpu as compiled
from bnkernels.ops.layer_norm.problem import Problem
from bnkernels.runtime.seam import Limits
from tests.ops.test_batch_norm_masked import DTYPES, dtype_named
from tests.ops.test_group_norm import assert_right, make
from tests.regress.refusal import refused
from tools import backends
from tools.backends import Backend
from tools.emulator import EmulatorRuntime

H200 = Limits(132, 227 * 1024, 228 * 1024, True)
# A channel each, one group; channels of a group that are no whole vectors, that are, and that are several; more rows
# than a block has; rows of several blocks, of whole vectors and of others.
CASES = [
    ((3, 4, 5, 3), 4),
    ((3, 6, 7), 1),
    ((5, 6, 7), 2),
    ((2, 32, 4, 4), 4),
    ((70, 16, 16), 2),
    ((90, 32, 32), 4),
    ((2, 24, 2900), 3),
    ((2, 6, 9000), 2),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "groups"), CASES)
def test_is_what_the_formulas_say(
    backend: Backend, rng: np.random.Generator, shape: tuple[int, ...], groups: int, dtype: str
) -> None:
    assert_right(backend, groups, *make(rng, shape, dtype), axis=-1)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("given", [(True, True), (True, False), (False, False)])
def test_activations_and_parameters(
    backend: Backend, rng: np.random.Generator, activation: str, given: tuple[bool, bool]
) -> None:
    for shape, dtype in (((4, 6, 8), "float32"), ((3, 16, 5), "bfloat16")):
        x, dy, *vectors = make(rng, shape, dtype)
        vectors = [vector if there else None for vector, there in zip(vectors, given, strict=True)]
        assert_right(backend, 2, x, dy, *vectors, activation, axis=-1)


@pytest.mark.parametrize("shape", [(7, 12, 5), (9, 16, 16), (2, 16, 2900)], ids=str)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit_parameters_are_those_numbers_in_float32(
    backend: Backend, rng: np.random.Generator, shape: tuple[int, ...], dtype: str
) -> None:
    data, found = dtype_named(dtype), []
    x, dy, gamma, beta = (array.astype(data) for array in make(rng, shape, dtype))
    x, dy = (np.ascontiguousarray(np.moveaxis(array, 1, -1)) for array in (x, dy))
    for kind in (data, np.dtype("float32")):
        on_x, on_dy, *vectors = backend.arrays(x, dy, gamma.astype(kind), beta.astype(kind))
        y, statistics = bn.group_norm_forward(on_x, 2, *vectors, axis=-1)
        grads = bn.group_norm_backward(on_dy, on_x, 2, *vectors, statistics, axis=-1)
        found.append([backend.asnumpy(array) for array in (y, *grads)])
    for got, want in zip(*found, strict=True):
        np.testing.assert_array_equal(got.astype(float), want.astype(data).astype(float))


def test_agrees_with_pytorch(torch: ModuleType, backend: Backend, rng: np.random.Generator) -> None:
    x, dy, gamma, beta = make(rng, (3, 8, 5, 4), "float64")
    tensors = [torch.from_numpy(array).requires_grad_() for array in (x, gamma, beta)]
    want = torch.nn.functional.group_norm(tensors[0], 4, *tensors[1:], 1e-3)
    dx, *others = torch.autograd.grad(want, tensors, torch.from_numpy(dy))
    given = (np.ascontiguousarray(np.moveaxis(array, 1, -1)) for array in (x, dy))
    on_x, on_dy, *vectors = backend.arrays(*given, gamma, beta)
    y, statistics = bn.group_norm_forward(on_x, 4, *vectors, eps=1e-3, axis=3)
    grads = bn.group_norm_backward(on_dy, on_x, 4, *vectors, statistics, axis=3)
    wanted = [np.moveaxis(array.detach().numpy(), 1, -1) for array in (want, dx)] + [one.numpy() for one in others]
    for got, right in zip((y, *grads), wanted, strict=True):
        np.testing.assert_allclose(backend.asnumpy(got), right, rtol=1e-11, atol=1e-12 * abs(right).max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "groups"), [((5, 6, 7), 2), ((2, 32, 4, 4), 4), ((2, 6, 9000), 2)])
def test_is_that_of_the_same_numbers_with_channels_first(
    backend: Backend, rng: np.random.Generator, shape: tuple[int, ...], groups: int, dtype: str
) -> None:
    """But for the order of sums."""
    x, dy, *vectors = make(rng, shape, dtype)
    found = []
    for axis in (1, -1):
        given = (np.ascontiguousarray(np.moveaxis(array, 1, axis)) for array in (x, dy))
        on_x, on_dy, *others = backend.arrays(*given, *vectors)
        y, statistics = bn.group_norm_forward(on_x, groups, *others, axis=axis, activation="silu")
        dx, *sums = bn.group_norm_backward(on_dy, on_x, groups, *others, statistics, axis=axis, activation="silu")
        arrays = [np.moveaxis(backend.asnumpy(array), axis, 1) for array in (y, dx)]
        found.append([array.astype(float) for array in (*arrays, *map(backend.asnumpy, (statistics[2], *sums)))])
    tolerance = {"float64": 1e-12, "float32": 1e-4}.get(dtype, 2**-6)
    for first, last in zip(*found, strict=True):
        np.testing.assert_allclose(last, first, rtol=tolerance, atol=tolerance * abs(first).max())


@pytest.mark.emulator
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("shape", [(40, 6, 5, 32), (2, 5800, 1, 24)], ids=["a block a row", "blocks share rows"])
def test_every_byte_moves_once(
    counting_emulator: EmulatorRuntime, rng: np.random.Generator, shape: tuple[int, ...], dtype: str
) -> None:
    """In one launch each way, and nothing is copied before."""
    x, dy = (counting_emulator.asarray(rng.standard_normal(shape).astype(dtype_named(dtype))) for _ in range(2))

    def moved() -> tuple[int, int]:
        (record,) = counting_emulator.launches
        large = [traffic for block, traffic in record.counts.arrays.items() if len(block) == x.nbytes]
        counting_emulator.reset()
        return sum(one.bytes_read for one in large), sum(one.bytes_written for one in large)

    with counting_emulator.device_limits(H200):
        _, statistics = bn.group_norm_forward(x, 4, axis=-1)
        firsts = 0 if shape[-1] == 24 else 4 * shape[0] * x.itemsize  # the first number of a row twice
        assert moved() == (x.nbytes + firsts, x.nbytes)
        bn.group_norm_backward(dy, x, 4, None, None, statistics, axis=-1)
        assert moved() == (2 * x.nbytes, x.nbytes)


@pytest.mark.emulator
def test_the_order_of_blocks_and_threads_changes_no_bit(emulated: EmulatorRuntime, rng: np.random.Generator) -> None:
    x, dy = (emulated.asarray(rng.standard_normal((2, 2900, 24)).astype("float32")) for _ in range(2))

    def run() -> list[np.ndarray]:
        y, statistics = bn.group_norm_forward(x, 3, axis=-1)
        return [np.array(array) for array in (y, *bn.group_norm_backward(dy, x, 3, None, None, statistics, axis=-1))]

    first = run()
    for seed in (1, 2, 3):
        with emulated.schedule(seed):
            for one, two in zip(first, run(), strict=True):
                np.testing.assert_array_equal(one, two)


def test_units_are_whole_where_the_channels_of_a_group_are() -> None:
    def shape_of(channels: int, address: int = 0) -> int:
        problem = Problem(8, channels * 50, np.dtype("float32"), channel_groups=2, inner=50, channels_last=True)
        plan = call.choose_forward(problem, backends.emulated_runtime().limits(np.zeros(1)))
        members = dict.fromkeys(("x", "y", "gamma", "beta"), address)
        return call._codes(plan, problem, bn.ops.activations.activation_named("identity", None), members)["shape"]

    assert shape_of(8) > 0
    assert (shape_of(6), shape_of(8, 4)) == (0, 0)


def test_parts_of_a_tensor_on_the_cpu(monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    """Where one does not fit in the cache."""
    monkeypatch.setattr(compiled, "PART", 3 * 6 * 5 * 8)
    assert_right(backends.make("numpy"), 2, *make(rng, (8, 6, 5), "float64"), axis=-1)


def test_in_place_and_replayed(backend: Backend, rng: np.random.Generator) -> None:
    """Also after a call with the channels elsewhere."""
    numbers = rng.standard_normal((4, 4, 4))
    x, dy, y, dx = backend.arrays(numbers, rng.standard_normal((4, 4, 4)), *(np.empty((4, 4, 4)) for _ in range(2)))
    statistics, dgamma, dbeta = backend.arrays(np.empty((3, 4, 2)), np.empty(4), np.empty(4))
    found = {}
    for axis in (1, -1, 1, -1):
        bn.group_norm_forward(x, 2, axis=axis, out=(y, statistics))
        bn.group_norm_backward(dy, x, 2, None, None, statistics, axis=axis, out=(dx, dgamma, dbeta))
        now = [np.array(backend.asnumpy(array)) for array in (y, dx, dgamma, dbeta)]
        for one, two in zip(found.setdefault(axis, now), now, strict=True):
            np.testing.assert_array_equal(one, two)
    assert (found[1][0] != found[-1][0]).any()
    bn.group_norm_backward(dy, x, 2, None, None, statistics, axis=-1, out=(dy, dgamma, dbeta))
    np.testing.assert_array_equal(backend.asnumpy(dy), found[-1][1])
    bn.group_norm_forward(x, 2, axis=-1, out=(x, statistics))
    np.testing.assert_array_equal(backend.asnumpy(x), found[-1][0])


@pytest.mark.parametrize(
    ("shape", "axis", "kind", "message"),
    [
        ((2, 3, 4, 4), 2, ValueError, "axis must be 1 or -1: channels come behind the examples or last, got 2"),
        ((2, 3, 4, 4), 0, ValueError, "axis must be 1 or -1: .* got 0"),
        ((2, 3, 4, 4), -2, ValueError, "axis must be 1 or -1: .* got -2"),
        ((2, 3, 4, 4), 1.0, TypeError, "axis must be an integer"),
        ((2, 3, 4, 4), "last", TypeError, "axis must be an integer"),
        ((2, 3, 4, 6), -1, ValueError, "groups must divide the 6 channels of x, got 4"),
        ((4,), -1, ValueError, r"x must have the shape \(N, \.\.\., C\)"),
    ],
)
def test_what_is_wrong_is_said(backend: Backend, shape: tuple[int, ...], axis: Any, kind: type, message: str) -> None:
    x = backend.asarray(np.zeros(shape, "float32"))
    with refused(backend, kind, message, x):
        bn.group_norm_forward(x, 4, axis=axis)
    with refused(backend, kind, message, x):
        bn.group_norm_backward(x, x, 4, None, None, x, axis=axis)


def test_groups_of_2_31_numbers_are_refused(emulated: EmulatorRuntime) -> None:
    x = emulated.sparse((1, 2**30, 2), "float16")
    with pytest.raises(ValueError, match=r"x has 2147483648 numbers in a group, .* pass channels in axis 1"):
        bn.group_norm_forward(x, 1, axis=-1)
