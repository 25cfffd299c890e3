"""The protocol of ranks that exchange arrays, and the agreement that all are about to do the same."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from typing import Any

import numpy as np

from bnkernels.runtime import checks as check
from bnkernels.runtime.arguments import empty
from bnkernels.runtime.registry import runtime_of

DIGEST, MESSAGE = 32, 256  # bytes of the digest of a text, and of the whole message: digest, beginning of the text
ERROR = "error: "  # beginning of a text that says why a rank cannot go on
TIMEOUT = 60.0  # seconds


class RankError(RuntimeError):
    """Ranks differ in what they do, or one is missing; the message names it."""


class Communicator(ABC):
    """Ranks, each a process or a thread with its part of the mini-batch, that exchange arrays.

    A class of one's own needs `rank`, `size` and `allgather`. All ranks must call `allgather` equally often, in the
    same order, with arrays of one shape and data type.

    Attributes
    ----------
    rank : int
        Number of this rank, from 0.
    size : int
        Number of ranks.
    speaker : int or None
        First of the ranks with an error, once all of them know that they cannot go on together: the one to say so.
    """

    rank: int
    size: int
    speaker: int | None = None

    @abstractmethod
    def allgather(self, values: Any) -> Any:
        """Return the arrays of all ranks.

        Parameters
        ----------
        values : array
            Array of this rank, in C order. Never written.

        Returns
        -------
        array, shape (size, ...)
            New array, beside `values`, of the arrays of all ranks in their order.

        Raises
        ------
        RankError
            If a rank is missing, or ranks differ in the length of the array.
        """

    def start(self, values: Any) -> Callable[[], Any]:
        """Begin an `allgather`; where nothing goes on by itself, do all of it.

        Parameters
        ----------
        values : array
            Argument of `allgather`, not to be written before the end.

        Returns
        -------
        callable
            Function that waits for the end and returns what `allgather` returns.
        """
        gathered = self.allgather(values)
        return lambda: gathered

    def split(self, color: int) -> Communicator:
        """Return the group of the ranks that give this color; all ranks must call it.

        Parameters
        ----------
        color : int
            Number of the group, at least 0.

        Returns
        -------
        Communicator
            Group, in the order of the ranks.

        Raises
        ------
        NotImplementedError
            If the class has no groups.
        """
        raise NotImplementedError(f"{type(self).__name__} has no groups: give the class a method split(color)")

    def agree(self, text: str | Exception) -> None:
        """Exchange a message of fixed length, and raise an error on every rank unless all say the same.

        Parameters
        ----------
        text : str or Exception
            Description of what this rank is about to do, or the error for which it cannot.

        Raises
        ------
        RankError
            If ranks differ: the same message on all.
        Exception
            The error that was given; ranks without one get a `RankError` with its message.
        """
        said = f"{ERROR}{type(text).__name__}: {text}" if isinstance(text, Exception) else text
        texts = [bytes(each) for each in self._gather_bytes(np.frombuffer(message(said), np.uint8))]
        if isinstance(text, Exception) or len(set(texts)) > 1:
            failed = [rank for rank, one in enumerate(texts) if one[DIGEST:].startswith(ERROR.encode())]
            self.speaker = min(failed, default=0)
            raise text if isinstance(text, Exception) else RankError(difference(texts))

    def agree_once(self, key: Hashable, text: Callable[[], str], checks: Callable[[], Any]) -> None:
        """Let the ranks `agree` before the first collective of a kind.

        Parameters
        ----------
        key : hashable
            Key that tells the kind from others on this rank. A later call with the same key exchanges nothing.
        text : callable
            Function that returns the description.
        checks : callable
            Function that raises a TypeError or ValueError where this rank cannot go on.
        """
        if key in self.agreed:
            return
        try:
            checks()
            said: str | Exception = text()
        except (TypeError, ValueError) as error:
            said = error
        self.agree(said)
        self.agreed.add(key)

    @property
    def agreed(self) -> set[Hashable]:
        """Kinds of collectives on which the ranks have agreed."""
        return self.__dict__.setdefault("_agreed", set())

    def _gather_bytes(self, values: np.ndarray) -> np.ndarray:
        """Return the bytes of all ranks, on the host."""
        return self.allgather(values)

    def synchronize(self) -> None:  # noqa: B027  most have ended when they return
        """Wait on the host for all-gathers that are enqueued."""

    def abort(self, reason: str) -> None:  # noqa: B027  most have nobody to end
        """End all ranks after an error on this one, where they are processes that would wait for it.

        Parameters
        ----------
        reason : str
            Reason, which the others are told.
        """

    def __copy__(self) -> Communicator:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Communicator:
        return self  # a copy of a layer works with the same ranks

    def __reduce__(self) -> Any:
        raise TypeError(f"a {type(self).__name__} cannot be pickled: it is of these processes; save a state_dict")

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: rank {self.rank} of {self.size}>"


class OneRank(Communicator):
    """The only rank: a process that nobody shares the mini-batch with."""

    rank, size = 0, 1

    def allgather(self, values: Any) -> Any:
        """Return a copy of the array; see `Communicator.allgather`."""
        gathered = empty(runtime_of(type(values)), (1, *values.shape), values)
        gathered[0, ...] = values
        return gathered

    def split(self, color: int) -> OneRank:
        """Return the group of this rank: itself; see `Communicator.split`."""
        check.integer("color", color, 0)
        return OneRank()


def checked(communicator: Any) -> Communicator:
    """Check for a communicator; return it."""
    if not isinstance(communicator, Communicator):
        raise TypeError(
            f"communicator must be a Communicator of bnkernels.distributed, such as mpi() returns, got "
            f"{check.shown(communicator)}"
        )
    return communicator


def message(text: str) -> bytes:
    """Return the message of a text: its digest, and as much of it as there is room for."""
    data = text.encode()
    shown = data[: MESSAGE - DIGEST].decode(errors="ignore").encode()
    return (hashlib.sha256(data).digest() + shown).ljust(MESSAGE, b"\0")


def difference(messages: list[bytes]) -> str:
    """Return in words who says what, the errors alone where there are some."""
    said: dict[bytes, list[int]] = {}
    for rank, one in enumerate(messages):
        said.setdefault(one, []).append(rank)
    texts = {one: one[DIGEST:].rstrip(b"\0").decode(errors="replace") for one in said}
    if failed := {one: text for one, text in texts.items() if text.startswith(ERROR)}:
        return "; ".join(f"{named(said[one])} cannot go on: {text[len(ERROR) :]}" for one, text in failed.items())
    parts = ", ".join(
        f"{named(ranks)} {'has' if len(ranks) == 1 else 'have'} {texts[one]}" for one, ranks in said.items()
    )
    return f"the ranks differ, and must all do the same in the same order: {parts}"


def named(ranks: list[int]) -> str:
    """Return ranks as messages name them."""
    few = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank {few}" if len(ranks) == 1 else f"ranks {few}"
