"""Replay cache: a call with ``out=`` whose arrays and options equal an earlier one's is launched again, unchecked.

What an op checks, and its kernel's argument, depend only on the options and on each array's type, address, device (of a
NumPy array whether it can be written), data type, shape and strides: the key of a call. It is read anew on every call,
so arrays may be reshaped in place, or freed and their addresses reused. No array is kept, and entries never change, so
threads may share them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from bnkernels.runtime import cpu, registry
from bnkernels.runtime.seam import Launch, Runtime

FACTS = "bnkernels.runtime.cpu.facts"
MOST_ADDRESSES, MOST_EACH = 1024, 8  # an entry takes about 2 kB
IMMUTABLE = {float, int, bool, str, type(None)}  # types of options that nobody can change behind our back


class Call:
    """A call of an op: already replayed, or to be launched after all checks.

    Parameters
    ----------
    cache : ReplayCache, optional
        Cache that records the launch. Without it nothing is recorded.
    place, key : int, list or tuple, optional
        Where the call belongs in the cache, and its key.

    Attributes
    ----------
    replayed : bool
        True if the launch has been made, so that nothing is left to do.
    """

    __slots__ = ("_cache", "_key", "_place", "replayed")

    def __init__(
        self,
        cache: ReplayCache | None = None,
        place: int = 0,
        key: list | tuple = (),
        replayed: bool = False,
    ) -> None:
        self._cache, self._place, self._key, self.replayed = cache, place, key, replayed

    def launch(
        self,
        runtime: Runtime,
        source: str,
        entry_point: str,
        launch: Launch,
        arguments: np.ndarray,
        like: Any,
        replayable: bool = True,
    ) -> None:
        """Launch a kernel as `Runtime.launch` does, and record it.

        `replayable` is False where the argument holds an address of this call alone, such as that of a copy. A
        cooperative launch is never recorded: the workspace that it uses is its stream's.
        """
        arguments.flags.writeable = False

        def enqueue(arrays: tuple) -> None:
            runtime.launch(source, entry_point, launch, arguments, arrays[0])

        self.compute(enqueue, (like,), replayable and not launch.cooperative)

    def compute(self, work: Callable[[tuple], None], arrays: tuple, replayable: bool = True) -> None:
        """Call ``work(arrays)``, which does all that is left after the checks, and record it.

        Parameters
        ----------
        work : callable
            Work on the arrays that `ReplayCache.replay` was given, outputs first. It must keep none of them.
        arrays : tuple of arrays
            These arrays, new ones where outputs are made.
        replayable : bool
            Whether to record it.
        """
        work(arrays)
        if self._cache is not None and replayable:
            self._cache.record(self._place, self._key, work)


NEW, REPLAYED = Call(), Call(replayed=True)


class ReplayCache:
    """The calls of one op that may be replayed, by the address of the first array written, or a hash of NumPy arrays.

    What was replayed last on a NumPy array is the first to be compared when the array comes again: a guess.
    Every op has its own: two in one cache would be taken for each other.
    """

    def __init__(self) -> None:
        self._entries: dict[int, tuple[tuple, ...]] = {}
        self._guesses: dict[int, tuple] = {}  # by the id of the first array

    def replay(self, out: Any, given: tuple, *options: Any) -> Call:
        """Replay a call that is in the cache.

        Parameters
        ----------
        out : tuple of arrays or None
            Arrays that the op writes, ``(out,)`` where it is one. Without the first of them, or a tuple, the call is
            neither replayed nor recorded: its outputs are new arrays.
        given : tuple
            All other arrays, None where absent.
        *options
            All options. Equal values of different types differ: 1.0 is no axis, though it equals one.

        Returns
        -------
        Call
            The call, `replayed` or not.
        """
        if type(out) is not tuple or not out:
            return NEW
        arrays = out + given
        kind = type(arrays[0])
        if kind is np.ndarray and kind not in registry.runtimes:
            return self._replay_on_host(arrays, options)
        if kind not in registry.runtimes:
            return NEW
        key: list = []
        for array in arrays:
            if array is None:
                key.append(None)
            elif type(array) is kind:
                data = array.data
                key += data.ptr, data.device_id, array.dtype, array.shape, array.strides
            else:
                return NEW
        key.append(kind)
        key += map(type, options)
        key += options
        for known, work in self._entries.get(key[0], ()):
            if known == key:
                work(arrays)
                return REPLAYED
        return Call(self, key[0], key) if IMMUTABLE.issuperset(map(type, options)) else NEW

    def _replay_on_host(self, arrays: tuple, options: tuple) -> Call:
        facts = cpu.kernels(FACTS)
        if facts is None or not facts.READABLE:
            return NEW
        walk, given, types = facts.walk, (facts.PLACES, id(arrays), len(arrays)), [*map(type, options)]
        (known, known_types, known_options), work = self._guesses.get(id(arrays[0]), facts.NO_CALL)
        place = walk(*given, known, False)
        if place == facts.EQUAL:
            if known_options == options and known_types == types:
                work(arrays)
                return REPLAYED
            place = walk(*given, facts.NO_FACTS, False)
        if not place:
            return NEW
        for entry in self._entries.get(place, ()):
            (known, known_types, known_options), work = entry
            if walk(*given, known, False) == facts.EQUAL and known_options == options and known_types == types:
                if len(self._guesses) >= MOST_ADDRESSES:
                    self._guesses.clear()
                self._guesses[id(arrays[0])] = entry
                work(arrays)
                return REPLAYED
        return Call(self, place, (facts.written(arrays), types, options)) if IMMUTABLE.issuperset(types) else NEW

    def record(self, place: int, key: list | tuple, work: Callable[[tuple], None]) -> None:
        """Keep what was done after all checks, by the key, at a place where few others are."""
        if len(self._entries) >= MOST_ADDRESSES:
            self._entries.clear()
        # A new tuple, not a changed one: another thread may be walking through it.
        others = self._entries.get(place, ())[: MOST_EACH - 1]
        self._entries[place] = ((key, work), *others)
