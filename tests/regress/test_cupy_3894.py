"""A cooperative launch was cut to fewer blocks with a warning: kernels that stride must not count on their grid."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import bnkernels as bn
from bnkernels.nn.mlp import MLP
from bnkernels.ops.fused_training import launch as fused_training_launch
from bnkernels.ops.layer_norm import launch as layer_norm_launch
from tools.emulator import EmulatorError, EmulatorRuntime
from tools.emulator.build import BUILD_VARIABLE

UNDER_TSAN = os.environ.get(BUILD_VARIABLE) == "tsan"
pytestmark = [
    pytest.mark.emulator,
    pytest.mark.skipif(UNDER_TSAN, reason="the emulated device has one multiprocessor under ThreadSanitizer"),
]


@pytest.fixture
def small_grids(emulated: EmulatorRuntime, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """Cut every grid to at most two blocks along the rows; return the grids that were asked for."""
    asked, launch = [], emulated.launch

    def cut(source: str, entry_point: str, planned: Any, arguments: np.ndarray, like: Any) -> None:
        asked.append(planned.grid)
        x, y, z = planned.grid
        along_x = source == "parameter_update" or source.endswith("_cooperative")
        grid = (min(x, 2), y, 1) if along_x else (x, min(y, 2), min(z, 2))
        launch(source, entry_point, replace(planned, grid=grid), arguments, like)

    monkeypatch.setattr(emulated, "launch", cut)
    return asked


def test_cupy_3894_inference_with_fewer_blocks(
    emulated: EmulatorRuntime, small_grids: list, rng: np.random.Generator
) -> None:
    x = rng.standard_normal((900, 40)).astype(np.float32)
    mean, var = np.zeros(40, np.float32), np.ones(40, np.float32)
    y = bn.batch_norm_inference(*(emulated.asarray(a) if a is not None else None for a in (x, None, None, mean, var)))
    assert small_grids == [(2, 1, 8)]
    np.testing.assert_array_equal(y, x * (1 / np.sqrt(np.float32(1) + np.float32(1e-5))))


def test_cupy_3894_parameter_update_with_fewer_blocks(
    emulated: EmulatorRuntime, small_grids: list, rng: np.random.Generator
) -> None:
    parameters, gradients, velocity = (rng.standard_normal(4000) for _ in range(3))
    on = [emulated.asarray(array) for array in (parameters, gradients, velocity)]
    bn.momentum_update(*on, lr=0.5, momentum=0.25)
    assert small_grids == [(8, 1, 1)]
    np.testing.assert_allclose(on[2], 0.25 * velocity + gradients, rtol=1e-14, atol=1e-15)
    np.testing.assert_allclose(on[0], parameters - 0.5 * (0.25 * velocity + gradients), rtol=1e-14, atol=1e-15)


def test_cupy_3894_slices_of_channels_with_fewer_groups(
    emulated: EmulatorRuntime, small_grids: list, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups of blocks take the slices in turn: with fewer of them the same bits."""
    x, dy = (emulated.asarray(rng.standard_normal((1024, 104)).astype(np.float32)) for _ in range(2))

    def step() -> list[np.ndarray]:
        y, statistics = bn.batch_norm_forward(x)
        return [y, statistics, *bn.batch_norm_backward(dy, x, None, None, statistics)]

    with_fewer = step()
    assert small_grids == [(7, 1, 1), (13, 1, 1)]
    monkeypatch.undo()
    for want, got in zip(step(), with_fewer, strict=True):
        np.testing.assert_array_equal(got, want)


# ---- blocks that wait for one another --------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["layer_norm", "linear_batch_norm", "linear_layer_norm"])
def test_cupy_3894_the_grid_barrier_counts_the_blocks_launched(
    emulated: EmulatorRuntime, op: str, rng: np.random.Generator
) -> None:
    """A grid barrier that counted on the planned grid would never end, nor would that of the next launch."""
    x, dy = (emulated.asarray(rng.standard_normal((100, 300)).astype("f4")) for _ in range(2))
    weight = emulated.asarray(rng.standard_normal((300, 300)).astype("f4"))

    def gradients() -> tuple[np.ndarray, ...]:
        if op == "layer_norm":
            _, statistics = bn.layer_norm_forward(x)
            return bn.layer_norm_backward(dy, x, None, None, statistics)
        norm = op.split("_")[1]
        _, z, statistics = bn.linear_batch_norm_forward(x, weight, norm=norm)
        return bn.linear_batch_norm_backward(dy, x, weight, None, None, z, statistics, norm=norm)

    whole = gradients()
    with emulated.cut_grids(3), pytest.warns(UserWarning, match="cut to 3 blocks"):
        cut = gradients()
    planned, launched = (record.launch.grid[0] for record in emulated.launches if record.launch.cooperative)
    assert planned > launched == 3
    for one, two, repeated in zip(whole, cut, gradients(), strict=True):
        np.testing.assert_allclose(two, one, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(repeated, one)


def test_cupy_3894_a_grid_of_two_dimensions_is_refused(
    emulated: EmulatorRuntime, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So blocks that share a slice of channels, or a network, never get fewer than they were planned with."""
    monkeypatch.setattr(fused_training_launch, "_why_not_one", lambda *_: "a test wants groups")
    x = emulated.asarray(rng.standard_normal((20_000, 8)).astype("f4"))
    model, labels = MLP((8, 16, 3)), emulated.asarray(np.zeros(len(x), np.int32))
    parameters, running = emulated.asarray(model.parameters), emulated.asarray(model.running)
    with emulated.cut_grids(3):
        with pytest.raises(ValueError, match="the device holds 3 blocks"):
            bn.batch_norm_forward(x)
        with pytest.raises(ValueError, match="the device holds 3 blocks"):
            bn.fused_training(model.fused, parameters, (), running, x, labels, batch=10, lr=0.1)
    assert emulated.launches == []
    np.testing.assert_array_equal(parameters, model.parameters)


def test_cupy_3894_the_emulator_cuts_nothing_unasked(
    emulated: EmulatorRuntime, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan of more blocks than are resident is an error, and says so."""
    monkeypatch.setattr(layer_norm_launch, "resident", lambda *_: 10**6)
    x = emulated.asarray(rng.standard_normal((4001, 8)).astype("f4"))
    _, statistics = bn.layer_norm_forward(x)
    with pytest.raises(EmulatorError, match=r"wait for one another, and of 8 this device holds 4 at once"):
        bn.layer_norm_backward(x, x, None, None, statistics)
