"""Layers of a network: each has a forward, a backward, and views of its parameters and their gradients.

A layer keeps what its backward needs from its last forward in training. Parameters and gradients are views of the
network's two flat arrays, so that an optimiser updates all of them at once.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from bnkernels.ops.activations import activation_named
from bnkernels.ops.batch_norm.inference import batch_norm_inference
from bnkernels.ops.batch_norm.training import batch_norm_backward, batch_norm_forward
from bnkernels.ops.layer_norm.op import layer_norm_backward, layer_norm_forward
from bnkernels.ops.linear_batch_norm.op import on_cpu
from bnkernels.runtime import checks as check
from bnkernels.runtime import overlap
from bnkernels.runtime.arguments import accumulator, empty
from bnkernels.runtime.registry import runtime_of

IDENTITY = activation_named("identity")


def _outputs(x: Any, length: int) -> tuple[Any, Any]:
    """Return new arrays for the output of a norm and for its statistics, three rows of this length.

    With ``out=`` a repeated call is replayed: memory that was freed comes back with the same addresses step by step.
    """
    runtime = runtime_of(type(x), "x")
    return empty(runtime, x.shape, x), empty(runtime, (3, length), x, accumulator(x.dtype))


class Linear:
    """``y = x @ weight + bias``.

    Parameters
    ----------
    parameters, gradients : dict of str to array
        `weight`, shape (inputs, outputs), and where there is one `bias`, shape (outputs,); each with its gradient.
    xp : module
        Array module, ``numpy`` or ``cupy``.
    first : bool
        Whether this is the first layer, so that the gradient of its input is not needed.
    """

    def __init__(self, parameters: dict[str, Any], gradients: dict[str, Any], xp: Any, *, first: bool = False) -> None:
        self.parameters, self.gradients = parameters, gradients
        self.xp, self.first = xp, first

    def forward(self, x: Any, *, training: bool) -> Any:
        """Return the output, shape (N, outputs), for `x`, shape (N, inputs)."""
        if training:
            self.x = x
        y = self.xp.matmul(x, self.parameters["weight"])
        if "bias" in self.parameters:
            y += self.parameters["bias"]
        return y

    def backward(self, dy: Any) -> Any:
        """Write the gradients of the parameters; return that of the input (None for the first layer)."""
        self.xp.matmul(self.x.T, dy, out=self.gradients["weight"])
        if "bias" in self.gradients and self.xp is np:
            dy = np.ascontiguousarray(dy)
            on_cpu().backward(dy, dy, None, IDENTITY, None, self.gradients["bias"])
        elif "bias" in self.gradients:
            dy.sum(axis=0, out=self.gradients["bias"])
        return None if self.first else self.xp.matmul(dy, self.parameters["weight"].T)


class BatchNorm:
    """Batch normalisation with the activation behind it.

    Parameters
    ----------
    parameters, gradients : dict of str to array
        `gamma` and `beta`, shape (C,); each with its gradient.
    running_mean, running_var : array, shape (C,), or both None
        Running statistics, updated in place by every forward in training. None: not tracked; then every forward, also
        outside training, normalises with the statistics of its mini-batch.
    momentum : float or None
        Weight of the new statistics; None gives the plain average of all mini-batches.
    unbiased : bool
        Whether `running_var` takes the variance over N - 1, else over N.
    eps : float
        Constant added to the variance, in the units of ``x**2``.
    activation : str
        Activation behind the normalisation.
    """

    def __init__(
        self,
        parameters: dict[str, Any],
        gradients: dict[str, Any],
        running_mean: Any = None,
        running_var: Any = None,
        *,
        momentum: float | None = 0.1,
        unbiased: bool = True,
        eps: float = 1e-5,
        activation: str = "identity",
    ) -> None:
        if (running_mean is None) != (running_var is None):
            missing = "running_mean" if running_mean is None else "running_var"
            raise ValueError(f"{missing} is None and its companion is not; pass both, or neither to track nothing")
        if momentum is not None:
            momentum = check.number("momentum", momentum, 0, 1)
        self.parameters, self.gradients = parameters, gradients
        self.running_mean, self.running_var = running_mean, running_var
        self.momentum, self.unbiased = momentum, check.boolean("unbiased", unbiased)
        self.eps, self.activation = check.epsilon(eps, parameters["gamma"]), activation
        self.batches = 0  # on the host: a counter on the device would cost a launch per step
        activation_named(activation)
        if runtime_of(type(parameters["gamma"])) is None:
            written = {"running_mean": running_mean, "running_var": running_var}
            for name, array in (written | {f"gradient of {key}": array for key, array in gradients.items()}).items():
                if array is not None:
                    overlap.writable(name, array)

    def forward(self, x: Any, *, training: bool) -> Any:
        """Return the output, of the shape of `x`, (N, C)."""
        gamma, beta, running = self.parameters["gamma"], self.parameters["beta"], (self.running_mean, self.running_var)
        if not training and self.running_mean is not None:
            return batch_norm_inference(x, gamma, beta, *running, eps=self.eps, activation=self.activation)
        y, statistics = batch_norm_forward(
            *(x, gamma, beta, *running),
            momentum=1 / (self.batches + 1) if self.momentum is None else self.momentum,
            unbiased=self.unbiased,
            eps=self.eps,
            activation=self.activation,
            out=_outputs(x, len(gamma)),
        )
        if training:
            self.x, self.statistics = x, statistics
            self.batches += 1
        return y

    def backward(self, dy: Any) -> Any:
        """Write the gradients of the parameters; return that of the input, in the place of `dy`, which is C-ordered."""
        vectors = self.parameters["gamma"], self.parameters["beta"]
        out = dy, self.gradients["gamma"], self.gradients["beta"]
        return batch_norm_backward(dy, self.x, *vectors, self.statistics, activation=self.activation, out=out)[0]


class LayerNorm:
    """Layer normalisation of every example, with the activation behind it.

    Parameters
    ----------
    parameters, gradients : dict of str to array
        `gamma` and `beta`, shape (C,); each with its gradient.
    eps : float
        Constant added to the variance, in the units of ``x**2``.
    activation : str
        Activation behind the normalisation.
    """

    def __init__(
        self, parameters: dict[str, Any], gradients: dict[str, Any], *, eps: float = 1e-5, activation: str = "identity"
    ) -> None:
        self.parameters, self.gradients = parameters, gradients
        self.eps, self.activation = check.epsilon(eps, parameters["gamma"]), activation
        activation_named(activation)

    def forward(self, x: Any, *, training: bool) -> Any:
        """Return the output, of the shape of `x`, (N, C)."""
        gamma, beta, out = self.parameters["gamma"], self.parameters["beta"], _outputs(x, len(x))
        y, statistics = layer_norm_forward(x, gamma, beta, eps=self.eps, activation=self.activation, out=out)
        if training:
            self.x, self.statistics = x, statistics
        return y

    def backward(self, dy: Any) -> Any:
        """Write the gradients of the parameters; return that of the input, in the place of `dy`, which is C-ordered."""
        vectors = self.parameters["gamma"], self.parameters["beta"]
        out = dy, self.gradients["gamma"], self.gradients["beta"]
        given = dy, self.x, *vectors, self.statistics
        return layer_norm_backward(*given, activation=self.activation, out=out)[0]


class ActivationLayer:
    """A bias and an activation, for networks without a norm.

    Parameters
    ----------
    parameters, gradients : dict of str to array
        `bias`, shape (C,), with its gradient.
    name : str
        Name of the activation, one of `bnkernels.ops.activations.ACTIVATIONS`.
    xp : module
        Array module, ``numpy`` or ``cupy``.
    """

    def __init__(self, parameters: dict[str, Any], gradients: dict[str, Any], name: str, xp: Any) -> None:
        self.parameters, self.gradients = parameters, gradients
        self.phi, self.xp = activation_named(name), xp

    def forward(self, z: Any, *, training: bool) -> Any:
        """Return the activations of `z`, shape (N, C), in its place where the backward does not need that."""
        bias = self.parameters["bias"]
        if self.xp is np:
            h = np.empty_like(z)
            on_cpu().forward(z, bias, self.phi, h)
            saved = z
        else:
            z += bias
            h = self.phi.forward(self.xp, z)
            saved = h if self.phi.from_output else z
        if training:
            self.saved = saved
        return h

    def backward(self, dh: Any) -> Any:
        """Write the gradient of the bias; return that of the input, on NumPy in the place of `dh`, C-ordered."""
        of_bias = self.gradients["bias"]
        if self.xp is np:
            on_cpu().backward(dh, self.saved, self.parameters["bias"], self.phi, dh, of_bias)
            return dh
        dz = self.phi.backward(self.xp, dh, self.saved)
        dz.sum(axis=0, out=of_bias)
        return dz
