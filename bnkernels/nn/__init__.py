"""Layers, networks and optimisers: they own arrays and call the ops."""

from bnkernels.nn.activations import ELU, GELU, Activation, Identity, LeakyReLU, ReLU, Sigmoid, SiLU, Tanh
from bnkernels.nn.batch_norm import BatchNorm
from bnkernels.nn.containers import Residual, Sequential
from bnkernels.nn.files import load, save
from bnkernels.nn.flatten import Flatten
from bnkernels.nn.frameworks import CONVENTIONS, Convention, batch_norm_like, from_torch
from bnkernels.nn.group_norm import GroupNorm
from bnkernels.nn.instance_norm import InstanceNorm
from bnkernels.nn.layer import Layer
from bnkernels.nn.layer_norm import LayerNorm
from bnkernels.nn.linear import Linear
from bnkernels.nn.linear_batch_norm import LinearBatchNorm
from bnkernels.nn.lstm import LSTM
from bnkernels.nn.mlp import MLP
from bnkernels.nn.norm_lstm import BatchNormLSTM, LayerNormLSTM
from bnkernels.nn.optimizers import SGD, Adam, Momentum, RMSProp, clip_gradients
from bnkernels.nn.rms_norm import RMSNorm
from bnkernels.nn.statistics import Statistics
from bnkernels.nn.sync_batch_norm import SyncBatchNorm

__all__ = [
    "CONVENTIONS",
    "ELU",
    "GELU",
    "LSTM",
    "MLP",
    "SGD",
    "Activation",
    "Adam",
    "BatchNorm",
    "BatchNormLSTM",
    "Convention",
    "Flatten",
    "GroupNorm",
    "Identity",
    "InstanceNorm",
    "Layer",
    "LayerNorm",
    "LayerNormLSTM",
    "LeakyReLU",
    "Linear",
    "LinearBatchNorm",
    "Momentum",
    "RMSNorm",
    "RMSProp",
    "ReLU",
    "Residual",
    "Sequential",
    "SiLU",
    "Sigmoid",
    "Statistics",
    "SyncBatchNorm",
    "Tanh",
    "batch_norm_like",
    "clip_gradients",
    "from_torch",
    "load",
    "save",
]
