"""PyTorch, which says what its users expect: loaded for a test, or the reason why not."""

from __future__ import annotations

import os
from importlib.util import find_spec
from types import ModuleType

import pytest

from tools.emulator.build import BUILD_VARIABLE, BUILDS


def absent() -> str | None:
    """Return why tests go without PyTorch, or None."""
    if BUILDS[os.environ.get(BUILD_VARIABLE, "plain")].sanitizer:
        return "PyTorch does not run under a sanitizer"
    return None if find_spec("torch") else "PyTorch is not installed"


def load() -> ModuleType:
    """Return PyTorch; skip the test, or the whole module at its import, where there is none."""
    if reason := absent():
        pytest.skip(reason, allow_module_level=True)
    return pytest.importorskip("torch")
