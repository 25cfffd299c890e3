"""Batch normalisation for CuPy: CUDA kernels that need one launch, with NumPy twins of the same signatures."""

from bnkernels import _process  # noqa: F401  first, for an interrupt while the command loads the rest
from bnkernels.batch_norm import batch_norm_backward, batch_norm_forward
from bnkernels.batch_norm_double_backward import batch_norm_double_backward
from bnkernels.batch_norm_folding import batch_norm_scale_shift, fold_batch_norm
from bnkernels.batch_norm_inference import batch_norm_inference, batch_norm_inference_backward
from bnkernels.batch_norm_statistics import (
    batch_norm_gradient_sums,
    batch_norm_input_gradient,
    batch_norm_moments,
    batch_norm_normalise,
    batch_norm_statistics,
)
from bnkernels.fused_training import fused_training
from bnkernels.layer_norm import layer_norm_backward, layer_norm_forward
from bnkernels.linear_batch_norm import linear_batch_norm_backward, linear_batch_norm_forward
from bnkernels.mini_batch import mini_batch, random_rows
from bnkernels.mlp import MLP
from bnkernels.parameter_update import adam_update, momentum_update, scheduled_update, sgd_update, update_schedule
from bnkernels.softmax_cross_entropy import softmax_cross_entropy

__version__ = "0.1.0"

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
    "layer_norm_backward",
    "layer_norm_forward",
    "linear_batch_norm_backward",
    "linear_batch_norm_forward",
    "mini_batch",
    "momentum_update",
    "random_rows",
    "scheduled_update",
    "sgd_update",
    "softmax_cross_entropy",
    "update_schedule",
]
