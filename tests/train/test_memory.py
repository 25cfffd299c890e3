"""How much memory there is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bnkernels.train import memory


def test_a_container_has_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(memory, "_LIMITS", (tmp_path / "absent", limit))
    machine = memory.total_memory()
    assert machine == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for text, total in (("max\n", machine), ("1073741824\n", 2**30), (f"{2**63}\n", machine)):
        limit.write_text(text)
        assert memory.total_memory() == total


def test_a_system_that_does_not_say_has_no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sysconf")
    assert memory.total_memory() is None
