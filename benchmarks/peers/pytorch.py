"""PyTorch in eager mode: its batch norm, by its own kernels and by cuDNN's.

Nothing here requires a gradient, so PyTorch records nothing: the backward is the very operators that autograd would
call, without autograd. That favours PyTorch. On the CPU both are there a second time, writing into outputs that exist
already.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import numpy as np

from benchmarks.harness.case import Arrays, Call, Case, NotSupportedError, Provider, on_both
from benchmarks.peers import EPSILON, MOMENTUM
from bnkernels.runtime.cpu.threads import get_num_threads

NATIVE, CUDNN = "native", "cudnn"
NEEDED = {"forward": ("x", "gamma", "beta", "running_mean", "running_var"), "backward": ("x", "gamma", "beta", "dy")}


@cache
def load() -> ModuleType:
    """Return PyTorch; on the CPU it computes with as many threads as ours does."""
    import torch

    torch.set_num_threads(get_num_threads())
    return torch


def absent(place: str) -> str | None:
    """Return why PyTorch cannot run in a place, or None."""
    if find_spec("torch") is None:
        return "PyTorch is not installed"
    if place == "cuda":
        torch = load()
        if not torch.backends.cuda.is_built():
            return "this PyTorch has no CUDA"
        if not torch.cuda.is_available():
            return "PyTorch finds no GPU"
    return None


def tensor_of(array: Any) -> Any:
    """Return a tensor that shares the memory of a NumPy or CuPy array of any data type of the cases.

    bfloat16 travels as int16, as neither `torch.from_numpy` nor DLPack take the type that ml_dtypes adds to NumPy.
    """
    torch = load()
    disguised = array.dtype.name == "bfloat16"
    bits = array.view(np.int16) if disguised else array
    tensor = torch.from_numpy(bits) if isinstance(bits, np.ndarray) else torch.from_dlpack(bits)
    return tensor.view(torch.bfloat16) if disguised else tensor


def tensors_of(case: Case, arrays: Arrays) -> dict[str, Any]:
    """Return all arrays as tensors in PyTorch's order of the axes; of NHWC that is a view, in channels-last format."""
    tensors = {name: tensor_of(array) for name, array in arrays.items()}
    if case.layout != "NHWC":
        return tensors
    return {name: tensor.permute(0, 3, 1, 2) if tensor.ndim == 4 else tensor for name, tensor in tensors.items()}


def in_memory_order(case: Case, tensor: Any) -> Any:
    """Return a view with the axes as they lie in memory."""
    return tensor.permute(0, 2, 3, 1) if case.layout == "NHWC" else tensor


def backend_of(x: Any, gamma: Any, beta: Any) -> str:
    """Return which kernels PyTorch chooses for a batch norm in training: ``native``, ``cudnn`` or ``miopen``.

    Raises
    ------
    NotSupportedError
        If this PyTorch cannot be asked.
    """
    torch = load()
    select = getattr(torch._C, "_select_batch_norm_backend", None)
    if select is None:
        raise NotSupportedError(f"PyTorch {torch.__version__} does not tell which kernels it chooses")
    # The choice depends on the presence of running statistics, not on their values.
    return select(x, gamma, beta, gamma, gamma, True, EPSILON).name.lower()


def describe(case: Case, arrays: Arrays, backend: str = NATIVE) -> str:
    """Return whose kernels compute, and whose PyTorch chooses when it is left to itself."""
    tensors = tensors_of(case, arrays)
    chosen = backend_of(*(tensors[name] for name in ("x", "gamma", "beta")))
    return f"{backend}, PyTorch's choice" if backend == chosen else f"{backend}; PyTorch's choice is {chosen}"


def prepare(case: Case, arrays: Arrays, backend: str = NATIVE) -> Call:
    """Prepare a case.

    Parameters
    ----------
    case, arrays
        See `benchmarks.harness.case.Provider`.
    backend : {"native", "cudnn"}
        Library of the kernels. PyTorch's own can do every case; cuDNN's only where PyTorch would choose them.

    Raises
    ------
    NotSupportedError
        If PyTorch does not choose cuDNN for the case.
    """
    tensors = tensors_of(case, arrays)
    chosen = backend_of(*(tensors[name] for name in ("x", "gamma", "beta")))
    if backend == CUDNN and chosen != CUDNN:
        raise NotSupportedError(f"PyTorch chooses its {chosen} kernels for this case, not cuDNN")
    if case.direction == "forward":
        return _forward(case, tensors, default=backend == chosen)
    return _backward(case, tensors, backend)


def _forward(case: Case, tensors: dict[str, Any], default: bool) -> Call:
    """Prepare a forward as users write it, or past PyTorch's choice by the operator that it did not choose."""
    torch = load()
    x, gamma, beta, running_mean, running_var = (tensors[name] for name in NEEDED["forward"])
    residual, epilogue = tensors.get("residual"), case.epilogue

    def normalise() -> Any:
        if default:
            return torch.nn.functional.batch_norm(x, running_mean, running_var, gamma, beta, True, MOMENTUM, EPSILON)
        return torch.native_batch_norm(x, gamma, beta, running_mean, running_var, True, MOMENTUM, EPSILON)[0]

    def call() -> tuple:
        y = normalise()
        if residual is not None:
            y += residual
        if epilogue:
            torch.relu_(y)
        return in_memory_order(case, y), running_mean, running_var

    return call


def prepare_out(case: Case, arrays: Arrays) -> Call:
    """Prepare the overloads of the operators that write into given outputs.

    Raises
    ------
    NotSupportedError
        For an epilogue: they would make it in passes of their own.
    """
    if case.epilogue:
        raise NotSupportedError("for no epilogue")
    aten, tensors = load().ops.aten, tensors_of(case, arrays)
    x, gamma, beta = (tensors[name] for name in ("x", "gamma", "beta"))
    if case.direction == "forward":
        running = tensors["running_mean"], tensors["running_var"]
        given = x, gamma, beta, *running, True, MOMENTUM, EPSILON
        names = ("out", "save_mean", "save_invstd")
        out = dict(zip(names, (x.clone(), gamma.clone(), gamma.clone()), strict=True))
        y = in_memory_order(case, out["out"])

        def forward() -> tuple:
            aten.native_batch_norm.out(*given, **out)
            return y, *running

        return forward
    _, *saved = normalise_and_save(x, gamma, beta)
    given = tensors["dy"], x, gamma, None, None, *saved, True, EPSILON, [True] * 3
    out = {f"out{i}": tensor.clone() for i, tensor in enumerate((x, gamma, beta))}
    gradients = in_memory_order(case, out["out0"]), out["out1"], out["out2"]

    def backward() -> tuple:
        aten.native_batch_norm_backward.out(*given, **out)
        return gradients

    return backward


def _backward(case: Case, tensors: dict[str, Any], backend: str) -> Call:
    """Prepare a backward: the forward is computed here."""
    relu_backward = load().ops.aten.threshold_backward.default
    x, gamma, beta, dy = (tensors[name] for name in NEEDED["backward"])
    y, *saved = normalise_and_save(x, gamma, beta, backend)
    y = activate(y, tensors.get("residual"), case.epilogue)
    differentiate = cudnn_backward if backend == CUDNN else native_backward

    def call() -> tuple:
        g = relu_backward(dy, y, 0) if case.epilogue else dy
        dx, dgamma, dbeta = differentiate(g, x, gamma, *saved)
        dresidual = (in_memory_order(case, g),) if case.epilogue == "add_relu" else ()
        return in_memory_order(case, dx), dgamma, dbeta, *dresidual

    return call


def normalise_and_save(x: Any, gamma: Any, beta: Any, backend: str = NATIVE) -> tuple:
    """Return y and what the backward needs: mean and 1/deviation; cuDNN adds memory of its own."""
    torch = load()
    normalise = torch.cudnn_batch_norm if backend == CUDNN else torch.native_batch_norm
    return normalise(x, gamma, beta, None, None, True, MOMENTUM, EPSILON)


def activate(y: Any, residual: Any, epilogue: str) -> Any:
    """Return what follows the normalisation, out of place."""
    if residual is not None:
        y = y + residual
    return y.relu() if epilogue else y


def native_backward(g: Any, x: Any, gamma: Any, mean: Any, rstd: Any) -> tuple:
    """Return the gradients of x, gamma and beta, by PyTorch's own kernels."""
    operator = load().ops.aten.native_batch_norm_backward.default
    return operator(g, x, gamma, None, None, mean, rstd, True, EPSILON, [True, True, True])


def cudnn_backward(g: Any, x: Any, gamma: Any, mean: Any, rstd: Any, reserve: Any) -> tuple:
    """Return the gradients of x, gamma and beta, by cuDNN."""
    operator = load().ops.aten.cudnn_batch_norm_backward.default
    return operator(x, g, gamma, None, None, mean, rstd, EPSILON, reserve)


def providers(prepare: Callable[[Case, Arrays], Call]) -> tuple[Provider, Provider]:
    """Return eager mode on the CPU and on a GPU, for an op with one backend."""
    return on_both("PyTorch eager", prepare, absent, "torch")


def _on_cuda(name: str, backend: str) -> Provider:
    """Return eager mode with one backend."""
    of_backend = [partial(function, backend=backend) for function in (prepare, describe)]
    return Provider(name, "cuda", of_backend[0], partial(absent, "cuda"), engine="torch", describe=of_backend[1])


PROVIDERS = (
    Provider("PyTorch eager", "cpu", prepare, partial(absent, "cpu"), describe=describe),
    Provider("PyTorch eager, out=", "cpu", prepare_out, partial(absent, "cpu")),
    _on_cuda("PyTorch eager, native", NATIVE),
    _on_cuda("PyTorch eager, cuDNN", CUDNN),
)
