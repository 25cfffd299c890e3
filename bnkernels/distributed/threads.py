"""Ranks that are threads of one process: for tests, and for several GPUs of one machine."""

from __future__ import annotations

import threading
from collections.abc import Callable
from time import monotonic
from typing import Any, TypeVar

import numpy as np

from bnkernels.distributed.communicator import TIMEOUT, Communicator, RankError, named
from bnkernels.runtime import checks as check
from bnkernels.runtime.arguments import empty
from bnkernels.runtime.registry import runtime_of

Result = TypeVar("Result")


class _Exchange:
    """One all-gather: the arrays that have come, and how many ranks have taken them."""

    def __init__(self) -> None:
        self.values: dict[int, Any] = {}


class _Meeting:
    """State that the threads share."""

    def __init__(self, size: int, timeout: float) -> None:
        self.size, self.timeout = size, timeout
        self.changed = threading.Condition()
        self.exchanges: dict[int, _Exchange] = {}
        self.groups: dict[tuple[int, int], _Meeting] = {}
        self.failed: str | None = None

    def fail(self, reason: str) -> None:
        """Let every rank that waits, or comes, raise an error with this reason."""
        with self.changed:
            self.failed = self.failed or reason
            for group in self.groups.values():
                group.fail(reason)
            self.changed.notify_all()


class ThreadCommunicator(Communicator):
    """A rank that is a thread; `threads` makes all of them.

    CuPy arrays may lie on one device or on a device for each rank. The host waits for what was enqueued before.
    """

    def __init__(self, meeting: _Meeting, rank: int) -> None:
        self.rank, self.size = rank, meeting.size
        self._meeting, self._number = meeting, 0

    def allgather(self, values: Any) -> Any:
        """Return the arrays of all ranks; see `Communicator.allgather`."""
        runtime = runtime_of(type(values), "values")
        own = values.copy()  # its owner may write it before the last rank has read it
        if runtime is not None and hasattr(runtime.xp, "cuda"):
            runtime.xp.cuda.get_current_stream().synchronize()
        arrays = self._exchanged(own)
        forms = [(array.shape, str(array.dtype)) for array in arrays]
        if len(set(forms)) > 1:
            each = ", ".join(f"rank {rank} {shape} of {dtype}" for rank, (shape, dtype) in enumerate(forms))
            raise RankError(f"the ranks gather arrays of different lengths: {each}")
        gathered = empty(runtime, (self.size, *values.shape), values)
        for rank, array in enumerate(arrays):
            gathered[rank, ...] = array if runtime is None else runtime.xp.asarray(array)
        return gathered

    def _exchanged(self, own: Any) -> list[Any]:
        """Return what every rank brings to this call, as soon as all have come."""
        meeting, self._number = self._meeting, self._number + 1
        deadline = monotonic() + meeting.timeout
        with meeting.changed:
            exchange = meeting.exchanges.setdefault(self._number, _Exchange())
            exchange.values[self.rank] = own
            meeting.changed.notify_all()
            while len(exchange.values) < self.size and meeting.failed is None:
                if not meeting.changed.wait(max(0.0, deadline - monotonic())) and monotonic() >= deadline:
                    missing = sorted(set(range(self.size)) - exchange.values.keys())
                    meeting.fail(
                        f"{named(missing)} did not come to all-gather {self._number} within {meeting.timeout:g} s"
                    )
            if len(exchange.values) < self.size:
                raise RankError(meeting.failed)
            meeting.exchanges.pop(self._number - 1, None)  # all have left the one before
            return [exchange.values[rank] for rank in range(self.size)]

    def split(self, color: int) -> ThreadCommunicator:
        """Return the group of the ranks that give this color; see `Communicator.split`."""
        colors = self.allgather(np.array(check.integer("color", color, 0)))
        members = np.flatnonzero(colors == color).tolist()
        meeting, key = self._meeting, (self._number, color)
        with meeting.changed:
            if key not in meeting.groups:
                meeting.groups[key] = _Meeting(len(members), meeting.timeout)
        return ThreadCommunicator(meeting.groups[key], members.index(self.rank))

    def abort(self, reason: str) -> None:
        """Let the other ranks raise a `RankError` that names this one."""
        self._meeting.fail(f"rank {self.rank} has failed: {reason}")


def threads(size: int, *, timeout: float = TIMEOUT) -> list[ThreadCommunicator]:
    """Return a communicator for each of several threads.

    Parameters
    ----------
    size : int
        Number of ranks.
    timeout : float
        Time to wait for a rank, in seconds.

    Returns
    -------
    list of ThreadCommunicator
        One for each thread, by rank.

    Raises
    ------
    TypeError, ValueError
        If an argument is wrong.

    Examples
    --------
    >>> threads(2)
    [<ThreadCommunicator: rank 0 of 2>, <ThreadCommunicator: rank 1 of 2>]
    """
    meeting = _Meeting(check.integer("size", size, 1), check.number("timeout", timeout, 0, threading.TIMEOUT_MAX))
    return [ThreadCommunicator(meeting, rank) for rank in range(meeting.size)]


def run_threads(size: int, work: Callable[[Communicator], Result], *, timeout: float = TIMEOUT) -> list[Result]:
    """Run a function on several ranks, each in a thread of its own.

    Parameters
    ----------
    size : int
        Number of ranks.
    work : callable
        Function of a communicator.
    timeout : float
        Time to wait for a rank, in seconds.

    Returns
    -------
    list
        Results of the function, by rank.

    Raises
    ------
    Exception
        The error of the rank that failed first; the others are ended.

    Examples
    --------
    >>> run_threads(3, lambda ranks: ranks.allgather(np.array(ranks.rank)).tolist())
    [[0, 1, 2], [0, 1, 2], [0, 1, 2]]
    """
    results: list[Any] = [None] * check.integer("size", size, 1)
    errors: list[BaseException] = []

    def run(communicator: ThreadCommunicator) -> None:
        try:
            results[communicator.rank] = work(communicator)
        except BaseException as error:
            errors.append(error)
            communicator.abort(f"{type(error).__name__}: {error}")

    ranks = [threading.Thread(target=run, args=(one,), daemon=True) for one in threads(size, timeout=timeout)]
    for thread in ranks:
        thread.start()
    for thread in ranks:
        thread.join()
    if errors:
        raise errors[0]
    return results
