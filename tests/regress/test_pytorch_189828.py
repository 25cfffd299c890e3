"""Shapes that nobody compared, found when kernels read past the end of what they had been given."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from tests.regress.calls import CALLS, make_arrays
from tests.regress.refusal import refused
from tools.backends import Backend

SPOILERS = {
    "short": lambda array: array[:-1],
    "long": lambda array: np.concatenate([array, array[-1:]]),
    "empty": lambda array: array[:0],
    "narrow": lambda array: array[..., :-1],
    "higher rank": lambda array: array[None],
    "lower rank": lambda array: np.array(array[0]),
}


@pytest.mark.parametrize("op", CALLS)
def test_pytorch_189828_wrong_shape_of_any_array(backend: Backend, op: str) -> None:
    """One array short, long, empty or of another rank was read or written out of bounds. 193097 and 188958 too."""
    for name, spoiler in product(CALLS[op].names, SPOILERS):
        if name == "parts":
            continue  # any number of them
        arrays = make_arrays(op)
        arrays[name] = SPOILERS[spoiler](arrays[name])
        on = {key: backend.asarray(array) for key, array in arrays.items()}
        with refused(backend, ValueError, "must|has the shape", *on.values()):
            CALLS[op].run(on)


@pytest.mark.parametrize("op", CALLS)
def test_pytorch_189831_wrong_type_of_any_array(backend: Backend, op: str) -> None:
    """A type that the kernels do not know, or not the type of the rest, must never be reinterpreted."""
    for name, dtype in product(CALLS[op].names, ("float16", "int16", "complex64", "float64")):
        if (op, name, dtype) == ("moments", "x", "float16"):
            continue  # moments of 16-bit data are float32
        arrays = make_arrays(op)
        arrays[name] = arrays[name].astype(dtype)
        on = {key: backend.asarray(array) for key, array in arrays.items()}
        with refused(backend, TypeError, "must be (float|int|bool)", *on.values()):
            CALLS[op].run(on)


@pytest.mark.parametrize("op", CALLS)
def test_pytorch_189828_gaps_in_any_array_that_must_have_none(backend: Backend, op: str) -> None:
    """A view with gaps was taken for a dense array."""
    for name in set(CALLS[op].names) - set(CALLS[op].any_strides):
        arrays = make_arrays(op)
        on = {key: backend.asarray(array) for key, array in arrays.items()}
        on[name] = backend.like(np.repeat(arrays[name], 2, axis=-1)[..., ::2])
        with refused(backend, ValueError, "contiguous", *on.values()):
            CALLS[op].run(on)


@pytest.mark.parametrize("op", CALLS)
def test_unspoilt_calls_write_every_output_and_no_input(backend: Backend, op: str) -> None:
    """The calls of the tests above are refused for their fault alone, and every array of the table takes part."""
    arrays = make_arrays(op)
    on = {name: backend.asarray(array) for name, array in arrays.items()}
    CALLS[op].run(on)
    for name in CALLS[op].reads:
        np.testing.assert_array_equal(backend.asnumpy(on[name]), arrays[name], err_msg=name)
    for name in CALLS[op].writes:
        written = backend.asnumpy(on[name])
        assert np.isfinite(written).all(), name
        assert (written != arrays[name]).any(), f"{op} left {name} as it was"
