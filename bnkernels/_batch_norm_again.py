"""What makes a call cheap: one that was checked and launched before is launched again after one comparison.

What an op checks, and the argument of its kernel, depend on the options and on facts of every array: type, data type,
shape, strides, address and device. So a call with ``out=`` whose facts are those of an earlier one needs no check, no
plan and no packing. The facts are read from the arrays every time: it does not matter that one was reshaped in place,
or freed and its address taken by another. No array is kept, and what is kept never changes, so threads may share it.

Any other call takes the long way: checks and plan by signature, overlaps and devices, packing.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from bnkernels import _runtime
from bnkernels._runtime import Launch, Runtime

MOST_ADDRESSES, MOST_EACH = 1024, 8  # an entry takes about 2 kB
UNCHANGING = {float, int, bool, str, type(None)}  # options that nobody can change behind our back


class Call(NamedTuple):
    """The facts of a call: who runs it, those of its arrays, and its options."""

    runtime: Runtime
    arrays: list  # as `Runtime.facts` returns them
    options: tuple  # momentum, eps, axis, activation, alpha


class Launches:
    """The launches of one op that may be made again, by the address of the first array that it writes."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[tuple, ...]] = {}

    def again(
        self, out: Any, rest: tuple, momentum: Any, eps: Any, axis: Any, activation: Any, alpha: Any
    ) -> Call | bool | None:
        """Launch what such a call once launched; `out` holds the arrays that come before the `rest`.

        Returns True if there was one; else the call, for `keep`, or None where there will be nothing to keep: on the
        host, without `out`, for what is no array.
        """
        if type(out) is not tuple or not out:
            return None
        runtime = _runtime.runtimes.get(type(out[0]))
        facts = None if runtime is None else runtime.facts(out + rest)
        if facts is None:
            return None
        for known, by, options, source, entry_point, launch, arguments in self._known.get(facts[0][3], ()):
            if known == facts and by is runtime:
                known_momentum, known_eps, known_axis, known_activation, known_alpha = options
                if (
                    (axis is known_axis or _same(axis, known_axis))
                    and (activation is known_activation or _same(activation, known_activation))
                    and (momentum is known_momentum or _same(momentum, known_momentum))
                    and (eps is known_eps or _same(eps, known_eps))
                    and (alpha is known_alpha or _same(alpha, known_alpha))
                ):
                    runtime.launch(source, entry_point, launch, arguments, out[0])
                    return True
        return Call(runtime, facts, (momentum, eps, axis, activation, alpha))

    def keep(self, call: Call, source: str, entry_point: str, launch: Launch, arguments: np.ndarray) -> None:
        """Keep a launch that was made after all checks."""
        if not UNCHANGING.issuperset(map(type, call.options)):
            return
        arguments.flags.writeable = False
        address = call.arrays[0][3]
        if len(self._known) >= MOST_ADDRESSES:
            self._known.clear()
        # A new tuple, not a changed one: another thread may be walking through it.
        others = self._known.get(address, ())[: MOST_EACH - 1]
        entry = (call.arrays, call.runtime, call.options, source, entry_point, launch, arguments)
        self._known[address] = (entry, *others)


def _same(given: Any, known: Any) -> bool:
    """Return whether an option is one that was checked: 1.0 is no axis, though it is equal to one."""
    return type(given) is type(known) and given == known
