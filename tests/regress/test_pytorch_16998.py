"""Grids that end at 65,535 blocks, and results that were wrong from row 2^16 on."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest

import bnkernels as bn
from tools import oracle
from tools.backends import Backend, emulated_runtime


def check(backend: Backend, rng: np.random.Generator, rows: int, channels: int) -> None:
    """Compare training and inference, forward and backward, with extended precision."""
    x, dy = (rng.standard_normal((rows, channels)).astype(np.float32) for _ in range(2))
    running = rng.standard_normal(channels).astype("float32"), rng.uniform(0.5, 2, channels).astype("float32")
    on_x, on_dy = backend.arrays(x, dy)
    y, statistics = bn.batch_norm_forward(on_x)
    on_running = backend.arrays(*running)
    results = (
        (None, y, bn.batch_norm_backward(on_dy, on_x, None, None, statistics)),
        (
            running,
            bn.batch_norm_inference(on_x, None, None, *on_running),
            bn.batch_norm_inference_backward(on_dy, on_x, None, None, *on_running),
        ),
    )
    for stats, got, grads in results:
        exact = oracle.forward(x, None, None, 1e-5, running=stats)
        oracle.assert_within(backend.asnumpy(got), exact.y, exact.z_bound, "y")
        exact = oracle.backward(dy, x, None, None, 1e-5, running=stats)
        for name, grad in zip(("dx", "dgamma", "dbeta"), grads, strict=True):
            oracle.assert_within(backend.asnumpy(grad), getattr(exact, name), getattr(exact, f"{name}_bound"), name)


@pytest.mark.parametrize("rows", [65535, 65536, 131072])
def test_apex_411_rows_around_65536(backend: Backend, rng: np.random.Generator, rows: int) -> None:
    """From 2^16 examples on, results were off by 14; pytorch 16998 could not launch them."""
    check(backend, rng, rows, 1)


@pytest.mark.slow  # under a sanitizer
def test_pytorch_16998_channels_65536(backend: Backend, rng: np.random.Generator) -> None:
    """One block per channel along an axis of the grid that ends at 65,535."""
    check(backend, rng, 2, 65536)


@pytest.mark.parametrize("rows", [65535, 65536])
def test_pytorch_16998_softmax_rows(backend: Backend, rng: np.random.Generator, rows: int) -> None:
    """The same for the loss, which has a warp for every example; the emulator runs its first and its last block."""
    logits, labels = rng.standard_normal((rows, 2)), rng.integers(0, 2, rows)
    ends = emulated_runtime().only_blocks([0, rows // 8 - 1]) if backend.name == "emulator" else nullcontext()
    with ends:
        loss, _ = bn.softmax_cross_entropy(backend.asarray(logits), backend.asarray(labels))
    ways = logits[np.arange(rows), 1 - labels] - logits[np.arange(rows), labels]
    whole = np.r_[:8, rows // 8 * 8 - 8 : rows // 8 * 8]
    np.testing.assert_allclose(backend.asnumpy(loss)[whole], np.log1p(np.exp(ways))[whole], rtol=1e-13, atol=1e-15)
