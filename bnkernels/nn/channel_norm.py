"""Base of the norms of channels in any axis, with a residual sum and a mask."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np

from bnkernels.nn.norm import Norm
from bnkernels.runtime.dlpack import incoming


class ChannelNorm(Norm):
    """Base of the norms of channels. What they keep of a forward ends with its residual and its mask."""

    takes_mask = True
    axis: int

    @np.errstate(all="ignore")  # kernels have no warnings either
    def forward(self, x: Any, *, training: bool | None = None, residual: Any = None, mask: Any = None) -> Any:
        """Return the output.

        Parameters
        ----------
        x : array, C channels in `axis`
            Input. Never written. An array of another library comes in through ``__dlpack__``.
        training : bool, optional
            Mode of this call; by default that of the layer. False keeps nothing for a backward.
        residual : array, shape and dtype of `x`, optional
            Array added before the activation; `backward` returns its gradient too.
        mask : array of bool, optional
            True where a value counts, as in `batch_norm_forward`.

        Returns
        -------
        array, shape and dtype of `x`
            Output, a new array.

        Raises
        ------
        TypeError, ValueError
            If an array does not fit the layer; nothing is changed then.
        """
        mode, keep = self._mode(training)
        x, residual, mask = self._taken(x), incoming("residual", residual), incoming("mask", mask)
        return self._forward(x, mode, keep, residual, mask)

    @abstractmethod
    def _forward(self, x: Any, training: bool, keep: bool, residual: Any = None, mask: Any = None) -> Any:
        """Compute without checks."""

    def _call_options(self, residual: Any, mask: Any) -> dict[str, Any]:
        options = {"axis": self.axis, "residual": residual, "mask": mask}
        return options | {"activation": self.activation, "alpha": self.alpha}
