"""Running statistics that every thread of a block read, changed and wrote: right by luck of the order."""

from __future__ import annotations

import numpy as np
import pytest

import bnkernels as bn
from tests.ops.test_batch_norm import make_case
from tests.regress.calls import CALLS, make_arrays
from tools.emulator import EmulatorRuntime

pytestmark = pytest.mark.emulator

SHAPES = [(64, 20), (40, 70), (260, 34)]  # one block; three, held; two, streamed


def results(runtime: EmulatorRuntime, shape: tuple[int, int], dtype: str) -> list[np.ndarray]:
    """Return all that a training step's two batch-norm launches write, and inference too."""
    x, gamma, beta, dy = (runtime.asarray(a) for a in make_case(np.random.default_rng(1), shape, dtype))
    running = [runtime.asarray(np.full(shape[1], value, dtype)) for value in (0.5, 2)]
    y, statistics = bn.batch_norm_forward(x, gamma, beta, *running, activation="tanh")
    grads = bn.batch_norm_backward(dy, x, gamma, beta, statistics, activation="tanh")
    frozen = bn.batch_norm_inference(x, gamma, beta, *running)
    frozen_grads = bn.batch_norm_inference_backward(dy, x, gamma, beta, *running)
    return [y, statistics, *running, *grads, frozen, *frozen_grads]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", SHAPES)
def test_tileops_1727_any_order_gives_the_same_bits(
    emulated: EmulatorRuntime, shape: tuple[int, int], dtype: str
) -> None:
    """Each order of blocks and threads is a GPU's on another day; none may change a bit."""
    want = results(emulated, shape, dtype)
    for seed in range(1, 7):
        with emulated.schedule(seed=seed, resident=(1, 2, 64)[seed % 3]):
            for one, other in zip(want, results(emulated, shape, dtype), strict=True):
                np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("op", CALLS)
def test_cuml_458_no_block_waits_for_another(emulated: EmulatorRuntime, op: str) -> None:
    """A barrier across the grid hangs when not all blocks fit on the device; with one at a time all ops must end."""
    alone, together = ({name: emulated.asarray(a) for name, a in make_arrays(op).items()} for _ in range(2))
    with emulated.schedule(seed=3, resident=1):
        CALLS[op].run(alone)
    with emulated.schedule(resident=1000):
        CALLS[op].run(together)
    for name in CALLS[op].writes:
        np.testing.assert_array_equal(alone[name], together[name], err_msg=name)
