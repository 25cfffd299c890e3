"""Softmax cross-entropy on all backends, against extended precision, and by what must hold for any input."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest

import bnkernels as bn
from bnkernels.runtime.cpu import threads
from tests.regress.refusal import refused
from tools import oracle
from tools.backends import Backend
from tools.emulator import EmulatorRuntime

# One element; the project's own; primes; more classes and rows than a warp and a block have; more than a block and a
# line of the CPU kernels have.
SHAPES = [(1, 1), (64, 10), (7, 33), (300, 1000), (67, 128), (9, 129), (5, 2500)]
DTYPES = ["float32", "float64"]


def exact(
    logits: np.ndarray, labels: np.ndarray, smoothing: float = 0.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return the loss and the gradient in extended precision, and a bound for each.

    An exponential is off by the rounding of its argument, a sum over K classes by at most K roundings.
    """
    rows, classes = logits.shape
    u = oracle.unit_roundoff(logits.dtype)
    shifted = logits.astype(oracle.Extended) - logits.max(1, keepdims=True)
    exponentials = np.exp(shifted)
    total = exponentials.sum(1, keepdims=True)
    p = exponentials / total
    smoothing = oracle.Extended(smoothing)
    targets = (1 - smoothing) * np.eye(classes, dtype=oracle.Extended)[labels] + smoothing / classes
    of_target = targets * shifted
    loss = np.log(total[:, 0]) - of_target.sum(1)
    dlogits = (p - targets) / rows
    of_total = u * (classes + oracle.SLACK + (p * np.abs(shifted)).sum(1))  # relative
    roundings = oracle.SLACK + (classes if smoothing else 0)
    loss_bound = of_total + u * (oracle.SLACK * np.abs(loss) + roundings * np.abs(of_target).sum(1))
    of_p = p * (u * np.abs(shifted) + of_total[:, None] + oracle.SLACK * u)
    of_targets = oracle.SLACK * u * targets if smoothing else 0
    return loss, dlogits, loss_bound, (of_p + of_targets) / rows + oracle.SLACK * u * np.abs(dlogits)


def check(
    backend: Backend, logits: np.ndarray, labels: np.ndarray, smoothing: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Compare an op's results with `exact`; return them."""
    on = backend.asarray(logits), backend.asarray(labels)
    loss, dlogits = bn.softmax_cross_entropy(*on, label_smoothing=smoothing)
    loss, dlogits = backend.asnumpy(loss), backend.asnumpy(dlogits)
    assert loss.dtype == dlogits.dtype == logits.dtype
    want_loss, want_dlogits, loss_bound, dlogits_bound = exact(logits, labels, smoothing)
    oracle.assert_within(loss, want_loss, loss_bound, "loss")
    oracle.assert_within(dlogits, want_dlogits, dlogits_bound, "dlogits")
    return loss, dlogits


def make_case(rng: np.random.Generator, shape: tuple[int, int], dtype: str) -> tuple[np.ndarray, np.ndarray]:
    return (3 * rng.standard_normal(shape)).astype(dtype), rng.integers(0, shape[1], shape[0])


@pytest.mark.parametrize("label_dtype", ["int32", "int64"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_extended_precision(
    backend: Backend, rng: np.random.Generator, shape: tuple[int, int], dtype: str, label_dtype: str
) -> None:
    logits, labels = make_case(rng, shape, dtype)
    check(backend, logits, labels.astype(label_dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("smoothing", [0.1, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_smoothed_labels(
    backend: Backend, rng: np.random.Generator, shape: tuple[int, int], smoothing: float, dtype: str
) -> None:
    check(backend, *make_case(rng, shape, dtype), smoothing=smoothing)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("ignored", [-100, 3])
@pytest.mark.parametrize("shape", [(64, 10), (7, 33), (4300, 4), (67, 150), (5, 2500)])
def test_examples_that_do_not_count(
    backend: Backend, rng: np.random.Generator, shape: tuple[int, int], ignored: int, smoothing: float
) -> None:
    """Their rows are 0 whatever the logits are, the others as they are alone. 4300 are two rounds of blocks."""
    logits, labels = make_case(rng, shape, "float32")
    labels[::3] = ignored
    counted = labels != ignored
    logits[~counted] = np.resize([np.nan, np.inf, 1, 2], logits.shape)[~counted]
    on = backend.arrays(logits, labels)
    got = bn.softmax_cross_entropy(*on, ignore_index=ignored, label_smoothing=smoothing)
    alone = bn.softmax_cross_entropy(*backend.arrays(logits[counted], labels[counted]), label_smoothing=smoothing)
    for array, want in zip(got, alone, strict=True):
        array = backend.asnumpy(array)
        np.testing.assert_array_equal(array[counted], backend.asnumpy(want))
        np.testing.assert_array_equal(array[~counted], 0)


def test_where_no_example_counts_nothing_is_learnt(backend: Backend, rng: np.random.Generator) -> None:
    logits, _ = make_case(rng, (9, 5), "float32")
    for array in bn.softmax_cross_entropy(*backend.arrays(logits, np.full(9, -100)), ignore_index=-100):
        np.testing.assert_array_equal(backend.asnumpy(array), 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_logits_neither_overflow_nor_vanish(backend: Backend, dtype: str) -> None:
    logits = np.array([[1e4, -1e4, 0], [-1e4, -1e4, -1e4], [1e4, 1e4, 0], [-1e4, 1e4, 1e4 - 1]], dtype)
    loss, dlogits = check(backend, logits, np.array([1, 2, 0, 2]))
    assert loss[0] == 2e4
    np.testing.assert_array_equal(dlogits[0], [0.25, -0.25, 0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.0, 7.25, -1e4, 1e30])
def test_equal_logits_share_the_probability(backend: Backend, value: float, dtype: str) -> None:
    logits = np.full((4, 8), value, dtype)
    loss, dlogits = check(backend, logits, np.array([0, 3, 7, 7]))
    np.testing.assert_allclose(loss, np.log(8), rtol=2 * np.finfo(dtype).eps)
    assert dlogits[0, 1] == 1 / 32
    assert dlogits[0, 0] == -7 / 32


def test_one_class_costs_nothing(backend: Backend) -> None:
    loss, dlogits = check(backend, np.float32([[3], [-1e30]]), np.array([0, 0]))
    np.testing.assert_array_equal(loss, 0)
    np.testing.assert_array_equal(dlogits, 0)


def test_masked_classes_are_minus_infinity(backend: Backend) -> None:
    """A class ruled out by -inf has probability 0 and leaves the others as if it were not there."""
    logits, labels = np.float64([[1, -np.inf, 2], [-np.inf, 0, 0]]), np.array([2, 1])
    loss, dlogits = bn.softmax_cross_entropy(backend.asarray(logits), backend.asarray(labels))
    one = backend.asnumpy(bn.softmax_cross_entropy(*backend.arrays(np.float64([[1, 2]]), np.array([1])))[0])
    np.testing.assert_allclose(backend.asnumpy(loss), [one[0], np.log(2)], rtol=1e-15)
    np.testing.assert_array_equal(backend.asnumpy(dlogits)[[0, 1], [1, 0]], 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_matches_central_differences(backend: Backend, rng: np.random.Generator, dtype: str) -> None:
    logits, labels = make_case(rng, (3, 5), "float64")
    _, dlogits = bn.softmax_cross_entropy(*backend.arrays(logits.astype(dtype), labels))

    def loss(logits: np.ndarray) -> float:
        return float(backend.asnumpy(bn.softmax_cross_entropy(*backend.arrays(logits, labels))[0]).mean())

    logits = logits.astype(dtype).astype("float64")
    for index in np.ndindex(logits.shape):
        up, down = logits.copy(), logits.copy()
        up[index] += 1e-6
        down[index] -= 1e-6
        numeric = (loss(up) - loss(down)) / 2e-6
        assert abs(numeric - float(backend.asnumpy(dlogits)[index])) <= 1e-9 + 2 * np.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_of_a_row_sums_to_zero(backend: Backend, rng: np.random.Generator, dtype: str) -> None:
    logits, labels = make_case(rng, (64, 10), dtype)
    _, dlogits = bn.softmax_cross_entropy(*backend.arrays(logits, labels))
    sums = backend.asnumpy(dlogits).astype(oracle.Extended).sum(1)
    assert (np.abs(sums) <= oracle.SLACK * oracle.unit_roundoff(logits.dtype) * 2 / 64).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [45, 150])
def test_rows_are_independent_bit_for_bit(backend: Backend, rng: np.random.Generator, classes: int, dtype: str) -> None:
    """The same example in another mini-batch: equal but for the division by its size, here a power of two."""
    logits, labels = make_case(rng, (64, classes), dtype)
    whole = bn.softmax_cross_entropy(*backend.arrays(logits, labels))
    loss, dlogits = (backend.asnumpy(array) for array in whole)
    for first, rows in ((0, 16), (13, 4), (63, 1)):
        some = slice(first, first + rows)
        part = bn.softmax_cross_entropy(*backend.arrays(logits[some], labels[some]))
        np.testing.assert_array_equal(backend.asnumpy(part[0]), loss[some])
        np.testing.assert_array_equal(backend.asnumpy(part[1]), dlogits[some] * (64 // rows))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_stays_in_its_row(backend: Backend, rng: np.random.Generator, bad: float) -> None:
    """NaN, and infinity, of which the gradient is not defined, make the row NaN and leave the rest as it is."""
    logits, labels = make_case(rng, (9, 40), "float32")
    spoilt = logits.copy()
    spoilt[4, 35] = bad
    clean = bn.softmax_cross_entropy(*backend.arrays(logits, labels))
    got = bn.softmax_cross_entropy(*backend.arrays(spoilt, labels))
    for want, array in zip(clean, got, strict=True):
        want, array = backend.asnumpy(want), backend.asnumpy(array)
        np.testing.assert_array_equal(np.delete(array, 4, 0), np.delete(want, 4, 0))
    assert np.isnan(backend.asnumpy(got[0])[4])
    assert np.isnan(backend.asnumpy(got[1])[4]).all()


@pytest.mark.parametrize(
    ("dtype", "wrong"), [("int32", -1), ("int32", 10), ("int64", 10), ("int64", 2**32), ("int64", -(2**63))]
)
def test_a_label_out_of_range(backend: Backend, rng: np.random.Generator, dtype: str, wrong: int) -> None:
    """NumPy refuses it and writes nothing; a kernel, which nobody waits for, gives NaN in that row alone."""
    logits, labels = make_case(rng, (9, 10), "float32")
    labels = labels.astype(dtype)
    spoilt = labels.copy()
    spoilt[5] = wrong
    on = backend.arrays(logits, spoilt)
    out = backend.empty((9,), "float32"), backend.empty((9, 10), "float32")
    if backend.is_numpy:
        with refused(backend, ValueError, f"labels must be from 0 to 9, the classes of logits; got {wrong}", *on, *out):
            bn.softmax_cross_entropy(*on, out=out)
        return
    want = bn.softmax_cross_entropy(*backend.arrays(logits, labels))
    bn.softmax_cross_entropy(*on, out=out)
    for clean, array in zip(want, out, strict=True):
        clean, array = backend.asnumpy(clean).copy(), backend.asnumpy(array)
        clean[5] = np.nan
        np.testing.assert_array_equal(array, clean)


@pytest.mark.parametrize("shape", [(64, 10), (7, 33), (5, 200), (3, 2500)])
def test_out_may_be_the_logits(backend: Backend, rng: np.random.Generator, shape: tuple[int, int]) -> None:
    logits, labels = backend.arrays(*make_case(rng, shape, "float32"))
    loss, dlogits = bn.softmax_cross_entropy(logits, labels)
    out = backend.empty(shape[:1], "float32"), logits
    got = bn.softmax_cross_entropy(logits, labels, out=out)
    assert got[0] is out[0]
    assert got[1] is logits
    np.testing.assert_array_equal(backend.asnumpy(out[0]), backend.asnumpy(loss))
    np.testing.assert_array_equal(backend.asnumpy(logits), backend.asnumpy(dlogits))


def test_inputs_are_never_written(backend: Backend, rng: np.random.Generator) -> None:
    logits, labels = make_case(rng, (64, 10), "float32")
    on = backend.arrays(logits, labels)
    bn.softmax_cross_entropy(*on)
    np.testing.assert_array_equal(backend.asnumpy(on[0]), logits)
    np.testing.assert_array_equal(backend.asnumpy(on[1]), labels)


@pytest.mark.parametrize("shape", [(0, 10), (0, 0)])
def test_no_examples_give_empty_results(backend: Backend, shape: tuple[int, int]) -> None:
    logits, labels = backend.arrays(np.zeros(shape, "float32"), np.zeros(0, "int32"))
    loss, dlogits = bn.softmax_cross_entropy(logits, labels)
    assert (loss.shape, dlogits.shape) == ((0,), shape)


ERRORS: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("no classes", {"logits": np.zeros((6, 0), "float32")}, ValueError, r"\(6, 0\): there is no class to be right"),
    ("one dimension", {"logits": np.zeros(6, "float32")}, ValueError, r"must have the shape \(N, K\), got \(6,\)"),
    ("float16", {"logits": np.zeros((6, 3), "float16")}, TypeError, "must be float32 or float64, got float16"),
    ("labels float", {"labels": np.zeros(6, "float32")}, TypeError, r"int32 or int64, got float32.*astype\('int64'\)"),
    ("labels int8", {"labels": np.zeros(6, "int8")}, TypeError, "labels must be int32 or int64, got int8"),
    ("labels one-hot", {"labels": np.zeros((6, 3), "int64")}, ValueError, r"the shape \(6,\), got \(6, 3\)"),
    ("labels short", {"labels": np.zeros(5, "int64")}, ValueError, r"labels must have the shape \(6,\), got \(5,\)"),
    ("labels gaps", {"labels": np.zeros(12, "int64")[::2]}, ValueError, "labels must be contiguous in C order"),
    ("Fortran", {"logits": np.zeros((3, 6), "float32").T}, ValueError, "logits must be contiguous in C order"),
]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"ignore_index": 1.5}, TypeError, "ignore_index must be an integer, got 1.5"),
        ({"ignore_index": 2**63}, ValueError, "ignore_index must be from -9223372036854775807 to"),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing must be between 0 and 1 and finite, got 1.5"),
        ({"label_smoothing": "0.1"}, TypeError, "label_smoothing must be a number"),
    ],
)
def test_option_errors_say_what_came(backend: Backend, options: dict, error: type[Exception], message: str) -> None:
    arrays = backend.arrays(np.ones((6, 3), "float32"), np.zeros(6, "int64"))
    with refused(backend, error, message, *arrays):
        bn.softmax_cross_entropy(*arrays, **options)


@pytest.mark.parametrize(("spoilt", "error", "message"), [e[1:] for e in ERRORS], ids=[e[0] for e in ERRORS])
def test_errors_say_what_came(backend: Backend, spoilt: dict, error: type[Exception], message: str) -> None:
    arrays = {"logits": np.ones((6, 3), "float32"), "labels": np.zeros(6, "int64")} | spoilt
    on = [backend.like(array) for array in arrays.values()]
    with refused(backend, error, message, *on):
        bn.softmax_cross_entropy(*on)


@pytest.mark.emulator
def test_same_bits_in_every_schedule(emulated: EmulatorRuntime, rng: np.random.Generator) -> None:
    logits, labels = (emulated.asarray(array) for array in make_case(rng, (27, 70), "float32"))
    want = bn.softmax_cross_entropy(logits, labels)
    for seed in range(1, 7):
        with emulated.schedule(seed=seed, resident=(1, 2, 64)[seed % 3]):
            for one, other in zip(want, bn.softmax_cross_entropy(logits, labels), strict=True):
                np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("shape", [(105_000, 10), (530, 2000)])
def test_threads_change_no_bit(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, shape: Any) -> None:
    logits, labels = make_case(rng, shape, "float32")
    assert logits.size >= threads.WORTH_SHARING
    found = []
    for number in (1, 2, 3):
        monkeypatch.setattr(threads, "_threads", number)
        monkeypatch.setattr(threads, "_pool", None)
        found.append(bn.softmax_cross_entropy(logits, labels))
    for loss, dlogits in found[1:]:
        np.testing.assert_array_equal(loss, found[0][0])
        np.testing.assert_array_equal(dlogits, found[0][1])


@pytest.mark.parametrize("options", [{}, {"ignore_index": 2}, {"label_smoothing": 0.3, "ignore_index": 2}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_agrees_with_torch(
    torch: ModuleType, backend: Backend, rng: np.random.Generator, dtype: str, options: dict[str, Any]
) -> None:
    logits, labels = make_case(rng, (64, 10), dtype)
    leaf = torch.tensor(logits, requires_grad=True)
    torch_loss = torch.nn.functional.cross_entropy(leaf, torch.tensor(labels), reduction="none", **options)
    torch.nn.functional.cross_entropy(leaf, torch.tensor(labels), **options).backward()
    loss, dlogits = bn.softmax_cross_entropy(*backend.arrays(logits, labels), **options)
    tolerance = 64 * float(np.finfo(dtype).eps)
    np.testing.assert_allclose(backend.asnumpy(loss), torch_loss.detach().numpy(), rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(backend.asnumpy(dlogits), leaf.grad.numpy(), rtol=tolerance, atol=tolerance / 64)
