"""Apex: NVIDIA's group batch norm, `apex.contrib.groupbn`, which keeps a channel's data on chip.

It exists for NHWC in float16 alone, with ReLU and the residual sum fused. It is built from source (`--bnp`), as no
wheel holds it. The backward is that of its autograd function, called directly: on the stream of the caller, and
without autograd's own cost, which favours Apex.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

from benchmarks.harness.case import Arrays, Call, Case, NotSupportedError, Provider
from benchmarks.peers import EPSILON, MOMENTUM
from benchmarks.peers.pytorch import absent as absent_pytorch
from benchmarks.peers.pytorch import load, tensor_of

VECTOR = 4  # channels that its kernels load at once


def absent() -> str | None:
    """Return why Apex cannot run, or None."""
    return absent_pytorch("cuda") or _absent_module()


@cache
def _absent_module() -> str | None:
    """Return why there is no group batch norm, or None."""
    if find_spec("apex") is None:
        return "Apex is not installed"
    try:
        module_class()
    except ImportError:
        return "this Apex has no group batch norm: it is built with --bnp"
    return None


def module_class() -> Any:
    """Return Apex's module."""
    from apex.contrib.groupbn.batch_norm import BatchNorm2d_NHWC

    return BatchNorm2d_NHWC


def prepare(case: Case, arrays: Arrays) -> Call:
    """Prepare a case.

    Raises
    ------
    NotSupportedError
        For anything but NHWC in float16 with channels in multiples of four.
    """
    if case.layout != "NHWC" or case.dtype != "float16":
        raise NotSupportedError("Apex's group batch norm is for NHWC in float16")
    if case.shape[1] % VECTOR:
        raise NotSupportedError(f"Apex's group batch norm is for channels in multiples of {VECTOR}")
    tensors = {name: tensor_of(array) for name, array in arrays.items()}
    module = _module(case, tensors)
    inputs = [tensors[name] for name in ("x", "residual") if name in tensors]
    if case.direction == "forward":
        return lambda: (module(*inputs), module.running_mean, module.running_var)
    return _backward(case, module, inputs, tensors["dy"])


def _module(case: Case, tensors: dict[str, Any]) -> Any:
    """Return the module with our parameters and running statistics in it."""
    torch = load()
    x, gamma, beta = (tensors[name] for name in ("x", "gamma", "beta"))
    module = module_class()(case.shape[1], fuse_relu=bool(case.epilogue)).to(x.device)
    differentiable = case.direction == "backward"
    module.weight, module.bias = (torch.nn.Parameter(vector, differentiable) for vector in (gamma, beta))
    module.eps, module.momentum = EPSILON, MOMENTUM
    if not differentiable:
        module.running_mean, module.running_var = tensors["running_mean"], tensors["running_var"]
    return module.train()


def _backward(case: Case, module: Any, inputs: list[Any], dy: Any) -> Call:
    """Prepare a backward: the forward is computed here; autograd hands over the context that it saved."""
    context = module(*(tensor.requires_grad_() for tensor in inputs)).grad_fn
    differentiate = context._forward_cls.backward
    count = 4 if case.epilogue == "add_relu" else 3

    def call() -> tuple:
        gradients = differentiate(context, dy)[:count]
        if case.epilogue != "add_relu":
            return gradients
        dx, dresidual, dgamma, dbeta = gradients
        return dx, dgamma, dbeta, dresidual

    return call


PROVIDERS = (Provider("Apex", "cuda", prepare, absent, engine="torch"),)
