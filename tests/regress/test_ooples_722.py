"""Statistics of an older mini-batch reused, or thrown away: three steps on moving data, the last one checked."""

from __future__ import annotations

import numpy as np
import pytest

from bnkernels.nn import BatchNorm
from tools.backends import Backend


@pytest.mark.parametrize("momentum", [0.25, None])
def test_ooples_722_third_step_on_data_that_moved(
    backend: Backend, rng: np.random.Generator, momentum: float | None
) -> None:
    """The backward used what the first forward had saved, and the caller dropped the new running statistics."""
    gamma, beta = np.array([2.0, -3.0, 0.5]), np.array([0.1, 0.2, -0.3])
    running = backend.arrays(np.zeros(3), np.ones(3))
    layer = BatchNorm.from_arrays(*backend.arrays(gamma, beta), *running, momentum=momentum, activation="tanh")
    batches = [rng.standard_normal((6, 3)) + 10 * step for step in range(3)]
    dy = rng.standard_normal((6, 3))

    mean, var = np.zeros(3), np.ones(3)
    for step, x in enumerate(batches):
        layer.forward(backend.asarray(x), training=True)
        dx = backend.asnumpy(layer.backward(backend.asarray(dy)))
        weight = 1 / (step + 1) if momentum is None else momentum
        mean += weight * (x.mean(0) - mean)
        var += weight * (x.var(0, ddof=1) - var)
    np.testing.assert_allclose(backend.asnumpy(running[0]), mean, rtol=1e-13)
    np.testing.assert_allclose(backend.asnumpy(running[1]), var, rtol=1e-13)

    def loss(x: np.ndarray) -> float:  # NumPy alone, so that nothing of the layer can be stale in it
        xhat = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
        return float((np.tanh(gamma * xhat + beta) * dy).sum())

    step = 1e-6
    for index in np.ndindex(dx.shape):
        up, down = batches[2].copy(), batches[2].copy()
        up[index] += step
        down[index] -= step
        assert abs((loss(up) - loss(down)) / (2 * step) - dx[index]) <= 1e-7


def test_homeric_5532_inference_uses_the_updated_statistics(backend: Backend, rng: np.random.Generator) -> None:
    """Inference after training went on with the statistics of before."""
    layer = BatchNorm.from_arrays(*backend.arrays(*np.float64([[1, 1], [0, 0], [0, 0], [1, 1]])), momentum=1.0)
    x = rng.standard_normal((9, 2)) + 100
    layer.forward(backend.asarray(x), training=True)
    y = backend.asnumpy(layer.forward(backend.asarray(x), training=False))
    np.testing.assert_allclose(y, (x - x.mean(0)) / np.sqrt(x.var(0, ddof=1) + 1e-5), rtol=1e-10, atol=1e-11)
