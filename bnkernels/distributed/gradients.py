"""The exchange of a data-parallel step: gradients of all ranks, added up in one all-gather."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bnkernels.distributed.communicator import Communicator, checked
from bnkernels.runtime import checks as check
from bnkernels.runtime.arguments import empty
from bnkernels.runtime.registry import runtime_of


class GradientExchange:
    """Adds up arrays over the ranks, all in one all-gather, in the order of the ranks: the same bits in every run.

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

    def __call__(self, *weights: float, flag: float = 0.0) -> float:
        """Replace the arrays by their sums over the ranks, each rank's weighted.

        Parameters
        ----------
        *weights : float
            Weight of this rank, one for each array; by default ``1 / size``, which gives means. Ranks with unequal
            parts of a mini-batch scale the gradient of their loss by their share of the examples **before** the
            backward, for synchronised batch norm adds it up too, and give the weight 1 to the gradients.
        flag : float
            Number that goes along, such as a wish to stop.

        Returns
        -------
        float
            Largest flag of all ranks.

        Raises
        ------
        ValueError
            If there are not as many weights as arrays.
        """
        ranks, buffer, start = self._ranks, self._buffer, 0
        weights = weights or (1 / ranks.size,) * len(self._arrays)
        if len(weights) != len(self._arrays):
            raise ValueError(f"weights must be {len(self._arrays)}, one for each array, got {len(weights)}")
        for array, weight in zip(self._arrays, weights, strict=True):
            buffer[start : start + array.size] = array if weight == 1 else array * array.dtype.type(weight)
            start += array.size
        buffer[-1] = flag
        gathered, start = ranks.allgather(buffer), 0
        ranks.synchronize()
        total = gathered[0, :-1]
        for rank in range(1, ranks.size):
            total += gathered[rank, :-1]
        for array in self._arrays:
            array[...] = total[start : start + array.size]
            start += array.size
        return float(gathered[:, -1].max())
