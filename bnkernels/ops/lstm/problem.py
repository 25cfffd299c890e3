"""Problem of an LSTM: sizes, norm and data type, the checks of the arrays, and what the steps share."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from bnkernels.runtime import checks as check
from bnkernels.runtime.operands import Operands

NORMS = ("batch", "layer", None)
GATES = 4  # input, forget, cell candidate and output: i, f, g, o, as in PyTorch
NORM_NAMES = ("gamma_x", "gamma_h", "gamma_c", "beta_c")
RUNNING_NAMES = tuple(f"{moment}_{part}" for part in "xhc" for moment in ("mean", "var"))


class Problem(NamedTuple):
    """Sizes (T, N, I, H), data type and norm.

    `live` is True where the statistics are those of the mini-batch, and `tracked` is the number of time steps that have
    population statistics. `capturable` is True where products are those of `matmul`.
    """

    steps: int
    rows: int
    inputs: int
    units: int
    dtype: np.dtype
    norm: str | None
    live: bool
    tracked: int
    capturable: bool = False

    @property
    def columns(self) -> int:
        """The gates of all units, 4H."""
        return GATES * self.units

    @property
    def rstd_shape(self) -> tuple[int, ...]:
        """Shape of 1 / standard deviation of a step: of input part, recurrent part and cell."""
        return (3, self.rows) if self.norm == "layer" else (2 * self.columns + self.units,)

    @property
    def sums_length(self) -> int:
        """Number of the gradients of bias, gamma_x, gamma_h, gamma_c and beta_c, one behind the other."""
        return 3 * self.columns + 2 * self.units if self.norm else self.columns


class Forward(NamedTuple):
    """Arrays and options that the steps of a forward share.

    `x_part` and `h_part` hold the products with the weights, and after a step what a norm made of them; without one,
    `x_part` is `gates`. Arrays whose first axis is 1 long instead of T are for the step being worked on.
    """

    problem: Problem
    eps: float
    momentum: float
    counts: tuple[int, ...]  # examples that a step has
    lengths: Any
    longest: int  # an example that has all of them
    y: Any
    h_n: Any
    c_n: Any
    c0: Any
    bias: Any
    norms: tuple
    running: tuple
    gates: Any
    x_part: Any
    h_part: Any
    c_hat: Any
    cells: Any
    rstd: Any


class Backward(NamedTuple):
    """Arrays that the steps of a backward share; `dh` and `dc` go from step to step, `dc` in place."""

    problem: Problem
    counts: tuple[int, ...]
    lengths: Any
    dy: Any
    dh_n: Any
    dc_n: Any
    c0: Any
    norms: tuple
    gates: Any
    x_hat: Any
    h_hat: Any
    c_hat: Any
    cells: Any
    rstd: Any
    dh: Any
    dc: Any
    dx_part: Any
    dh_part: Any


class Saved(NamedTuple):
    """Arguments and results of a forward that its backward takes; opaque to callers."""

    problem: Problem
    counts: tuple[int, ...]
    lengths: Any
    x: Any
    h0: Any
    c0: Any
    weight_ih: Any
    weight_hh: Any
    bias: Any
    norms: tuple
    y: Any
    gates: Any
    x_hat: Any
    h_hat: Any
    c_hat: Any
    cells: Any
    rstd: Any


def at(array: Any, t: int) -> Any:
    """Return the part of an array that belongs to a step; all steps share the only one of an array that has one."""
    return array[t if len(array) > 1 else 0]


def check_lengths(lengths: Any, steps: int, rows: int) -> np.ndarray | None:
    """Check the lengths of the sequences, on the host; return them as 32-bit integers."""
    if lengths is None:
        return None
    if isinstance(lengths, (list, tuple)):
        lengths = np.asarray(lengths)
    if type(lengths) is not np.ndarray:  # nor a kind of it that lies elsewhere
        raise TypeError(
            f"lengths must be a NumPy array of integers, or a list of them, got {check.shown(lengths)}; the op needs "
            "them on the host, as PyTorch does: pass cupy.asnumpy of them"
        )
    if lengths.dtype.kind not in "iu":
        raise TypeError(f"lengths must be integers, got {lengths.dtype}; convert them with lengths.astype('int64')")
    if lengths.shape != (rows,):
        raise ValueError(f"lengths must have the shape ({rows},), one for every example, got {lengths.shape}")
    wrong = lengths[(lengths < 1) | (lengths > steps)]
    if wrong.size:
        raise ValueError(f"lengths must be from 1 to T, here {steps}, got {int(wrong[0])}; leave empty sequences out")
    return lengths.astype(np.int32)


def counts_of(lengths: np.ndarray | None, steps: int, rows: int) -> tuple[int, ...]:
    """Return how many examples every step has, up to the last step that has one."""
    if lengths is None:
        return (rows,) * steps
    ended = np.bincount(lengths, minlength=steps + 1).cumsum()
    return tuple(int(count) for count in rows - ended[:-1] if count)


Arguments = dict[str, check.Argument | None]


def _forward(args: Arguments, norm: str | None, training: bool, kept: bool, capturable: bool) -> Problem:
    x = args["x"]
    check.float32_or_float64(x)
    if len(x.shape) != 3:
        raise ValueError(f"x must have the shape (T, N, I), time first, got {x.shape}")
    steps, rows, inputs = x.shape
    weight_hh = args["weight_hh"]
    if len(weight_hh.shape) != 2 or weight_hh.shape[0] != GATES * weight_hh.shape[1] or 0 in weight_hh.shape:
        raise ValueError(f"weight_hh must have the shape (4 H, H), gates i, f, g, o, got {weight_hh.shape}")
    if not inputs:
        raise ValueError(f"x must have at least one input, got the shape {x.shape}")
    units, columns = weight_hh.shape[1], weight_hh.shape[0]
    live = norm == "batch" and training
    if live and rows == 1:
        raise ValueError("x has one example: one value per unit has no variance; train on at least two")
    _check_given(args, norm, training)
    tracked = 0 if args["mean_x"] is None else args["mean_x"].shape[0]
    if args["mean_x"] is not None and not tracked:
        raise ValueError("running must have statistics of at least one time step, got none")
    shapes = {"x": x.shape, "weight_ih": (columns, inputs), "weight_hh": (columns, units), "bias": (columns,)}
    shapes |= {name: (rows, units) for name in ("h0", "c0", "h_n", "c_n")} | {"y": (steps, rows, units)}
    shapes |= {"gamma_x": (columns,), "gamma_h": (columns,), "gamma_c": (units,), "beta_c": (units,)}
    shapes |= {name: (tracked, units if name[-1] == "c" else columns) for name in RUNNING_NAMES}
    for name, shape in shapes.items():
        check.contiguous(args[name], shape, x.dtype)
    return Problem(steps, rows, inputs, units, x.dtype, norm, live, tracked, capturable)


def _check_given(args: Arguments, norm: str | None, training: bool) -> None:
    """Check that parameters and population statistics are there exactly where the norm has a use for them."""
    if norm is None and args["gamma_x"] is not None:
        raise ValueError("norms belong to a norm; without one pass norms=None, or the name of the norm")
    if norm is not None and args["gamma_x"] is None:
        raise ValueError(f"norms must be ({', '.join(NORM_NAMES)}) with norm='{norm}', got None")
    if norm != "batch" and args["mean_x"] is not None:
        raise ValueError(f"running belongs to batch norm; with norm={norm!r} there is none to update")
    if norm == "batch" and not training and args["mean_x"] is None:
        raise ValueError("running must be given with training=False: the population statistics are taken then")


def _backward(args: Arguments) -> None:
    x, h0, weight_hh = args["x"], args["h0"], args["weight_hh"]
    columns, units = weight_hh.shape[:1], weight_hh.shape[1:]
    shapes = {"dy": (*x.shape[:2], *units), "dx": x.shape, "dweight_ih": args["weight_ih"].shape}
    shapes |= dict.fromkeys(("dh_n", "dc_n", "dh0", "dc0"), h0.shape) | {"dweight_hh": weight_hh.shape}
    shapes |= dict.fromkeys(("dbias", "dgamma_x", "dgamma_h"), columns) | dict.fromkeys(("dgamma_c", "dbeta_c"), units)
    for name, shape in shapes.items():
        check.contiguous(args[name], shape, x.dtype)


_READ = f"x h0 c0 weight_ih weight_hh bias {' '.join(NORM_NAMES)}"
_OPTIONAL = f"y h_n c_n h0 c0 bias {' '.join((*NORM_NAMES, *RUNNING_NAMES))}"
TRAINING = Operands(f"y h_n c_n {' '.join(RUNNING_NAMES)}", _READ, _forward, optional=_OPTIONAL)
INFERENCE = Operands("y h_n c_n", f"{_READ} {' '.join(RUNNING_NAMES)}", _forward, optional=_OPTIONAL)
_GRADIENTS = f"dx dh0 dc0 dweight_ih dweight_hh dbias {' '.join(f'd{name}' for name in NORM_NAMES)}"
BACKWARD = Operands(
    *(_GRADIENTS, "x h0 c0 weight_ih weight_hh dy dh_n dc_n", _backward), optional=f"{_GRADIENTS} dy dh_n dc_n"
)
