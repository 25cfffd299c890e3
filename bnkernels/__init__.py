"""Batch normalisation for CuPy: CUDA kernels that need one launch each way, and the same ops on NumPy."""

from bnkernels import _process  # noqa: F401  first, for an interrupt while the command loads the rest
from bnkernels._version import __version__  # noqa: F401
from bnkernels.nn.mlp import MLP
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
from bnkernels.ops.fused_training.op import fused_training
from bnkernels.ops.layer_norm.op import layer_norm_backward, layer_norm_forward
from bnkernels.ops.linear_batch_norm.op import linear_batch_norm_backward, linear_batch_norm_forward
from bnkernels.ops.mini_batch.op import mini_batch, random_rows
from bnkernels.ops.parameter_update.op import (
    adam_update,
    momentum_update,
    scheduled_update,
    sgd_update,
    update_schedule,
)
from bnkernels.ops.softmax_cross_entropy.op import softmax_cross_entropy
from bnkernels.runtime.cpu.threads import get_num_threads, set_num_threads

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
    "layer_norm_backward",
    "layer_norm_forward",
    "linear_batch_norm_backward",
    "linear_batch_norm_forward",
    "mini_batch",
    "momentum_update",
    "random_rows",
    "scheduled_update",
    "set_num_threads",
    "sgd_update",
    "softmax_cross_entropy",
    "update_schedule",
]
