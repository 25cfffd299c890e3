"""Mistakes in calls of the norms in PyTorch's place: named before anything is changed."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

from tools import real_torch

torch = real_torch.load()

from bnkernels.compat import torch as ours  # noqa: E402

VECTOR, MATRIX = torch.ones(3), torch.ones(4, 3)
ERRORS: dict[str, tuple[Any, type[Exception], str]] = {
    "no tensor": (
        lambda: ours.batch_norm(np.ones((4, 3)), None, None, training=True),
        TypeError,
        r"input must be a torch.Tensor, got a numpy.ndarray of the shape \(4, 3\)",
    ),
    "integers": (
        lambda: ours.layer_norm(MATRIX.long(), (3,)),
        TypeError,
        "input must be float16, bfloat16, float32 or float64, got torch.int64; pass input.float()",
    ),
    "one axis": (
        lambda: ours.batch_norm(VECTOR, None, None, training=True),
        ValueError,
        r"input must have the shape \(N, C, ...\), and residual the same, got \(3,\) and None",
    ),
    "another residual": (
        lambda: ours.BatchNorm1d(3)(MATRIX, MATRIX[:2]),
        ValueError,
        r"residual the same, got \(4, 3\) and a torch.Tensor of the shape torch.Size\(\[2, 3\]\)",
    ),
    "half of the statistics": (
        lambda: ours.batch_norm(MATRIX, VECTOR, None),
        ValueError,
        "running_mean and running_var must be two tensors, or in training both None",
    ),
    "no statistics": (
        lambda: ours.batch_norm(MATRIX, None, None),
        ValueError,
        "running_mean and running_var must be two tensors, or in training both None, got None and None",
    ),
    "channels": (
        lambda: ours.BatchNorm1d(4)(MATRIX),
        ValueError,
        r"weight must have the shape \(3,\) for an input of the shape \(4, 3\), got \(4,\)",
    ),
    "statistics of other channels": (
        lambda: ours.batch_norm(MATRIX, VECTOR, torch.ones(2)),
        ValueError,
        r"running_var must have the shape \(3,\) for an input of the shape \(4, 3\), got \(2,\)",
    ),
    "wider data": (
        lambda: ours.BatchNorm1d(3)(MATRIX.double()),
        TypeError,
        "weight must be torch.float64 for an input of torch.float64, got torch.float32",
    ),
    "wider parameters": (
        lambda: ours.LayerNorm(3, dtype=torch.float64)(MATRIX.bfloat16()),
        TypeError,
        "weight must be torch.float32 for an input of torch.bfloat16, got torch.float64",
    ),
    "dimensions": (lambda: ours.BatchNorm2d(3)(MATRIX), ValueError, r"expected 4D input \(got 2D input\)"),
    "one value": (lambda: ours.BatchNorm1d(3)(MATRIX[:1]), ValueError, "one value per channel has no variance"),
    "last axes": (
        lambda: ours.LayerNorm((2, 3))(MATRIX),
        ValueError,
        r"input must have the last axes \(2, 3\), at least one, got the shape \(4, 3\)",
    ),
    "features": (
        lambda: ours.LinearBatchNorm(2, 3)(MATRIX),
        ValueError,
        r"input must have the shape \(N, 2\) and the type torch.float32, got a torch.Tensor of the shape torch",
    ),
    "a norm": (lambda: ours.LinearBatchNorm(2, 3, norm="group"), ValueError, "norm must be one of batch, layer; got"),
    "an activation": (lambda: ours.LayerNorm(3, activation="swish"), ValueError, "activation must be one of identity"),
    "eps": (lambda: ours.BatchNorm1d(3, eps=0.0)(MATRIX), ValueError, "eps must be at least 1.175e-38"),
    "momentum": (
        lambda: ours.BatchNorm1d(3, momentum=2.0)(MATRIX),
        ValueError,
        "momentum must be between 0 and 1 and finite, got 2.0",
    ),
}


@pytest.mark.parametrize("error", ERRORS)
def test_what_is_wrong_is_named(error: str) -> None:
    call, kind, message = ERRORS[error]
    with pytest.raises(kind, match=message):
        call()


@pytest.mark.parametrize("make", [lambda: ours.BatchNorm1d(3), lambda: ours.LinearBatchNorm(3, 3)])
def test_a_refused_mini_batch_changes_no_state(make: Any) -> None:
    module = make()
    before = copy.deepcopy(module.state_dict())
    for wrong in (MATRIX[:1], MATRIX.double(), torch.ones(4, 2)):
        with pytest.raises((TypeError, ValueError)):
            module(wrong)
    for key, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[key])


@pytest.mark.parametrize("norm", ["batch", "layer", "linear"])
def test_a_tensor_without_memory_is_refused(norm: str) -> None:
    x = torch.ones(3, 2, device="meta")
    module = {"batch": ours.BatchNorm1d(2), "layer": ours.LayerNorm(2), "linear": ours.LinearBatchNorm(2, 3)}[norm]
    with pytest.raises(TypeError, match="input must lie in the memory of a CPU or of a CUDA device, got one on meta"):
        module(x)
