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

from bnkernels.runtime import registry
from bnkernels.runtime.seam import Launch, Reader, Runtime

MOST_ADDRESSES, MOST_EACH = 1024, 8  # an entry takes about 2 kB
UNCHANGING = {float, int, bool, str, type(None)}  # options that nobody can change behind our back


class Call(NamedTuple):
    """A call that was not known: who would run it, what reads its facts, these, its options, and what is like it."""

    runtime: Runtime
    read: Reader
    facts: list
    options: tuple  # momentum, eps, axis, activation, alpha, unbiased
    launches: dict[int, tuple] | None  # those of such arrays; None if there has been none

    @property
    def on_one_device(self) -> bool:
        """Whether all arrays are on the same device."""
        devices = self.facts[1::5]
        return devices.count(devices[0]) == len(devices)


class Launches:
    """The launches of one op that may be made again.

    They are kept by the type of the arrays, by which of them are given, which decides what reads their facts, and by
    the address of the first.
    """

    def __init__(self) -> None:
        self._known: dict[type, tuple[tuple[Runtime, Reader, dict[int, tuple]], ...]] = {}

    def again(
        self,
        out: Any,
        rest: tuple,
        momentum: Any,
        eps: Any,
        axis: Any,
        activation: Any,
        alpha: Any,
        unbiased: Any = None,
    ) -> Call | bool | None:
        """Launch what such a call once launched; `out` holds the arrays that come before the `rest`.

        Returns True if there was one; else the call, for `keep`, or None where there will be nothing to keep: on the
        host, without `out`, for what is no array.
        """
        if type(out) is not tuple:
            return None
        arrays = out + rest
        for runtime, read, launches in self._known.get(type(arrays[0]), ()):
            facts = read(arrays)
            if facts is None:
                continue
            for known, (m, e, ax, phi, al, u), source, entry_point, launch, arguments in launches.get(facts[0], ()):
                if (
                    known == facts
                    and (activation is phi or _same(activation, phi))
                    and (momentum is m or _same(momentum, m))
                    and (eps is e or _same(eps, e))
                    and (axis is ax or _same(axis, ax))
                    and (alpha is al or _same(alpha, al))
                    and (unbiased is u or _same(unbiased, u))
                ):
                    runtime.launch(source, entry_point, launch, arguments, arrays[0])
                    return True
            return Call(runtime, read, facts, (momentum, eps, axis, activation, alpha, unbiased), launches)
        return _unknown(arrays, (momentum, eps, axis, activation, alpha, unbiased))

    def keep(self, call: Call, source: str, entry_point: str, launch: Launch, arguments: np.ndarray) -> None:
        """Keep a launch that was made after all checks."""
        if not UNCHANGING.issuperset(map(type, call.options)):
            return
        arguments.flags.writeable = False
        launches = self._new(call) if call.launches is None else call.launches
        if len(launches) >= MOST_ADDRESSES:
            launches.clear()
        # A new tuple, not a changed one: another thread may be walking through it.
        others = launches.get(call.facts[0], ())[: MOST_EACH - 1]
        launches[call.facts[0]] = ((call.facts, call.options, source, entry_point, launch, arguments), *others)

    def _new(self, call: Call) -> dict[int, tuple]:
        """Return the place of the launches of arrays of this type, these of them given."""
        kind = call.runtime.array_type
        launches: dict[int, tuple] = {}
        self._known[kind] = (*self._known.get(kind, ()), (call.runtime, call.read, launches))
        return launches


def _unknown(arrays: tuple, options: tuple) -> Call | None:
    """Return a call whose arrays are of a type, or given in a combination, that was not seen before."""
    runtime = registry.runtimes.get(type(arrays[0]))
    if runtime is None:
        return None
    read = runtime.reader(tuple(array is not None for array in arrays))
    facts = read(arrays)
    return None if facts is None else Call(runtime, read, facts, options, None)


def _same(given: Any, known: Any) -> bool:
    """Return whether an option is one that was checked: 1.0 is no axis, though it is equal to one."""
    return type(given) is type(known) and given == known
