"""The roll call of MPI ranks: who is missing, when a collective does not end."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

ASKED, ANSWERED = 1, 2  # tags
PATIENCE = 1.0  # seconds to wait for answers: a rank that waits as we do looks for questions every `LOOK`
LOOK = 0.05


class RollCall:
    """Questions and answers between ranks that wait for the end of a collective.

    MPI does not say who has not come. So a rank whose time is up asks each of the others, and those that wait too
    answer with the number of the collective they are in.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm
        Ranks; the messages are on a duplicate of it.
    """

    def __init__(self, comm: Any) -> None:
        self._comm = comm.Dup()
        self._sent: list[Any] = []  # requests and what they send, of messages that nobody waits for
        self._answers: dict[int, int] = {}

    def answer(self, number: int) -> None:
        """Read what has come: say to whoever asks that this rank is in a collective of this number."""
        from mpi4py import MPI

        status, value = MPI.Status(), np.empty(1, np.int64)
        while self._comm.Iprobe(MPI.ANY_SOURCE, MPI.ANY_TAG, status):
            rank, tag = status.Get_source(), status.Get_tag()
            self._comm.Recv(value, rank, tag)
            if tag == ASKED:
                self._send(number, rank, ANSWERED)
            else:
                self._answers[rank] = int(value[0])

    def missing(self, number: int) -> list[int]:
        """Return the ranks that do not say within a second that they are in this collective, or a later one."""
        others = [rank for rank in range(self._comm.size) if rank != self._comm.rank]
        self._answers.clear()
        for rank in others:
            self._send(number, rank, ASKED)
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline and len(self._answers) < len(others):
            self.answer(number)
            time.sleep(LOOK / 10)
        return [rank for rank in others if self._answers.get(rank, -1) < number]

    def _send(self, number: int, rank: int, tag: int) -> None:
        value = np.array([number], np.int64)
        self._sent.append((self._comm.Isend(value, rank, tag), value))
