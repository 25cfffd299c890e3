"""An LSTM layer over whole sequences, without a norm, with recurrent batch norm, or with layer norm.

CuPy arrays run ``cuda/lstm_*.cu`` between the products of a library, NumPy arrays ``cpu``, or ``reference.py`` where
Numba is missing. Below, T is the number of time steps, N that of
examples, I that of inputs and H that of hidden units; the 4H gates come in PyTorch's order: input, forget, cell
candidate, output.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np

from bnkernels.ops.lstm import sequence
from bnkernels.ops.lstm.problem import (
    BACKWARD,
    INFERENCE,
    NORM_NAMES,
    NORMS,
    RUNNING_NAMES,
    TRAINING,
    Forward,
    Problem,
    Saved,
    check_lengths,
    counts_of,
)
from bnkernels.runtime import checks as check
from bnkernels.runtime.arguments import empty
from bnkernels.runtime.arrays import AnyArray, Array
from bnkernels.runtime.cpu import kernels
from bnkernels.runtime.seam import Runtime

CPU = "bnkernels.ops.lstm.cpu"


def lstm_forward(
    x: Array,
    h0: AnyArray | None,
    c0: AnyArray | None,
    weight_ih: AnyArray,
    weight_hh: AnyArray,
    bias: AnyArray | None = None,
    norms: tuple[AnyArray, ...] | None = None,
    running: tuple[AnyArray, ...] | None = None,
    *,
    norm: str | None = None,
    training: bool = True,
    momentum: float | None = 0.1,
    batches_before: int = 0,
    eps: float = 1e-5,
    lengths: Any = None,
    keep: bool = True,
    reuse: Any = None,
    capturable: bool = False,
    out: tuple[AnyArray, AnyArray, AnyArray] | None = None,
) -> tuple[Array, Array, Array, Any]:
    """Run an LSTM over whole sequences.

    Parameters
    ----------
    x : array, shape (T, N, I), float32 or float64
        Sequences of the mini-batch, time first; C order. Never written.
    h0, c0 : array, shape (N, H), dtype of `x`, or None
        Hidden state and cell before the first step; None is 0.
    weight_ih, weight_hh : array, shapes (4H, I) and (4H, H), dtype of `x`
        Weights of the inputs and of the hidden state, gates in the order i, f, g, o; C order.
    bias : array, shape (4H,), dtype of `x`, optional
        Shift of the gates: the sum of PyTorch's ``bias_ih`` and ``bias_hh``.
    norms : tuple of four arrays, shapes (4H,), (4H,), (H,), (H,), dtype of `x`, optional
        Scales of input part, recurrent part and cell, and shift of the cell: ``(gamma_x, gamma_h, gamma_c, beta_c)``;
        with a norm.
    running : tuple of six arrays, shapes (T_max, 4H) four times, (T_max, H) twice, dtype of `x`, optional
        Population statistics of every step with batch norm: means and variances of input part, recurrent part and cell,
        ``(mean_x, var_x, mean_h, var_h, mean_c, var_c)``. In training updated in place, else taken; steps beyond T_max
        update none, and take those of the last.
    norm : {"batch", "layer", None}
        Norm of input part, recurrent part and, before the output, of the cell: batch norm over the mini-batch for every
        step and unit, layer norm over the gates of an example and over its cells, or none.
    training : bool
        Whether batch norm takes the statistics of the mini-batch, or the population's.
    momentum : float or None
        Weight of the new statistics in the population's, between 0 and 1; None is 1 / (batches_before + 1).
    batches_before : int
        Number of the mini-batches that the population statistics are of already; only for ``momentum=None``.
    eps : float
        Number added to variances.
    lengths : array of int, shape (N,), on the host, optional
        Lengths of the sequences, from 1 to T; in any order. By default T.
    keep : bool
        Whether a backward follows; False takes less memory.
    reuse : tuple, optional
        Result `saved` of an earlier forward, whose backward is not wanted any more: its memory is taken where it fits.
    capturable : bool
        Whether forward and backward can be captured as a CUDA graph: products are those of `matmul`, where CuPy's are
        faster. Without `lengths`, which come from the host.
    out : tuple of three arrays, optional
        Arrays for ``(y, h_n, c_n)``; C order.

    Returns
    -------
    y : array, shape (T, N, H), dtype of `x`
        Hidden state behind every step; 0 beyond the length of a sequence.
    h_n, c_n : array, shape (N, H), dtype of `x`
        Hidden state and cell behind the last step of each sequence.
    saved : tuple or None
        Arguments and results for the backward, for as many as are wanted; None without `keep`. It holds the arguments
        and `y` themselves, not copies: they must not change before the backward.

    Raises
    ------
    TypeError, ValueError
        If an argument is wrong; nothing is written then.

    Notes
    -----
    With W x_t the input part and W h_{t-1} the recurrent part, ``a = norm(W x_t) gamma_x + norm(W h_{t-1}) gamma_h +
    bias``, ``c_t = sigmoid(f) c_{t-1} + sigmoid(i) tanh(g)`` and ``h_t = sigmoid(o) tanh(norm(c_t) gamma_c + beta_c)``.
    The cell that goes to the next step is not normalised. Population variances are unbiased, over N - 1; a step that
    one example is left at has the variance 0 and updates no population statistics. Examples beyond their length do not
    enter the statistics; whatever `x` holds there must be finite.

    A sequence is one launch where it fits, else a time step is, behind a product by a library. Source:
    ``cuda/lstm_forward_cooperative.cu``, ``cuda/lstm_forward.cu``.

    For truncated backward through time pass `h_n` and `c_n` of a window as `h0` and `c0` of the next, and drop the
    gradients that the backward of the next returns for them.

    References
    ----------
    .. [1] T. Cooijmans et al., "Recurrent Batch Normalization", 2016, arXiv:1603.09025.
    .. [2] J. L. Ba, J. R. Kiros and G. E. Hinton, "Layer Normalization", 2016, arXiv:1607.06450.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.array([[[1.0]], [[2.0]]])
    >>> y, h_n, c_n, saved = lstm_forward(x, None, None, np.ones((4, 1)), np.zeros((4, 1)))
    >>> y.shape, h_n.round(3), c_n.round(3)
    ((2, 1, 1), array([[0.768]]), array([[1.34]]))
    """
    check.one_of("norm", norm, NORMS)
    training, keep = check.boolean("training", training), check.boolean("keep", keep)
    capturable = check.boolean("capturable", capturable)
    if capturable and lengths is not None:
        raise ValueError("lengths must be None with capturable=True: a CUDA graph cannot copy them from the host")
    y, h_n, c_n = check.pack_outputs(out, ("y", "h_n", "c_n"))
    norms, running = _pack("norms", norms, NORM_NAMES), _pack("running", running, RUNNING_NAMES)
    written = (running, ()) if training else ((), running)
    arrays = (y, h_n, c_n, *written[0], x, h0, c0, weight_ih, weight_hh, bias, *norms, *written[1])
    operands, options = TRAINING if training else INFERENCE, (norm, training, keep, capturable)
    runtime, problem = operands.check(*arrays, options=options)
    eps = check.epsilon(eps, x)
    momentum = check.cumulative(batches_before) if momentum is None else check.number("momentum", momentum, 0, 1)
    lengths = check_lengths(lengths, problem.steps, problem.rows)
    counts = counts_of(lengths, problem.steps, problem.rows) if problem.rows else ()
    state = problem.rows, problem.units
    y, h_n, c_n = (
        empty(runtime, shape, x) if array is None else array
        for array, shape in ((y, (problem.steps, *state)), (h_n, state), (c_n, state))
    )
    h0, c0 = (_zeros(runtime, state, x) if array is None else array for array in (h0, c0))
    if not counts:
        h_n[...], c_n[...] = h0, c0
    longest = 0 if lengths is None or not counts else int(lengths.argmax())
    if lengths is not None and runtime is not None:
        lengths = runtime.on_device(lengths, x)
    memory = _fitting(runtime, problem, reuse, len(counts), x) if keep else None
    if memory is None:
        memory = _memory(runtime, problem, x, len(counts) if keep else min(1, len(counts)), max(1, len(counts)))
    run = Forward(problem, eps, momentum, counts, lengths, longest, y, h_n, c_n, c0, bias, norms, running, *memory)
    if counts:
        _driver(runtime).forward(runtime, run, x, h0, weight_ih, weight_hh)
    if not keep:
        return y, h_n, c_n, None
    return y, h_n, c_n, Saved(problem, counts, lengths, x, h0, c0, weight_ih, weight_hh, bias, norms, y, *memory)


def lstm_backward(
    dy: AnyArray | None,
    dh_n: AnyArray | None,
    dc_n: AnyArray | None,
    saved: Any,
    *,
    input_gradient: bool = True,
    out: tuple[Any, ...] | None = None,
) -> tuple[Any, Any, Any, Any, Any, Any, Any]:
    """Return the gradients of `lstm_forward`, through all its time steps.

    Parameters
    ----------
    dy : array, shape (T, N, H), dtype of `x`, or None
        Gradient with respect to the hidden states of all steps; None is 0, where only the last state is used. Beyond
        the length of a sequence it does not matter.
    dh_n, dc_n : array, shape (N, H), dtype of `x`, or None
        Gradients with respect to the last hidden state and the last cell; None is 0.
    saved : tuple
        Last result of the forward.
    input_gradient : bool
        True if `dx` is wanted; the first layer of a network does not need it.
    out : tuple, optional
        Arrays for the gradients, as they are returned, `dnorms` a tuple of four; C order. None where None is returned.

    Returns
    -------
    dx : array, shape (T, N, I), dtype of `x`, or None
        Gradient with respect to `x`, where it is wanted.
    dh0, dc0 : array, shape (N, H), dtype of `x`
        Gradients with respect to the first hidden state and the first cell.
    dweight_ih, dweight_hh : array, shapes (4H, I) and (4H, H), dtype of `x`
        Gradients with respect to the weights.
    dbias : array, shape (4H,), dtype of `x`
        Gradient with respect to `bias`, given or not.
    dnorms : tuple of four arrays, shapes (4H,), (4H,), (H,), (H,), dtype of `x`, or None
        Gradients with respect to `norms`; None without a norm.

    Raises
    ------
    TypeError, ValueError
        If an argument is wrong; nothing is written then.

    Notes
    -----
    Deterministic. With batch norm after ``training=False`` the statistics are constants. Source:
    ``cuda/lstm_backward_cooperative.cu``, ``cuda/lstm_backward.cu``.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.array([[[1.0]], [[2.0]]])
    >>> y, h_n, c_n, saved = lstm_forward(x, None, None, np.ones((4, 1)), np.zeros((4, 1)))
    >>> dx, dh0, dc0, *_ = lstm_backward(None, np.ones((1, 1)), None, saved)
    >>> dx.shape, dc0.round(4)
    ((2, 1, 1), array([[0.1363]]))
    """
    if not isinstance(saved, Saved):
        raise TypeError(f"saved must be the last result of lstm_forward with keep=True, got {check.shown(saved)}")
    input_gradient = check.boolean("input_gradient", input_gradient)
    problem, x, h0 = saved.problem, saved.x, saved.h0
    found = _pack_gradients(out, input_gradient, problem.norm)
    weights = saved.weight_ih, saved.weight_hh
    runtime, _ = BACKWARD.check(*found, x, h0, saved.c0, *weights, dy, dh_n, dc_n)
    columns, units = (problem.columns,), (problem.units,)
    vectors = (columns, columns, columns, units, units)[: 5 if problem.norm else 1]
    shapes = [like.shape for like in (x, h0, h0, *weights)] + [*vectors]
    if out is None:
        found = [empty(runtime, shape, x) for shape in shapes]
        found[0] = found[0] if input_gradient else None
    wanted, parameters = found[:5], found[5 : len(shapes)]
    if saved.counts:
        sums = _driver(runtime).backward(runtime, saved, dy, dh_n, dc_n, tuple(wanted))
    else:
        sums = _zeros(runtime, (problem.sums_length,), x)
        for gradient, given in zip(wanted, (None, dh_n, dc_n, None, None), strict=True):
            if gradient is not None:
                gradient[...] = 0 if given is None else given
    start = 0
    for gradient in parameters:
        gradient[...] = sums[start : start + len(gradient)]
        start += len(gradient)
    return *wanted, parameters[0], tuple(parameters[1:]) if problem.norm else None


def _pack_gradients(out: Any, input_gradient: bool, norm: str | None) -> list:
    """Check the tuple of the gradients, or None; return its ten arrays, None for what is not wanted."""
    if out is None:
        return [None] * 10
    names = ("dx", "dh0", "dc0", "dweight_ih", "dweight_hh", "dbias", "dnorms")
    *others, dnorms = check.pack_wanted(out, names, (input_gradient, *[True] * 5, norm is not None))
    return [*others, *_pack("dnorms", dnorms, tuple(f"d{name}" for name in NORM_NAMES))]


def _pack(name: str, arrays: Any, names: tuple[str, ...]) -> tuple:
    """Check a tuple with one array for every name, or None; return it, or as many None."""
    if arrays is None:
        return (None,) * len(names)
    if not isinstance(arrays, (tuple, list)) or len(arrays) != len(names) or type(None) in map(type, arrays):
        raise TypeError(
            f"{name} must be a tuple of the {len(names)} arrays ({', '.join(names)}), got {check.shown(arrays)}"
        )
    return tuple(arrays)


def _driver(runtime: Runtime | None) -> ModuleType:
    """Return the module that computes all steps."""
    return (runtime is None and kernels(CPU)) or sequence


def _zeros(runtime: Runtime | None, shape: tuple[int, ...], like: Any, dtype: np.dtype | None = None) -> Any:
    zeros = empty(runtime, shape, like, dtype)
    zeros[...] = 0
    return zeros


def _memory(runtime: Runtime | None, problem: Problem, x: Any, kept: int, used: int) -> tuple:
    """Return gates, x_part, h_part, c_hat, cells and rstd of so many steps that are kept, and of all for x_part."""
    rows, columns, units = problem.rows, problem.columns, problem.units
    x_part = empty(runtime, (used, rows, columns), x)
    h_part = empty(runtime, (kept if problem.norm else min(1, kept), rows, columns), x)
    cells = empty(runtime, (kept, rows, units), x)
    if not problem.norm:
        return x_part, x_part, h_part, None, cells, None
    gates, c_hat = empty(runtime, (kept, rows, columns), x), empty(runtime, (kept, rows, units), x)
    return gates, x_part, h_part, c_hat, cells, empty(runtime, (kept, *problem.rstd_shape), x)


def _fitting(runtime: Runtime | None, problem: Problem, reuse: Any, used: int, x: Any) -> tuple | None:
    """Return the memory of an earlier forward, None where it does not fit."""
    if reuse is None:
        return None
    if not isinstance(reuse, Saved):
        raise TypeError(f"reuse must be the last result of lstm_forward with keep=True, got {check.shown(reuse)}")
    free = {name: getattr(problem, name) for name in ("steps", "live", "tracked", "capturable")}
    steps = len(reuse.cells)
    if (
        reuse.problem._replace(**free) != problem
        or type(reuse.y) is not type(x)
        or not (steps == used or 1 < used <= steps)
    ):
        return None
    if runtime is not None and runtime.device(reuse.y) != runtime.device(x):
        return None
    return reuse.gates, reuse.x_hat, reuse.h_hat, reuse.c_hat, reuse.cells, reuse.rstd
