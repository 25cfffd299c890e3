"""The mini-batch whose turn it is: rows in their order or by index, a row of the schedule, and a counter that moves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import bnkernels as bn
from benchmarks.harness.case import Case, Provider
from benchmarks.ops import bench_mini_batch
from tests.regress.refusal import refused
from tools import backends
from tools.backends import Backend
from tools.emulator import EmulatorRuntime


def make(rng: np.random.Generator, backend: Backend, batch: int, inputs: int, dtype: str, steps: int = 3) -> dict:
    """Return the arguments for so many steps."""
    rows = steps * batch
    arrays = {
        "x": rng.standard_normal((rows, inputs)).astype(dtype),
        "labels": rng.integers(0, 9, rows).astype(np.int32),
        "schedule": rng.standard_normal((steps, 3)).astype(dtype),
        "counter": np.zeros(2, np.uint32),
    }
    return {name: backend.asarray(array) for name, array in arrays.items()}


def outputs(backend: Backend, batch: int, inputs: int, dtype: str) -> tuple:
    return backend.empty((batch, inputs), dtype), backend.asarray(np.zeros(batch, "int32")), backend.empty((3,), dtype)


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("batch", "inputs"), [(64, 64), (1, 1), (7, 33), (60, 784)])
def test_every_step_has_its_rows(
    backend: Backend, rng: np.random.Generator, batch: int, inputs: int, dtype: str, indexed: bool
) -> None:
    given, out = make(rng, backend, batch, inputs, dtype), outputs(backend, batch, inputs, dtype)
    rows = np.arange(3 * batch).reshape(3, batch).astype(np.int32)
    if indexed:
        rows = rng.integers(0, 3 * batch, rows.shape).astype(np.int32)
        given["indices"] = backend.asarray(rows)
    host = {name: backend.asnumpy(array).copy() for name, array in given.items()}
    for step in range(3):
        found = bn.mini_batch(**given, out=out)
        assert all(one is two for one, two in zip(found, out, strict=True))
        wanted = host["x"][rows[step]], host["labels"][rows[step]], host["schedule"][step]
        for one, two in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(backend.asnumpy(one), two)
        assert backend.asnumpy(given["counter"]).tolist() == [step + 1, 0]


def test_numpy_looks_whether_there_is_such_a_step(rng: np.random.Generator) -> None:
    backend = backends.make("numpy")
    given, out = make(rng, backend, 4, 2, "float32"), outputs(backend, 4, 2, "float32")
    given["counter"][0] = 3
    with refused(backend, IndexError, "counter is at step 3, and there is no such mini-batch of 4", *given.values()):
        bn.mini_batch(**given, out=out)


@pytest.mark.emulator
def test_the_counter_moves_once_whatever_the_order_of_blocks(
    emulated: EmulatorRuntime, rng: np.random.Generator
) -> None:
    backend = backends.make("emulator")
    for seed in range(1, 5):
        given, out = make(rng, backend, 60, 100, "float32"), outputs(backend, 60, 100, "float32")
        with emulated.schedule(seed, resident=3):
            bn.mini_batch(**given, out=out)
        assert emulated.launches[-1].launch.grid[0] > 1
        np.testing.assert_array_equal(backend.asnumpy(out[0]), backend.asnumpy(given["x"])[:60])
        assert backend.asnumpy(given["counter"]).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": np.zeros((6, 2), "float16")}, TypeError, "x must be float32 or float64, got float16"),
        ({"x": np.zeros(6, "float32")}, ValueError, "x and schedule must have two dimensions"),
        ({"labels": np.zeros(6, "int64")}, TypeError, "labels must be int32, got int64"),
        ({"counter": np.zeros(1, "uint32")}, ValueError, r"counter must have the shape \(2,\), got \(1,\)"),
        ({"schedule": np.zeros((3, 2), "float32")}, ValueError, r"scalars must have the shape \(2,\), got \(3,\)"),
        ({"indices": np.zeros((3, 5), "int32")}, ValueError, r"indices must have the shape \(3, 2\), got \(3, 5\)"),
    ],
)
def test_what_is_wrong_is_refused(
    backend: Backend, rng: np.random.Generator, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    given, out = make(rng, backend, 2, 2, "float32"), outputs(backend, 2, 2, "float32")
    given |= {name: backend.asarray(array) for name, array in change.items()}
    with refused(backend, error, message, given["counter"]):
        bn.mini_batch(**given, out=out)


def test_an_output_over_the_examples_is_refused(backend: Backend, rng: np.random.Generator) -> None:
    given, out = make(rng, backend, 2, 2, "float32"), outputs(backend, 2, 2, "float32")
    with refused(backend, ValueError, "x_out overlaps x in memory", *given.values()):
        bn.mini_batch(**given, out=(given["x"][:2], *out[1:]))


@pytest.mark.parametrize("provider", bench_mini_batch.OP.providers[::2], ids=lambda provider: provider.name)
def test_what_is_benchmarked_is_right(provider: Provider) -> None:
    if reason := provider.absent():
        pytest.skip(reason)
    case = Case("mini_batch", "forward", (6, 5), "float64")
    arrays = bench_mini_batch.inputs(case, np.random.default_rng(0).standard_normal)
    call = provider.prepare(case, arrays)
    for _ in range(2):
        for one, two in zip(call(), bench_mini_batch.reference(case, arrays, np), strict=True):
            np.testing.assert_array_equal(np.asarray(one), two)


@pytest.mark.parametrize(
    ("counter", "key", "wanted"),
    [  # the known answers of Random123, of which the first word of a counter is the lower one
        (0x0000000000000000, 0x00000000, 0xFF1DAE59),
        (0xFFFFFFFFFFFFFFFF, 0xFFFFFFFF, 0x2C3F628B),
        (0x85A308D3243F6A88, 0x13198A2E, 0xDD7CE038),
    ],
)
def test_random_rows_are_those_of_philox(counter: int, key: int, wanted: int) -> None:
    rows = 2**31 - 1
    (found,) = bn.random_rows(key, 1, rows, start=counter).tolist()
    assert found == wanted * rows >> 32


def test_random_rows_are_all_rows_alike(rng: np.random.Generator) -> None:
    """A chi-squared of 99 degrees of freedom is above 160 once in 10,000 times; this seed is fixed."""
    counts = np.bincount(bn.random_rows(3, 100_000, 100), minlength=100)
    assert counts.size == 100
    assert ((counts - 1000.0) ** 2 / 1000).sum() < 160
    np.testing.assert_array_equal(
        bn.random_rows(3, 5, 100, start=2**32 - 2)[2:], bn.random_rows(3, 3, 100, start=2**32)
    )


@pytest.mark.parametrize("rows", [0, 2**31])
def test_random_rows_need_rows(rows: int) -> None:
    with pytest.raises(ValueError, match=r"rows must be from 1 to 2\*\*31 - 1, got"):
        bn.random_rows(0, 1, rows)
