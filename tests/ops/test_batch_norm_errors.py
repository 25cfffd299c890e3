"""Refusals of the batch-norm ops: messages say what was expected, what came and the way out, and nothing happens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import bnkernels as bn
from tests.regress.calls import CALLS, make_arrays
from tests.regress.refusal import refused
from tools import backends
from tools.backends import Backend

OPS = ("forward", "backward", "double_backward", "inference", "inference_backward")
ARRAYS = [(op, name) for op in OPS for name in CALLS[op].names]
FUNCTIONS = {
    "forward": bn.batch_norm_forward,
    "backward": bn.batch_norm_backward,
    "double_backward": bn.batch_norm_double_backward,
    "inference": bn.batch_norm_inference,
    "inference_backward": bn.batch_norm_inference_backward,
}


def on_backend(backend: Backend, op: str) -> dict[str, Any]:
    return {name: backend.asarray(array) for name, array in make_arrays(op).items()}


def call(op: str, on: dict[str, Any], **options: Any) -> Any:
    """Call an op with the arrays that it reads, or updates in place, and these options."""
    names = (*CALLS[op].reads, *(("running_mean", "running_var") if op == "forward" else ()))
    return FUNCTIONS[op](*(on[name] for name in names), **options)


@pytest.mark.emulator
@pytest.mark.parametrize("others", ["numpy", "emulator"])
@pytest.mark.parametrize("op", OPS)
def test_arrays_of_two_kinds_are_never_mixed(op: str, others: str) -> None:
    odd = {"numpy": "emulator", "emulator": "numpy"}[others]
    for name in CALLS[op].names:
        on = on_backend(backends.make(others), op)
        on[name] = backends.make(odd).asarray(make_arrays(op)[name])
        with refused(backends.make("emulator"), TypeError, r"is a .* but .* is a .*cupy\.asarray", *on.values()):
            CALLS[op].run(on)


@pytest.mark.parametrize("thing", [[[1.0, 2.0]], 3, 2.5, "text", object()], ids=lambda thing: type(thing).__name__)
@pytest.mark.parametrize("op", OPS)
def test_what_is_no_array_is_refused(backend: Backend, op: str, thing: Any) -> None:
    on, kind = on_backend(backend, op), type(thing).__name__
    for name in on:
        rest = [array for other, array in on.items() if other != name]
        message = rf"^{name}: expected a NumPy or a CuPy array, got .*{kind}.*numpy\.asarray"
        with refused(backend, TypeError, message, *rest):
            CALLS[op].run(on | {name: thing})


REQUIRED = {
    "forward": ("x",),
    "backward": ("dy", "x", "statistics"),
    "double_backward": ("dy", "x", "statistics"),
    "inference": ("x", "running_mean", "running_var"),
    "inference_backward": ("dy", "x", "running_mean", "running_var"),
}


@pytest.mark.parametrize(("op", "name"), [(op, name) for op, names in REQUIRED.items() for name in names])
def test_none_is_refused_where_an_array_must_be(backend: Backend, op: str, name: str) -> None:
    on = on_backend(backend, op)
    rest = [array for other, array in on.items() if other != name]
    on[name] = None
    with refused(backend, TypeError, f"{name} must be an array, got None", *rest):
        CALLS[op].run(on)


@pytest.mark.parametrize("dtype", ["int8", "int32", "int64", "uint8", "bool", "complex128", "longdouble"])
@pytest.mark.parametrize("op", OPS)
def test_data_types_without_a_kernel_name_the_way_out(backend: Backend, op: str, dtype: str) -> None:
    on = {name: backend.asarray(array.astype(dtype)) for name, array in make_arrays(op).items()}
    name = np.dtype(dtype).name
    way_out = r"pass x\.real" if dtype == "complex128" else r"convert it with x\.astype\('float32'\)"
    message = rf"x must be float16, bfloat16, float32 or float64, got {name}; {way_out}"
    with refused(backend, TypeError, message, *on.values()):
        CALLS[op].run(on)


@pytest.mark.parametrize("shape", [(), (6,)])
@pytest.mark.parametrize("op", OPS)
def test_an_x_of_too_few_dimensions(backend: Backend, op: str, shape: tuple[int, ...]) -> None:
    on = on_backend(backend, op)
    on["x"] = backend.asarray(np.ones(shape, np.float32))
    message = r"x must have at least two dimensions, such as \(N, C\), got the shape \("
    with refused(backend, ValueError, message, *on.values()):
        CALLS[op].run(on)


@pytest.mark.parametrize("axis", [2, -3, 10**30])
@pytest.mark.parametrize("op", OPS)
def test_an_axis_out_of_range(backend: Backend, op: str, axis: int) -> None:
    on = on_backend(backend, op)
    message = rf"axis must be from -2 to 1 for x of the shape \(6, 3\), got {axis}"
    with refused(backend, ValueError, message, *on.values()):
        call(op, on, axis=axis)


@pytest.mark.parametrize("axis", [1.0, "1", None, (1,), [1]], ids=repr)
@pytest.mark.parametrize("op", OPS)
def test_an_axis_that_is_no_integer(backend: Backend, op: str, axis: Any) -> None:
    on = on_backend(backend, op)
    call(op, on, axis=np.int64(1))
    with refused(backend, TypeError, "axis must be an integer, got ", *on.values()):
        call(op, on, axis=axis)


@pytest.mark.parametrize("op", OPS)
def test_a_residual_must_be_like_x(backend: Backend, op: str) -> None:
    on = on_backend(backend, op)
    for spoilt, error, message in (
        (np.ones((6, 1), np.float32), ValueError, r"residual must have the shape \(6, 3\), got \(6, 1\)"),
        (np.ones((6, 3), np.float64), TypeError, r"residual must be float32, got float64; convert it with residual\."),
    ):
        with refused(backend, error, message, *on.values()):
            call(op, on, residual=backend.asarray(spoilt))
    with refused(backend, TypeError, "^residual: expected a NumPy or a CuPy array, got builtins.int", *on.values()):
        call(op, on, residual=1)


@pytest.mark.parametrize("op", ["backward", "inference_backward"])
def test_out_has_a_place_for_the_gradient_of_a_residual(backend: Backend, op: str) -> None:
    on = on_backend(backend, op)
    out = on["dx"], on["dgamma"], on["dbeta"]
    residual = backend.asarray(np.ones((6, 3), np.float32))
    message = r"out must be a tuple of the 4 arrays \(dx, dgamma, dbeta, dresidual\), got "
    with refused(backend, TypeError, message, *on.values()):
        call(op, on, residual=residual, out=out)
    message = "dx overlaps dresidual in memory; dx may be exactly dy or x or residual; pass a separate array"
    with refused(backend, ValueError, message, *on.values()):
        call(op, on, residual=residual, out=(*out, on["dx"]))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    ("op", "name"), [(op, name) for op, name in ARRAYS if name in ("gamma", "dgamma", "running_var")]
)
def test_parameters_of_16_bit_data_are_float32_or_all_of_16_bits(
    backend: Backend, op: str, name: str, dtype: str
) -> None:
    pytest.importorskip("ml_dtypes")
    half = np.dtype(dtype)
    arrays = make_arrays(op)
    like_x = ("x", "dy", "y", "dx", "ddx", "ddy", "out", name)
    on = {key: backend.asarray(array.astype(half if key in like_x else "float32")) for key, array in arrays.items()}
    # gamma in 16 bits decides that beta has to be so too, except in the double backward, which takes float32 alone.
    wrong, right, got = (name, "float32", dtype)
    if name == "gamma" and op != "double_backward":
        wrong, right, got = ("dgamma" if "backward" in op else "beta", dtype, "float32")
    message = rf"{wrong} must be {right}, got {got}; convert it with {wrong}\.astype\('{right}'\)"
    with refused(backend, TypeError, message, *on.values()):
        CALLS[op].run(on)


@pytest.mark.parametrize("op", OPS)
def test_alpha_is_a_number_and_only_for_those_that_have_it(backend: Backend, op: str) -> None:
    on = on_backend(backend, op)
    for activation, alpha, error, message in (
        ("relu", 0.1, ValueError, "alpha is an option of leaky_relu and elu, not of relu; got 0.1"),
        ("elu", np.inf, ValueError, "alpha must be finite, got inf"),
        ("leaky_relu", "steep", TypeError, "alpha must be a number, got 'steep'"),
    ):
        with refused(backend, error, message, *on.values()):
            call(op, on, activation=activation, alpha=alpha)


@pytest.mark.parametrize("op", OPS)
def test_a_wrong_shape_names_both_shapes(backend: Backend, op: str) -> None:
    on = on_backend(backend, op)
    on["beta"] = backend.asarray(np.ones(4, np.float32))
    with refused(backend, ValueError, r"beta must have the shape \(3,\), got \(4,\)", *on.values()):
        CALLS[op].run(on)


@pytest.mark.parametrize("op", OPS)
def test_two_data_types_name_the_conversion(backend: Backend, op: str) -> None:
    on = on_backend(backend, op)
    on["gamma"] = backend.asarray(np.ones(3, np.float64))
    message = r"gamma must be float32, got float64; convert it with gamma\.astype\('float32'\)"
    with refused(backend, TypeError, message, *on.values()):
        CALLS[op].run(on)


@pytest.mark.parametrize(("op", "name"), [(op, name) for op in OPS for name in CALLS[op].writes])
def test_a_written_array_must_be_contiguous(backend: Backend, op: str, name: str) -> None:
    arrays = make_arrays(op)
    on = on_backend(backend, op)
    on[name] = backend.like(np.repeat(arrays[name], 2, -1)[..., ::2])
    message = rf"{name} must be contiguous in C order, got strides \(.*\); pass a contiguous array"
    with refused(backend, ValueError, message, *on.values()):
        CALLS[op].run(on)


@pytest.mark.parametrize("op", ["forward", "backward", "double_backward", "inference_backward"])
@pytest.mark.parametrize("wrong", ["list", "array", "too few", "too many", "a None"])
def test_out_must_be_a_tuple_of_all_outputs(backend: Backend, op: str, wrong: str) -> None:
    on = on_backend(backend, op)
    names = [name for name in CALLS[op].writes if not name.startswith("running")]
    out = tuple(on[name] for name in names)
    spoilt = {
        "list": list(out),
        "array": out[0],
        "too few": out[:-1],
        "too many": (*out, out[-1]),
        "a None": (None, *out[1:]),
    }[wrong]
    message = rf"out must be a tuple of the {len(names)} arrays \({', '.join(names)}\), got "
    with refused(backend, TypeError, message, *on.values()):
        call(op, on, out=spoilt)


def test_overlap_names_both_arrays_and_what_may_be(backend: Backend) -> None:
    on = on_backend(backend, "forward")
    on["running_var"] = on["running_mean"]
    message = "running_mean overlaps running_var in memory; y may be exactly x; pass a separate array"
    with refused(backend, ValueError, message, *on.values()):
        CALLS["forward"].run(on)


def test_running_statistics_overlap_without_out(backend: Backend) -> None:
    """An array updated in place must not be read elsewhere, whether or not the outputs are given."""
    on = on_backend(backend, "forward")
    on["running_var"] = on["running_mean"]
    with refused(backend, ValueError, "running_mean overlaps running_var", *on.values()):
        call("forward", on)


@pytest.mark.parametrize("bad", [-1e-9, 1.0000001, np.nan, np.inf, -np.inf, -5])
def test_momentum_out_of_range(backend: Backend, bad: float) -> None:
    on = on_backend(backend, "forward")
    with refused(backend, ValueError, "momentum must be between 0 and 1 and finite, got ", *on.values()):
        call("forward", on, momentum=bad)


@pytest.mark.parametrize("bad", [-1e-9, np.nan, np.inf, -np.inf, -1])
@pytest.mark.parametrize("op", ["forward", "inference", "inference_backward"])
def test_eps_out_of_range(backend: Backend, op: str, bad: float) -> None:
    on = on_backend(backend, op)
    message = "eps must be at least 1.175e-38, the smallest normal float32, got -" if bad < 0 else "eps must be finite"
    with refused(backend, ValueError, message if np.isfinite(bad) else "eps must be finite, got ", *on.values()):
        call(op, on, eps=bad)


@pytest.mark.parametrize("bad", [-1, 1.5, None, True], ids=repr)
def test_a_number_of_batches_that_is_none(backend: Backend, bad: Any) -> None:
    on = on_backend(backend, "forward")
    error = ValueError if bad == -1 else TypeError
    with refused(backend, error, "batches_before must be a", *on.values()):
        call("forward", on, momentum=None, batches_before=bad)


@pytest.mark.parametrize(
    ("name", "bad"),
    [("eps", None), *((name, bad) for name in ("momentum", "eps") for bad in ("0.1x", [0.1], 1j))],
    ids=repr,
)
def test_options_that_are_no_numbers(backend: Backend, name: str, bad: Any) -> None:
    on = on_backend(backend, "forward")
    with refused(backend, TypeError, f"{name} must be a number, got ", *on.values()):
        call("forward", on, **{name: bad})


@pytest.mark.parametrize("bad", ["softplus", "ReLU", "", None, 1, ["relu"]], ids=repr)
@pytest.mark.parametrize("op", OPS)
def test_unknown_activation_lists_the_known(backend: Backend, op: str, bad: Any) -> None:
    on = on_backend(backend, op)
    message = "activation must be one of identity, relu, leaky_relu, sigmoid, tanh, gelu, gelu_tanh, silu, elu; got "
    with refused(backend, ValueError, message, *on.values()):
        call(op, on, activation=bad)
