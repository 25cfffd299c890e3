"""Cooperative launches through CuPy: more shared memory, and a workspace for every stream of every device."""

from __future__ import annotations

import types

import numpy as np
import pytest

import bnkernels as bn
from bnkernels._runtime import SHARED_BYTES, WORKSPACE_BYTES
from tests.emulator import EmulatorRuntime
from tests.test_cuda_runtime import batch, cupy

__all__ = ["cupy"]  # the fixture
pytestmark = pytest.mark.emulator


def test_blocks_that_wait_are_launched_to_be_resident_together(
    cupy: types.ModuleType, emulated: EmulatorRuntime, rng: np.random.Generator
) -> None:
    arrays = batch(rng, 20_000, 8)
    x, gamma, beta, dy = map(cupy.asarray, arrays)
    y, statistics = bn.batch_norm_forward(x, gamma, beta)
    dx, *_ = bn.batch_norm_backward(dy, x, gamma, beta, statistics)
    launches = [record.launch for record in cupy.driver.launches]
    assert all(launch.cooperative for launch in launches)
    assert all(launch.shared_bytes > SHARED_BYTES for launch in launches), "the kernels asked for more"
    x, gamma, beta, dy = map(emulated.asarray, arrays)
    want, statistics = bn.batch_norm_forward(x, gamma, beta)
    np.testing.assert_array_equal(y.get(), want)
    np.testing.assert_array_equal(dx.get(), bn.batch_norm_backward(dy, x, gamma, beta, statistics)[0])


def test_streams_and_devices_do_not_share_a_workspace(cupy: types.ModuleType, rng: np.random.Generator) -> None:
    """Two launches at once on one would count each other's arrivals."""
    made = []
    zeros = cupy.zeros
    cupy.zeros = lambda *given: made.append(zeros(*given)) or made[-1]
    streams = [cupy.cuda.Stream(), cupy.cuda.Stream()]
    for device in (0, 1, 0):
        with cupy.cuda.Device(device):
            x = cupy.asarray(batch(rng, 20_000, 8)[0])
        bn.batch_norm_forward(x)
        for stream in streams:
            with stream:
                bn.batch_norm_forward(x)
    assert [(array.device.id, array.nbytes) for array in made] == [(d, WORKSPACE_BYTES) for d in (0, 0, 0, 1)]
    assert len({array.data.ptr for array in made}) == 4


def test_a_launch_of_blocks_that_do_not_wait_takes_no_workspace(
    cupy: types.ModuleType, rng: np.random.Generator
) -> None:
    cupy.zeros = None
    bn.batch_norm_forward(cupy.asarray(batch(rng, 1024, 64)[0]))
    assert [record.entry_point for record in cupy.driver.launches] == ["bnk_batch_norm_forward_spread_f32"]


def test_a_workspace_is_not_made_while_a_graph_is_captured(cupy: types.ModuleType, rng: np.random.Generator) -> None:
    """Its zeros would be part of the graph: every replay would clear the counters, and eager calls would miss them."""
    x, stream = cupy.asarray(batch(rng, 20_000, 8)[0]), cupy.cuda.Stream()
    out = bn.batch_norm_forward(x)
    with stream:
        cupy.driver.captures[stream.ptr] = []
        with pytest.raises(RuntimeError, match="call the op once on this stream before the capture begins"):
            bn.batch_norm_forward(x, out=out)
        assert cupy.driver.captures.pop(stream.ptr) == [], "nothing was launched"
        bn.batch_norm_forward(x, out=out)
        cupy.driver.captures[stream.ptr] = []
        bn.batch_norm_forward(x, out=out)
        assert len(cupy.driver.captures.pop(stream.ptr)) == 1
