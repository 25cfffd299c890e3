"""Linear layers with a norm: what is wrong is refused before anything is launched or written."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import bnkernels as bn
from tests.ops.test_linear_batch_norm import make
from tests.regress.refusal import refused
from tools.backends import Backend


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": np.ones((4, 3, 2), "float32")}, ValueError, r"x must have the shape \(N, K\), got"),
        ({"x": np.ones((4, 3), "int32")}, TypeError, "x must be float16, bfloat16, float32 or float64"),
        ({"x": np.ones((1, 3), "float32")}, ValueError, "no variance; train on at least two"),
        ({"weight": np.ones((2, 5), "float32")}, ValueError, r"weight must have the shape \(3, 5\), got \(2, 5\)"),
        ({"weight": np.ones((3, 5), "float64")}, TypeError, "weight must be float32, got float64"),
        ({"gamma": np.ones(4, "float32")}, ValueError, r"gamma must have the shape \(5,\), got \(4,\)"),
        ({"norm": "group"}, ValueError, "norm must be one of batch, layer, None; got 'group'"),
        ({"norm": None}, ValueError, "gamma belongs to a norm"),
        ({"momentum": 2.0}, ValueError, "momentum must be between 0 and 1"),
        ({"eps": -1.0}, ValueError, "eps must be at least 1.175e-38"),
        ({"activation": "swish"}, ValueError, "activation must be"),
        ({"out": ()}, TypeError, r"out must be a tuple of the 3 arrays \(y, z, statistics\)"),
    ],
)
def test_what_is_wrong_is_refused(
    backend: Backend, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    given: dict[str, Any] = {
        "x": np.ones((4, 3), "float32"),
        "weight": np.ones((3, 5), "float32"),
        "gamma": np.ones(5, "float32"),
        "running_mean": np.zeros(5, "float32"),
    } | change
    given = {name: backend.asarray(value) if isinstance(value, np.ndarray) else value for name, value in given.items()}
    with refused(backend, error, message, given["running_mean"]):
        bn.linear_batch_norm_forward(**given)


def test_wrong_gradients_are_refused(backend: Backend, rng: np.random.Generator) -> None:
    x, weight, dy, gamma, beta = backend.arrays(*make(rng, (6, 3, 4), "float32"))
    _, z, statistics = bn.linear_batch_norm_forward(x, weight, gamma, beta)
    dbeta = backend.asarray(np.zeros(4, "float32"))
    with refused(backend, TypeError, r"\(None, dweight, dgamma, dbeta\)", dbeta):
        bn.linear_batch_norm_backward(
            dy, x, weight, gamma, beta, z, statistics, input_gradient=False, out=(None, None, None, dbeta)
        )
    with refused(backend, ValueError, "gamma belongs to a norm; without statistics"):
        bn.linear_batch_norm_backward(dy, x, weight, gamma, beta, z, None)
    with refused(backend, ValueError, r"dy must have the shape \(6, 4\), got \(5, 4\)"):
        bn.linear_batch_norm_backward(dy[:5], x, weight, gamma, beta, z, statistics)
    with refused(backend, ValueError, "dweight overlaps weight in memory", weight):
        out = (backend.empty((6, 3), "float32"), weight, backend.empty((4,), "float32"), dbeta)
        bn.linear_batch_norm_backward(dy, x, weight, gamma, beta, z, statistics, out=out)
