"""The next mini-batch, by a counter on the device: what a captured training step begins with, in one launch."""

from __future__ import annotations

import numpy as np

from bnkernels.ops.mini_batch import reference
from bnkernels.runtime import checks as check
from bnkernels.runtime import seam as rt
from bnkernels.runtime.arguments import SUFFIX, addresses, arguments_type, pack
from bnkernels.runtime.arrays import AnyArray, Array
from bnkernels.runtime.cpu import kernels
from bnkernels.runtime.operands import Operands
from bnkernels.runtime.replay import ReplayCache

CPU = "bnkernels.ops.mini_batch.cpu"
ARGUMENTS = arguments_type(
    "x labels indices schedule x_out labels_out scalars_out counter", "batch inputs scalars", "", ""
)
THREADS, VECTOR = 256, 16
HALF, LOW = 32, 2**32 - 1  # bits and mask of the lower half of a 64-bit counter


def _shape(args: dict[str, check.Argument | None]) -> tuple[int, int, int]:
    """Check all arrays; return the sizes of a mini-batch and of a row of the schedule."""
    x, x_out, schedule = args["x"], args["x_out"], args["schedule"]
    check.float32_or_float64(x)
    if len(x.shape) != 2 or len(schedule.shape) != 2:
        raise ValueError(f"x and schedule must have two dimensions, got the shapes {x.shape} and {schedule.shape}")
    batch = x_out.shape[0] if x_out.shape else 0
    check.contiguous(x, x.shape, x.dtype)
    check.contiguous(args["labels"], x.shape[:1], np.dtype(np.int32))
    check.contiguous(schedule, schedule.shape, x.dtype)
    check.contiguous(x_out, (batch, x.shape[1]), x.dtype)
    check.contiguous(args["labels_out"], (batch,), np.dtype(np.int32))
    check.contiguous(args["scalars"], schedule.shape[1:], x.dtype)
    check.contiguous(args["counter"], (2,), np.dtype(np.uint32))
    if args["indices"] is not None:
        check.contiguous(args["indices"], (*args["indices"].shape[:1], batch), np.dtype(np.int32))
    return batch, x.shape[1], schedule.shape[1]


CALLS = ReplayCache()
OPERANDS = Operands("x_out labels_out scalars counter", "x labels schedule indices", _shape, optional="indices")


def mini_batch(
    x: Array,
    labels: AnyArray,
    schedule: Array,
    counter: AnyArray,
    *,
    indices: AnyArray | None = None,
    out: tuple[Array, Array, Array],
) -> tuple[Array, Array, Array]:
    """Copy the mini-batch that a counter names, and move the counter to the next.

    Parameters
    ----------
    x : array, shape (rows, K), float32 or float64
        All examples; C order. Never written.
    labels : array, shape (rows,), int32
        Labels of the examples.
    schedule : array, shape (steps, S), dtype of `x`
        Numbers that depend on the step alone, such as a learning rate.
    counter : array, shape (2,), uint32
        Number of the step, from 0, and a 0; the first is one more afterwards.
    indices : array, shape (steps, N), int32, optional
        Rows of the mini-batches. They are not checked: reading them would synchronise. Without them the mini-batches
        are the rows in their order.
    out : tuple of three arrays
        Arrays for the examples (N, K), their labels (N,), and the row of the schedule (S,); C order.

    Returns
    -------
    tuple of three arrays
        `out`.

    Raises
    ------
    TypeError, ValueError
        If an argument is wrong; nothing is written then.
    IndexError
        For NumPy arrays, if there is no such step.

    Notes
    -----
    On a GPU a step beyond the last one is not noticed. All that varies from step to step is read from device memory,
    so the launch can be captured and replayed. Source:
    ``cuda/mini_batch.cu``.

    Examples
    --------
    >>> import numpy as np
    >>> x, labels = np.arange(6.0).reshape(6, 1), np.arange(6, dtype=np.int32)
    >>> rates, counter = np.array([[0.1], [0.05]]), np.array([1, 0], np.uint32)
    >>> out = np.empty((3, 1)), np.empty(3, np.int32), np.empty(1)
    >>> _, batch_labels, rate = mini_batch(x, labels, rates, counter, out=out)
    >>> batch_labels, rate, counter
    (array([3, 4, 5], dtype=int32), array([0.05]), array([2, 0], dtype=uint32))
    """
    call = CALLS.replay(out, (x, labels, schedule, counter, indices))
    if call.replayed:
        return out
    x_out, labels_out, scalars = check.pack_outputs(out, OPERANDS.names[:3])
    runtime, sizes = OPERANDS.check(x_out, labels_out, scalars, counter, x, labels, schedule, indices)
    if runtime is None:
        copy = (kernels(CPU) or reference).mini_batch
        call.compute(lambda arrays: copy(*arrays), (*out, x, labels, schedule, counter, indices))
        return out
    pointers = addresses(runtime, x, labels, indices, schedule, x_out, labels_out, scalars, counter)
    batch, inputs, _ = sizes
    row = inputs * x.dtype.itemsize
    vectors = not any(number % VECTOR for number in (row, runtime.pointer(x), runtime.pointer(x_out)))
    launch = mini_batch_launch(batch, row // VECTOR if vectors else inputs)
    arguments = pack(ARGUMENTS[x.dtype], *pointers, *sizes)
    kernel = f"bnk_mini_batch_{'vectors_' if vectors else ''}{SUFFIX[x.dtype]}"
    call.launch(runtime, "mini_batch", kernel, launch, arguments, x)
    return out


def mini_batch_launch(batch: int, units: int) -> rt.Launch:
    """Return the launch that copies `batch` rows of so many units, a thread for each up to a block's.

    Examples
    --------
    >>> mini_batch_launch(64, 16)
    Launch(grid=(4, 1, 1), block=(16, 16, 1), shared_bytes=0, cooperative=False)
    """
    threads = min(max(units, 1), THREADS)
    examples = THREADS // threads
    return rt.Launch((max(1, rt.ceil_div(batch, examples)), 1, 1), (threads, examples, 1))


def random_rows(seed: int, count: int, rows: int, start: int = 0) -> np.ndarray:
    """Return the rows of the data that `fused_training` draws for its examples, with replacement.

    Parameters
    ----------
    seed : int
        Seed, from 0 to 2**32 - 1.
    count : int
        Number of examples.
    rows : int
        Number of rows of the data, from 1 to 2**31 - 1.
    start : int
        Number of the first example: for the mini-batch of a step its size times the steps before.

    Returns
    -------
    array, shape (count,), int32
        Rows, a NumPy array.

    Raises
    ------
    TypeError
        If an argument is not an integer.
    ValueError
        If one is out of range.

    Notes
    -----
    Every number is made of its place alone, by Philox-2x32-10 [1]_, and 2**32 numbers are divided among the rows: the
    probabilities of two rows differ by at most 2**-32.

    References
    ----------
    .. [1] J. Salmon, M. Moraes, R. Dror and D. Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.

    Examples
    --------
    >>> random_rows(7, 3, 1000).tolist() == random_rows(7, 5, 1000)[:3].tolist()
    True
    >>> random_rows(7, 2, 1000, start=1).tolist() == random_rows(7, 3, 1000)[1:].tolist()
    True
    """
    seed, count, start = check_seed(seed), check.integer("count", count, 0), check.integer("start", start, 0)
    if start + count > 2**64:
        raise ValueError(f"start + count must be at most 2**64, got {check.shown(start)} and {check.shown(count)}")
    if not 0 < check.integer("rows", rows) < 2**31:
        raise ValueError(f"rows must be from 1 to 2**31 - 1, got {check.shown(rows)}")
    counter = np.arange(count, dtype=np.uint64) + np.uint64(start)
    half = np.uint64(HALF)
    low, high = counter & np.uint64(LOW), counter >> half
    for turn in range(10):
        product = low * np.uint64(0xD256D193)
        low = (product >> half) ^ np.uint64((seed + turn * 0x9E3779B9) & LOW) ^ high
        high = product & np.uint64(LOW)
    return (low * np.uint64(rows) >> half).astype(np.int32)


def check_seed(seed: int) -> int:
    """Return the seed of `random_rows`, if it is one."""
    if not 0 <= check.integer("seed", seed) <= LOW:
        raise ValueError(f"seed must be from 0 to 2**32 - 1, got {check.shown(seed)}")
    return int(seed)
