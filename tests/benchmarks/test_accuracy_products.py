"""Errors of float32 products: the document has what is measured, and no arithmetic is far behind another."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.accuracy import products
from tools.emulator import EmulatorRuntime

PAGE = Path(__file__).parents[2] / "docs" / "fused_layers.md"


@pytest.mark.emulator
@pytest.mark.plain_build
def test_the_page_has_the_errors_that_are_measured(emulated: EmulatorRuntime) -> None:
    assert "\n".join(products.lines()) in PAGE.read_text(encoding="utf-8")
