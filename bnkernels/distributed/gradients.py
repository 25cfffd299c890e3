"""The exchange of a data-parallel step: gradients of all ranks, averaged in one all-gather."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bnkernels.distributed.communicator import Communicator, checked
from bnkernels.runtime import checks as check
from bnkernels.runtime.arguments import empty
from bnkernels.runtime.registry import runtime_of


class GradientExchange:
    """Averages arrays over the ranks, all in one all-gather, in the order of the ranks: the same bits in every run.

    Parameters
    ----------
    communicator : Communicator
        Ranks.
    arrays : sequence of array, shape (P,)
        Flat arrays of one data type, such as `Layer.flatten` returns for gradients; the same sizes on all ranks.

    Raises
    ------
    TypeError, ValueError
        If they are no such arrays.
    RankError
        If ranks differ in their sizes.

    Notes
    -----
    Every rank receives the arrays of all: `size` times the memory of one. That suits small networks and few ranks; an
    all-reduce moves less to many ranks, in an order that MPI and NCCL do not promise.

    Examples
    --------
    >>> import numpy as np
    >>> from bnkernels.distributed import run_threads
    >>> def work(ranks):
    ...     gradients = np.array([1.0, ranks.rank])
    ...     GradientExchange(ranks, [gradients])()
    ...     return gradients.tolist()
    >>> run_threads(2, work)
    [[1.0, 0.5], [1.0, 0.5]]
    """

    def __init__(self, communicator: Communicator, arrays: Sequence[Any]) -> None:
        self._ranks, self._arrays = checked(communicator), list(arrays)
        forms = {f"array {number}": check.signature(array) for number, array in enumerate(self._arrays)}
        found = check.arguments(forms, written=len(forms))
        first = next(iter(found.values()))
        check.floating(first)
        for argument in found.values():
            check.contiguous(argument, (argument.shape[0] if len(argument.shape) == 1 else -1,), first.dtype)
        sizes = [array.size for array in self._arrays]
        self._buffer = empty(runtime_of(first.kind), (sum(sizes) + 1,), self._arrays[0])
        self._ranks.agree(f"a flat exchange of {sizes} numbers, {first.dtype}")

    def __call__(self, weight: float | None = None, flag: float = 0.0) -> float:
        """Replace the arrays by their mean over the ranks.

        Parameters
        ----------
        weight : float, optional
            Weight of this rank, such as its share of the examples; they add up to 1. By default all count alike.
        flag : float
            Number that goes along, such as a wish to stop.

        Returns
        -------
        float
            Largest flag of all ranks.
        """
        ranks, buffer, start = self._ranks, self._buffer, 0
        weight = 1 / ranks.size if weight is None else check.number("weight", weight, 0)
        for array in self._arrays:
            buffer[start : start + array.size] = array * array.dtype.type(weight)
            start += array.size
        buffer[-1] = flag
        gathered, start = ranks.allgather(buffer), 0
        total = gathered[0]
        for rank in range(1, ranks.size):
            total[:-1] += gathered[rank, :-1]
        for array in self._arrays:
            array[...] = total[start : start + array.size]
            start += array.size
        return float(gathered[:, -1].max())
