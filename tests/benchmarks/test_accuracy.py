"""Our kernels and our CPU path keep the accuracy contract on every input, and the documents say what was measured."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks.accuracy import contract as accuracy
from benchmarks.harness.timing import RESULTS
from benchmarks.report import accuracy as report
from tools.backends import Backend

# Held by one block, and large for NumPy, which takes it in blocks.
SHAPES = [(64, 5), (1030, 3), (4100, 5)]
OURS = ("our kernels, emulated", "our CPU path")


def make(name: str, shape: tuple[int, int], dtype: str) -> accuracy.Case:
    """Return a case; skips where the data type has no such numbers, or is not installed."""
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed: there is no bfloat16")
    case = accuracy.make(accuracy.inputs(*shape)[name], dtype)
    if case is None:
        pytest.skip(f"{name} is beyond the largest {dtype}")
    return case


@pytest.mark.parametrize("dtype", accuracy.DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", accuracy.inputs(2, 1))
def test_the_contract_is_kept(backend: Backend, name: str, shape: tuple[int, int], dtype: str) -> None:
    case = make(name, shape, dtype)
    found, promised = accuracy.errors(case, accuracy.ours(backend, case)), accuracy.promise(case)
    beyond = {quantity: error for quantity, error in found.items() if not error <= promised[quantity]}
    assert not beyond, f"promised {promised}"
    assert accuracy.kept(found, promised)


def results(case: accuracy.Case) -> accuracy.Results:
    """Return right results of a case in float32: those of the formulas in float64."""
    double = accuracy.Case(*(array.astype(np.float64) for array in case))
    found = accuracy.ours(accuracy.backends.make("numpy"), double)
    mean = found["mean"].astype(np.float32)
    rounded = {name: a.astype(np.float32) for name, a in found.items()}
    return rounded | {"mean": mean, "mean_low": (found["mean"] - mean).astype(np.float32)}


@pytest.mark.parametrize("quantity", ["mean", "rstd", "y", "dx", "dgamma", "dbeta"])
def test_an_error_beyond_the_contract_is_seen(quantity: str) -> None:
    case = make("5 + 0.1 z", (64, 3), "float32")
    right = results(case)
    promised = accuracy.promise(case)
    assert accuracy.kept(accuracy.errors(case, right), promised)
    for wrong in (right[quantity] * np.float32(1 + 1e-4), np.full_like(right[quantity], np.nan)):
        found = accuracy.errors(case, right | {quantity: wrong})
        assert [name for name, error in found.items() if error > promised[name]] == [quantity]


def test_a_mean_in_one_number_does_not_keep_the_contract() -> None:
    case = make("1e7 + z", (64, 3), "float32")
    right = results(case)
    found = accuracy.errors(case, right | {"mean_low": np.zeros_like(right["mean_low"])})
    assert found["mean"] > 1e4


def test_a_constant_channel_may_have_no_error() -> None:
    case = make("constant 1e+07", (64, 3), "float32")
    right = results(case)
    assert accuracy.kept(accuracy.errors(case, right), accuracy.promise(case))
    next_to = np.nextafter(right["y"], np.float32(np.inf))
    assert not accuracy.kept(accuracy.errors(case, right | {"y": next_to}), accuracy.promise(case))


@pytest.mark.parametrize("dtype", accuracy.DTYPES)
@pytest.mark.parametrize("inner", [1, 16])
def test_pytorch_is_given_the_same_numbers(dtype: str, inner: int) -> None:
    """A transposed result would be off by as much as it is large: millions of last places."""
    pytest.importorskip("torch", reason="PyTorch is not installed")
    case = make("z", (64, 5), dtype)
    assert max(accuracy.errors(case, accuracy.pytorch(case, inner)).values()) < 20


def test_the_committed_run_is_whole_and_ours_keep_the_contract() -> None:
    """A run that left out an input, or in which the contract was broken, must not be what the documents show."""
    rows = json.loads((RESULTS / "accuracy.json").read_text(encoding="utf-8"))["errors"]
    names = accuracy.inputs(2, 1)
    possible = {(dtype, name) for dtype in accuracy.DTYPES for name in names}
    for way in OURS:
        assert all(row["kept"] for row in rows if row["way"] == way)
        absent = possible - {(row["dtype"], row["input"]) for row in rows if row["way"] == way}
        assert {dtype for dtype, _ in absent} == {"float16"}
        assert {name for _, name in absent} == {"1e6 + z", "1e7 + z", "constant 1e+07", "constant 1e+10"}


def test_the_report_marks_what_is_beyond_the_contract() -> None:
    promised = {"dtype": "float32", "input": "z", "way": "promised"} | dict.fromkeys(report.QUANTITIES, 6.0)
    good = promised | {"way": "a"} | dict.fromkeys(report.QUANTITIES, 0.123) | {"kept": True}
    bad = good | {"way": "b", "y": 7.0, "dx": "not finite", "kept": False}
    run = {"versions": {"NumPy": "2.0", "torch": None}, "rows": 8, "channels": 2, "date": "2026-01-02"}
    text = report.tables(run | {"errors": [promised, good, bad]})
    assert "| a | 1 | 1 |\n| b | 1 | 0 |" in text
    assert "| z | promised | 6 | 6 | 6 | 6 | 6 | 6 |  |" in text
    assert "|  | a | 0.12 | 0.12 | 0.12 | 0.12 | 0.12 | 0.12 | yes |" in text
    assert "|  | b | 0.12 | 0.12 | **7** | **not finite** | 0.12 | 0.12 | **no** |" in text
    assert text.endswith("8 rows, 2 channels; NumPy 2.0; 2026-01-02.")
