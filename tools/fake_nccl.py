"""A stand-in for ``nccl.core`` of nccl4py without a GPU: ranks are threads, arrays those of the stand-in for CuPy.

It refuses what nccl4py refuses: buffers of other types or too short, and communicators that were aborted.
`tests.distributed.test_nccl` compares it with the real package, which imports without a driver or NCCL.
"""

from __future__ import annotations

import itertools
import threading
import types
from collections import defaultdict
from typing import Any

import numpy as np

SECONDS = 20.0  # a rank that waits longer has found a mistake of a test
BYTES = 128

_numbers = itertools.count(1)
_worlds: dict[bytes, World] = {}
_lock = threading.Lock()


class NcclInvalid(Exception):
    """An argument that nccl4py refuses."""


class World:
    """The ranks that share a unique identifier."""

    def __init__(self, nranks: int) -> None:
        self.barrier = threading.Barrier(nranks, timeout=SECONDS)
        self.sent: dict[int, Any] = {}


class UniqueId:
    """``nccl.core.UniqueId``."""

    def __init__(self, _internal: bytes = b"") -> None:
        self._bytes = _internal

    def __bytes__(self) -> bytes:
        return self._bytes

    @staticmethod
    def from_bytes(b: bytes) -> UniqueId:
        """Return the identifier of these bytes."""
        if len(b) != BYTES or not any(b):
            raise ValueError(f"expected the {BYTES} bytes of an identifier")
        return UniqueId(bytes(b))


def get_unique_id(empty: bool = False) -> UniqueId:
    """Return a new identifier."""
    return UniqueId(next(_numbers).to_bytes(BYTES, "big"))


class Communicator:
    """``nccl.core.Communicator``.

    Attributes
    ----------
    streams : list of int
        Stream of every all-gather.
    state : int
        Answer of `get_async_error`.
    """

    def __init__(self, ptr: int | None = None) -> None:
        self.streams: list[int] = []
        self.state, self._world = 0, None

    @classmethod
    def init(cls, nranks: int, rank: int, unique_id: UniqueId, config: Any = None) -> Communicator:
        """Return a rank of those that share the identifier, once all are there."""
        return cls()._joined(bytes(unique_id), nranks, rank)

    def _joined(self, key: bytes, nranks: int, rank: int) -> Communicator:
        with _lock:
            self._world = _worlds.setdefault(key, World(nranks))
        self._key, self.nranks, self.rank = key, nranks, rank
        self._world.barrier.wait()
        return self

    def _check_valid(self, operation: str) -> None:
        if self._world is None:
            raise NcclInvalid(f"Cannot {operation}: Communicator is not initialized")

    def allgather(self, sendbuf: Any, recvbuf: Any, *, stream: Any = None, config: Any = None) -> None:
        """Gather, as soon as all ranks are here."""
        self._check_valid("allgather")
        if sendbuf.dtype != recvbuf.dtype:
            raise NcclInvalid(f"Dtype mismatch: sendbuf has dtype {sendbuf.dtype}, recvbuf has dtype {recvbuf.dtype}")
        if recvbuf.size < self.nranks * sendbuf.size:
            raise NcclInvalid("Buffer count mismatch")
        self.streams.append(stream)
        world = self._world
        world.sent[self.rank] = np.array(sendbuf._memory, subok=False)
        world.barrier.wait()
        for rank in range(self.nranks):
            np.asarray(recvbuf._memory)[rank * sendbuf.size :][: sendbuf.size] = world.sent[rank]
        world.barrier.wait()

    def split(self, color: int | None = None, key: int = 0, config: Any = None) -> Communicator:
        """Return the group of the ranks of this color, in the order of their keys."""
        self._check_valid("split")
        world = self._world
        world.sent[self.rank] = color, key
        world.barrier.wait()
        groups = defaultdict(list)
        for rank, (other, place) in sorted(world.sent.items()):
            groups[other].append((place, rank))
        members = sorted(groups[color])
        name = self._key + f"/{len(self.streams)}/{color}".encode()
        world.barrier.wait()
        return type(self)()._joined(name, len(members), members.index((key, self.rank)))

    def abort(self) -> None:
        """End: later calls are refused."""
        self._world = None

    def get_async_error(self) -> int:
        """Return the state that a test has set."""
        self._check_valid("get async error")
        return self.state

    def get_last_error(self) -> str:
        """Return a message."""
        return "unhandled system error" if self.state else ""


def make() -> types.ModuleType:
    """Return a new module ``nccl``, with its part ``core``."""
    nccl, core = types.ModuleType("nccl"), types.ModuleType("nccl.core")
    core.Communicator, core.UniqueId, core.get_unique_id, core.NcclInvalid = (
        Communicator,
        UniqueId,
        get_unique_id,
        NcclInvalid,
    )
    nccl.core = core
    return nccl
