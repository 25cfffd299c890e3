"""Conventions of other frameworks: what their numbers and names mean, and layers made with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from bnkernels.nn import activations
from bnkernels.nn.batch_norm import BatchNorm
from bnkernels.nn.containers import Sequential
from bnkernels.nn.flatten import Flatten
from bnkernels.nn.group_norm import GroupNorm
from bnkernels.nn.instance_norm import InstanceNorm
from bnkernels.nn.layer import Layer
from bnkernels.nn.layer_norm import LayerNorm
from bnkernels.nn.linear import Linear
from bnkernels.nn.lstm import LSTM
from bnkernels.nn.rms_norm import RMSNorm
from bnkernels.runtime import checks as check


class Convention(NamedTuple):
    """Meaning of a framework's batch norm.

    Parameters
    ----------
    momentum : float
        Default of its momentum.
    weighs_old : bool
        Whether that is the weight of the old running statistics, else of the new mini-batch.
    unbiased : bool
        Whether its running variance is over N - 1, else over N.
    eps : float
        Default of its epsilon.
    axis : int
        Default of the axis of the channels.
    names : tuple of str
        Its names of scale, shift, running mean and running variance.
    """

    momentum: float
    weighs_old: bool
    unbiased: bool
    eps: float
    axis: int
    names: tuple[str, str, str, str]


NAMES = ("weight", "bias", "running_mean", "running_var")
CONVENTIONS = {
    "pytorch": Convention(0.1, False, True, 1e-5, 1, NAMES),
    "keras": Convention(0.99, True, False, 1e-3, -1, ("gamma", "beta", "moving_mean", "moving_variance")),
    "flax": Convention(0.99, True, False, 1e-5, -1, ("scale", "bias", "mean", "var")),
    "onnx": Convention(0.9, True, False, 1e-5, 1, ("scale", "B", "input_mean", "input_var")),
    "chainer": Convention(0.9, True, True, 2e-5, 1, ("gamma", "beta", "avg_mean", "avg_var")),
}


def batch_norm_like(
    framework: str,
    num_features: int,
    *,
    momentum: float | None = None,
    eps: float | None = None,
    arrays: Mapping[str, Any] | None = None,
    **options: Any,
) -> BatchNorm:
    """Return a batch norm that means what one of another framework does.

    Parameters
    ----------
    framework : {"pytorch", "keras", "flax", "onnx", "chainer"}
        Framework. DeZero has Chainer's conventions.
    num_features : int
        Number of channels.
    momentum : float, optional
        Momentum (decay, in Chainer) as the framework means it; by default the framework's own default.
    eps : float, optional
        Epsilon; by default the framework's own default.
    arrays : mapping of str to array, optional
        Arrays to copy, by the framework's names; those that are missing keep their usual first values.
    **options
        Options of `BatchNorm`, which take precedence.

    Returns
    -------
    BatchNorm
        Layer.

    Raises
    ------
    TypeError, ValueError
        If there is no such framework, an array has a name that it does not know, or an argument is wrong.

    Examples
    --------
    >>> batch_norm_like("keras", 8).momentum == 1 - 0.99
    True
    >>> batch_norm_like("onnx", 2, arrays={"scale": np.array([2.0, 3.0])}).weight
    array([2., 3.], dtype=float32)
    """
    check.one_of("framework", framework, CONVENTIONS)
    meant = CONVENTIONS[framework]
    weight = meant.momentum if momentum is None else momentum
    usual: dict[str, Any] = {"decay" if meant.weighs_old else "momentum": weight, "unbiased": meant.unbiased}
    usual |= {"eps": meant.eps if eps is None else eps, "axis": meant.axis}
    layer = BatchNorm(num_features, **usual | options)
    if arrays is not None:
        ours = dict(zip(meant.names, NAMES, strict=True))
        unknown = [name for name in arrays if name not in ours]
        if unknown:
            raise ValueError(f"arrays of {framework} are named {', '.join(meant.names)}; got {check.shown(unknown)}")
        layer.load_state_dict({ours[name]: array for name, array in arrays.items()}, strict=False)
    return layer


def from_torch(module: Any, *, xp: Any = np) -> Layer:
    """Return the layers of a PyTorch module, with copies of its parameters and running statistics.

    Parameters
    ----------
    module : torch.nn.Module
        A `Linear`, `BatchNorm1d`, `2d` or `3d`, `InstanceNorm1d`, `2d` or `3d` without running statistics, `LayerNorm`,
        `RMSNorm`, `GroupNorm`, `LSTM`, activation, `Flatten()`, or a `Sequential` of such. The way back is
        ``module.load_state_dict({name: torch.from_numpy(a) for name, a in layer.state_dict().items()})``.
    xp : module
        Array module of the layers, `numpy` or `cupy`.

    Returns
    -------
    Layer
        Layers, in the module's mode.

    Raises
    ------
    TypeError
        If it is, or holds, another module.
    """
    name = type(module).__name__
    if not type(module).__module__.startswith("torch.nn.") or name not in TORCH:
        raise TypeError(f"module must be one of torch.nn's {', '.join(TORCH)}, got {check.kind_of(module)}")
    if name == "Sequential":
        return Sequential(*(from_torch(child, xp=xp) for child in module)).train(module.training)
    layer = TORCH[name](module)
    state = {name: array.cpu() for name, array in module.state_dict().items()}
    dtypes = {str(array.dtype).removeprefix("torch.") for array in state.values() if array.is_floating_point()}
    if dtypes:
        layer.astype(dtypes.pop())
    # NumPy takes no bfloat16 of PyTorch's; float32 holds the same numbers.
    halves = {name: array.float() for name, array in state.items() if array.itemsize == 2}
    layer.load_state_dict(state | halves)
    return layer.to(xp).train(module.training)


def _linear(module: Any) -> Layer:
    return Linear(module.in_features, module.out_features, bias=module.bias is not None)


def _batch_norm(module: Any) -> Layer:
    options = {"momentum": module.momentum, "affine": module.affine, "eps": module.eps}
    return BatchNorm(module.num_features, track_running_stats=module.running_mean is not None, **options)


def _flatten(module: Any) -> Layer:
    if (module.start_dim, module.end_dim) != (1, -1):
        raise TypeError(f"module must be a Flatten() of all axes but the first, got {module}")
    return Flatten()


def _lstm(module: Any) -> Layer:
    if module.bidirectional or module.proj_size or module.dropout:
        raise TypeError(f"module must be an LSTM of one direction without projection and dropout, got {module}")
    options = {"layers": module.num_layers, "bias": module.bias, "batch_first": module.batch_first}
    return LSTM(module.input_size, module.hidden_size, **options)


def _layer_norm(module: Any) -> Layer:
    affine, bias = module.elementwise_affine, module.bias is not None
    return LayerNorm(tuple(module.normalized_shape), eps=module.eps, affine=affine, bias=bias)


def _rms_norm(module: Any) -> Layer:
    weight = module.weight
    eps = module.eps
    if eps is None:
        dtype = "float32" if weight is None or weight.itemsize == 2 else str(weight.dtype).removeprefix("torch.")
        eps = float(np.finfo(dtype).eps)
    return RMSNorm(tuple(module.normalized_shape), eps=eps, affine=weight is not None)


def _instance_norm(module: Any) -> Layer:
    if module.running_mean is not None:
        raise TypeError(f"module must not track running statistics to become an InstanceNorm, got {module}")
    return InstanceNorm(module.num_features, eps=module.eps, affine=module.affine)


TORCH: dict[str, Callable[[Any], Layer]] = {
    "Sequential": lambda module: Sequential(),
    "Linear": _linear,
    "BatchNorm1d": _batch_norm,
    "BatchNorm2d": _batch_norm,
    "BatchNorm3d": _batch_norm,
    "GroupNorm": lambda module: GroupNorm(module.num_groups, module.num_channels, eps=module.eps, affine=module.affine),
    "InstanceNorm1d": _instance_norm,
    "InstanceNorm2d": _instance_norm,
    "InstanceNorm3d": _instance_norm,
    "LayerNorm": _layer_norm,
    "LSTM": _lstm,
    "RMSNorm": _rms_norm,
    "Flatten": _flatten,
    "Identity": lambda module: activations.Identity(),
    "ReLU": lambda module: activations.ReLU(),
    "LeakyReLU": lambda module: activations.LeakyReLU(module.negative_slope),
    "Sigmoid": lambda module: activations.Sigmoid(),
    "Tanh": lambda module: activations.Tanh(),
    "GELU": lambda module: activations.GELU(module.approximate),
    "SiLU": lambda module: activations.SiLU(),
    "ELU": lambda module: activations.ELU(module.alpha),
}
