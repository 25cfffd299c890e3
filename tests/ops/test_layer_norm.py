"""Layer norm against the formulas in extended precision, in every place, type, layout and launch.

Long because three implementations are compared with the same formulas, and each has edges of its own.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bnkernels as bn
from bnkernels.ops.layer_norm.launch import choose_backward
from bnkernels.ops.layer_norm.problem import MOST_PARTIALS, Problem
from bnkernels.runtime.seam import Limits
from tests.ops.test_batch_norm_masked import DTYPES, dtype_named
from tests.regress.refusal import refused
from tools import backends, oracle
from tools.backends import Backend
from tools.emulator import EmulatorRuntime
from tools.oracle import Extended, accumulator, unit_roundoff
from tools.oracle_layer_norm import exact

# One value; the question's layer; rows of no whole units; of a few; of more units than a warp has threads; one that
# several warps share; and row workers without a row.
SHAPES = [(1, 1), (64, 20), (5, 3), (33, 7), (9, 64), (300, 4), (6, 161), (3, 1100), (40, 256)]
H200 = Limits(132, 227 * 1024, 228 * 1024, True)


def make(rng: np.random.Generator, shape: tuple[int, int], dtype: str) -> list[np.ndarray]:
    """Return x, dy in the type, gamma and beta in that of the accumulator."""
    kind = dtype_named(dtype)
    x, dy = ((rng.standard_normal(shape) * scale + shift).astype(kind) for scale, shift in ((2, 1), (1, 0)))
    of = accumulator(x.dtype)
    return [x, dy, rng.uniform(0.5, 1.5, shape[1]).astype(of), rng.standard_normal(shape[1]).astype(of)]


def assert_right(
    backend: Backend, x: Any, dy: Any, gamma: Any, beta: Any, activation: str = "identity", eps: float = 1e-3
) -> None:
    """Check forward and backward against the formulas."""
    on_x, on_dy, *vectors = backend.arrays(x, dy, gamma, beta)
    y, statistics = bn.layer_norm_forward(on_x, *vectors, eps=eps, activation=activation)
    right, u = exact(x, dy, gamma, beta, eps, activation), unit_roundoff(x.dtype)
    oracle.assert_within(backend.asnumpy(y), right.y, right.y_bound, "y")
    mean, low, rstd = backend.asnumpy(statistics).astype(Extended)
    largest = float(np.abs(x.astype(Extended)).max())
    # The kernels keep the contract of docs/accuracy.md: 6 last places of the standard deviation.
    slack = (
        12 * u / right.rstd if not backend.is_numpy else u * largest if x.dtype == np.float64 else 4 * u * u * largest
    )
    assert (np.abs(mean + low - right.mean) <= slack).all()
    np.testing.assert_allclose(rstd, right.rstd, rtol=float(8 * u))
    grads = bn.layer_norm_backward(on_dy, on_x, *vectors, statistics, activation=activation)
    for name, got in zip(("dx", "dgamma", "dbeta"), grads, strict=True):
        oracle.assert_within(backend.asnumpy(got), getattr(right, name), getattr(right, f"{name}_bound"), name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_is_what_the_formulas_say(
    backend: Backend, rng: np.random.Generator, shape: tuple[int, int], dtype: str
) -> None:
    assert_right(backend, *make(rng, shape, dtype))


@pytest.mark.parametrize(
    "activation", ["relu", "leaky_relu", "sigmoid", "tanh", "gelu", "gelu_tanh", "silu", "elu", "identity"]
)
def test_every_activation(backend: Backend, rng: np.random.Generator, activation: str) -> None:
    assert_right(backend, *make(rng, (13, 24), "float32"), activation)
    assert_right(backend, *make(rng, (7, 9), "float16"), activation)


@pytest.mark.parametrize("given_vectors", [(False, False), (True, False), (False, True)])
def test_scale_and_shift_are_optional(
    backend: Backend, rng: np.random.Generator, given_vectors: tuple[bool, bool]
) -> None:
    x, dy, *vectors = make(rng, (10, 12), "float32")
    assert_right(backend, x, dy, *(v if here else None for v, here in zip(vectors, given_vectors, strict=True)))


@pytest.mark.parametrize("shape", [(2, 3, 8), (8,), (2, 0, 8), (0, 5)])
def test_any_leading_axes(backend: Backend, rng: np.random.Generator, shape: tuple[int, ...]) -> None:
    x, dy = rng.standard_normal((2, *shape))
    given_arrays = backend.arrays(x, dy)
    y, statistics = bn.layer_norm_forward(given_arrays[0])
    dx, dgamma, dbeta = bn.layer_norm_backward(given_arrays[1], given_arrays[0], None, None, statistics)
    assert y.shape == dx.shape == shape
    assert statistics.shape == (3, *shape[:-1])
    if x.size:
        wanted = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        np.testing.assert_allclose(backend.asnumpy(y), wanted, rtol=1e-12, atol=1e-13)
        sums = (dy * wanted).reshape(-1, shape[-1]).sum(0)
        np.testing.assert_allclose(backend.asnumpy(dgamma), sums, rtol=1e-11, atol=1e-12)
    else:
        assert not backend.asnumpy(dgamma).any()
        assert not backend.asnumpy(dbeta).any()


def test_a_mean_far_from_0_costs_no_digits(backend: Backend) -> None:
    x = (2.0**22 + np.arange(96).reshape(4, 24) % 11).astype("float32")
    assert_right(backend, x, np.cos(x), np.ones(24, "float32"), np.zeros(24, "float32"), eps=1e-5)


def test_an_outlier_costs_no_digits(backend: Backend, rng: np.random.Generator) -> None:
    """Not even where all others are seen from it."""
    x, dy, *vectors = make(rng, (3, 1000), "float32")
    x[0, 0], x[1, 500] = 1e4, -1e4
    assert_right(backend, x, dy, *vectors)


def test_a_constant_row_is_its_shift(backend: Backend) -> None:
    x, beta = np.full((3, 37), 0.1, "float32"), np.arange(37, dtype="float32")
    y, statistics = bn.layer_norm_forward(*backend.arrays(x, None, beta))
    np.testing.assert_array_equal(backend.asnumpy(y), np.tile(beta, (3, 1)))
    np.testing.assert_array_equal(backend.asnumpy(statistics)[0], x[:, 0])


def test_what_is_not_finite_stays_in_its_row(backend: Backend, rng: np.random.Generator) -> None:
    x, dy, gamma, beta = make(rng, (4, 40), "float32")
    x[1, 3], x[2, 5] = np.nan, np.inf
    on_x, on_dy, *vectors = backend.arrays(x, dy, gamma, beta)
    y, statistics = bn.layer_norm_forward(on_x, *vectors)
    dx, *_ = bn.layer_norm_backward(on_dy, on_x, *vectors, statistics)
    for array in (backend.asnumpy(y), backend.asnumpy(dx)):
        np.testing.assert_array_equal(np.isfinite(array).all(1), [True, False, False, True])
        assert np.isnan(array[1:3]).all()


def test_the_order_of_the_features_matters_only_to_roundings(backend: Backend, rng: np.random.Generator) -> None:
    x, _, gamma, beta = make(rng, (5, 48), "float64")
    order = rng.permutation(48)
    y, _ = bn.layer_norm_forward(*backend.arrays(x, gamma, beta))
    permuted, _ = bn.layer_norm_forward(*backend.arrays(x[:, order], gamma[order], beta[order]))
    np.testing.assert_allclose(backend.asnumpy(permuted), backend.asnumpy(y)[:, order], rtol=1e-13, atol=1e-14)


def test_in_place(backend: Backend, rng: np.random.Generator) -> None:
    arrays = make(rng, (20, 36), "float32")
    x, dy, *vectors = backend.arrays(*arrays)
    y, statistics = bn.layer_norm_forward(x, *vectors)
    grads = bn.layer_norm_backward(dy, x, *vectors, statistics)
    repeated = bn.layer_norm_backward(dy, x, *vectors, statistics, out=(dy, *backend.arrays(*arrays[2:])))
    for got, wanted in zip(repeated, grads, strict=True):
        np.testing.assert_array_equal(backend.asnumpy(got), backend.asnumpy(wanted))
    assert repeated[0] is dy
    bn.layer_norm_forward(x, *vectors, out=(x, statistics))
    np.testing.assert_array_equal(backend.asnumpy(x), backend.asnumpy(y))


# ---- launches -------------------------------------------------------------------------------------------------------


@pytest.mark.emulator
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_one_row_on_the_chip_while_there_is_no_room_for_two(
    emulated: EmulatorRuntime, rng: np.random.Generator, dtype: str
) -> None:
    arrays = make(rng, (5, 1000), dtype)
    shared = {"bfloat16": 41, "float32": 25, "float64": 49}[dtype] * 1024
    with emulated.device_limits(Limits(1, shared, shared + 1024, True)):
        assert choose_backward(Problem(5, 1000, arrays[0].dtype), emulated.limits(None)).stages == 1
        assert_right(backends.make("emulator"), *arrays)


@pytest.mark.emulator
def test_equal_gradients_of_many_rows_add_up(emulated: EmulatorRuntime) -> None:
    """A plain sum of the 125 rows of a worker would lose digits."""
    x = np.where(np.arange(1000)[:, None] % 2 == np.arange(512) % 2, np.float32(1), np.float32(-1))
    on_x, dy = emulated.asarray(x), emulated.asarray(np.full_like(x, 0.1))
    with emulated.device_limits(Limits(1, 227 * 1024, 228 * 1024, True)):
        dbeta = bn.layer_norm_backward(dy, on_x, None, None, bn.layer_norm_forward(on_x)[1])[2]
    exact = Extended(np.float32(0.1)) * 1000
    assert (np.abs(np.array(dbeta) - exact) <= 6 * np.finfo("float32").eps * exact).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_finite_rows_give_finite_results(backend: Backend, dtype: str) -> None:
    """Even where the distance of a number from another, or a sum of gradients, is out of range."""
    kind = dtype_named(dtype)
    most = float(ml_dtypes.finfo(kind).max)
    if backend.is_numpy and dtype == "float64":
        most /= 2  # the reference has no wider type
    row = np.where(np.arange(24) == 0, most, -most).astype(kind)
    x, dy = (np.tile(np.array([one, -one]), (2, 1)) for one in (row, np.full(24, most / 4, kind)))
    x[2:] = np.arange(24) % 3 - 1
    on_x, on_dy, beta = backend.arrays(x, dy, np.arange(24, dtype=accumulator(x.dtype)))
    y, statistics = bn.layer_norm_forward(on_x, None, beta)
    dx, *_ = bn.layer_norm_backward(on_dy, on_x, None, beta, statistics)
    np.testing.assert_array_equal(backend.asnumpy(y)[:2].astype(float), np.tile(np.arange(24.0), (2, 1)))
    mean = backend.asnumpy(statistics)[0, :2]
    np.testing.assert_allclose(mean / most, [-11 / 12, 11 / 12], rtol=1e-6)
    dx = backend.asnumpy(dx).astype(float)
    assert (dx[:2] == 0).all()
    assert (np.abs(dx[2:]) <= 1e-5 * most).all()


@pytest.mark.parametrize("shape", [(900, 24), (70, 260), (200, 512), (5000, 4)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_several_blocks_meet(backend: Backend, rng: np.random.Generator, shape: tuple[int, int], dtype: str) -> None:
    arrays = make(rng, shape, dtype)
    assert choose_backward(Problem(*shape, arrays[0].dtype), H200).launch.grid[0] > 1
    assert_right(backend, *arrays)


@pytest.mark.emulator
def test_a_device_whose_blocks_cannot_wait_has_one(emulated: EmulatorRuntime, rng: np.random.Generator) -> None:
    with emulated.device_limits(Limits(4, 227 * 1024, 228 * 1024, False)):
        assert choose_backward(Problem(900, 24, np.dtype("float32")), emulated.limits(None)).launch.grid == (1, 1, 1)
        assert_right(backends.make("emulator"), *make(rng, (900, 24), "float32"))


@pytest.mark.emulator
@pytest.mark.parametrize("shape", [(64, 20), (900, 24), (5, 4100)], ids=str)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_64_kib_of_shared_memory_on_a_multiprocessor_are_enough(
    emulated: EmulatorRuntime, rng: np.random.Generator, dtype: str, shape: tuple[int, int]
) -> None:
    """As on sm_75."""
    turing = Limits(2, 65536, 65536, True, reserved_bytes=0)
    for limits in (turing, turing._replace(reserved_bytes=1024)):
        with emulated.device_limits(limits):
            assert_right(backends.make("emulator"), *make(rng, shape, dtype))


def test_alignment_changes_no_bit(backend: Backend, rng: np.random.Generator) -> None:
    arrays = make(rng, (1024, 32), "float32")
    found = []
    for shift in (0, 1):
        moved = []
        for array in arrays:
            flat = backend.asarray(np.zeros(array.size + 4, array.dtype))
            view = flat[shift : shift + array.size].reshape(array.shape)
            view[...] = backend.asarray(array)
            moved.append(view)
        x, dy, gamma, beta = moved
        y, statistics = bn.layer_norm_forward(x, gamma, beta, activation="gelu")
        grads = bn.layer_norm_backward(dy, x, gamma, beta, statistics, activation="gelu")
        found.append([backend.asnumpy(array) for array in (y, statistics, *grads)])
    for one, two in zip(*found, strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.emulator
@pytest.mark.parametrize("shape", [(700, 40), (24, 600)])
def test_the_order_of_blocks_and_threads_changes_no_bit(
    emulated: EmulatorRuntime, rng: np.random.Generator, shape: tuple[int, int]
) -> None:
    x, dy, *vectors = (emulated.asarray(array) for array in make(rng, shape, "float32"))
    found = []
    with emulated.device_limits(Limits(2, 60 * 1024, 61 * 1024, True)):  # four blocks: ThreadSanitizer has a limit too
        for seed in range(4):
            with emulated.schedule(seed, resident=4):
                y, statistics = bn.layer_norm_forward(x, *vectors, activation="silu")
                grads = bn.layer_norm_backward(dy, x, *vectors, statistics, activation="silu")
            found.append([np.array(array) for array in (y, statistics, *grads)])
    for others in found[1:]:
        for one, two in zip(found[0], others, strict=True):
            np.testing.assert_array_equal(one, two)


@pytest.mark.emulator
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_every_byte_is_moved_once(counting_emulator: EmulatorRuntime, rng: np.random.Generator, dtype: str) -> None:
    x, dy, *vectors = (counting_emulator.asarray(array) for array in make(rng, (640, 64), dtype))
    counting_emulator.reset()
    y, statistics = bn.layer_norm_forward(x, *vectors)
    dx, *_ = bn.layer_norm_backward(dy, x, *vectors, statistics)
    forward, backward = (record.counts for record in counting_emulator.launches)
    assert forward.of(x).unique_bytes_read == x.nbytes
    assert forward.of(x).bytes_read == x.nbytes + 640 * x.itemsize  # the first number of a row twice
    for array in (x, dy):
        assert backward.of(array).bytes_read == backward.of(array).unique_bytes_read == array.nbytes
    assert forward.of(y).bytes_written == backward.of(dx).bytes_written == x.nbytes
    assert forward.total.bytes_written == y.nbytes + statistics.nbytes


@pytest.mark.emulator
def test_a_workspace_saves_the_allocation(emulated: EmulatorRuntime, rng: np.random.Generator) -> None:
    arrays = make(rng, (900, 24), "float32")
    x, dy, *vectors = (emulated.asarray(array) for array in arrays)
    _, statistics = bn.layer_norm_forward(x, *vectors)
    wanted = bn.layer_norm_backward(dy, x, *vectors, statistics)
    workspace = emulated.asarray(np.full(MOST_PARTIALS * 24, np.nan, "float32"))
    out = tuple(map(emulated.asarray, (arrays[1], *arrays[2:])))
    run = emulated.capture(lambda: bn.layer_norm_backward(dy, x, *vectors, statistics, workspace=workspace, out=out), x)
    run()
    for got, right in zip(out, wanted, strict=True):
        np.testing.assert_array_equal(np.array(got), np.array(right))


@pytest.mark.parametrize("dtype", ["float16", "float64"])
@pytest.mark.parametrize(("shape", "axes"), [((5, 4, 6), 2), ((2, 3, 4, 6), 2), ((3, 2, 4, 3), 4), ((0, 4, 6), 2)])
def test_several_axes_are_as_one(
    backend: Backend, rng: np.random.Generator, shape: tuple[int, ...], axes: int, dtype: str
) -> None:
    x, dy = rng.standard_normal((2, *shape)).astype(dtype)
    gamma, beta = rng.standard_normal((2, *shape[-axes:])).astype("float32" if dtype == "float16" else dtype)
    found = []
    for flat in (False, True):
        leading = shape[:-axes] + ((-1,) if x.size else (24,))
        shapes = (leading, leading, -1, -1) if flat else (shape, shape, shape[-axes:], shape[-axes:])
        on_x, on_dy, *vectors = backend.arrays(*map(np.reshape, (x, dy, gamma, beta), shapes))
        options = {"axes": 1 if flat else axes, "activation": "silu"}
        y, statistics = bn.layer_norm_forward(on_x, *vectors, **options)
        gradients = bn.layer_norm_backward(on_dy, on_x, *vectors, statistics, **options)
        found.append([backend.asnumpy(array) for array in (y, statistics, *gradients)])
    shapes = [array.shape for array in found[0]]
    assert shapes == [shape, (3, *shape[:-axes]), shape, shape[-axes:], shape[-axes:]]
    for array, flat_array in zip(*found, strict=True):
        np.testing.assert_array_equal(array.ravel(), flat_array.ravel())


# ---- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"x": np.zeros((4, 0), "float32")}, ValueError, "C at least 1"),
        ({"x": np.zeros((), "float32")}, ValueError, "C at least 1"),
        ({"x": np.zeros((4, 6), "int32")}, TypeError, "x must be float16"),
        ({"x": np.zeros((8, 6), "float32")[::2]}, ValueError, "x must be contiguous"),
        ({"axes": 0}, ValueError, "axes must be at least 1, got 0"),
        ({"axes": 2.0}, TypeError, "axes must be an integer, got 2.0"),
        ({"axes": 3}, ValueError, r"x must have the shape \(\.\.\., \*S\), S of 3 axes.* got \(4, 6\)"),
        ({"axes": 2}, ValueError, r"gamma must have the shape \(4, 6\), got \(6,\)"),
        ({"gamma": np.ones(5, "float32")}, ValueError, r"gamma must have the shape \(6,\)"),
        ({"beta": np.ones(6, "float64")}, TypeError, "beta must be float32"),
        ({"dy": np.zeros((4, 5), "float32")}, ValueError, r"dy must have the shape \(4, 6\)"),
        ({"statistics": np.zeros((4, 3), "float32")}, ValueError, r"statistics must have the shape \(3, 4\)"),
        ({"workspace": np.zeros(5, "float32")}, ValueError, "at least 3072 numbers"),
        ({"eps": -1.0}, ValueError, "eps must be at least 1.175e-38"),
        ({"activation": "swish"}, ValueError, "activation"),
        ({"out": 3}, TypeError, "out must be a tuple"),
    ],
)
def test_what_is_wrong_is_said(backend: Backend, changes: dict[str, Any], kind: type, message: str) -> None:
    given_values: dict[str, Any] = {
        "x": np.zeros((4, 6), "float32"),
        "dy": np.zeros((4, 6), "float32"),
        "gamma": np.ones(6, "float32"),
        "beta": np.zeros(6, "float32"),
        "statistics": np.zeros((3, 4), "float32"),
        "workspace": None,
        "eps": 1e-5,
        "axes": 1,
        "activation": "relu",
        "out": None,
    } | changes
    arrays = {name: backend.like(a) if isinstance(a, np.ndarray) else a for name, a in given_values.items()}
    x, gamma, beta = (arrays[name] for name in ("x", "gamma", "beta"))
    options = {name: arrays[name] for name in ("axes", "activation", "out")}
    with refused(backend, kind, message, x, gamma, beta):
        if not changes.keys() & {"dy", "statistics", "workspace"}:
            bn.layer_norm_forward(x, gamma, beta, eps=arrays["eps"], **options)
        bn.layer_norm_backward(
            arrays["dy"], x, gamma, beta, arrays["statistics"], workspace=arrays["workspace"], **options
        )


def test_overlapping_arrays_are_refused(backend: Backend) -> None:
    x, statistics = backend.arrays(np.zeros((4, 6), "float32"), np.zeros((3, 4), "float32"))
    with refused(backend, ValueError, "statistics overlaps", x):
        bn.layer_norm_forward(x, out=(backend.arrays(np.zeros((4, 6), "float32"))[0], x.reshape(-1)[:12].reshape(3, 4)))
    dy, other = backend.arrays(np.zeros((4, 6), "float32"), np.zeros(9, "float32"))
    with refused(backend, ValueError, "dgamma overlaps dbeta", dy):
        bn.layer_norm_backward(dy, x, None, None, statistics, out=(dy, other[:6], other[3:]))
    with refused(backend, ValueError, "dx overlaps x in memory; dx may be exactly dy", x):
        bn.layer_norm_backward(
            dy, x, None, None, statistics, out=(x, *backend.arrays(np.zeros(6, "f"), np.zeros(6, "f")))
        )


@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 300),
    dtype=st.sampled_from(DTYPES),
    activation=st.sampled_from(["identity", "relu", "gelu"]),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=25, deadline=None)
def test_any_size(rows: int, columns: int, dtype: str, activation: str, seed: int) -> None:
    assert_right(backends.make("numpy"), *make(np.random.default_rng(seed), (rows, columns), dtype), activation)
