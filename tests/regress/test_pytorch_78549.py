"""Host synchronisation and allocation on the way to a launch, which break the capture of CUDA graphs.

The arrays of these tests have no bytes: to read a value, or to ask for memory, would fail.
"""

from __future__ import annotations

import numpy as np
import pytest

import bnkernels as bn
from tests.regress.calls import CALLS, make_arrays
from tests.regress.device import RecordedArray, record_of, recording


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("op", CALLS)
def test_pytorch_78549_with_outputs_given_nothing_is_read_or_allocated(op: str, dtype: str) -> None:
    """A check of the counts on the host waited for the device. pytorch 68985: memory was asked for during capture."""
    with recording() as runtime:
        for _ in range(3):
            CALLS[op].run(record_of(make_arrays(op, dtype)))
        assert runtime.allocations == []
        assert len(runtime.launches) == 3


def vector(address: int) -> RecordedArray:
    return RecordedArray((20,), np.float32, address * 2**20)


def test_pytorch_68985_without_outputs_only_they_are_allocated() -> None:
    """No workspace, no temporary: what is returned is all that is allocated."""
    x, dy = (RecordedArray((64, 20), np.float32, address * 2**20) for address in (1, 2))
    gamma, beta, mean, var = map(vector, (3, 4, 5, 6))
    labels = RecordedArray((64,), np.int64, 7 * 2**20)
    with recording() as runtime:
        y, statistics = bn.batch_norm_forward(x, gamma, beta, mean, var)
        assert runtime.allocations == [y, statistics]
        grads = bn.batch_norm_backward(dy, x, gamma, beta, statistics)
        assert runtime.allocations == [y, statistics, *grads]
        runtime.allocations.clear()
        out = bn.batch_norm_inference(x, gamma, beta, mean, var)
        grads = bn.batch_norm_inference_backward(dy, x, gamma, beta, mean, var)
        loss = bn.softmax_cross_entropy(x, labels)
        assert runtime.allocations == [out, *grads, *loss]
        assert len(runtime.launches) == 5
