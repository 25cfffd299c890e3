"""Outputs that lie on inputs: exactly, and then the result is the same; partly, and then it is an error."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

import bnkernels as bn
from tests.regress.calls import CALLS, make_arrays
from tests.regress.refusal import refused
from tools.backends import Backend

IN_PLACE = [
    ("forward", "y", "x"),
    ("inference", "out", "x"),
    ("backward", "dx", "dy"),
    ("backward", "dx", "x"),
    *(("double_backward", "ddy", read) for read in ("ddx", "dy", "x")),
    ("masked_forward", "y", "x"),
    *((op, "dx", read) for op in ("masked_backward", "input_gradient") for read in ("dy", "x")),
    ("normalise", "out", "x"),
    ("inference_backward", "dx", "dy"),
    ("inference_backward", "dx", "x"),
    ("softmax_cross_entropy", "dlogits", "logits"),
]


@pytest.mark.parametrize(("op", "output", "read"), IN_PLACE)
@pytest.mark.parametrize("view", [False, True])
def test_ggml_1491_output_on_an_input(backend: Backend, op: str, output: str, read: str, view: bool) -> None:
    """A later pass read what an earlier one had written over; in place must give the bits of out of place."""
    fresh, on = ({name: backend.asarray(array) for name, array in make_arrays(op).items()} for _ in range(2))
    CALLS[op].run(fresh)
    on[output] = on[read][:] if view else on[read]  # another array object on the same memory counts as the same
    CALLS[op].run(on)
    for name in CALLS[op].writes:
        np.testing.assert_array_equal(backend.asnumpy(on[name]), backend.asnumpy(fresh[name]), err_msg=name)


def test_ggml_1491_dy_is_x_is_dx(backend: Backend) -> None:
    """The input of the upstream report, all in one array."""
    x = np.float32([[1], [0], [0], [0]])
    fresh, one = backend.arrays(x, x)
    _, statistics = bn.batch_norm_forward(fresh)
    want = bn.batch_norm_backward(fresh, fresh, None, None, statistics)
    vectors = [backend.empty((1,), "float32") for _ in range(2)]
    bn.batch_norm_backward(one, one, None, None, statistics, out=(one, *vectors))
    np.testing.assert_array_equal(backend.asnumpy(one), backend.asnumpy(want[0]))


@pytest.mark.parametrize(("op", "output", "read"), IN_PLACE)
def test_nntile_371_partial_overlap_is_refused(backend: Backend, op: str, output: str, read: str) -> None:
    """One row off: what is written for one row is read for the next."""
    on = {name: backend.asarray(array) for name, array in make_arrays(op).items()}
    rows, channels = make_arrays(op)[read].shape
    both = backend.asarray(np.ones((rows + 1, channels), np.float32))
    on[read], on[output] = both[:-1], both[1:]
    with refused(backend, ValueError, f"{output} overlaps {read} in memory.*pass a separate array", *on.values()):
        CALLS[op].run(on)


@pytest.mark.parametrize("op", CALLS)
def test_nntile_371_every_other_pair_is_refused(backend: Backend, op: str) -> None:
    """A vector on a matrix, a statistic on a parameter: any memory that is written must belong to one array alone."""
    arrays = make_arrays(op)
    for pair in product(CALLS[op].writes, CALLS[op].names):
        if pair[0] == pair[1] or (op, *pair) in IN_PLACE or (op, *pair[::-1]) in IN_PLACE:
            continue
        on = {name: backend.asarray(array) for name, array in arrays.items()}
        shared = backend.asarray(np.zeros(max(arrays[name].nbytes for name in pair), np.uint8))
        for name in pair:
            on[name] = shared[: arrays[name].nbytes].view(arrays[name].dtype).reshape(arrays[name].shape)
        with refused(backend, ValueError, "overlaps .* in memory", *on.values()):
            CALLS[op].run(on)
