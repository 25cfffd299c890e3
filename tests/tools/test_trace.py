"""Events of a traced launch: every access with its thread and block, barriers, and waits for other blocks."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from tools.emulator import EmulatorRuntime, planted
from tools.emulator.binding import KINDS

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator needs g++")
READ, WRITE, BARRIER, WAIT = range(len(KINDS))


@pytest.fixture(scope="module")
def runtime() -> EmulatorRuntime:
    return EmulatorRuntime("plain", planted.SOURCES)


def test_every_access_is_an_event_in_order(runtime: EmulatorRuntime) -> None:
    with runtime.tracing():
        result = planted.launch(runtime, "reverse", 64, 64, grid=(2, 1, 1))
    events = runtime.launches[-1].events
    for block in range(2):
        own = events[events["block"] == block]
        assert own["kind"].tolist() == [READ] * 32 + [BARRIER] + [WRITE] * 32
        reads, writes = own[:32], own[33:]
        assert reads["thread"].tolist() == list(range(32))
        places = (np.arange(32) + 32 * block) * 4
        np.testing.assert_array_equal(reads["address"], result.x.ctypes.data + places)
        np.testing.assert_array_equal(writes["address"], result.y.ctypes.data + places)
        assert set(own["bytes"].tolist()) == {0, 4}


def test_a_wait_for_other_blocks_is_an_event(runtime: EmulatorRuntime) -> None:
    with runtime.tracing():
        planted.launch_case(runtime, "meeting")
    events = runtime.launches[-1].events
    assert set(events[events["kind"] == WAIT]["block"].tolist()) == {0, 1, 2, 3}


def test_without_tracing_there_are_none(runtime: EmulatorRuntime) -> None:
    planted.launch_case(runtime, "reverse")
    assert runtime.launches[-1].events.size == 0
