"""Repeated calls keep few records, no array, and nothing of another thread or stream."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import numpy as np
import pytest

import bnkernels as bn
from bnkernels.runtime import replay
from bnkernels.runtime.cpu import using
from bnkernels.runtime.seam import Launch
from tests.regress.calls import EVERY, make_arrays, run
from tests.regress.device import Device
from tests.runtime.test_replay import OPS, device, forward
from tools.emulator import EmulatorRuntime

__all__ = ["device"]  # the fixture


def test_what_is_kept_is_bounded(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "MOST_ADDRESSES", 4)
    monkeypatch.setattr(replay, "MOST_EACH", 2)
    cache, launch = replay.ReplayCache(), Launch((1, 1, 1), (1, 1, 1))
    y, x = (device.runtime.array_type((4,), "float32", 2**20 * place) for place in (1, 2))
    for place in range(10):
        y.address = 2**30 + 2**20 * place
        for eps in (0.1, 0.2, 0.3):
            call = cache.replay((y,), (x,), eps)
            assert not call.replayed
            call.launch(device.runtime, "source", "kernel", launch, np.zeros(()), x)
        assert 1 <= len(cache._entries) <= 4
        assert all(len(entries) <= 2 for entries in cache._entries.values())
    assert cache.replay((y,), (x,), 0.3).replayed  # the last is known
    assert not cache.replay((y,), (x,), 0.1).replayed


@pytest.mark.parametrize("op", OPS)
def test_no_array_is_kept(device: Device, op: str) -> None:
    gc.freeze()  # only what is made from here on need be looked through
    on = device.arrays(op)
    run(op, on)
    run(op, on)
    device.runtime.launches.clear()
    references = [weakref.ref(array) for array in on.values()]
    on.clear()
    gc.collect()
    assert [reference() for reference in references] == [None] * len(references)


def test_threads_launch_their_own_calls(device: Device) -> None:
    calls, start = 200, threading.Barrier(4)

    def work(number: int) -> None:
        on = device.arrays("forward")
        for array in on.values():
            array.address += 2**40 * number
        start.wait()
        for step in range(calls):
            forward(on, eps=(0.25, 0.5)[step % 2])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    records = [record.arguments for record in device.runtime.launches]
    for number in range(4):
        mine = [record for record in records if int(record["y"]) >> 40 == number]
        assert len(mine) == calls
        assert all(int(record[name]) >> 40 == number for record in mine for name in ("x", "gamma", "statistics"))
        assert sum(record["eps"] == 0.5 for record in mine) == calls // 2


@pytest.mark.parametrize("op", [*OPS, "adam_update"])
def test_a_repeated_call_on_numpy_is_not_checked_again_and_keeps_no_array(
    op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("numba")
    kept: list[Any] = []
    record = replay.ReplayCache.record
    monkeypatch.setattr(replay.ReplayCache, "record", lambda *given: (kept.append(given[0]), record(*given)))
    with using("compiled"):
        arrays, others = make_arrays(op), make_arrays(op)
        run(op, others)  # loads the kernels: before, nothing is kept
        run(op, arrays)
        for name, array in make_arrays(op).items():
            arrays[name][...] = array
        kept.clear()
        run(op, arrays)
        assert not kept
        for name, array in arrays.items():
            np.testing.assert_array_equal(array, others[name])
        arrays[EVERY[op].writes[-1]].flags.writeable = False
        with pytest.raises(ValueError, match="must be writable"):
            run(op, arrays)
    references = [weakref.ref(array) for array in arrays.values()]
    arrays.clear()
    del array
    gc.collect()
    assert [reference() for reference in references] == [None] * len(references)


@pytest.mark.emulator
def test_a_launch_on_the_workspace_of_a_stream_is_not_kept(
    emulated: EmulatorRuntime, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next call may come on another stream."""
    asked, workspace = [], emulated.workspace
    monkeypatch.setattr(emulated, "workspace", lambda array: asked.append(1) or workspace(array))
    x = emulated.asarray(rng.standard_normal((20_000, 8)).astype("f4"))
    out = bn.batch_norm_forward(x)
    for _ in range(3):
        bn.batch_norm_forward(x, out=out)
    assert len(asked) == 4
    assert all(record.launch.cooperative for record in emulated.launches)
