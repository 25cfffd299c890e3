"""Every promise of docs/semantics.md names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
LINES = [
    line
    for line in (TESTS.parent / "docs" / "semantics.md").read_text(encoding="utf-8").partition("\n## ")[2].splitlines()
    if line.startswith("| ") and not line.startswith(("| promise |", "| --- |"))
]


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.split("|")[1].strip()[:60])
def test_a_promise_has_tests(line: str) -> None:
    promise, tests = line.strip("| ").split(" | ")
    named = re.findall(r"`(?:regress/)?(test_\w+\.py)::(test_\w+)`", tests)
    assert promise
    assert named
    assert len(named) == tests.count("`") // 2, "nothing but tests in the second column"
    for file, name in named:
        (path,) = TESTS.rglob(file)
        assert re.search(rf"^def {name}\(", path.read_text(encoding="utf-8"), re.MULTILINE), f"{file}::{name}"


def test_there_are_promises() -> None:
    assert len(LINES) > 20
