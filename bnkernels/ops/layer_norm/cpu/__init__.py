"""Layer norm and RMS norm on the CPU, compiled by Numba: the kernels, and how rows are shared among threads.

Blocks of rows are fixed by the shape, so the bits are the same for any number of threads. Beside its arrays a call
takes 2 MiB at most, for the sums of columns of every block.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

from bnkernels.ops.activations import Activation
from bnkernels.ops.layer_norm.cpu.backward import GROUP, HELD, backward_blocks, backward_columns, backward_rows
from bnkernels.ops.layer_norm.cpu.forward import forward_rows
from bnkernels.ops.layer_norm.problem import Problem
from bnkernels.runtime.arguments import addresses, host_pointer
from bnkernels.runtime.cpu.language import LIKE, LINE
from bnkernels.runtime.cpu.sums import MOST_SUMS, merge
from bnkernels.runtime.cpu.threads import share
from bnkernels.runtime.seam import ceil_div

HEIGHT = 64  # rows of a block, unless there would be too many blocks


def forward(
    problem: Problem,
    x: np.ndarray,
    gamma: np.ndarray | None,
    beta: np.ndarray | None,
    eps: float,
    phi: Activation,
    y: np.ndarray,
    statistics: np.ndarray,
) -> Callable[[Any], None]:
    """Return what writes `y` and `statistics`."""
    (rows, columns, *_), (like, params, _, _) = problem, _plan(problem)
    pointers = addresses(None, x, gamma, beta, y, statistics)
    given = like, params, *pointers, rows, columns, problem.centred, eps, phi.alpha, phi.code
    return lambda _: share(forward_rows, rows, rows * columns, *given)


def backward(
    problem: Problem,
    dy: np.ndarray,
    x: np.ndarray,
    gamma: np.ndarray | None,
    beta: np.ndarray | None,
    statistics: np.ndarray,
    phi: Activation,
    dx: np.ndarray,
    dgamma: np.ndarray,
    dbeta: np.ndarray | None,
) -> Callable[[Any], None]:
    """Return what writes the gradients; `dx` may be `dy`."""
    (rows, columns, *_), (like, params, height, blocks) = problem, _plan(problem)
    given = like, params, *addresses(None, dy, x, gamma, beta, statistics)
    outputs, numbers = addresses(None, dx, dgamma, dbeta), (rows, columns, problem.centred, phi.alpha, phi.code)

    def by_rows(_: Any) -> None:
        sums = np.empty(2 * blocks * columns)
        share(backward_blocks, blocks, rows * columns, *given, *outputs, host_pointer(sums), *numbers, height)
        if blocks > 1:
            for offset, out in ((0, outputs[2]), (columns, outputs[1]))[0 if problem.centred else 1 :]:
                merge(params, host_pointer(sums), offset, 2 * columns, blocks, columns, out)

    def by_columns(_: Any) -> None:
        sums = np.empty(3 * rows)
        share(backward_rows, rows, rows * columns, *given, host_pointer(sums), *numbers)
        lines = ceil_div(columns, LINE)
        share(backward_columns, lines, rows * columns, *given, *outputs, host_pointer(sums), *numbers)

    return by_rows if columns <= HELD else by_columns


@lru_cache(maxsize=1024)
def _plan(problem: Problem) -> tuple[Any, Any, int, int]:
    """Return an example of the data and one of the parameters, and height and number of the blocks of rows."""
    height = GROUP * ceil_div(max(HEIGHT, ceil_div(problem.rows, max(1, MOST_SUMS // (2 * problem.columns)))), GROUP)
    return LIKE[problem.dtype.name], LIKE[problem.params_dtype.name], height, ceil_div(problem.rows, height)
