"""The arrays of an op, and all that can be wrong with them, checked before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from bnkernels.runtime import checks as check
from bnkernels.runtime import overlap, registry
from bnkernels.runtime.arguments import addresses
from bnkernels.runtime.seam import Runtime


class Operands:
    """The arrays of an op by name.

    Parameters
    ----------
    writes, reads : str
        Names of the arrays that the op writes, and of those that it only reads, separated by spaces. The first one that
        it reads is always given.
    problem : callable
        ``problem(arguments, *options)``: checks data types, shapes and layouts of a dict of `checks.Argument` by name,
        and returns what the launch depends on. Its results are cached by the signatures of the arrays. By default it
        returns the dict.
    optional : str
        Names of the arrays that may be None.
    in_place : str
        Names of the arrays of which the first one written may be one.
    """

    def __init__(
        self, writes: str, reads: str, problem: Callable[..., Any] = dict, *, optional: str = "", in_place: str = ""
    ) -> None:
        self.written, self.names = len(writes.split()), (*writes.split(), *reads.split())
        self._optional, self._in_place = tuple(optional.split()), tuple(in_place.split())
        self._find = problem
        self._problem = lru_cache(maxsize=1024)(self._checked)

    def check(self, *arrays: Any, options: tuple = ()) -> tuple[Runtime | None, Any]:
        """Check all arrays, in the order of `names`; return their runtime, None for NumPy, and the problem."""
        runtime, reaches, problem = self._problem(options, *check.signatures(arrays))
        if runtime is not None:
            check.one_device(runtime, self.names, arrays)
        for array in arrays[: self.written]:
            if array is not None:
                places = addresses(runtime, *arrays), reaches
                overlap.check_outputs(runtime, self.names, arrays, *places, self.written, self._in_place)
                break
        return runtime, problem

    def _checked(self, options: tuple, *signatures: check.Signature | None) -> tuple[Runtime | None, tuple, Any]:
        given = dict(zip(self.names, signatures, strict=True))
        problem = self._find(check.arguments(given, self._optional, self.written), *options)
        runtime = registry.runtime_of(signatures[self.written][0])
        return runtime, tuple(map(overlap.reach, signatures)), problem
