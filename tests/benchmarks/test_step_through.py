"""The step-through: pages are what the script writes, traces are what the kernels do, and the claims hold in them."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from benchmarks.step_through import page, record
from tools.emulator import EmulatorRuntime

CASES = json.loads(record.RESULT.read_text(encoding="utf-8"))
WRITTEN = "run python -m benchmarks.step_through"


def test_the_pages_are_what_the_script_writes() -> None:
    for path, text in page.pages(CASES).items():
        assert path.read_text(encoding="utf-8") == text, WRITTEN


def test_every_case_is_there() -> None:
    assert [page.key(one) for one in CASES] == list(record.cases())


@pytest.mark.emulator
@pytest.mark.plain_build
@pytest.mark.parametrize(
    "key", [("example", 64, 20), ("neuron", 64, 256), ("neuron", 1024, 20), ("neuron", 4096, 4), ("neuron", 4096, 20)]
)
def test_the_traces_are_those_of_these_kernels(key: tuple[str, int, int], emulated: EmulatorRuntime) -> None:
    (committed,) = (one for one in CASES if page.key(one) == key)
    assert json.loads(record.text([record.case(*key)])) == [committed], f"{WRITTEN} --record"


@pytest.mark.parametrize("one", CASES, ids=lambda one: "-".join(map(str, page.key(one))))
def test_every_cell_is_written_once_and_read_before(one: page.Case) -> None:
    _, rows, columns = page.key(one)
    read, written = np.zeros((2, rows, columns), int)
    for step in sorted(page.steps_of(one), key=lambda step: step.start):
        for r0, r1, c0, c1 in step.read:
            read[r0:r1, c0:c1] += 1
        for r0, r1, c0, c1 in step.written:
            assert read[r0:r1, c0:c1].all()
            written[r0:r1, c0:c1] += 1
    assert (written == 1).all()
    assert (
        read.min() == read.max() == (2 if one["way"] == "example" or "two_pass" in one["launches"][0]["kernel"] else 1)
    )


def test_what_the_page_says_holds() -> None:
    for one in CASES:
        way, rows, columns = page.key(one)
        waits = max(step.waits for step in page.steps_of(one))
        assert waits == (2 if way == "example" else int(rows == 4096 and columns >= 20)), page.key(one)


def test_by_example_is_ahead_where_the_page_says() -> None:
    def total(way: str, examples: int, neurons: int, cost: int) -> int:
        (one,) = (one for one in CASES if page.key(one) == (way, examples, neurons))
        return max(step.start + step.waits * cost + step.length for step in page.steps_of(one))

    sizes = {page.key(one)[1:] for one in CASES}
    ahead = {
        size: sum(total("example", *size, cost) < total("neuron", *size, cost) for cost in range(101)) for size in sizes
    }
    assert {size: count for size, count in ahead.items() if count} == {(4096, 20): 6, (4096, 64): 34}
    text = (page.ROOT / "docs" / "step_through.md").read_text(encoding="utf-8").replace("\n", " ")
    assert "where a wait costs less than 6 and 34 words" in " ".join(text.split())


def test_what_is_no_rectangle_is_refused() -> None:
    with pytest.raises(ValueError, match="expected whole rows of some columns, got 3 elements in 2 rows"):
        record.rectangles(np.array([0, 1, 4]), 4)
    assert record.rectangles(np.array([0, 1, 4, 5, 12, 13]), 4) == [[0, 2, 0, 2], [3, 4, 0, 2]]


def test_the_page_needs_no_network() -> None:
    for path in page.pages(CASES):
        text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|src=|@import|fetch\(", text)
