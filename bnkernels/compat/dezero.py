"""The batch normalisation of DeZero, the framework of "Deep Learning from Scratch 3": its function and its layer.

It needs a DeZero that can be imported: the book's repository runs on NumPy 2, version 0.0.13 of the index does not.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from dezero import Config, Function, Layer, Parameter, Variable, as_variable

from bnkernels.nn.owner import zeros_beside
from bnkernels.ops.batch_norm.double_backward import batch_norm_double_backward
from bnkernels.ops.batch_norm.inference import batch_norm_inference, batch_norm_inference_backward
from bnkernels.ops.batch_norm.training import batch_norm_backward, batch_norm_forward


def batch_nrom(x: Any, gamma: Any, beta: Any, mean: Any, var: Any, decay: float = 0.9, eps: float = 2e-5) -> Variable:
    """Normalise every channel; the name is DeZero's.

    Parameters
    ----------
    x : dezero.Variable or array, shape (N, C) or (N, C, H, W)
        Mini-batch.
    gamma, beta : dezero.Variable or array, shape (C,)
        Scale and shift.
    mean, var : array, shape (C,)
        Running statistics, updated in place while ``Config.train``; else they normalise. The variance is unbiased.
    decay : float
        Weight of the old running statistics.
    eps : float
        Number added to the variance.

    Returns
    -------
    dezero.Variable
        Output. It can be differentiated twice.

    Raises
    ------
    TypeError, ValueError
        If an array does not fit.
    """
    return _Forward(mean, var, decay, eps)(x, gamma, beta)


class _Forward(Function):
    """Batch normalisation as a function of a graph."""

    def __init__(self, mean: Any, var: Any, decay: float, eps: float) -> None:
        self.running, self.decay, self.eps, self.statistics = (mean, var), decay, eps, None

    def forward(self, x: Any, gamma: Any, beta: Any) -> Any:
        if not Config.train:
            return batch_norm_inference(x, gamma, beta, *self.running, eps=self.eps)
        options = {"momentum": 1 - self.decay, "eps": self.eps}
        y, self.statistics = batch_norm_forward(x, gamma, beta, *self.running, **options)
        return y

    def backward(self, gy: Variable) -> tuple[Variable, ...]:
        return _Backward(self.statistics, self.running, self.eps)(gy, *self.inputs)


class _Backward(Function):
    """The backward as a function of a graph, for gradients of gradients."""

    def __init__(self, statistics: Any, running: tuple[Any, Any], eps: float) -> None:
        self.statistics, self.running, self.eps = statistics, running, eps  # in test mode there are no statistics

    def __call__(self, *inputs: Any) -> Any:
        self.made = super().__call__(*inputs)  # a graph holds its outputs weakly, and asks for all three
        return tuple(self.made)

    def forward(self, gy: Any, x: Any, gamma: Any, beta: Any) -> Any:
        if self.statistics is None:
            return batch_norm_inference_backward(gy, x, gamma, beta, *self.running, eps=self.eps)
        return batch_norm_backward(gy, x, gamma, beta, self.statistics)

    def backward(self, *given: Any) -> Any:
        if Config.enable_backprop:
            raise RuntimeError(
                "gradients of gradients have no graph in this batch norm; call backward with create_graph=False"
            )
        (mean, var), statistics = self.running, self.statistics
        if statistics is None:
            statistics = np.stack([mean, 0 * mean, (var + self.eps) ** -0.5])  # NumPy hands CuPy's on
        ggs = (None if gg is None else gg.data for gg in given)
        arrays = (one.data for one in self.inputs)
        gradients = batch_norm_double_backward(*ggs, *arrays, statistics, frozen=self.statistics is None)
        return tuple(map(Variable, gradients))


class BatchNorm(Layer):
    """Batch normalisation with parameters of its own, which the first call makes.

    Parameters
    ----------
    decay : float
        Weight of the old running statistics.
    eps : float
        Number added to the variance.

    Attributes
    ----------
    gamma, beta, avg_mean, avg_var : dezero.Parameter, shape (C,)
        Scale, shift and running statistics, by DeZero's names, with which its weights are saved and loaded.
    """

    def __init__(self, decay: float = 0.9, eps: float = 2e-5) -> None:
        super().__init__()
        self.decay, self.eps = decay, eps
        self.avg_mean, self.avg_var = Parameter(None, "avg_mean"), Parameter(None, "avg_var")
        self.gamma, self.beta = Parameter(None, "gamma"), Parameter(None, "beta")

    def forward(self, x: Any) -> Variable:
        """Return the output.

        Parameters
        ----------
        x : dezero.Variable or array, shape (N, C) or (N, C, H, W)
            Mini-batch.

        Returns
        -------
        dezero.Variable
            Output.
        """
        data = as_variable(x).data
        for start, parameters in enumerate([(self.avg_mean, self.beta), (self.avg_var, self.gamma)]):
            for parameter in parameters:
                if parameter.data is None:
                    parameter.data = zeros_beside(data, data.shape[1:2]) + start
        running = self.avg_mean.data, self.avg_var.data
        return batch_nrom(x, self.gamma, self.beta, *running, self.decay, self.eps)
