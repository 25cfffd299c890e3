"""RMS norm against the formulas in extended precision, in every place, type and launch, and against PyTorch."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import bnkernels as bn
from bnkernels.ops.layer_norm.launch import choose_backward, choose_forward
from bnkernels.ops.layer_norm.problem import Problem
from bnkernels.runtime.seam import Limits
from tests.ops.test_batch_norm_masked import DTYPES, dtype_named
from tests.ops.test_layer_norm import H200, SHAPES, make
from tests.ops.test_layer_norm_long_rows import LONGEST, ROOMIEST, SMALL, WIDE
from tests.regress.refusal import refused
from tools import backends, oracle
from tools.backends import Backend
from tools.emulator import EmulatorRuntime
from tools.oracle import accumulator, unit_roundoff
from tools.oracle_layer_norm import exact


def assert_right(
    backend: Backend, x: Any, dy: Any, gamma: Any, activation: str = "identity", eps: float = 1e-3
) -> None:
    """Check forward and backward against the formulas."""
    on_x, on_dy, on_gamma = backend.arrays(x, dy, gamma)
    y, statistics = bn.rms_norm_forward(on_x, on_gamma, eps=eps, activation=activation)
    right, u = exact(x, dy, gamma, None, eps, activation, centred=False), unit_roundoff(x.dtype)
    oracle.assert_within(backend.asnumpy(y), right.y, right.y_bound, "y")
    assert statistics.shape == (1, len(x))
    np.testing.assert_allclose(backend.asnumpy(statistics)[0], right.rstd, rtol=float(8 * u))
    grads = bn.rms_norm_backward(on_dy, on_x, on_gamma, statistics, activation=activation)
    for name, got in zip(("dx", "dgamma"), grads, strict=True):
        oracle.assert_within(backend.asnumpy(got), getattr(right, name), getattr(right, f"{name}_bound"), name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_is_what_the_formulas_say(
    backend: Backend, rng: np.random.Generator, shape: tuple[int, int], dtype: str
) -> None:
    assert_right(backend, *make(rng, shape, dtype)[:3])


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "sigmoid", "tanh", "gelu", "silu", "elu"])
def test_every_activation(backend: Backend, rng: np.random.Generator, activation: str) -> None:
    assert_right(backend, *make(rng, (13, 24), "float32")[:3], activation)
    assert_right(backend, *make(rng, (7, 9), "bfloat16")[:3], activation)


def test_the_scale_is_optional(backend: Backend, rng: np.random.Generator) -> None:
    x, dy, *_ = make(rng, (10, 12), "float32")
    assert_right(backend, x, dy, None, "silu")


def test_the_gradients_are_slopes(backend: Backend, rng: np.random.Generator) -> None:
    """Central differences."""
    x, dy, gamma, _ = make(rng, (3, 7), "float64")

    def loss(x: np.ndarray, gamma: np.ndarray) -> float:
        y, _ = bn.rms_norm_forward(*backend.arrays(x, gamma), activation="tanh")
        return float((backend.asnumpy(y) * dy).sum())

    on_x, on_dy, on_gamma = backend.arrays(x, dy, gamma)
    _, statistics = bn.rms_norm_forward(on_x, on_gamma, activation="tanh")
    found = map(backend.asnumpy, bn.rms_norm_backward(on_dy, on_x, on_gamma, statistics, activation="tanh"))
    for number, got in enumerate(found):
        slopes = np.empty(got.size)
        for i in range(got.size):
            values = []
            for step in (1e-6, -1e-6):
                changed = [x.copy(), gamma.copy()]
                changed[number].reshape(-1)[i] += step
                values.append(loss(*changed))
            slopes[i] = (values[0] - values[1]) / 2e-6
        np.testing.assert_allclose(got.reshape(-1), slopes, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_power_of_two_cancels_out(backend: Backend, rng: np.random.Generator, dtype: str) -> None:
    """Bit for bit, if eps is scaled by its square; the gradient by `x` is divided by it."""
    x, dy, gamma, _ = make(rng, (9, 40), dtype)
    found = []
    for scale in (1, 4):
        on_x, on_dy, on_gamma = backend.arrays(x * x.dtype.type(scale), dy, gamma)
        y, statistics = bn.rms_norm_forward(on_x, on_gamma, eps=1e-3 * scale**2)
        grads = bn.rms_norm_backward(on_dy, on_x, on_gamma, statistics)
        found.append([backend.asnumpy(array).astype(float) for array in (y, statistics, *grads)])
    (y, statistics, dx, dgamma), (y4, statistics4, dx4, dgamma4) = found
    for one, four in ((y, y4), (statistics, statistics4 * 4), (dgamma, dgamma4)):
        np.testing.assert_array_equal(one, four)
    if dtype != "float16":  # its smaller gradients are rounded to multiples of the smallest number
        np.testing.assert_array_equal(dx, dx4 * 4)


def test_is_layer_norm_where_the_mean_is_0(backend: Backend, rng: np.random.Generator) -> None:
    half = rng.standard_normal((8, 30))
    x = backend.asarray(np.concatenate([half, -half], 1))
    gamma = backend.asarray(rng.uniform(0.5, 1.5, 60))
    y, statistics = bn.rms_norm_forward(x, gamma)
    wanted, others = bn.layer_norm_forward(x, gamma)
    np.testing.assert_allclose(backend.asnumpy(y), backend.asnumpy(wanted), rtol=1e-14, atol=1e-15)
    np.testing.assert_allclose(backend.asnumpy(statistics)[0], backend.asnumpy(others)[2], rtol=1e-14)


@pytest.mark.parametrize(("shape", "axes"), [((2, 3, 8), 1), ((2, 3, 8), 2), ((8,), 1), ((2, 0, 8), 1), ((0, 5), 1)])
def test_any_axes(backend: Backend, rng: np.random.Generator, shape: tuple[int, ...], axes: int) -> None:
    x, dy = rng.standard_normal((2, *shape))
    gamma = rng.uniform(0.5, 1.5, shape[-axes:])
    on_x, on_dy, on_gamma = backend.arrays(x, dy, gamma)
    y, statistics = bn.rms_norm_forward(on_x, on_gamma, axes=axes)
    dx, dgamma = bn.rms_norm_backward(on_dy, on_x, on_gamma, statistics, axes=axes)
    assert (dx.shape, dgamma.shape, statistics.shape) == (shape, gamma.shape, (1, *shape[:-axes]))
    over = tuple(range(-axes, 0))
    xhat = x / np.sqrt(np.square(x).mean(over, keepdims=True) + 1e-5)
    np.testing.assert_allclose(backend.asnumpy(y), gamma * xhat, rtol=1e-12, atol=1e-13)
    sums = (dy * xhat).sum(tuple(range(len(shape) - axes)))
    np.testing.assert_allclose(backend.asnumpy(dgamma), sums, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [20, 1100, 16_400])
def test_agrees_with_pytorch(
    torch: ModuleType, backend: Backend, rng: np.random.Generator, columns: int, dtype: str
) -> None:
    x, dy, gamma, _ = make(rng, (5, columns), dtype)
    tensors = [torch.from_numpy(array.astype("float64")).requires_grad_() for array in (x, gamma)]
    y = torch.nn.functional.rms_norm(tensors[0], (columns,), tensors[1], 1e-3)
    wanted = y, *torch.autograd.grad(y, tensors, torch.from_numpy(dy.astype("float64")))
    on_x, on_dy, on_gamma = backend.arrays(x, dy, gamma)
    y, statistics = bn.rms_norm_forward(on_x, on_gamma, eps=1e-3)
    right = exact(x, dy, gamma, None, 1e-3, centred=False)
    for name, got, want in zip(
        ("y", "dx", "dgamma"),
        (y, *bn.rms_norm_backward(on_dy, on_x, on_gamma, statistics)),
        wanted,
        strict=True,
    ):
        bound = getattr(right, f"{name}_bound") * 2  # PyTorch's float64 has its own
        oracle.assert_within(backend.asnumpy(got), want.detach().numpy().astype(oracle.Extended), bound, name)


# ---- special values -------------------------------------------------------------------------------------------------


def test_a_row_of_zeros_is_0(backend: Backend) -> None:
    x, gamma = backend.arrays(np.zeros((3, 37), "float32"), np.ones(37, "float32"))
    y, statistics = bn.rms_norm_forward(x, gamma)
    dx, dgamma = bn.rms_norm_backward(backend.asarray(np.ones((3, 37), "float32")), x, gamma, statistics)
    assert not backend.asnumpy(y).any()
    assert not backend.asnumpy(dgamma).any()
    np.testing.assert_array_equal(backend.asnumpy(dx), np.broadcast_to(backend.asnumpy(statistics).T, (3, 37)))


def test_what_is_not_finite_stays_in_its_row(backend: Backend, rng: np.random.Generator) -> None:
    x, dy, gamma, _ = make(rng, (4, 40), "float32")
    x[1, 3], x[2, 5] = np.nan, np.inf
    on_x, on_dy, on_gamma = backend.arrays(x, dy, gamma)
    y, statistics = bn.rms_norm_forward(on_x, on_gamma)
    dx, _ = bn.rms_norm_backward(on_dy, on_x, on_gamma, statistics)
    for array in (backend.asnumpy(y), backend.asnumpy(dx)):
        np.testing.assert_array_equal(np.isfinite(array).all(1), [True, False, False, True])


@pytest.mark.parametrize("columns", [24, 16_400])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_finite_rows_give_finite_results(backend: Backend, dtype: str, columns: int) -> None:
    """Even where a square, or a sum of gradients, is out of range."""
    kind = dtype_named(dtype)
    most = float(ml_dtypes.finfo(kind).max)
    x = np.where(np.arange(columns) % 2, most, -most).astype(kind)
    x = np.stack([x, (np.arange(columns) % 3 - 1).astype(kind)])
    on_x, on_dy = backend.arrays(x, np.full((2, columns), most / 4, kind))
    y, statistics = bn.rms_norm_forward(on_x)
    dx, _ = bn.rms_norm_backward(on_dy, on_x, None, statistics)
    assert not backend.asnumpy(y)[0].any()
    assert not backend.asnumpy(dx)[0].any()
    assert np.isfinite(backend.asnumpy(dx)[1].astype(float)).all()


# ---- launches -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("above", [0, 1, 16])
def test_rows_around_the_longest_of_a_block(backend: Backend, rng: np.random.Generator, dtype: str, above: int) -> None:
    kind = np.dtype(dtype_named(dtype))
    columns = LONGEST[kind.itemsize] + above
    plan = choose_forward(Problem(3, columns, kind, centred=False), H200)
    assert ("cooperative" in plan.kernel) == (above > 0)
    assert_right(backend, *make(rng, (3, columns), dtype)[:3], "relu")


@pytest.mark.emulator
@pytest.mark.parametrize(
    ("dtype", "shape", "limits"),
    [
        ("bfloat16", (7, 40_008), WIDE),  # the next rows on their way
        ("float64", (80, 2101), ROOMIEST),  # two at once, and more than a thread sums in registers
        ("float32", (2, 70_000), SMALL),  # columns that are read again
    ],
    ids=["stages", "two at once", "read again"],
)
def test_rows_of_several_blocks(
    emulated: EmulatorRuntime, rng: np.random.Generator, dtype: str, shape: tuple[int, int], limits: Limits
) -> None:
    with emulated.device_limits(limits):
        assert_right(backends.make("emulator"), *make(rng, shape, dtype)[:3])


@pytest.mark.parametrize("shape", [(900, 24), (70, 260), (5000, 4)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_several_blocks_meet(backend: Backend, rng: np.random.Generator, shape: tuple[int, int], dtype: str) -> None:
    arrays = make(rng, shape, dtype)[:3]
    assert choose_backward(Problem(*shape, arrays[0].dtype, centred=False), H200).launch.grid[0] > 1
    assert_right(backend, *arrays)


@pytest.mark.emulator
@pytest.mark.parametrize("shape", [(700, 40), (24, 600), (9, 8200)])
def test_the_order_of_blocks_and_threads_changes_no_bit(
    emulated: EmulatorRuntime, rng: np.random.Generator, shape: tuple[int, int]
) -> None:
    x, dy, gamma = (emulated.asarray(array) for array in make(rng, shape, "float32")[:3])
    found = []
    with emulated.device_limits(SMALL):  # four blocks
        for seed in range(4):
            with emulated.schedule(seed, resident=4):
                y, statistics = bn.rms_norm_forward(x, gamma, activation="silu")
                grads = bn.rms_norm_backward(dy, x, gamma, statistics, activation="silu")
            found.append([np.array(array) for array in (y, statistics, *grads)])
    for others in found[1:]:
        for one, two in zip(found[0], others, strict=True):
            np.testing.assert_array_equal(one, two)


@pytest.mark.emulator
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_every_byte_is_moved_once(counting_emulator: EmulatorRuntime, rng: np.random.Generator, dtype: str) -> None:
    x, dy, gamma = (counting_emulator.asarray(array) for array in make(rng, (640, 64), dtype)[:3])
    counting_emulator.reset()
    y, statistics = bn.rms_norm_forward(x, gamma)
    dx, dgamma = bn.rms_norm_backward(dy, x, gamma, statistics)
    forward, backward = (record.counts for record in counting_emulator.launches)
    for counts, array in ((forward, x), (backward, x), (backward, dy)):
        assert counts.of(array).bytes_read == counts.of(array).unique_bytes_read == array.nbytes
    assert forward.total.bytes_written == y.nbytes + statistics.nbytes == x.nbytes + 640 * 4
    assert backward.of(dx).bytes_written == x.nbytes
    assert backward.of(dgamma).bytes_written == dgamma.nbytes


def test_16_bit_parameters_are_those_numbers_in_float32(backend: Backend, rng: np.random.Generator) -> None:
    for dtype, shape in (("float16", (70, 64)), ("bfloat16", (7, 20)), ("float16", (2, 40_000))):
        data = dtype_named(dtype)
        x, dy = (rng.standard_normal(shape).astype(data) for _ in range(2))
        gamma = rng.uniform(-2, 2, shape[1]).astype(data)
        found = []
        for one in (gamma, gamma.astype("float32")):
            on_x, on_dy, on_gamma = backend.arrays(x, dy, one)
            y, statistics = bn.rms_norm_forward(on_x, on_gamma)
            grads = bn.rms_norm_backward(on_dy, on_x, on_gamma, statistics)
            found.append([backend.asnumpy(array) for array in (y, *grads)])
        assert [array.dtype for array in found[0]] == [data] * 3
        for got, want in zip(*found, strict=True):
            np.testing.assert_array_equal(got.astype(float), want.astype(data).astype(float))


# ---- arguments ------------------------------------------------------------------------------------------------------


def test_in_place(backend: Backend, rng: np.random.Generator) -> None:
    arrays = make(rng, (20, 36), "float32")[:3]
    x, dy, gamma = backend.arrays(*arrays)
    y, statistics = bn.rms_norm_forward(x, gamma)
    wanted = bn.rms_norm_backward(dy, x, gamma, statistics)
    repeated = bn.rms_norm_backward(dy, x, gamma, statistics, out=(dy, *backend.arrays(arrays[2])))
    for got, want in zip(repeated, wanted, strict=True):
        np.testing.assert_array_equal(backend.asnumpy(got), backend.asnumpy(want))
    bn.rms_norm_forward(x, gamma, out=(x, statistics))
    np.testing.assert_array_equal(backend.asnumpy(x), backend.asnumpy(y))


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"x": np.zeros((4, 0), "float32")}, ValueError, "C at least 1"),
        ({"x": np.zeros((4, 6), "int32")}, TypeError, "x must be float16"),
        ({"axes": 2}, ValueError, r"gamma must have the shape \(4, 6\), got \(6,\)"),
        ({"gamma": np.ones(6, "float64")}, TypeError, "gamma must be float32"),
        ({"dy": np.zeros((4, 5), "float32")}, ValueError, r"dy must have the shape \(4, 6\)"),
        ({"statistics": np.zeros((3, 4), "float32")}, ValueError, r"statistics must have the shape \(1, 4\)"),
        ({"workspace": np.zeros(5, "float32")}, ValueError, "at least 3072 numbers"),
        ({"eps": 0.0}, ValueError, "eps must be at least 1.175e-38"),
        ({"activation": "swish"}, ValueError, "activation"),
        ({"out": (np.zeros((4, 6), "float32"),) * 3}, TypeError, "out must be a tuple of the 2 arrays"),
    ],
)
def test_what_is_wrong_is_said(backend: Backend, changes: dict[str, Any], kind: type, message: str) -> None:
    given: dict[str, Any] = {
        "x": np.zeros((4, 6), "float32"),
        "dy": np.zeros((4, 6), "float32"),
        "gamma": np.ones(6, "float32"),
        "statistics": np.zeros((1, 4), "float32"),
        "workspace": None,
        "eps": 1e-5,
        "axes": 1,
        "activation": "relu",
        "out": None,
    } | changes
    arrays = {name: backend.like(a) if isinstance(a, np.ndarray) else a for name, a in given.items()}
    x, gamma = arrays["x"], arrays["gamma"]
    options = {name: arrays[name] for name in ("axes", "activation", "out")}
    with refused(backend, kind, message, x, gamma):
        if not changes.keys() & {"dy", "statistics", "workspace"}:
            bn.rms_norm_forward(x, gamma, eps=arrays["eps"], **options)
        saved = arrays["statistics"]
        bn.rms_norm_backward(arrays["dy"], x, gamma, saved, workspace=arrays["workspace"], **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 20, 128, 129, 1030, 8193])
def test_compiled_rows_of_any_length(rng: np.random.Generator, columns: int, dtype: str) -> None:
    with backends.entered("compiled") as backend:
        assert_right(backend, *make(rng, (11, columns), dtype)[:3], "relu")


def test_gamma_has_the_type_of_the_accumulator(backend: Backend) -> None:
    x = backend.asarray(np.ones((2, 3), "float16"))
    _, statistics = bn.rms_norm_forward(x)
    _, dgamma = bn.rms_norm_backward(x, x, None, statistics)
    assert dgamma.dtype == statistics.dtype == accumulator(np.dtype("float16"))
