"""Long short-term memory with recurrent batch norm, and with layer norm."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from bnkernels.nn.batch_norm import DEFAULT_MOMENTUM
from bnkernels.nn.lstm import LSTM
from bnkernels.runtime import checks as check

NORMALISED = ("ih", "hh", "c")  # input part and recurrent part of the gates, and the cell


class _NormLSTM(LSTM):
    """Base of the LSTMs with norms: their scales, and the shift of the cell."""

    first_gamma: ClassVar[float]
    _norm_names = ("gamma_ih", "gamma_hh", "gamma_c", "beta_c")

    def __init__(self, inputs: int, hidden: int, *, eps: float = 1e-5, **options: Any) -> None:
        super().__init__(inputs, hidden, **options)
        self.eps = check.epsilon(eps, self._parameters["weight_ih_l0"])

    def _add_norm(self, number: int, dtype: np.dtype, xp: Any) -> None:
        for name, units in zip(self._norm_names, (4 * self.hidden,) * 2 + (self.hidden,) * 2, strict=True):
            first = self.first_gamma if name != "beta_c" else 0
            self._parameters[f"{name}_l{number}"] = xp.asarray(np.full(units, first, dtype))

    def _options(self) -> list[str]:
        *options, dtype = super()._options()
        return [*options, *([f"eps={self.eps!r}"] if self.eps != 1e-5 else []), dtype]


class LayerNormLSTM(_NormLSTM):
    """Long short-term memory with layer norm of the input part and the recurrent part of its gates, and of the cell.

    Parameters
    ----------
    inputs, hidden : int
        As in `LSTM`.
    eps : float
        Number added to variances.
    **options
        Other options of `LSTM`.

    Attributes
    ----------
    state, state_gradient : tuple of two arrays, shape (layers, N, H)
        As in `LSTM`.

    Raises
    ------
    TypeError, ValueError
        If an argument is wrong.

    Notes
    -----
    Beside the weights there are ``gamma_ih_l0`` and ``gamma_hh_l0`` (4H,), ``gamma_c_l0`` and ``beta_c_l0`` (H,), and
    one bias, ``bias_l0``; see `bnkernels.lstm_forward` for the formulas.

    References
    ----------
    .. [1] J. L. Ba, J. R. Kiros and G. E. Hinton, "Layer Normalization", 2016, arXiv:1607.06450, section 3.1.

    Examples
    --------
    >>> lstm = LayerNormLSTM(3, 4, output="last", seed=0)
    >>> lstm(np.ones((5, 2, 3), "float32")).shape
    (2, 4)
    """

    norm = "layer"
    first_gamma = 1.0


class BatchNormLSTM(_NormLSTM):
    """Long short-term memory with recurrent batch norm of the input part and the recurrent part of its gates, and cell.

    Parameters
    ----------
    inputs, hidden : int
        As in `LSTM`.
    steps : int
        Number of time steps that have population statistics of their own; later ones take those of the last.
    eps : float
        Number added to variances.
    momentum : float or None
        Weight of a mini-batch in the population statistics; None averages all.
    **options
        Other options of `LSTM`.

    Attributes
    ----------
    state, state_gradient : tuple of two arrays, shape (layers, N, H)
        As in `LSTM`.
    batches : int
        Number of mini-batches that the population statistics have seen.

    Raises
    ------
    TypeError, ValueError
        If an argument is wrong.

    Notes
    -----
    In training every time step is normalised by its own statistics over the mini-batch; scales and shifts are shared
    by all steps. Scales begin at 0.1: with 1 the gradient of tanh vanishes. Beside what `LayerNormLSTM` has there are
    the population statistics ``running_mean_ih_l0``, ``running_var_ih_l0`` (steps, 4H), of ``hh`` the same, and of
    ``c`` (steps, H).

    References
    ----------
    .. [1] T. Cooijmans et al., "Recurrent Batch Normalization", 2016, arXiv:1603.09025.

    Examples
    --------
    >>> lstm = BatchNormLSTM(3, 4, steps=5, seed=0)
    >>> y = lstm(np.random.default_rng(1).standard_normal((5, 2, 3)).astype("float32"))
    >>> lstm.batches, lstm.buffers["running_mean_hh_l0"].shape, lstm.eval()(np.ones((7, 1, 3), "float32")).shape
    (1, (5, 16), (7, 1, 4))
    """

    norm = "batch"
    first_gamma = 0.1

    def __init__(
        self,
        inputs: int,
        hidden: int,
        *,
        steps: int,
        eps: float = 1e-5,
        momentum: float | None = DEFAULT_MOMENTUM,
        **options: Any,
    ) -> None:
        self.steps, self.batches = check.integer("steps", steps, 1), 0
        self.momentum = momentum if momentum is None else check.number("momentum", momentum, 0, 1)
        super().__init__(inputs, hidden, eps=eps, **options)

    def _add_norm(self, number: int, dtype: np.dtype, xp: Any) -> None:
        super()._add_norm(number, dtype, xp)
        for part in NORMALISED:
            shape = self.steps, self.hidden if part == "c" else 4 * self.hidden
            self._buffers[f"running_mean_{part}_l{number}"] = xp.asarray(np.zeros(shape, dtype))
            self._buffers[f"running_var_{part}_l{number}"] = xp.asarray(np.ones(shape, dtype))

    def _arrays(self, number: int) -> dict[str, Any]:
        names = (f"running_{what}_{part}_l{number}" for part in NORMALISED for what in ("mean", "var"))
        return super()._arrays(number) | {"running": tuple(self._buffers[name] for name in names)}

    def _mode_options(self, training: bool) -> dict[str, Any]:
        return {"training": training, "momentum": self.momentum, "batches_before": self.batches}

    def _options(self) -> list[str]:
        inputs, hidden, *options = super()._options()
        more = [] if self.momentum == DEFAULT_MOMENTUM else [f"momentum={self.momentum!r}"]
        return [inputs, hidden, f"steps={self.steps}", *more, *options]
