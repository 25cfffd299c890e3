"""The last layer with its loss in one: against extended precision, and against the separate ops."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import bnkernels as bn
from bnkernels.ops.linear_softmax_cross_entropy.launch import choose
from bnkernels.runtime.seam import Limits
from tests.ops.test_linear_batch_norm import H200, assert_product
from tests.regress.refusal import refused
from tools import backends, oracle
from tools.backends import Backend
from tools.emulator import EmulatorRuntime
from tools.oracle import Extended, unit_roundoff

# (N, K, M): the question's; one of everything; two tiles of classes, and of inputs; more classes than examples; sizes
# that nothing divides; more examples than a tile has rows.
SIZES = [(64, 20, 10), (1, 1, 1), (5, 300, 270), (9, 6, 70), (33, 65, 4), (300, 10, 6), (512, 7, 3)]
SMALL, ALONE = Limits(4, 227 * 1024, 228 * 1024, True), H200._replace(cooperative=False)


def make(rng: np.random.Generator, sizes: tuple[int, int, int], dtype: str) -> list[np.ndarray]:
    """Return x, weight, bias and labels."""
    rows, inputs, outputs = sizes
    numbers = (rng.standard_normal(shape).astype(dtype) for shape in ((rows, inputs), (inputs, outputs), outputs))
    return [*numbers, rng.integers(0, outputs, rows)]


def check(found: tuple, given: list[np.ndarray]) -> None:
    """Compare losses and gradients with those in extended precision."""
    loss, dx, dweight, dbias = found
    x, weight, bias, labels = (array.astype(Extended) if array.dtype.kind == "f" else array for array in given)
    (rows, inputs), outputs, u = x.shape, weight.shape[1], unit_roundoff(given[0].dtype)
    logits = x @ weight + bias
    off = (inputs + 8) * u * (np.abs(x) @ np.abs(weight) + np.abs(bias))  # a logit is off by as much
    shifted = logits - logits.max(1, keepdims=True)
    exponentials = np.exp(shifted)
    total = exponentials.sum(1, keepdims=True)
    p, one = exponentials / total, np.eye(outputs)[labels]
    worst = 2 * off.max(1, keepdims=True) + u * (outputs + oracle.SLACK + np.abs(shifted).max(1, keepdims=True))
    right = np.log(total[:, 0]) - shifted[np.arange(rows), labels]
    oracle.assert_within(loss, right, 2 * worst[:, 0] + oracle.SLACK * u * np.abs(right), "loss")
    dlogits, bound = (p - one) / rows, (3 * p * worst + oracle.SLACK * u * (p + one)) / rows
    assert_product(dx, dlogits, weight.T, "dx", a_bound=bound)
    assert_product(dweight, x.T, dlogits, "dweight", b_bound=bound)
    of_sums = bound.sum(0) + (rows + 8) * u * np.abs(dlogits).sum(0)
    oracle.assert_within(dbias, dlogits.sum(0), of_sums, "dbias")


@pytest.mark.parametrize(("dtype", "labels"), [("float32", "int32"), ("float64", "int64"), ("float64", "int32")])
@pytest.mark.parametrize("sizes", SIZES)
def test_matches_extended_precision(
    backend: Backend, rng: np.random.Generator, sizes: tuple[int, int, int], dtype: str, labels: str
) -> None:
    given = make(rng, sizes, dtype)
    given[3] = given[3].astype(labels)
    check(tuple(map(backend.asnumpy, bn.linear_softmax_cross_entropy(*backend.arrays(*given)))), given)


def test_without_bias_and_without_the_gradient_of_the_input(backend: Backend, rng: np.random.Generator) -> None:
    x, weight, bias, labels = make(rng, (40, 7, 5), "float64")
    on = backend.arrays(x, weight, np.zeros_like(bias), labels)
    whole = bn.linear_softmax_cross_entropy(*on)
    some = bn.linear_softmax_cross_entropy(on[0], on[1], None, on[3], input_gradient=False)
    assert some[1] is None
    for one, two in zip((some[0], *some[2:]), (whole[0], *whole[2:]), strict=True):
        np.testing.assert_array_equal(backend.asnumpy(one), backend.asnumpy(two))


def test_large_logits_neither_overflow_nor_vanish(backend: Backend) -> None:
    x, weight = np.float32([[1e4], [-1e4]]), np.float32([[1, -1, 0]])
    given = [x, weight, np.zeros(3, "float32"), np.array([1, 1])]
    loss, dx, *_ = map(backend.asnumpy, bn.linear_softmax_cross_entropy(*backend.arrays(*given)))
    np.testing.assert_array_equal(loss, [2e4, 0])
    np.testing.assert_array_equal(dx[:, 0], [1, 0])


def test_nan_stays_in_its_example(backend: Backend, rng: np.random.Generator) -> None:
    x, *others = make(rng, (40, 7, 5), "float32")
    x[4, 3] = np.nan
    loss, dx, dweight, dbias = map(backend.asnumpy, bn.linear_softmax_cross_entropy(*backend.arrays(x, *others)))
    assert np.isnan(loss[4])
    assert np.isnan(dx[4]).all()
    assert np.isfinite(np.delete(loss, 4)).all()
    assert np.isfinite(np.delete(dx, 4, axis=0)).all()
    assert np.isnan(dweight).all()
    assert np.isnan(dbias).all()


@pytest.mark.parametrize("label", [-1, 5])
def test_a_label_out_of_range_is_an_error_or_nan(backend: Backend, rng: np.random.Generator, label: int) -> None:
    given = make(rng, (40, 7, 5), "float32")
    given[3][2] = label
    if backend.is_numpy:
        with pytest.raises(ValueError, match="labels must be from 0 to 4"):
            bn.linear_softmax_cross_entropy(*given)
        return
    loss, dx, *_ = map(backend.asnumpy, bn.linear_softmax_cross_entropy(*backend.arrays(*given)))
    np.testing.assert_array_equal(np.isnan(loss), np.arange(40) == 2)
    np.testing.assert_array_equal(np.isnan(dx).all(1), np.arange(40) == 2)


def test_outputs_are_written_where_they_are_wanted(backend: Backend, rng: np.random.Generator) -> None:
    rows, inputs, outputs = sizes = 30, 8, 5
    given = backend.arrays(*make(rng, sizes, "float32"))
    shapes = (rows,), (rows, inputs), (inputs, outputs), (outputs,)
    out, workspace = (
        tuple(backend.empty(shape, "float32") for shape in shapes),
        backend.empty((rows, outputs), "float32"),
    )
    wanted = [backend.asnumpy(array) for array in bn.linear_softmax_cross_entropy(*given)]
    for _ in range(3):  # the second call is replayed
        found = bn.linear_softmax_cross_entropy(*given, workspace=workspace, out=out)
        assert all(one is two for one, two in zip(found, out, strict=True))
        for one, two in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(backend.asnumpy(one), two)


@pytest.mark.parametrize("sizes", [(0, 4, 3), (600, 4, 3), (4, 1100, 3), (4, 0, 3)])
def test_beyond_the_kernel_a_library_multiplies(
    backend: Backend, rng: np.random.Generator, sizes: tuple[int, int, int]
) -> None:
    given = make(rng, sizes, "float64")
    if backend.name == "emulator":
        backends.emulated_runtime().reset()
    found = tuple(map(backend.asnumpy, bn.linear_softmax_cross_entropy(*backend.arrays(*given))))
    if sizes[0]:
        check(found, given)
    else:
        assert not any(array.any() for array in found)
    if backend.name == "emulator":
        assert {record.source for record in backends.emulated_runtime().launches} <= {"softmax_cross_entropy"}


@pytest.mark.emulator
def test_is_one_launch_with_one_grid_barrier(emulated: EmulatorRuntime, rng: np.random.Generator) -> None:
    backend = backends.make("emulator")
    with emulated.device_limits(SMALL):
        bn.linear_softmax_cross_entropy(*backend.arrays(*make(rng, (64, 20, 10), "float32")))
    (record,) = emulated.launches
    assert record.launch.cooperative
    assert record.launch.grid == (4, 1, 1)


@pytest.mark.emulator
def test_the_order_of_blocks_and_threads_changes_no_bit(emulated: EmulatorRuntime, rng: np.random.Generator) -> None:
    backend = backends.make("emulator")
    given = backend.arrays(*make(rng, (70, 20, 33), "float32"))

    def run() -> list[np.ndarray]:
        return [backend.asnumpy(array) for array in bn.linear_softmax_cross_entropy(*given)]

    with emulated.device_limits(SMALL):
        first = run()
        for seed in range(1, 4):
            with emulated.schedule(seed, resident=4):
                for one, two in zip(first, run(), strict=True):
                    assert np.isfinite(one).all()
                    np.testing.assert_array_equal(one, two)


def test_the_launch_follows_from_the_sizes() -> None:
    f32, i64 = np.dtype("float32"), np.dtype("int64")
    assert choose(64, 20, 10, f32, i64, H200).launch.grid == (16, 1, 1)
    assert choose(512, 1024, 1024, f32, i64, H200).launch.grid == (128, 1, 1)
    assert choose(64, 20, 10, f32, i64, ALONE) is None
    assert choose(32, 20, 10, f32, i64, ALONE).launch.grid == (1, 1, 1)
    assert choose(64, 20, 1024, f32, i64, H200._replace(shared_bytes=40 * 1024)) is None


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": np.ones((4, 3, 2), "float32")}, ValueError, r"x must have the shape \(N, K\), got"),
        ({"x": np.ones((4, 3), "float16")}, TypeError, "x must be float32 or float64"),
        ({"weight": np.ones(3, "float32")}, ValueError, r"weight must have the shape \(K, M\), got"),
        ({"weight": np.ones((2, 5), "float32")}, ValueError, r"weight must have the shape \(3, 5\), got \(2, 5\)"),
        ({"weight": np.ones((3, 0), "float32")}, ValueError, "there is no class to be right"),
        ({"bias": np.ones(4, "float32")}, ValueError, r"bias must have the shape \(5,\), got \(4,\)"),
        ({"bias": np.ones(5)}, TypeError, "bias must be float32, got float64"),
        ({"labels": np.zeros(4, "uint8")}, TypeError, "labels must be int32 or int64, got uint8"),
        ({"labels": np.zeros(3, "int64")}, ValueError, r"labels must have the shape \(4,\), got \(3,\)"),
        ({"workspace": np.ones((4, 4), "float32")}, ValueError, r"workspace must have the shape \(4, 5\)"),
        ({"input_gradient": 1}, TypeError, "input_gradient must be True or False"),
        ({"out": ()}, TypeError, r"out must be the tuple of arrays \(loss, dx, dweight, dbias\)"),
    ],
)
def test_what_is_wrong_is_refused(
    backend: Backend, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    given: dict[str, Any] = {
        "x": np.ones((4, 3), "float32"),
        "weight": np.ones((3, 5), "float32"),
        "bias": np.ones(5, "float32"),
        "labels": np.zeros(4, "int64"),
    } | change
    given = {name: backend.asarray(value) if isinstance(value, np.ndarray) else value for name, value in given.items()}
    with refused(backend, error, message):
        bn.linear_softmax_cross_entropy(**given)
