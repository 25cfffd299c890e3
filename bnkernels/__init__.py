"""Batch normalisation for CuPy: CUDA kernels that need one launch each way, and the same ops on NumPy."""

from typing import TYPE_CHECKING

from bnkernels import _process  # noqa: F401  first of ours, for an interrupt while the command loads the rest
from bnkernels._version import __version__  # noqa: F401
from bnkernels.ops.batch_norm.double_backward import batch_norm_double_backward
from bnkernels.ops.batch_norm.folding import batch_norm_scale_shift, fold_batch_norm
from bnkernels.ops.batch_norm.in_parts import (
    batch_norm_gradient_sums,
    batch_norm_input_gradient,
    batch_norm_moments,
    batch_norm_normalise,
    batch_norm_statistics,
)
from bnkernels.ops.batch_norm.inference import batch_norm_inference, batch_norm_inference_backward
from bnkernels.ops.batch_norm.training import batch_norm_backward, batch_norm_forward
from bnkernels.ops.group_norm.op import group_norm_backward, group_norm_forward
from bnkernels.ops.instance_norm.op import instance_norm_backward, instance_norm_forward
from bnkernels.ops.layer_norm.op import layer_norm_backward, layer_norm_forward
from bnkernels.ops.linear_batch_norm.op import linear_batch_norm_backward, linear_batch_norm_forward
from bnkernels.ops.linear_softmax_cross_entropy.op import linear_softmax_cross_entropy
from bnkernels.ops.matmul.op import matmul
from bnkernels.ops.mini_batch.op import mini_batch, random_rows
from bnkernels.ops.parameter_update.op import adam_update, momentum_update, rmsprop_update, sgd_update
from bnkernels.ops.parameter_update.schedule import scheduled_update, update_schedule
from bnkernels.ops.rms_norm.op import rms_norm_backward, rms_norm_forward
from bnkernels.ops.softmax_cross_entropy.op import softmax_cross_entropy
from bnkernels.runtime.cpu.threads import get_num_threads, set_num_threads

if TYPE_CHECKING:
    from bnkernels import nn
    from bnkernels.nn.mlp import MLP
    from bnkernels.ops.fused_training.op import fused_training
    from bnkernels.ops.lstm.op import lstm_backward, lstm_forward

__all__ = [
    "MLP",
    "adam_update",
    "batch_norm_backward",
    "batch_norm_double_backward",
    "batch_norm_forward",
    "batch_norm_gradient_sums",
    "batch_norm_inference",
    "batch_norm_inference_backward",
    "batch_norm_input_gradient",
    "batch_norm_moments",
    "batch_norm_normalise",
    "batch_norm_scale_shift",
    "batch_norm_statistics",
    "fold_batch_norm",
    "fused_training",
    "get_num_threads",
    "group_norm_backward",
    "group_norm_forward",
    "instance_norm_backward",
    "instance_norm_forward",
    "layer_norm_backward",
    "layer_norm_forward",
    "linear_batch_norm_backward",
    "linear_batch_norm_forward",
    "linear_softmax_cross_entropy",
    "lstm_backward",
    "lstm_forward",
    "matmul",
    "mini_batch",
    "momentum_update",
    "nn",
    "random_rows",
    "rms_norm_backward",
    "rms_norm_forward",
    "rmsprop_update",
    "scheduled_update",
    "set_num_threads",
    "sgd_update",
    "softmax_cross_entropy",
    "update_schedule",
]


# Names whose modules are loaded when they are first asked for: the other ops do not need the time that these take.
_LATER = {
    "MLP": "bnkernels.nn.mlp",
    "fused_training": "bnkernels.ops.fused_training.op",
    "lstm_backward": "bnkernels.ops.lstm.op",
    "lstm_forward": "bnkernels.ops.lstm.op",
}


def __getattr__(name: str) -> object:
    """Return what is loaded late."""
    from importlib import import_module

    if name == "nn":
        return import_module("bnkernels.nn")
    if name not in _LATER:
        raise AttributeError(f"module 'bnkernels' has no attribute {name!r}")
    globals()[name] = found = getattr(import_module(_LATER[name]), name)
    return found
