"""Synchronised batch norm over ranks is batch norm of the concatenated mini-batch, in one collective each way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import bnkernels as bn
from bnkernels.distributed import (
    Communicator,
    RankError,
    run_threads,
    sync_batch_norm_backward,
    sync_batch_norm_forward,
)
from bnkernels.distributed.communicator import MESSAGE
from tests.ops.test_batch_norm_layouts import as_rows, make_tensors
from tests.ops.test_batch_norm_masked import dtype_named, make_mask, spoiled, spread_mask
from tests.ops.test_batch_norm_statistics import parts_of
from tools import oracle
from tools.backends import Backend

# Shape, axis of the channels, and numbers of examples of the ranks.
SHARDS = [
    ((40, 7), 1, (10, 25, 5)),
    ((40, 3, 9), 1, (0, 39, 0, 1)),
    ((40, 4, 5), -1, (20, 20)),
    ((40, 5), 1, (40,)),
]
TIMEOUT = 20.0


class Counted(Communicator):
    """Ranks that count what they gather."""

    def __init__(self, ranks: Communicator) -> None:
        self.rank, self.size, self._ranks = ranks.rank, ranks.size, ranks
        self.gathered: list[int] = []

    def allgather(self, values: Any) -> Any:
        """Gather, and remember how much."""
        self.gathered.append(values.nbytes)
        return self._ranks.allgather(values)


def over_ranks(shards: tuple[int, ...], work: Callable[[Communicator, int], Any]) -> list[Any]:
    """Return the results of all ranks."""
    return run_threads(len(shards), lambda ranks: work(ranks, ranks.rank), timeout=TIMEOUT)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize(("shape", "axis", "shards"), SHARDS)
def test_the_ranks_together_are_the_mini_batch(
    backend: Backend, rng: np.random.Generator, shape: tuple, axis: int, dtype: str, shards: tuple
) -> None:
    *tensors, gamma, beta = make_tensors(rng, shape, axis, dtype_named(dtype))
    xs, dys, residuals = ([backend.asarray(part) for part in parts_of(array, shards)] for array in tensors)
    options = {"axis": axis, "activation": "tanh"}

    def work(ranks: Communicator, rank: int) -> tuple:
        vectors = backend.arrays(gamma, beta)
        given = {"residual": residuals[rank], **options}
        y, statistics = sync_batch_norm_forward(ranks, xs[rank], *vectors, eps=1e-3, **given)
        arrays = dys[rank], xs[rank], *vectors, statistics
        return y, statistics, *sync_batch_norm_backward(ranks, *arrays, **given)

    found = [[backend.asnumpy(array) for array in of] for of in over_ranks(shards, work)]
    y, dx, dresidual = (as_rows(np.concatenate([of[i] for of in found]), axis) for i in (0, 2, 5))
    for _, statistics, *_ in found[1:]:
        np.testing.assert_array_equal(statistics, found[0][1])
    rows = [as_rows(array, axis) for array in tensors]
    exact = oracle.forward(rows[0], gamma, beta, 1e-3, "tanh", residual=rows[2])
    oracle.assert_within(y, exact.y, 2 * exact.z_bound, "y")
    grads = oracle.backward(rows[1], rows[0], gamma, beta, 1e-3, "tanh", residual=rows[2])
    oracle.assert_within(dx, grads.dx, 2 * grads.dx_bound, "dx")
    oracle.assert_within(dresidual, grads.dresidual, 2 * grads.dresidual_bound, "dresidual")
    for place, name in ((3, "dgamma"), (4, "dbeta")):
        total = sum(of[place].astype(np.float64) for of in found).astype(found[0][place].dtype)
        oracle.assert_within(total, getattr(grads, name), 2 * getattr(grads, f"{name}_bound"), name)


MEANS = [("float32", 1e4, 0), ("float32", 1e7, 0), ("float32", 0, 1e5), ("float32", -3e6, 1e3)]
MEANS += [("float64", 1e3, 0), ("float64", -3e6, 1e3)]  # beyond it extended precision is no oracle of float64


@pytest.mark.parametrize(("dtype", "offset", "spread"), MEANS)
def test_means_that_are_large_or_differ_between_the_ranks(
    backend: Backend, rng: np.random.Generator, offset: float, spread: float, dtype: str
) -> None:
    """The means of the ranks lie `spread` apart: then nearly all of the variance is between the ranks."""
    shards = (100, 399, 1)
    x = np.concatenate([rng.standard_normal((n, 4)) + offset + spread * i for i, n in enumerate(shards)]).astype(dtype)
    dy = rng.standard_normal(x.shape).astype(dtype)
    xs, dys = ([backend.asarray(part) for part in parts_of(array, shards)] for array in (x, dy))

    def work(ranks: Communicator, rank: int) -> tuple:
        y, statistics = sync_batch_norm_forward(ranks, xs[rank])
        return y, *sync_batch_norm_backward(ranks, dys[rank], xs[rank], None, None, statistics)

    y, dx = (np.concatenate([backend.asnumpy(of[i]) for of in over_ranks(shards, work)]) for i in (0, 1))
    exact, grads = oracle.forward(x, None, None, 1e-5), oracle.backward(dy, x, None, None, 1e-5)
    oracle.assert_within(y, exact.y, 2 * exact.z_bound, "y")
    oracle.assert_within(dx, grads.dx, 2 * grads.dx_bound, "dx")


def test_one_collective_each_way_and_an_agreement_before_the_first(rng: np.random.Generator) -> None:
    def work(ranks: Communicator) -> tuple[list[int], Counter]:
        counted = Counted(ranks)
        x = rng.standard_normal((8, 5)).astype("float32")
        for _ in range(3):
            _, statistics = sync_batch_norm_forward(counted, x)
            sync_batch_norm_backward(counted, x, x, None, None, statistics)
        return counted.gathered

    for gathered in run_threads(2, work):
        step = [4 * 5 * 4, 3 * 5 * 4]
        assert gathered == [MESSAGE, step[0], MESSAGE, step[1], *step, *step]


def test_running_statistics_are_the_same_bits_on_all_ranks_and_those_of_the_whole(
    backend: Backend, rng: np.random.Generator
) -> None:
    whole, shards = rng.standard_normal((5, 40, 6)) * 3 + 7, (13, 0, 27)

    def work(ranks: Communicator, rank: int) -> tuple:
        mean, var = backend.arrays(np.zeros(6), np.ones(6))
        for number, x in enumerate(whole):
            part = backend.asarray(parts_of(x, shards)[rank])
            options = {"momentum": None, "batches_before": number} if rank >= 0 else {}
            sync_batch_norm_forward(ranks, part, None, None, mean, var, **options)
        return backend.asnumpy(mean), backend.asnumpy(var)

    found = over_ranks(shards, work)
    for mean, var in found:
        np.testing.assert_array_equal(mean, found[0][0])
        np.testing.assert_array_equal(var, found[0][1])
        np.testing.assert_allclose(mean, whole.mean((0, 1)), rtol=1e-13)
        np.testing.assert_allclose(var, whole.var(1, ddof=1).mean(0), rtol=1e-12)


def test_two_runs_have_the_same_bits(rng: np.random.Generator) -> None:
    x, dy = rng.standard_normal((2, 57, 33)).astype("float32")
    shards = (20, 30, 7)

    def work(ranks: Communicator, rank: int) -> list[bytes]:
        part, gradient = (parts_of(array, shards)[rank] for array in (x, dy))
        y, statistics = sync_batch_norm_forward(ranks, part)
        found = y, statistics, *sync_batch_norm_backward(ranks, gradient, part, None, None, statistics)
        return [array.tobytes() for array in found]

    assert over_ranks(shards, work) == over_ranks(shards, work)


def test_masks(backend: Backend, rng: np.random.Generator) -> None:
    shape, shards = (30, 4, 3), (12, 18)
    *tensors, gamma, beta = make_tensors(rng, shape, 1, np.dtype("float32"))
    mask = make_mask(rng, (30, 3))
    rows = spread_mask(mask, shape, 1)
    x, dy = (spoiled(array, rows, 1) for array in tensors[:2])

    def work(ranks: Communicator, rank: int) -> tuple:
        part, gradient, valid = (backend.asarray(parts_of(array, shards)[rank]) for array in (x, dy, mask))
        vectors, options = backend.arrays(gamma, beta), {"mask": valid, "activation": "relu"}
        y, statistics = sync_batch_norm_forward(ranks, part, *vectors, **options)
        return y, *sync_batch_norm_backward(ranks, gradient, part, *vectors, statistics, **options)

    found = over_ranks(shards, work)
    vectors, options = backend.arrays(gamma, beta), {"mask": backend.asarray(mask), "activation": "relu"}
    on_x, on_dy = backend.arrays(x, dy)
    y, statistics = bn.batch_norm_forward(on_x, *vectors, **options)
    dx, *_ = bn.batch_norm_backward(on_dy, on_x, *vectors, statistics, **options)
    for place, right in ((0, y), (1, dx)):
        got = np.concatenate([backend.asnumpy(of[place]) for of in found])
        np.testing.assert_allclose(got, backend.asnumpy(right), rtol=2e-5, atol=2e-6)


def test_an_empty_mini_batch_on_all_ranks_leaves_the_running_statistics(backend: Backend) -> None:
    def work(ranks: Communicator) -> tuple:
        x, mean, var = backend.arrays(np.empty((0, 3), "float32"), np.full(3, 2, "float32"), np.full(3, 3, "float32"))
        y, statistics = sync_batch_norm_forward(ranks, x, None, None, mean, var)
        return y, mean, var, *sync_batch_norm_backward(ranks, y, x, None, None, statistics)

    for y, mean, var, dx, dgamma, dbeta in run_threads(2, work):
        assert y.shape == dx.shape == (0, 3)
        for array, value in ((mean, 2), (var, 3), (dgamma, 0), (dbeta, 0)):
            np.testing.assert_array_equal(backend.asnumpy(array), value)


def test_groups_of_ranks_have_a_mini_batch_each(rng: np.random.Generator) -> None:
    x = rng.standard_normal((4, 6, 3))

    def work(ranks: Communicator) -> np.ndarray:
        return sync_batch_norm_forward(ranks.split(ranks.rank % 2), x[ranks.rank])[0]

    found = run_threads(4, work)
    for members in ((0, 2), (1, 3)):
        right, _ = bn.batch_norm_forward(np.concatenate([x[member] for member in members]))
        np.testing.assert_allclose(np.concatenate([found[member] for member in members]), right, rtol=1e-12, atol=1e-14)


def test_in_place_and_with_parameters_of_16_bits(rng: np.random.Generator) -> None:
    x, dy, gamma, beta = (rng.standard_normal(shape).astype("float16") for shape in ((8, 3), (8, 3), (3,), (3,)))

    def work(ranks: Communicator) -> tuple:
        part, gradient = x[4 * ranks.rank :][:4].copy(), dy[4 * ranks.rank :][:4].copy()
        y, statistics = sync_batch_norm_forward(ranks, part, gamma, beta)
        fresh = sync_batch_norm_backward(ranks, gradient, part, gamma, beta, statistics)
        out = gradient, np.empty(3, "float16"), np.empty(3, "float16")
        sync_batch_norm_backward(ranks, gradient, part, gamma, beta, statistics, out=out)
        sync_batch_norm_forward(ranks, part, gamma, beta, out=(part, statistics))
        return zip((part, *out), (y, *fresh), strict=True)

    for pairs in run_threads(2, work):
        for got, right in pairs:
            assert got.dtype == right.dtype == np.float16
            np.testing.assert_array_equal(got, right)


def test_what_is_done_meanwhile_comes_between_start_and_end(rng: np.random.Generator) -> None:
    events: list[str] = []

    class Observed(Counted):
        def start(self, values: Any) -> Callable[[], Any]:
            events.append("start")
            gathered = self.allgather(values)
            return lambda: (events.append("end"), gathered)[1]

    def work(ranks: Communicator) -> None:
        observed, x = Observed(ranks), rng.standard_normal((4, 2))
        _, statistics = sync_batch_norm_forward(ranks, x)
        given = observed, x, x, None, None, statistics
        sync_batch_norm_backward(*given, meanwhile=lambda: events.append("meanwhile"))

    run_threads(1, work)
    assert events == ["start", "meanwhile", "end"]


DIFFERENCES = {
    "channels": (lambda rank: {"x": np.ones((4, 3 + rank))}, ("3 channels", "4 channels")),
    "dtype": (lambda rank: {"x": np.ones((4, 3), ["float32", "float64"][rank])}, ("float32", "float64")),
    "eps": (lambda rank: {"x": np.ones((4, 3)), "eps": [1e-5, 1e-3][rank]}, ("eps 1e-05", "eps 0.001")),
    "order": (lambda rank: {"x": np.ones((4, 3)), "name": ["1", "4"][rank]}, ("layer '1'", "layer '4'")),
    "momentum": (lambda rank: {"x": np.ones((4, 3)), "momentum": [0.1, 0.2][rank]}, ("0.1", "0.2")),
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_ranks_that_differ_all_raise_the_same_error(name: str) -> None:
    given, texts = DIFFERENCES[name]
    messages = []

    def work(ranks: Communicator) -> None:
        with pytest.raises(RankError) as raised:
            sync_batch_norm_forward(ranks, **given(ranks.rank))
        messages.append(str(raised.value))

    run_threads(2, work, timeout=TIMEOUT)
    assert messages[0] == messages[1]
    assert all(text in messages[0] for text in ("rank 0", "rank 1", *texts))


def test_an_argument_that_is_wrong_on_one_rank_is_an_error_on_all() -> None:
    messages = {}

    def work(ranks: Communicator) -> None:
        gamma = np.ones(3 + ranks.rank, "float32")
        with pytest.raises((ValueError, RankError)) as raised:
            sync_batch_norm_forward(ranks, np.ones((4, 3), "float32"), gamma)
        messages[ranks.rank] = type(raised.value), str(raised.value)

    run_threads(2, work, timeout=TIMEOUT)
    assert messages[1][0] is ValueError
    assert messages[0][0] is RankError
    assert "rank 1 cannot go on: ValueError: gamma must have the shape (3,)" in messages[0][1]


def test_a_communicator_is_asked_for() -> None:
    with pytest.raises(TypeError, match="communicator must be a Communicator"):
        sync_batch_norm_forward(np.ones((4, 3)), np.ones((4, 3)))
