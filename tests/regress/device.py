"""Devices that only keep a record: arrays without a byte behind them, so whoever looks at a value fails."""

from __future__ import annotations

import math
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from bnkernels.runtime import registry, seam
from bnkernels.runtime.seam import Launch, Limits
from tests.regress.calls import make_arrays


class RecordedArray:
    """An array on a device, as the ops may see it: its type, layout and address, and views of its rows."""

    def __init__(self, shape: tuple[int, ...], dtype: Any, address: int, device: int = 0) -> None:
        self.shape, self.dtype, self.address, self.device_number = shape, np.dtype(dtype), address, device
        steps = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
        self.strides = tuple(step * self.dtype.itemsize for step in steps)
        self.size = math.prod(shape)

    data = property(lambda self: types.SimpleNamespace(ptr=self.address, device_id=self.device_number))

    @property
    def T(self) -> RecordedArray:
        """The transpose, a view."""
        view = type(self)(self.shape[::-1], self.dtype, self.address, self.device_number)
        view.strides = self.strides[::-1]
        return view

    def __getitem__(self, row: int) -> RecordedArray:
        """Return a view of one row."""
        return RecordedArray(self.shape[1:], self.dtype, self.address + row * self.strides[0], self.device_number)


class Recorded(NamedTuple):
    """One launch as it was asked for."""

    source: str
    entry_point: str
    launch: Launch
    arguments: np.ndarray
    like: RecordedArray


class RecordingRuntime(seam.Runtime):
    """Allocates addresses and launches nothing, and remembers both."""

    array_type = RecordedArray
    xp = None  # an op that reaches for the array module has left the hot path

    def __init__(self) -> None:
        self.launches: list[Recorded] = []
        self.allocations: list[RecordedArray] = []

    def empty(self, shape: tuple[int, ...], dtype: np.dtype, like: RecordedArray) -> RecordedArray:
        """Return an array beside `like`."""
        array = self.array_type(shape, dtype, 2**40 + 2**20 * len(self.allocations), like.device_number)
        self.allocations.append(array)
        return array

    def contiguous(self, array: RecordedArray) -> RecordedArray:
        """Return an array beside it, of the same shape."""
        return self.empty(array.shape, array.dtype, array)

    def pointer(self, array: RecordedArray) -> int:
        """Return the array's address."""
        return array.address

    def device(self, array: RecordedArray) -> int:
        """Return the number of the array's device."""
        return array.device_number

    def limits(self, array: RecordedArray) -> Limits:
        """Return those of a device whose blocks cannot wait for one another."""
        return Limits(132, 227 * 1024, 228 * 1024, False)

    def workspace(self, array: RecordedArray) -> int:
        """Return an address that no array has: blocks that add up in turn need it."""
        return 2**50

    def launch(self, source: str, entry_point: str, launch: Launch, arguments: np.ndarray, like: RecordedArray) -> None:
        """Remember the launch."""
        self.launches.append(Recorded(source, entry_point, launch, arguments, like))


class Device:
    """A runtime, its arrays, and the number of calls that took the long way."""

    def __init__(self, runtime: RecordingRuntime) -> None:
        self.runtime, self.checked = runtime, 0

    def arrays(self, op: str, dtype: str = "float32") -> dict[str, RecordedArray]:
        """Return the arrays of a call, far apart from one another."""
        return {
            name: self.runtime.array_type(array.shape, array.dtype, 2**20 * (position + 1))
            for position, (name, array) in enumerate(make_arrays(op, dtype).items())
        }


_runtime_of_records = RecordingRuntime()  # one for ever: the ops' cached plans hold on to it


@contextmanager
def recording() -> Iterator[RecordingRuntime]:
    """Let recorded arrays run on a recording runtime without records."""
    registry.register(_runtime_of_records)
    _runtime_of_records.launches.clear()
    _runtime_of_records.allocations.clear()
    try:
        yield _runtime_of_records
    finally:
        del registry.runtimes[RecordedArray]


def record_of(arrays: dict[str, np.ndarray]) -> dict[str, RecordedArray]:
    """Return a recorded array for each of these, far apart from one another."""
    return {
        name: RecordedArray(array.shape, array.dtype, 2**20 * (position + 1))
        for position, (name, array) in enumerate(arrays.items())
    }
