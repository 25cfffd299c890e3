"""Layer norm, RMS norm and group norm on the CPU, compiled by Numba: the kernels, and who computes which rows.

Blocks of rows are fixed by the shape, so the bits are the same for any number of threads. Beside its arrays a call
takes 2 MiB at most, for the sums of columns of every block; and where channels come last twice 1 MiB, or what two
examples take that are larger.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache, partial
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

PART = 2**20  # bytes of channels that come last, which are put in the order of the others to be computed
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
) -> Callable[[tuple], None]:
    """Return what writes `y` and `statistics`, given these, x, gamma and beta as a tuple."""
    if problem.channels_last:
        return partial(_forward_last, problem, eps, phi)
    rows, columns, (like, params, _, _) = problem.rows, problem.columns, _plan(problem)
    pointers = addresses(None, x, gamma, beta, y, statistics)
    numbers = rows, columns, problem.channel_groups, problem.centred, eps, phi.alpha, phi.code
    if problem.inner == 1:
        given = like, params, *pointers, *numbers
        return lambda _: share(forward_rows, rows, rows * columns, *given)

    def of_channels(arrays: tuple) -> None:
        own = [_of_columns(problem, array) for array in arrays[3:5]]
        given = like, params, pointers[0], *addresses(None, *own), *pointers[3:], *numbers
        share(forward_rows, rows, rows * columns, *given)

    return of_channels


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
) -> Callable[[tuple], None]:
    """Return what writes the gradients, given these, dy, x, gamma, beta and statistics; `dx` may be `dy`."""
    if problem.channels_last:
        return partial(_backward_last, problem, phi)
    inputs, outputs = addresses(None, dy, x, gamma, beta, statistics), addresses(None, dx, dgamma, dbeta)
    if problem.inner == 1:
        return lambda _: _differentiate(problem, phi, inputs, outputs)

    @np.errstate(all="ignore")  # kernels have no warnings either
    def of_channels(arrays: tuple) -> None:
        gradients, own = arrays[1:3], [_of_columns(problem, array) for array in arrays[5:7]]
        sums = [np.empty(problem.channel_groups * problem.columns, problem.acc_dtype) for _ in gradients]
        given = *inputs[:2], *addresses(None, *own), inputs[4]
        _differentiate(problem, phi, given, (outputs[0], *addresses(None, *sums)))
        for gradient, of_columns in zip(gradients, sums, strict=True):
            gradient[...] = of_columns.reshape(-1, problem.inner).sum(1, dtype=np.float64).astype(problem.acc_dtype)

    return of_channels


def _parts(problem: Problem) -> Iterator[tuple[Problem, slice, slice]]:
    """Yield the problem of the next examples, 1 MiB or one, with channels first; and places of examples and rows."""
    groups, size = problem.channel_groups, problem.channel_groups * problem.columns * problem.dtype.itemsize
    examples, count = problem.rows // groups, max(1, PART // size)
    for start in range(0, examples, count):
        end = min(start + count, examples)
        own = problem._replace(rows=(end - start) * groups, channels_last=False)
        yield own, slice(start, end), slice(start * groups, end * groups)


def _first(problem: Problem, array: np.ndarray) -> np.ndarray:
    """Return a view with the channels in axis 1, (examples, channels, positions)."""
    return array.reshape(-1, problem.inner, problem.channel_groups * problem.channels).swapaxes(1, 2)


@np.errstate(all="ignore")  # kernels have no warnings either
def _forward_last(problem: Problem, eps: float, phi: Activation, arrays: tuple) -> None:
    """Write `y` and `statistics` of channels that come last, part by part by way of the cache."""
    y, statistics, x, gamma, beta = arrays[:5]
    of_rows = statistics.reshape(problem.statistics_shape)
    for own, examples, rows in _parts(problem):
        part = np.ascontiguousarray(_first(problem, x[examples]))
        of_part = np.empty(own.statistics_shape, problem.acc_dtype)
        given = part, of_part, part, gamma, beta
        forward(own, part, gamma, beta, eps, phi, part, of_part)(given)
        _first(problem, y[examples])[...] = part
        of_rows[:, rows] = of_part


@np.errstate(all="ignore")  # kernels have no warnings either
def _backward_last(problem: Problem, phi: Activation, arrays: tuple) -> None:
    """Write the gradients of channels that come last, likewise."""
    dx, dgamma, dbeta, dy, x, gamma, beta, statistics = arrays[:8]  # a workspace may follow
    sums = [np.zeros(gradient.shape) for gradient in (dgamma, dbeta)]
    of_rows = statistics.reshape(problem.statistics_shape)
    for own, examples, rows in _parts(problem):
        of_dy, of_x = (np.ascontiguousarray(_first(problem, array[examples])) for array in (dy, x))
        gradients = [np.empty(dgamma.shape, problem.acc_dtype) for _ in sums]
        given = of_dy, of_x, gamma, beta, np.ascontiguousarray(of_rows[:, rows])
        backward(own, *given, phi, of_dy, *gradients)((of_dy, *gradients, *given))
        _first(problem, dx[examples])[...] = of_dy
        for sum_, gradient in zip(sums, gradients, strict=True):
            sum_ += gradient
    dgamma[...], dbeta[...] = sums


def _of_columns(problem: Problem, parameters: np.ndarray | None) -> np.ndarray | None:
    """Return the parameters of all columns of an example."""
    return None if parameters is None else parameters.astype(problem.acc_dtype).repeat(problem.inner)


def _differentiate(problem: Problem, phi: Activation, inputs: tuple[int, ...], outputs: tuple[int, int, int]) -> None:
    """Write dx, and the gradients of the parameters of all columns of an example."""
    rows, columns, groups, (like, params, height, blocks) = *problem[:2], problem.channel_groups, _plan(problem)
    given, numbers = (like, params, *inputs), (rows, columns, groups, problem.centred, phi.alpha, phi.code)
    if columns > HELD:
        sums = np.empty(3 * rows)
        share(backward_rows, rows, rows * columns, *given, host_pointer(sums), *numbers)
        lines = groups * ceil_div(columns, LINE)
        share(backward_columns, lines, rows * columns, *given, *outputs, host_pointer(sums), *numbers)
        return
    sums = np.empty(2 * blocks * groups * columns)
    share(backward_blocks, blocks * groups, rows * columns, *given, *outputs, host_pointer(sums), *numbers, height)
    if blocks > 1:
        step, size = 2 * groups * columns, groups * columns
        for offset, out in ((0, outputs[2]), (size, outputs[1]))[0 if problem.centred else 1 :]:
            merge(params, host_pointer(sums), offset, step, blocks, size, out)


@lru_cache(maxsize=1024)
def _plan(problem: Problem) -> tuple[Any, Any, int, int]:
    """Return an example of the data and one of the parameters, and height and number of the blocks of rows."""
    rows, columns = problem.rows // problem.channel_groups, problem.channel_groups * problem.columns
    height = GROUP * ceil_div(max(HEIGHT, ceil_div(rows, max(1, MOST_SUMS // (2 * columns)))), GROUP)
    params = problem.params_dtype if problem.inner == 1 else problem.acc_dtype
    return LIKE[problem.dtype.name], LIKE[params.name], height, ceil_div(rows, height)
