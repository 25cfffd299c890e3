"""Refusals of the layers: what was expected, what came, the way out; and nothing is changed."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

from bnkernels import nn
from tests.regress.refusal import refused
from tools.backends import make


@pytest.mark.parametrize("layer", [nn.BatchNorm(3), nn.LayerNorm(3), nn.Linear(3, 2), nn.LinearBatchNorm(3, 2)])
def test_a_layer_names_what_it_was_given(layer: nn.Layer) -> None:
    name = type(layer).__name__
    x = np.ones((4, 3), "float32")
    with pytest.raises(RuntimeError, match=f"backward needs what a forward keeps: call this {name} before it"):
        copy.deepcopy(layer).backward(x)
    for wrong, error, message in (
        (x.astype("f8"), TypeError, rf"x must be float32.* for this {name}.*, got float64.*or the layer with .astype"),
        (x.astype("i4"), TypeError, "x must be float16, bfloat16, float32 or float64, got int32"),
        (np.ones((4, 5), "f4"), ValueError, r"x must have .*3.*, got the shape \(4, 5\)"),
        ([[1.0] * 3], TypeError, "^x: expected a NumPy or a CuPy array, got builtins.list"),
        (np.ma.ones((4, 3), "f4"), TypeError, "whose mask would be lost"),
        (None, TypeError, "x must be an array, got None"),
    ):
        with refused(make("numpy"), error, message, *layer.parameters.values(), *layer.buffers.values()):
            layer(wrong)
    with pytest.raises(TypeError, match="training must be True or False, got 1"):
        layer(x, training=1)
    y = layer(x)
    for wrong, error, message in (
        (y.astype("f8"), TypeError, "dy must be float32, got float64"),
        (y[:3], ValueError, r"dy must have the shape \(4, \d\), got \(3, \d\)"),
        (None, TypeError, "dy must be an array, got None"),
    ):
        with refused(make("numpy"), error, message, *layer.gradients.values()):
            layer.backward(wrong)
    with pytest.raises(TypeError, match="accumulate must be True or False"):
        layer.backward(y, accumulate=1)


@pytest.mark.emulator
def test_mixed_kinds_of_arrays_are_refused() -> None:
    emulated = make("emulator")
    layer = nn.BatchNorm(3)
    with pytest.raises(TypeError, match=r"x is a .*EmulatedArray, but weight of this BatchNorm is a numpy"):
        layer(emulated.asarray(np.ones((4, 3), "f4")))
    with pytest.raises(TypeError, match=r"bias is a numpy\.ndarray but the first array is a .*EmulatedArray"):
        nn.BatchNorm.from_arrays(emulated.asarray(np.ones(3)), np.zeros(3))


@pytest.mark.parametrize(
    ("make_layer", "error", "message"),
    [
        (lambda: nn.BatchNorm(0), ValueError, "num_features must be at least 1, got 0"),
        (lambda: nn.BatchNorm(2.5), TypeError, "num_features must be an integer"),
        (lambda: nn.BatchNorm(2, eps=0.0), ValueError, "eps must be at least"),
        (lambda: nn.BatchNorm(2, activation="spam"), ValueError, "activation must be one of"),
        (lambda: nn.BatchNorm(2, affine=1), TypeError, "affine must be True or False"),
        (lambda: nn.BatchNorm(2, renorm=(3, 5), track_running_stats=False), ValueError, "renorm takes running"),
        (lambda: nn.BatchNorm(2, xp="cupy"), TypeError, "xp must be an array module"),
        (lambda: nn.BatchNorm.from_arrays(), ValueError, "are None; pass arrays, or make a BatchNorm"),
        (lambda: nn.BatchNorm.from_arrays(np.ones(2), renorm=(3, 5)), ValueError, "pass running_mean and running_var"),
        (lambda: nn.BatchNorm.from_arrays(np.ones(2), np.ones(3)), ValueError, r"bias must have the shape \(2,\)"),
        (lambda: nn.BatchNorm.from_arrays(np.ones(2), np.ones(2, "f4")), TypeError, "bias must be float64"),
        (lambda: nn.BatchNorm.from_arrays(np.ones(4)[::2]), ValueError, "weight must be contiguous in C order"),
        (lambda: nn.LayerNorm(()), ValueError, "normalized_shape must have at least one axis"),
        (lambda: nn.LayerNorm((3, 0)), ValueError, "normalized_shape must be at least 1"),
        (lambda: nn.Linear(3, 0), ValueError, "outputs must be at least 1"),
        (lambda: nn.Linear.from_arrays(np.ones(3)), ValueError, r"weight must have the shape \(inputs, outputs\)"),
        (lambda: nn.GELU("erf"), ValueError, "approximate must be one of none, tanh"),
        (lambda: nn.ReLU("relu"), TypeError, "positional"),
        (lambda: nn.Sequential(nn.ReLU(), "relu"), TypeError, "a layer must be a Layer of bnkernels.nn, got 'relu'"),
        (lambda: nn.Sequential(*[nn.ReLU()] * 2), TypeError, "a layer keeps what belongs to one forward"),
        (lambda: nn.LinearBatchNorm(3, 2, norm="group"), ValueError, "norm must be one of batch, layer"),
    ],
)
def test_a_layer_that_cannot_be(make_layer: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make_layer()


def test_arrays_that_cannot_be_written_are_refused() -> None:
    fixed = np.ones(2)
    fixed.flags.writeable = False
    with pytest.raises(ValueError, match="running_mean must be writable, got a read-only array"):
        nn.BatchNorm.from_arrays(np.ones(2), np.ones(2), fixed, np.ones(2))
