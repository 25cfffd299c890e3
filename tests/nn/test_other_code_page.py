"""The page about other code: its tables are what the code says."""

from __future__ import annotations

from pathlib import Path

from bnkernels import nn
from tests.nn import test_conventions

PAGE = Path(__file__).parents[2] / "docs" / "howto" / "other_code.md"


def test_the_table_of_frameworks_is_that_of_the_code() -> None:
    rows = [line.strip("| ").split(" | ") for line in PAGE.read_text(encoding="utf-8").splitlines()]
    by_names = {row[6]: row for row in rows if len(row) == 7}
    for meant in nn.CONVENTIONS.values():
        _, number, default, variance, eps, axis, _ = by_names[", ".join(meant.names)]
        assert ("of the old" in number) is meant.weighs_old
        assert float(default) == meant.momentum
        assert variance == ("N - 1" if meant.unbiased else "N")
        assert (float(eps), int(axis)) == (meant.eps, meant.axis)


def test_the_table_of_norms_is_whole() -> None:
    tests = [name for name in vars(test_conventions) if name.startswith("test_row_")]
    assert {int(name.split("_")[2]) for name in tests} == set(range(1, 17))
