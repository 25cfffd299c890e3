"""Kernels of the budget: the calls that launch them, the turns of their loops, and what they are to reach."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from math import prod
from typing import Any

import bnkernels as bn
from benchmarks.counts.limits import WARP
from bnkernels.nn.mlp import MLP
from bnkernels.ops.fused_training.op import fused_training
from bnkernels.runtime.seam import Launch, ceil_div

Array = Any
Make = Callable[..., Array]  # makes an array of a shape and the name of a data type
Call = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """A kernel at a size.

    Attributes
    ----------
    op, shape, dtype : str, tuple of int, str
        The case: the op with its direction, and its data.
    call : callable
        The call, on arrays that it is given the maker of, with so many repetitions in it where there is a loop of them.
    target : int
        The most instructions for each vector, or cycles.
    vectors : callable or None
        Number of vectors of `x` that a thread reads, from its launch; None: a small kernel, judged by its cycles.
    moved : int
        Vectors that memory moves for each of them.
    trips : callable
        Numbers of turns of loops, from the launch: see `tools.compile.paths.Machine.path`.
    avoid : sequence of str
        Source lines that are not on the path.
    repeated : str
        Line of the loop of which the figures are one turn; else they are of the whole kernel.
    rare : (str, int) or None
        Source line that only every so many turns reach.
    summed : str
        Source line of one instruction for each element of `x`. If given, the path must have as many of it as the
        vectors have elements, and copy and store each vector: else the turns of loops are wrong.
    """

    op: str
    shape: tuple[int, ...]
    dtype: str
    call: Callable[[Make, int], Call]
    target: int
    vectors: Callable[[Launch], int] | None = None
    moved: int = 2
    trips: Callable[[Launch], Mapping[str, Sequence[int | Fraction]]] = field(default=lambda launch: {})
    avoid: Sequence[str] = ()
    repeated: str = ""
    rare: tuple[str, int] | None = None
    summed: str = ""

    @property
    def name(self) -> str:
        """The case in words."""
        return f"{self.op} {'x'.join(map(str, self.shape))} {self.dtype}"


def batch_norm(direction: str, shape: tuple[int, ...], dtype: str) -> Callable[[Make, int], Call]:
    """Return what makes the call of a pass with a ReLU."""

    def call(array: Make, repetitions: int) -> Call:
        x, options = array(shape, dtype), {"axis": 1 if len(shape) > 2 else -1, "activation": "relu"}
        gamma, beta, mean, var = (array(shape[1:2]) for _ in range(4))
        if direction == "forward":
            out = array(shape, dtype), array((3, shape[1]))
            return lambda: bn.batch_norm_forward(x, gamma, beta, mean, var, out=out, **options)
        given, out = (array(shape, dtype), x, gamma, beta, array((3, shape[1]))), (array(shape, dtype), mean, var)
        return lambda: bn.batch_norm_backward(*given, out=out, **options)

    return call


def layer_norm(direction: str, shape: tuple[int, int], dtype: str, centred: bool = True) -> Callable[[Make, int], Call]:
    """Return what makes the call of a pass; that of RMS norm, if rows are not centred."""

    def call(array: Make, repetitions: int) -> Call:
        x, y = array(shape, dtype), array(shape, dtype)
        vectors, gradients = ([array(shape[1:]) for _ in range(1 + centred)] for _ in range(2))
        forward, backward = bn.layer_norm_forward, bn.layer_norm_backward
        if not centred:
            forward, backward = bn.rms_norm_forward, bn.rms_norm_backward
        saved = array((3 if centred else 1, shape[0]))
        if direction == "forward":
            return lambda: forward(x, *vectors, out=(y, saved))
        dy = array(shape, dtype)
        return lambda: backward(dy, x, *vectors, saved, out=(y, *gradients))

    return call


def long_rows(direction: str, target: int, centred: bool = True) -> Row:
    """Return the row of a layer norm, or of an RMS norm."""
    name = "layer_norm" if centred else "rms_norm"
    call = layer_norm(direction, *LONG_ROWS, centred)
    row = Row(f"{name} {direction}", *LONG_ROWS, call, target, vectors=lambda launch: 4096 // 8 // launch.block[0])
    if direction == "forward":
        return row
    return replace(row, moved=3, repeated="block_row < own.all", rare=("dgamma = add(dgamma, terms", 16))


def fused(sizes: tuple[int, ...], batch: int) -> Callable[[Make, int], Call]:
    """Return what makes training steps of a network with batch norm, by SGD."""

    def call(array: Make, steps: int) -> Call:
        model = MLP(sizes)
        x, labels = array((steps * batch, sizes[0])), array((steps * batch,), "int32")
        parameters, running = array(model.parameters.shape), array(model.running.shape)
        given, losses = (model.fused, parameters, (), running, x, labels), array((steps,))
        return lambda: fused_training(*given, batch=batch, optimizer="sgd", lr=0.1, out=losses)

    return call


def at_question(direction: str) -> Row:
    """Return the row of the question's mini-batch."""
    return Row(f"batch_norm {direction}", (64, 20), "float32", batch_norm(direction, (64, 20), "float32"), 1100)


def of_one_block(launch: Launch) -> dict[str, tuple[int, ...]]:
    """Return how often the loops of a step of 64-20-10 run in the longest warp: one of the first layer's tiles."""
    warps, ahead = launch.threads // WARP, 4  # examples that are looked up together
    copies = ceil_div(64, warps * ahead)
    of_products = 64 // 8, 20 // 8  # eight terms a turn; of the backward there is no whole turn
    return {
        "first = threadIdx.x / WARP": (copies, copies),
        "k < terms": of_products,
        "tile < tiles": (1, 0),
        "first = before": (0,),
        "n < subwarp.batch; n += 4": (8, 8),
    }


def of_several_blocks(launch: Launch) -> dict[str, tuple[int, ...]]:
    """Return how often the loops of a step of 784-100-100-100-10 run in a block that has neurons of every layer.

    The products of the first layer have more than one stage. The last layer is updated by other blocks meanwhile.
    """
    return {
        "first < count; first +=": (1,) * 13 + (0, 1) + (1,) * 4,
        "i < turns; ++i": (4, 4),
        "COLUMNS<A>; n += PRODUCT_THREADS": (0,) * 21,
        "s < count; s += 4": (4,) * 7 + (2,) * 6,
        "first < rows && c < left": (4,),
        "first < all": (0, 1, 0, 1),
        "n < row.count; n += WARP": (2, 2, 2, 2),
        "n < a.batch; n += WARP": (2, 2, 2),
        "n < g.count; n += WARP": (2,) * 6,
    }


def rows_of_thread(shape: tuple[int, ...]) -> Callable[[Launch], int]:
    """Return what tells the vectors of `x` that a thread of a cooperative launch has of a slice."""
    vectors = shape[0] if len(shape) == 2 else prod((shape[0], *shape[2:])) // 8
    return lambda launch: ceil_div(vectors, launch.grid[1] * launch.block[1])


def of_slice(direction: str, shape: tuple[int, ...]) -> Callable[[Launch], dict[str, tuple[int | Fraction, ...]]]:
    """Return how often the loops of a slice run where all rows are held, in a block that is not the last to arrive."""
    rows_of, forward, inner = rows_of_thread(shape), direction == "forward", len(shape) > 2

    def trips(launch: Launch) -> dict[str, tuple[int | Fraction, ...]]:
        rows, levels = rows_of(launch), 1 + (launch.block[1] > 8) + (launch.block[1] > 64)

        def unrolled(times: int) -> Fraction:  # the path has all of the code for rows left over, too
            return Fraction(rows - (times - 1), times)

        return {
            "i < count; ++i, to": (0, 0, unrolled(4)),
            "i < last; ++i, ": (unrolled((4 if inner else 2) // (1 if forward else 2)),),
            **({} if inner else {"step *= COOPERATIVE_FAN_IN": (levels,), "i += step) add": (0,)}),
            "i > a.held; --i": (0,),
            "write(kept.own[at])" if forward else "&kept[i - 1]": (rows,),
        }

    return trips


# Lines for sums beyond the range, for rows that are not held, and for the last block of a slice to arrive.
AWAY = (
    "units[i] < A(1)",
    "add_other_rows<L>(",
    "row = rows.row(valid.rest)",
    "first = valid.rest",
    "slice.add_blocks(",
    "of.statistics[c] = empty",
    "mean[0] = ",
)


def large(direction: str, shape: tuple[int, ...], dtype: str) -> Row:
    """Return the row of a tensor whose slices several blocks share."""
    return Row(
        f"batch_norm {direction}",
        shape,
        dtype,
        batch_norm(direction, shape, dtype),
        150 if direction == "forward" else 240,
        vectors=rows_of_thread(shape),
        moved=2 if direction == "forward" else 3,
        trips=of_slice(direction, shape),
        avoid=AWAY,
        repeated="turn < turns.count + lag",
        summed="squares[i] = fma(" if direction == "forward" else "g_centred[i] = fma(",
    )


def lstm(direction: str, norm: str | None, sizes: tuple[int, int, int]) -> Callable[[Make, int], Call]:
    """Return what makes an LSTM of (examples, inputs, units), with population statistics where it has them."""
    rows, inputs, units = sizes
    gates = 4 * units

    def call(array: Make, steps: int) -> Call:
        states, weights = (array((rows, units)) for _ in range(2)), (array((gates, inputs)), array((gates, units)))
        norms = (array((gates,)), array((gates,)), array((units,)), array((units,))) if norm else None
        widths = (gates, gates, units) if norm == "batch" else ()
        running = tuple(array((steps, width)) for width in widths for _ in range(2)) or None
        given = array((steps, rows, inputs)), *states, *weights, array((gates,)), norms, running
        if direction == "forward":
            return lambda: bn.lstm_forward(*given, norm=norm)
        saved, dy = bn.lstm_forward(*given, norm=norm)[3], array((steps, rows, units))
        return lambda: bn.lstm_backward(dy, None, None, saved)

    return call


def sequence(direction: str, norm: str | None, target: int) -> Row:
    """Return the row of a step within the launch of a sequence; 100 units, products of 8 terms a turn."""
    loop, terms = (
        ("t < a.steps; ++t", "k < units; ++k") if direction == "forward" else ("t >= 0; --t", "c < units; ++c")
    )
    name = f"lstm {direction}, {norm} norm, step" if norm else f"lstm {direction}, step"
    row = Row(name, (64, 1, 100), "float32", lstm(direction, norm, (64, 1, 100)), target, repeated=loop)
    return replace(row, trips=lambda launch: {terms: (Fraction(100 - 7, 8),)})


def step_launch(direction: str, norm: str, sizes: tuple[int, int, int], target: int) -> Row:
    """Return the row of a step that is a launch of its own."""
    return Row(f"lstm_{norm}_norm_step {direction}", sizes, "float32", lstm(direction, norm, sizes), target)


def group_norm(direction: str, target: int, axis: int = 1) -> Row:
    """Return the row of images, with their channels in an axis, whose groups of channels are as long as those rows."""
    groups, (shape, dtype) = 16, GROUPS if axis == 1 else LAST_GROUPS

    def call(array: Make, repetitions: int) -> Call:
        x, out = array(shape, dtype), array(shape, dtype)
        gamma, beta, *gradients = (array((shape[axis],)) for _ in range(4))
        given = x, groups, gamma, beta
        statistics = array((3, shape[0], groups))
        if direction == "forward":
            return lambda: bn.group_norm_forward(*given, axis=axis, out=(out, statistics))
        dy = array(shape, dtype)
        return lambda: bn.group_norm_backward(dy, *given, statistics, axis=axis, out=(out, *gradients))

    op = f"group_norm {direction}" if axis == 1 else f"group_norm {direction}, channels last"
    return replace(long_rows(direction, target), op=op, shape=shape, dtype=dtype, call=call)


LONG_ROWS = (16384, 4096), "bfloat16"
GROUPS = (1024, 256, 16, 16), "bfloat16"
LAST_GROUPS = (1024, 16, 16, 256), "bfloat16"
MATRIX, IMAGES = ((65536, 4096), "bfloat16"), ((256, 256, 56, 56), "float16")
ROWS = [
    *(large(direction, *data) for data in (MATRIX, IMAGES) for direction in ("forward", "backward")),
    long_rows("forward", 150),
    long_rows("backward", 260),
    long_rows("forward", 100, centred=False),
    long_rows("backward", 220, centred=False),
    group_norm("forward", 175),
    group_norm("backward", 290),
    group_norm("forward", 175, axis=-1),
    group_norm("backward", 300, axis=-1),
    at_question("forward"),
    at_question("backward"),
    Row(
        "fused_training step",
        (64, 20, 10),
        "float32",
        fused((64, 20, 10), 64),
        6500,
        trips=of_one_block,
        repeated="step < a.steps; ++step",
    ),
    Row(
        "fused_training step",
        (784, 100, 100, 100, 10),
        "float32",
        fused((784, 100, 100, 100, 10), 60),
        60000,
        trips=of_several_blocks,
        repeated="step < a.steps; ++step",
    ),
    # Targets of an LSTM are what was counted first, and a tenth.
    sequence("forward", None, 9500),
    sequence("backward", None, 13000),
    sequence("forward", "batch", 22000),
    sequence("backward", "batch", 20500),
    sequence("forward", "layer", 11500),
    sequence("backward", "layer", 13000),
    step_launch("forward", "batch", (64, 1, 1000), 14500),
    step_launch("backward", "batch", (64, 1, 1000), 12500),
    step_launch("forward", "layer", (128, 256, 256), 8500),
    step_launch("backward", "layer", (128, 256, 256), 10500),
]
