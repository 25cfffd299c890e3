"""Messages of every op about an array of a wrong kind: containers, data types and byte order, layouts."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

import bnkernels as bn
from bnkernels.runtime import checks as check
from tests.regress.calls import EVERY, make_arrays, named, run
from tests.regress.refusal import refused
from tools import backends
from tools.backends import Backend

NUMPY = backends.make("numpy")

# ---- containers and data types --------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", EVERY)
def test_another_byte_order_is_refused(backend: Backend, op: str) -> None:
    for name in EVERY[op].names:
        if name == "mask":
            continue
        arrays = make_arrays(op)
        arrays[name] = arrays[name].astype(arrays[name].dtype.newbyteorder())
        on = {key: backend.asarray(array) for key, array in arrays.items()}
        message = rf"{named(op, name)} must be in the byte order of this machine, got >.*newbyteorder\('='\)"
        with refused(backend, TypeError, message, *on.values()):
            run(op, on)


HALVES = [op for op in EVERY if "forward" in op or op in ("inference", "moments", "normalise")]


@pytest.mark.parametrize("op", [op for op in HALVES])
def test_float16_of_another_byte_order_is_refused(backend: Backend, op: str) -> None:
    """Its name is float16, and kernels read its bytes as native."""
    like_x = ("x", "y", "z", "out", "weight", "residual")
    arrays = {key: array.astype("float16") if key in like_x else array for key, array in make_arrays(op).items()}
    on = {key: backend.asarray(array) for key, array in arrays.items()}
    run(op, on)  # native halves are taken
    on["x"] = backend.asarray(arrays["x"].astype(">f2"))
    with refused(backend, TypeError, "x must be in the byte order of this machine, got >f2", *on.values()):
        run(op, on)


@pytest.mark.parametrize("op", EVERY)
def test_masked_arrays_and_matrices_are_refused(op: str) -> None:
    """The mask was dropped without a word; a matrix multiplies in another way."""
    for name in EVERY[op].names:
        arrays = make_arrays(op)
        plain = arrays[name]
        arrays[name] = np.ma.masked_array(plain, mask=np.zeros(plain.shape, bool))
        expected = rf"^{named(op, name)}: expected a plain array, got a "
        message = f"{expected}MaskedArray, whose mask would be lost.*mask=.*filled"
        with refused(NUMPY, TypeError, message, *arrays.values()):
            run(op, arrays)
        if plain.ndim == 2:
            with pytest.warns(PendingDeprecationWarning):
                arrays[name] = np.matrix(plain)
            with refused(NUMPY, TypeError, rf"{expected}matrix; pass numpy\.asarray", *arrays.values()):
                run(op, arrays)


@pytest.mark.parametrize("op", EVERY)
def test_other_subclasses_compute_as_plain_arrays(op: str) -> None:
    arrays, plain = make_arrays(op), make_arrays(op)
    run(op, {name: array.view(np.recarray) for name, array in arrays.items()})
    run(op, plain)
    for name in EVERY[op].writes:
        np.testing.assert_array_equal(arrays[name], plain[name])


@pytest.mark.parametrize("op", EVERY)
def test_the_way_out_of_complex_numbers_keeps_them(op: str) -> None:
    """astype('float32') drops what is imaginary."""
    for name in set(EVERY[op].names) - {"mask", "indices"}:
        arrays = make_arrays(op)
        arrays[name] = arrays[name].astype("complex64")
        with pytest.raises(TypeError, match="got complex64") as caught:
            run(op, arrays)
        assert "astype('float" not in str(caught.value)


@pytest.mark.parametrize(
    "check_of", [check.floating, check.float32_or_float64, lambda a: check.like(a, (2,), np.dtype("float32"))]
)
def test_complex_numbers_are_not_converted(check_of: Callable) -> None:
    argument = check.Argument("x", np.ndarray, np.dtype("complex64"), (2,), (8,))
    with pytest.raises(TypeError, match=r"x must be .*, got complex64; pass x\.real"):
        check_of(argument)


@pytest.mark.parametrize("op", EVERY)
def test_only_of_outputs_a_silent_copy_is_the_danger(op: str) -> None:
    for name in set(EVERY[op].names) - set(EVERY[op].any_strides):
        arrays = make_arrays(op)
        arrays[name] = np.repeat(arrays[name], 2, -1)[..., ::2]
        with pytest.raises(ValueError, match=f"{named(op, name)} must be contiguous in C order, got strides") as caught:
            run(op, arrays)
        assert ("silent copy" in str(caught.value)) == (name in EVERY[op].writes)


@pytest.mark.parametrize("dtype", ["int64", "bool", "longdouble"])
@pytest.mark.parametrize("name", ["weight", "bias", "gamma", "beta", "running_mean", "running_var"])
def test_folding_takes_floating_point_alone(name: str, dtype: str) -> None:
    """Integers came back cut off."""
    arrays = {"weight": np.ones((3, 2))} | dict.fromkeys(
        ("bias", "gamma", "beta", "running_mean", "running_var"), np.ones(3)
    )
    calls = {"fold": lambda a: bn.fold_batch_norm(*a.values())}
    if name not in ("weight", "bias"):
        calls["scale"] = lambda a: bn.batch_norm_scale_shift(*list(a.values())[2:])
    for call in calls.values():
        call(arrays)
        with pytest.raises(TypeError, match=f"{name} must be float16, bfloat16, float32 or float64, got"):
            call(arrays | {name: arrays[name].astype(dtype)})
