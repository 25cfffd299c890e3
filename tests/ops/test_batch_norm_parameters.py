"""Parameters in the data's own 16 bits: computed with in float32, their gradients rounded once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import bnkernels as bn
from tests.ops.test_batch_norm_masked import dtype_named
from tools.backends import Backend


@pytest.mark.parametrize("given", ["gamma beta", "gamma", "beta"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_parameters_in_16_bits_are_those_numbers_in_float32(
    backend: Backend, rng: np.random.Generator, dtype: str, given: str
) -> None:
    data = dtype_named(dtype)
    x, dy = (rng.standard_normal((200, 12)).astype(data) for _ in range(2))
    vectors = {name: rng.uniform(-2, 2, 12).astype(data) for name in given.split()}
    results = []
    for single in (False, True):
        on_x, on_dy, gamma, beta, mean, var = backend.arrays(
            *(x, dy),
            *(
                vectors[name].astype("float32" if single else data) if name in vectors else None
                for name in ("gamma", "beta")
            ),
            *(np.zeros(12, "float32"), np.ones(12, "float32")),
        )
        options = {"activation": "silu"}
        y, statistics = bn.batch_norm_forward(on_x, gamma, beta, mean, var, **options)
        grads = bn.batch_norm_backward(on_dy, on_x, gamma, beta, statistics, **options)
        frozen = bn.batch_norm_inference(on_x, gamma, beta, mean, var, **options)
        frozen_grads = bn.batch_norm_inference_backward(on_dy, on_x, gamma, beta, mean, var, **options)
        results.append([backend.asnumpy(array) for array in (y, *grads, frozen, *frozen_grads, mean, var)])
    for i, (got, want) in enumerate(zip(*results, strict=True)):
        assert got.dtype == (data if i < 8 else np.float32)
        step = float(np.finfo(np.float16).eps if dtype == "float16" else 2**-7)
        # Two roundings to 16 bits that may fall on either side.
        np.testing.assert_allclose(got.astype("float64"), want.astype("float64"), rtol=step, atol=step)


def test_parameters_in_16_bits_with_out_and_their_gradients_type(backend: Backend, rng: np.random.Generator) -> None:
    x, dy = (rng.standard_normal((20, 3)).astype("float16") for _ in range(2))
    on_x, on_dy, gamma, beta = backend.arrays(x, dy, np.ones(3, "float16"), np.zeros(3, "float16"))
    _, statistics = bn.batch_norm_forward(on_x, gamma, beta)
    out = tuple(backend.empty(shape, "float16") for shape in ((20, 3), (3,), (3,)))
    found = bn.batch_norm_backward(on_dy, on_x, gamma, beta, statistics, out=out)
    assert all(got is given for got, given in zip(found, out, strict=True))
    assert np.isfinite(backend.asnumpy(out[1])).all()
    others = (out[0], *(backend.empty((3,), "float32") for _ in range(2)))
    with pytest.raises(TypeError, match="dgamma must be float16, got float32"):
        bn.batch_norm_backward(on_dy, on_x, gamma, beta, statistics, out=others)


@pytest.mark.parametrize(("gamma", "beta"), [("float16", "float32"), ("float32", "float16"), ("float64", None)])
def test_parameters_of_two_types_are_refused(backend: Backend, gamma: Any, beta: Any) -> None:
    x = backend.asarray(np.ones((4, 3), "float16"))
    vectors = [None if dtype is None else backend.asarray(np.ones(3, dtype)) for dtype in (gamma, beta)]
    wrong, right, got = {
        ("float16", "float32"): ("beta", "float16", "float32"),
        ("float32", "float16"): ("gamma", "float16", "float32"),
        ("float64", None): ("gamma", "float32", "float64"),
    }[gamma, beta]
    with pytest.raises(TypeError, match=f"{wrong} must be {right}, got {got}"):
        bn.batch_norm_forward(x, *vectors)
