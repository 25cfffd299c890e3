"""The batch normalisation of the book "Deep Learning from Scratch", ``common/layers.py``, under its name."""

from __future__ import annotations

from typing import Any

from bnkernels.nn.batch_norm import BatchNorm
from bnkernels.nn.owner import zeros_beside


class BatchNormalization:
    """Batch normalisation of the columns of a matrix; images are flattened to one.

    Parameters
    ----------
    gamma, beta : array, shape (D,)
        Scale and shift; the layer works on them.
    momentum : float
        Weight of the **old** running statistics, which are over N and start at 0.
    running_mean, running_var : array, shape (D,), optional
        Running statistics, updated in place; by default the first forward makes them.

    Attributes
    ----------
    dgamma, dbeta : array, shape (D,)
        Gradients after a backward; None before.
    """

    eps = 10e-7

    def __init__(
        self, gamma: Any, beta: Any, momentum: float = 0.9, running_mean: Any = None, running_var: Any = None
    ) -> None:
        self.gamma, self.beta, self.momentum = gamma, beta, momentum
        self.running_mean, self.running_var = running_mean, running_var
        self.dgamma = self.dbeta = self._layer = None

    def forward(self, x: Any, train_flg: bool = True) -> Any:
        """Return the output.

        Parameters
        ----------
        x : array, shape (N, D), or (N, C, H, W) with D = C H W
            Mini-batch.
        train_flg : bool
            Whether to normalise with the statistics of the mini-batch and update the running ones.

        Returns
        -------
        array, shape of `x`
            Output.
        """
        if self.running_mean is None:
            self.running_mean, self.running_var = (zeros_beside(self.gamma, self.gamma.shape) for _ in range(2))
        if self._layer is None:
            arrays = self.gamma, self.beta, self.running_mean, self.running_var
            self._layer = BatchNorm.from_arrays(*arrays, decay=self.momentum, unbiased=False, eps=self.eps)
        return self._layer.train(bool(train_flg))(x.reshape(len(x), -1)).reshape(x.shape)

    def backward(self, dout: Any) -> Any:
        """Return the gradient of the input; keep those of the parameters.

        Parameters
        ----------
        dout : array, shape of the output
            Gradient with respect to the output.

        Returns
        -------
        array, shape of `dout`
            Gradient with respect to the input.

        Raises
        ------
        RuntimeError
            If there was no forward.
        """
        if self._layer is None:
            raise RuntimeError("backward needs what a forward keeps: call forward before it")
        dx = self._layer.backward(dout.reshape(len(dout), -1)).reshape(dout.shape)
        self.dgamma, self.dbeta = (self._layer.gradients[name] for name in ("weight", "bias"))
        return dx
