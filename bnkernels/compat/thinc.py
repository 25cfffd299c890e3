"""Norms as layers of thinc 8.3, which spaCy computes with: ``bnkernels.BatchNorm.v1`` and ``bnkernels.LayerNorm.v1``.

Both take rows, and have the parameters G and b as thinc's own layer norm; `with_array2d` of thinc makes them take
ragged arrays and lists. A config finds them by the entry points ``thinc_layers``, without an import.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from thinc.api import Model, registry
from thinc.layers.layernorm import init as init_layer_norm

from bnkernels.nn.state import host
from bnkernels.ops.batch_norm.inference import batch_norm_inference, batch_norm_inference_backward
from bnkernels.ops.batch_norm.training import batch_norm_backward, batch_norm_forward
from bnkernels.ops.layer_norm.op import layer_norm_backward, layer_norm_forward

RUNNING = {"running_mean": 0, "running_var": 1}  # attributes of a batch norm, and the numbers that they start with
Pass = tuple[Any, Callable[[Any], Any]]  # output, and the function that takes its gradient and returns the input's


@registry.layers("bnkernels.BatchNorm.v1")
def BatchNorm(
    nI: int | None = None, momentum: float = 0.1, eps: float = 1e-5, activation: str = "identity"
) -> Model[Any, Any]:
    """Return a batch norm of rows, with an activation behind it.

    Parameters
    ----------
    nI : int, optional
        Width of the rows; by default that of the data which `initialize` is given.
    momentum : float
        Weight of the **new** mini-batch in the running statistics, as in PyTorch.
    eps : float
        Number added to the variance.
    activation : str
        Activation behind, as in `batch_norm_forward`.

    Returns
    -------
    thinc.model.Model
        Layer. Its attributes `running_mean` and `running_var` are saved with it.
    """
    attrs = {"momentum": momentum, "eps": eps, "activation": activation, **dict.fromkeys(RUNNING)}
    shared: dict[str, Any] = {"dims": {"nI": nI, "nO": nI}, "params": {"G": None, "b": None}}
    return Model("batchnorm", _batch_norm, init=_init_batch_norm, attrs=attrs, **shared)


@registry.layers("bnkernels.LayerNorm.v1")
def LayerNorm(nI: int | None = None, eps: float = 1e-8) -> Model[Any, Any]:
    """Return a layer norm of rows, which computes what thinc's ``LayerNorm.v1`` does.

    Parameters
    ----------
    nI : int, optional
        Width of the rows; by default that of the data which `initialize` is given.
    eps : float
        Number added to the variance, which is 1e-8 in thinc's.

    Returns
    -------
    thinc.model.Model
        Layer.
    """
    shared: dict[str, Any] = {"dims": {"nI": nI, "nO": nI}, "params": {"G": None, "b": None}}
    return Model("layernorm", _layer_norm, init=init_layer_norm, attrs={"eps": eps}, **shared)


def _batch_norm(model: Model[Any, Any], X: Any, is_train: bool) -> Pass:
    vectors = model.get_param("G"), model.get_param("b")
    running = _running(model)
    options = {name: model.attrs[name] for name in ("eps", "activation")}
    if is_train:
        Y, statistics = batch_norm_forward(X, *vectors, *running, momentum=model.attrs["momentum"], **options)
    else:
        Y = batch_norm_inference(X, *vectors, *running, **options)

    def backprop(dY: Any) -> Any:
        if is_train:
            dX, *gradients = batch_norm_backward(dY, X, *vectors, statistics, activation=options["activation"])
        else:
            dX, *gradients = batch_norm_inference_backward(dY, X, *vectors, *running, **options)
        return _added(model, dX, *gradients)

    return Y, backprop


def _layer_norm(model: Model[Any, Any], X: Any, is_train: bool) -> Pass:
    X = model.ops.xp.ascontiguousarray(X)  # as the op asks for
    vectors = model.get_param("G"), model.get_param("b")
    Y, statistics = layer_norm_forward(X, *vectors, eps=model.attrs["eps"])

    def backprop(dY: Any) -> Any:
        dY = model.ops.xp.ascontiguousarray(dY)
        return _added(model, *layer_norm_backward(dY, X, *vectors, statistics))

    return Y, backprop


def _added(model: Model[Any, Any], dX: Any, dG: Any, db: Any) -> Any:
    model.inc_grad("G", dG)
    model.inc_grad("b", db)
    return dX


def _init_batch_norm(model: Model[Any, Any], X: Any = None, Y: Any = None) -> None:
    init_layer_norm(model, X, Y)
    for name, start in RUNNING.items():
        model.attrs[name] = model.ops.alloc1f(model.get_dim("nI")) + start


def _running(model: Model[Any, Any]) -> list[Any]:
    """Return the running statistics on the model's device: to_gpu leaves them, and those of a file are read-only."""
    for name in RUNNING:
        array = model.attrs[name]
        if type(array) is not model.ops.xp.ndarray or not getattr(array.flags, "writeable", True):
            model.attrs[name] = model.ops.asarray(host(array))
    return [model.attrs[name] for name in RUNNING]
