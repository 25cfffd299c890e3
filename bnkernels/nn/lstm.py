"""Long short-term memory over sequences."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np

from bnkernels.nn.layer import Leaf
from bnkernels.nn.options import check_type
from bnkernels.nn.owner import array_module, data_type
from bnkernels.ops.lstm.op import lstm_backward, lstm_forward
from bnkernels.runtime import checks as check
from bnkernels.runtime.arguments import empty
from bnkernels.runtime.registry import runtime_of

State = tuple[Any, Any]
INITIAL = ("uniform", "identity")


class LSTM(Leaf):
    """Long short-term memory over sequences.

    Parameters
    ----------
    inputs, hidden : int
        Numbers of features of a time step, I, and of hidden units, H.
    layers : int
        Number of such layers, each of which takes the hidden states of the one before it.
    bias : bool
        Whether the gates have a bias.
    batch_first : bool
        Whether sequences come and go as (N, T, ...), else time first: (T, N, ...).
    output : {"all", "last"}
        Hidden states of all steps, or only that behind the last step of each sequence, (N, H).
    initial : {"uniform", "identity"}
        Initial weights: uniform within ``1 / sqrt(H)``, PyTorch's; or orthogonal ones of the inputs, the identity for
        every gate of the hidden state, biases 0 and of the forget gate 1.
    input_gradient : bool
        Whether `backward` returns the gradient of the input.
    capturable : bool
        Whether forward and backward can be captured as a CUDA graph, see `lstm_forward`.
    dtype : data type
        Type of data and parameters, float32 or float64.
    seed : int, numpy.random.Generator, optional
        Seed of the initial weights.
    xp : module
        Array module, `numpy` or `cupy`.

    Attributes
    ----------
    state : tuple of two arrays, shape (layers, N, H)
        Hidden states and cells behind the last step of the last forward.
    state_gradient : tuple of two arrays, shape (layers, N, H)
        Gradients with respect to the state that the last forward began with, of the last backward.

    Raises
    ------
    TypeError, ValueError
        If an argument is wrong.

    Notes
    -----
    Parameters have PyTorch's names and layout: ``weight_ih_l0`` (4H, I), ``weight_hh_l0`` (4H, H), ``bias_ih_l0``,
    ``bias_hh_l0`` (4H,), gates in the order i, f, g, o; the state of a ``torch.nn.LSTM`` loads as it is, and back.

    Examples
    --------
    >>> lstm = LSTM(3, 4, seed=0)
    >>> y = lstm(np.ones((5, 2, 3), "float32"))
    >>> y.shape, lstm.state[0].shape, lstm.backward(np.ones_like(y)).shape
    ((5, 2, 4), (1, 2, 4), (5, 2, 3))
    """

    norm: ClassVar[str | None] = None
    _in_c_order = True
    eps = 1e-5

    def __init__(
        self,
        inputs: int,
        hidden: int,
        *,
        layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        output: str = "all",
        initial: str = "uniform",
        input_gradient: bool = True,
        capturable: bool = False,
        dtype: Any = "float32",
        seed: int | np.random.Generator | None = None,
        xp: Any = np,
    ) -> None:
        super().__init__()
        self.inputs, self.hidden = check.integer("inputs", inputs, 1), check.integer("hidden", hidden, 1)
        self.layers, self.batch_first = check.integer("layers", layers, 1), check.boolean("batch_first", batch_first)
        check.one_of("output", output, ("all", "last"))
        check.one_of("initial", initial, INITIAL)
        self.output, self.input_gradient = output, check.boolean("input_gradient", input_gradient)
        self.capturable = check.boolean("capturable", capturable)
        self.state: State | None = None
        self.state_gradient: State | None = None
        dtype, xp = data_type(dtype), array_module(xp)
        if dtype.itemsize == 2:
            raise ValueError(f"dtype must be float32 or float64 for this {type(self).__name__}, got {dtype}")
        biases = () if not check.boolean("bias", bias) else ("bias",) if self.norm else ("bias_ih", "bias_hh")
        rng = np.random.default_rng(seed)
        for number in range(self.layers):
            drawn = _initial(rng, initial, hidden if number else inputs, hidden, biases)
            for name, array in drawn.items():
                self._parameters[f"{name}_l{number}"] = xp.asarray(array.astype(dtype))
            self._add_norm(number, dtype, xp)
        self._take_gradients(None)

    def _add_norm(self, number: int, dtype: np.dtype, xp: Any) -> None:
        """Add the arrays of the norms of a layer."""

    def forward(self, x: Any, *, training: bool | None = None, state: State | None = None, lengths: Any = None) -> Any:
        """Return the hidden states.

        Parameters
        ----------
        x : array, shape (T, N, I), or with `batch_first` (N, T, I)
            Sequences. Never written. An array of another library comes in through ``__dlpack__``.
        training : bool, optional
            Mode of this call; by default that of the layer. False keeps nothing for a backward.
        state : tuple of two arrays, shape (layers, N, H), optional
            Hidden states and cells to begin with; by default 0.
        lengths : array of int, shape (N,), optional
            Lengths of the sequences; by default T.

        Returns
        -------
        array, shape (T, N, H), with `batch_first` (N, T, H), or (N, H)
            Hidden states of all steps, 0 beyond the length of a sequence, or of the last one.

        Raises
        ------
        TypeError, ValueError
            If an argument does not fit the layer; nothing is changed then.
        """
        mode, keep = self._mode(training)
        x = self._taken(x)
        return self._run(x, mode, keep, self._checked(state, x), lengths)

    @np.errstate(all="ignore")  # kernels have no warnings either
    def _run(self, x: Any, training: bool, keep: bool, state: State | None, lengths: Any) -> Any:
        y = _time_first(x) if self.batch_first else x
        saved, last, shape = [], [], y.shape
        before = self._saved[1] if keep and self._saved is not None else [None] * self.layers
        for number in range(self.layers):
            first = (None, None) if state is None else (state[0][number], state[1][number])
            y, h_n, c_n, kept = lstm_forward(
                y, *first, **self._arrays(number), norm=self.norm, eps=self.eps, lengths=lengths, keep=keep,
                reuse=before[number], capturable=self.capturable, **self._mode_options(training),
            )  # fmt: skip
            if keep:
                self._saved = None  # its memory has been taken
            saved.append(kept)
            last.append((h_n, c_n))
        if training and self._buffers:
            self.batches += 1
        if keep:
            self._saved = x, saved, shape
        self.state = tuple(_stack(arrays) for arrays in zip(*last, strict=True))
        if self.output == "last":
            return last[-1][0]
        return _time_first(y) if self.batch_first else y

    def _forward(self, x: Any, training: bool, keep: bool) -> Any:
        return self._run(x, training, keep, None, None)

    def _mode_options(self, training: bool) -> dict[str, Any]:
        return {}

    def backward(self, dy: Any, *, accumulate: bool = False, state_gradient: State | None = None) -> Any:
        """Write the gradients of the parameters, and `state_gradient` of the first state; return that of the input.

        Parameters
        ----------
        dy : array, shape and dtype of the output
            Gradient with respect to the output of the last forward. Never written.
        accumulate : bool
            Whether to add to the gradients of the parameters instead of writing over them.
        state_gradient : tuple of two arrays, shape (layers, N, H), optional
            Gradients with respect to `state`, the last hidden states and cells; by default 0.

        Returns
        -------
        array, shape of the input, or None
            Gradient with respect to the input, where it is wanted.

        Raises
        ------
        RuntimeError
            If there was no forward.
        TypeError, ValueError
            If an array does not fit; nothing is changed then.
        """
        if self._saved is not None:
            self._last = self._checked(state_gradient, self._saved[0], "state_gradient")
        return super().backward(dy, accumulate=accumulate)

    def _backward(self, dy: Any, in_place: bool) -> Any:
        saved, last = self._saved[1], self._last
        of_state: list[State] = []
        dh_last = dy if self.output == "last" else None
        dy = None if self.output == "last" else _time_first(dy) if self.batch_first else dy
        for number in reversed(range(self.layers)):
            dh, dc = (None, None) if last is None else (last[0][number], last[1][number])
            if dh_last is not None:
                dh = dh_last if dh is None else dh + dh_last
            dy, dh0, dc0, *gradients = lstm_backward(
                dy, dh, dc, saved[number], input_gradient=number > 0 or self.input_gradient
            )
            self._write(number, *gradients)
            of_state.insert(0, (dh0, dc0))
            dh_last = None
        self.state_gradient = tuple(_stack(arrays) for arrays in zip(*of_state, strict=True))
        return _time_first(dy) if self.batch_first and dy is not None else dy

    def _write(self, number: int, dweight_ih: Any, dweight_hh: Any, dbias: Any, dnorms: Any) -> None:
        """Write the gradients of a layer."""
        found = {"weight_ih": dweight_ih, "weight_hh": dweight_hh}
        found |= dict.fromkeys(("bias", "bias_ih", "bias_hh"), dbias)
        found |= dict(zip(self._norm_names, dnorms or (), strict=False))
        for name, gradient in found.items():
            if f"{name}_l{number}" in self._gradients:
                self._gradients[f"{name}_l{number}"][...] = gradient

    _norm_names: ClassVar[tuple[str, ...]] = ()

    def _arrays(self, number: int) -> dict[str, Any]:
        """Return the arrays of a layer as the op takes them."""
        own = self._parameters
        bias = own.get(f"bias_l{number}")
        if f"bias_ih_l{number}" in own:
            bias = own[f"bias_ih_l{number}"] + own[f"bias_hh_l{number}"]
        found = {"weight_ih": own[f"weight_ih_l{number}"], "weight_hh": own[f"weight_hh_l{number}"], "bias": bias}
        if self._norm_names:
            found["norms"] = tuple(own[f"{name}_l{number}"] for name in self._norm_names)
        return found

    def _checked(self, state: Any, x: Any, name: str = "state") -> State | None:
        """Check a pair of hidden states and cells, for an input."""
        if state is None:
            return None
        if not isinstance(state, tuple | list) or len(state) != 2:
            raise TypeError(f"{name} must be a tuple of two arrays, hidden states and cells, got {check.shown(state)}")
        shape = self.layers, x.shape[0 if self.batch_first else 1], self.hidden
        given = {"x": x, f"{name}[0]": state[0], f"{name}[1]": state[1]}
        found = check.arguments({key: check.signature(array) for key, array in given.items()})
        for key in (f"{name}[0]", f"{name}[1]"):
            check.contiguous(found[key], shape, x.dtype)
        return tuple(state)

    def _check(self, x: Any) -> None:
        check_type(self, x, str(self._parameters["weight_ih_l0"].dtype))
        axes = "(N, T, I)" if self.batch_first else "(T, N, I)"
        if x.ndim != 3 or x.shape[2] != self.inputs:
            raise ValueError(f"x must have the shape {axes} with {self.inputs} inputs, got the shape {x.shape}")

    def _output(self) -> tuple[np.dtype, tuple[int, ...]]:
        x, _, (steps, rows, _) = self._saved
        if self.output == "last":
            return x.dtype, (rows, self.hidden)
        return x.dtype, (*((rows, steps) if self.batch_first else (steps, rows)), self.hidden)

    def _forget(self) -> None:
        super()._forget()
        self.state = self.state_gradient = None

    def _options(self) -> list[str]:
        options = [str(self.inputs), str(self.hidden)]
        options += [f"layers={self.layers}"] if self.layers > 1 else []
        options += [] if any(name.startswith("bias") for name in self._parameters) else ["bias=False"]
        options += ["batch_first=True"] if self.batch_first else []
        options += ["output='last'"] if self.output == "last" else []
        options += [] if self.input_gradient else ["input_gradient=False"]
        options += ["capturable=True"] if self.capturable else []
        return [*options, f"dtype='{self._parameters['weight_ih_l0'].dtype}'"]


def _initial(
    rng: np.random.Generator, initial: str, inputs: int, hidden: int, biases: tuple[str, ...]
) -> dict[str, np.ndarray]:
    """Return the initial weights and biases of a layer."""
    if initial == "uniform":
        shapes = {"weight_ih": (4 * hidden, inputs), "weight_hh": (4 * hidden, hidden)}
        shapes |= dict.fromkeys(biases, (4 * hidden,))
        bound = 1 / math.sqrt(hidden)
        return {name: rng.uniform(-bound, bound, shape) for name, shape in shapes.items()}
    drawn = {"weight_ih": _orthogonal(rng, 4 * hidden, inputs), "weight_hh": np.tile(np.eye(hidden), (4, 1))}
    for number, name in enumerate(biases):
        drawn[name] = np.zeros(4 * hidden)
        drawn[name][hidden : 2 * hidden] = number == 0  # the forget gate
    return drawn


def _orthogonal(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """Return a random matrix whose rows, or columns if they are fewer, are orthogonal and of length 1."""
    q, r = np.linalg.qr(rng.standard_normal((max(rows, columns), min(rows, columns))))
    q *= np.sign(np.diag(r))
    return q if rows >= columns else q.T


def _stack(arrays: tuple) -> Any:
    out = empty(runtime_of(type(arrays[0])), (len(arrays), *arrays[0].shape), arrays[0])
    for place, array in zip(out, arrays, strict=True):
        place[...] = array
    return out


def _time_first(array: Any) -> Any:
    """Return (N, T, ...) as (T, N, ...), or the other way round, in C order."""
    runtime = runtime_of(type(array))
    out = empty(runtime, (array.shape[1], array.shape[0], *array.shape[2:]), array)
    out[...] = array.swapaxes(0, 1)
    return out
