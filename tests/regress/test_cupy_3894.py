"""A cooperative launch was cut to fewer blocks with a warning: kernels that stride must not count on their grid."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import bnkernels as bn
from tests.emulator import EmulatorRuntime

pytestmark = pytest.mark.emulator


@pytest.fixture
def small_grids(emulated: EmulatorRuntime, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """Cut every grid to at most two blocks along the rows; return the grids that were asked for."""
    asked, launch = [], emulated.launch

    def cut(source: str, entry_point: str, planned: Any, arguments: np.ndarray, like: Any) -> None:
        asked.append(planned.grid)
        x, y, _ = planned.grid
        grid = (min(x, 2), 1, 1) if source == "parameter_update" else (x, min(y, 2), 1)
        launch(source, entry_point, replace(planned, grid=grid), arguments, like)

    monkeypatch.setattr(emulated, "launch", cut)
    return asked


def test_cupy_3894_inference_with_fewer_blocks(
    emulated: EmulatorRuntime, small_grids: list, rng: np.random.Generator
) -> None:
    x = rng.standard_normal((900, 40)).astype(np.float32)
    mean, var = np.zeros(40, np.float32), np.ones(40, np.float32)
    y = bn.batch_norm_inference(*(emulated.asarray(a) if a is not None else None for a in (x, None, None, mean, var)))
    assert small_grids == [(2, 8, 1)]
    np.testing.assert_array_equal(y, x * (1 / np.sqrt(np.float32(1) + np.float32(1e-5))))


def test_cupy_3894_parameter_update_with_fewer_blocks(
    emulated: EmulatorRuntime, small_grids: list, rng: np.random.Generator
) -> None:
    parameters, gradients, velocity = (rng.standard_normal(2000) for _ in range(3))
    on = [emulated.asarray(array) for array in (parameters, gradients, velocity)]
    bn.momentum_update(*on, lr=0.5, momentum=0.25)
    assert small_grids == [(8, 1, 1)]
    np.testing.assert_allclose(on[2], 0.25 * velocity + gradients, rtol=1e-14, atol=1e-15)
    np.testing.assert_allclose(on[0], parameters - 0.5 * (0.25 * velocity + gradients), rtol=1e-14, atol=1e-15)
