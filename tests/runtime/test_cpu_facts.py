"""Facts of NumPy arrays, as compiled code reads them: each that differs makes another call."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from bnkernels.runtime import cpu

BUFFER = np.zeros(64, np.float32)


def matrix() -> np.ndarray:
    """Return one view of the same memory, always a new object."""
    return BUFFER[:24].reshape(4, 6)


def read_only() -> np.ndarray:
    """Return that view, which cannot be written."""
    view = matrix()
    view.flags.writeable = False
    return view


OTHERS: dict[str, Callable[[], Any]] = {
    "address": lambda: BUFFER[1:25].reshape(4, 6),
    "shape": lambda: BUFFER[:24].reshape(6, 4),
    "axes": lambda: BUFFER[:24],
    "strides": lambda: np.lib.stride_tricks.as_strided(BUFFER, (4, 6), (32, 4)),
    "order": lambda: np.lib.stride_tricks.as_strided(BUFFER, (4, 6), (4, 16)),
    "dtype": lambda: matrix().view(np.int32),
    "byte order": lambda: matrix().view(np.dtype(np.float32).newbyteorder()),
    "read-only": read_only,
    "nothing": lambda: None,
}


@pytest.fixture
def facts() -> ModuleType:
    pytest.importorskip("numba")
    with cpu.using("compiled"):
        return cpu.kernels("bnkernels.runtime.cpu.facts")


def hashed(facts: ModuleType, arrays: tuple) -> int:
    return facts.walk(facts.PLACES, id(arrays), len(arrays), facts.NO_FACTS, False)


def equal(facts: ModuleType, arrays: tuple, others: tuple) -> bool:
    return facts.walk(facts.PLACES, id(arrays), len(arrays), facts.written(others), False) == facts.EQUAL


def test_they_can_be_read_here(facts: ModuleType) -> None:
    assert facts.READABLE


def test_other_objects_with_the_same_facts_are_the_same(facts: ModuleType) -> None:
    one, other = (None, matrix(), BUFFER), (None, matrix(), BUFFER)
    assert hashed(facts, one) == hashed(facts, other) != 0
    assert equal(facts, one, other)


@pytest.mark.parametrize("fact", OTHERS)
def test_every_fact_counts(facts: ModuleType, fact: str) -> None:
    one, other = (BUFFER, matrix(), None), (BUFFER, OTHERS[fact](), None)
    assert hashed(facts, one) != hashed(facts, other)
    assert not equal(facts, one, other)
    assert not equal(facts, other, one)


def test_what_changes_in_place_is_seen(facts: ModuleType) -> None:
    array = np.zeros((4, 6))
    arrays = (array,)
    before, kept = hashed(facts, arrays), facts.written(arrays)
    array.shape = 6, 4
    assert hashed(facts, arrays) != before
    assert facts.walk(facts.PLACES, id(arrays), 1, kept, False) == hashed(facts, arrays)
    array.shape = 4, 6
    assert hashed(facts, arrays) == before
    assert facts.walk(facts.PLACES, id(arrays), 1, kept, False) == facts.EQUAL


@pytest.mark.parametrize(
    "other",
    [np.ma.zeros(3), np.rec.array([(1, 2.0)]), np.float32(1), [1.0], 1.0, "x"],
    ids=lambda other: type(other).__name__,
)
def test_what_is_no_plain_array_has_none(facts: ModuleType, other: Any) -> None:
    assert hashed(facts, (BUFFER, other)) == 0
    assert not equal(facts, (BUFFER, other), (BUFFER, None))
