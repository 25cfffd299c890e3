"""Replay cache: a call with ``out=`` whose arrays and options equal an earlier one's is launched again, unchecked.

What an op checks, and its kernel's argument, depend only on the options and on each array's type, address, device (of a
NumPy array the flags, such as whether it can be written), data type, shape and strides: the key of a call. It is read
anew on every call, so arrays may be reshaped in place, or freed and their addresses reused. No array is kept, and
entries never change, so threads may share them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from bnkernels.runtime import cpu, registry
from bnkernels.runtime.arguments import HOST, heads
from bnkernels.runtime.seam import Launch, Runtime

MOST_ADDRESSES, MOST_EACH = 1024, 8  # an entry takes about 2 kB
IMMUTABLE = {float, int, bool, str, type(None)}  # types of options that nobody can change behind our back


class Call:
    """A call of an op: already replayed, or to be launched after all checks.

    Parameters
    ----------
    cache : ReplayCache, optional
        Cache that records the launch. Without it nothing is recorded.
    key : list, optional
        Key of the call.

    Attributes
    ----------
    replayed : bool
        True if the launch has been made, so that nothing is left to do.
    """

    __slots__ = ("_cache", "_key", "replayed")

    def __init__(self, cache: ReplayCache | None = None, key: list | None = None, replayed: bool = False) -> None:
        self._cache, self._key, self.replayed = cache, key, replayed

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
            self._cache.record(self._key, work)


NEW, REPLAYED = Call(), Call(replayed=True)


class ReplayCache:
    """The launches of one op that may be replayed, by the address of the first array that it writes.

    Every op has its own: two in one cache would be taken for each other.
    """

    def __init__(self) -> None:
        self._entries: dict[int, tuple[tuple, ...]] = {}

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
        key: list = []
        if kind in registry.runtimes:
            for array in arrays:
                if array is None:
                    key.append(None)
                elif type(array) is kind:
                    data = array.data
                    key += data.ptr, data.device_id, array.dtype, array.shape, array.strides
                else:
                    return NEW
        elif kind is HOST and cpu.in_use():
            for array in arrays:
                if array is None:
                    key.append(None)
                elif type(array) is kind:
                    key += heads[id(array)].value, array.flags.num, array.dtype, array.shape, array.strides
                else:
                    return NEW
        else:
            return NEW
        key.append(kind)
        key += map(type, options)
        key += options
        for known, work in self._entries.get(key[0], ()):
            if known == key:
                work(arrays)
                return REPLAYED
        return Call(self, key) if IMMUTABLE.issuperset(map(type, options)) else NEW

    def record(self, key: list, work: Callable[[tuple], None]) -> None:
        """Keep what was done after all checks."""
        if len(self._entries) >= MOST_ADDRESSES:
            self._entries.clear()
        # A new tuple, not a changed one: another thread may be walking through it.
        others = self._entries.get(key[0], ())[: MOST_EACH - 1]
        self._entries[key[0]] = ((key, work), *others)
