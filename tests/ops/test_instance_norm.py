"""Instance norm against the formulas in extended precision, batch norm of each example, and PyTorch."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest

import bnkernels as bn
from tests.ops.test_batch_norm_layouts import as_rows, make_tensors
from tests.ops.test_batch_norm_masked import DTYPES, dtype_named
from tests.regress.refusal import refused
from tools import oracle
from tools.backends import Backend
from tools.emulator import EmulatorRuntime

# Sequences and images, channels first and last; one example; more than one block takes; several blocks a channel.
CASES = [
    ((3, 4, 7), 1),
    ((2, 3, 5, 6), 1),
    ((2, 5, 6, 3), -1),
    ((2, 2, 3, 2, 2), 1),
    ((1, 5, 40), 1),
    ((200, 3, 6), 1),
    ((2, 4, 130, 128), 1),
    ((2, 96, 128, 8), -1),
]


def assert_right(
    backend: Backend, rng: np.random.Generator, shape: tuple[int, ...], axis: int, dtype: str, activation: str
) -> None:
    """Check forward and backward against the formulas of every example."""
    *tensors, gamma, beta = make_tensors(rng, shape, axis, dtype_named(dtype))
    x, dy, residual, *vectors = backend.arrays(*tensors, gamma, beta)
    options = {"axis": axis, "residual": residual, "activation": activation}
    y, statistics = bn.instance_norm_forward(x, *vectors, eps=1e-3, **options)
    assert statistics.shape == (shape[0], 3, shape[axis])
    dx, dgamma, dbeta, dresidual = bn.instance_norm_backward(dy, x, *vectors, statistics, **options)
    found = {name: backend.asnumpy(array) for name, array in zip(("y", "dx", "dr"), (y, dx, dresidual), strict=True)}
    of_example = axis - 1 if axis > 0 else axis
    grads = []
    for n in range(shape[0]):
        rows, dy_rows, residual_rows = (as_rows(array[n], of_example) for array in tensors)
        given = gamma, beta, 1e-3, activation
        right = oracle.forward(rows, *given, residual=residual_rows)
        grads.append(grad := oracle.backward(dy_rows, rows, *given, residual=residual_rows))
        oracle.assert_within(as_rows(found["y"][n], of_example), right.y, right.z_bound, "y")
        oracle.assert_within(as_rows(found["dx"][n], of_example), grad.dx, grad.dx_bound, "dx")
        oracle.assert_within(as_rows(found["dr"][n], of_example), grad.dresidual, grad.dresidual_bound, "dresidual")
    for name, sums in (("dgamma", dgamma), ("dbeta", dbeta)):
        bound = sum(getattr(grad, f"{name}_bound") + abs(getattr(grad, name)) * 1e-7 for grad in grads)
        oracle.assert_within(backend.asnumpy(sums), sum(getattr(grad, name) for grad in grads), bound, name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "axis"), CASES)
def test_is_what_the_formulas_say(
    backend: Backend, rng: np.random.Generator, shape: tuple[int, ...], axis: int, dtype: str
) -> None:
    assert_right(backend, rng, shape, axis, dtype, "sigmoid")


@pytest.mark.parametrize("activation", ["identity", "relu", "leaky_relu", "silu"])
def test_activations(backend: Backend, rng: np.random.Generator, activation: str) -> None:
    assert_right(backend, rng, (3, 4, 9), 1, "float32", activation)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", [(3, 4, 7), (2, 3, 5, 6), (2, 2, 3, 4, 2)])
def test_agrees_with_pytorch(
    torch: ModuleType, backend: Backend, rng: np.random.Generator, shape: tuple[int, ...], dtype: str, affine: bool
) -> None:
    x, dy = (rng.standard_normal(shape).astype(dtype) for _ in range(2))
    vectors = [rng.uniform(0.5, 1.5, shape[1]).astype(dtype) if affine else None for _ in range(2)]
    tensors = [torch.from_numpy(a.astype("float64")).requires_grad_() for a in (x, *vectors) if a is not None]
    options = {"weight": tensors[1], "bias": tensors[2]} if affine else {}
    want = torch.nn.functional.instance_norm(tensors[0], **options, eps=1e-3)
    wanted = want, *torch.autograd.grad(want, tensors, torch.from_numpy(dy.astype("float64")))
    on_x, on_dy, *on_vectors = backend.arrays(x, dy, *vectors)
    y, statistics = bn.instance_norm_forward(on_x, *on_vectors, eps=1e-3)
    grads = bn.instance_norm_backward(on_dy, on_x, *on_vectors, statistics)
    tolerance = {"float32": 1e-5, "float64": 1e-12}[dtype]
    for got, right in zip((y, *grads), wanted, strict=False):
        right = right.detach().numpy()
        np.testing.assert_allclose(backend.asnumpy(got), right, rtol=tolerance, atol=tolerance * abs(right).max())


def test_the_gradients_are_slopes(backend: Backend, rng: np.random.Generator) -> None:
    """Central differences."""
    x, dy = rng.standard_normal((2, 2, 3, 4))
    gamma, beta = rng.uniform(0.5, 1.5, (2, 3))

    def loss(arrays: list[np.ndarray]) -> float:
        y, _ = bn.instance_norm_forward(*backend.arrays(*arrays), activation="tanh")
        return float((backend.asnumpy(y) * dy).sum())

    on_x, on_dy, *vectors = backend.arrays(x, dy, gamma, beta)
    _, statistics = bn.instance_norm_forward(on_x, *vectors, activation="tanh")
    grads = bn.instance_norm_backward(on_dy, on_x, *vectors, statistics, activation="tanh")
    for number, got in enumerate(map(backend.asnumpy, grads)):
        for i in range(got.size):
            values = []
            for step in (1e-6, -1e-6):
                changed = [x.copy(), gamma.copy(), beta.copy()]
                changed[number].reshape(-1)[i] += step
                values.append(loss(changed))
            assert got.reshape(-1)[i] == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-6, abs=1e-7)


def test_is_batch_norm_of_every_example(backend: Backend, rng: np.random.Generator) -> None:
    """Bit for bit where there is one; a shift and a positive scale of a channel of an example change nothing."""
    x = backend.asarray(rng.standard_normal((1, 4, 30)))
    y, statistics = bn.instance_norm_forward(x, activation="relu")
    wanted, others = bn.batch_norm_forward(x, activation="relu")
    for got, want in ((y, wanted), (statistics[0], others)):
        np.testing.assert_array_equal(backend.asnumpy(got), backend.asnumpy(want))
    images = rng.standard_normal((3, 4, 30))
    scale, shift = rng.uniform(0.5, 2, (3, 4, 1)), rng.standard_normal((3, 4, 1))
    one, two = (bn.instance_norm_forward(backend.asarray(a), eps=1e-30)[0] for a in (images, scale * images + shift))
    np.testing.assert_allclose(backend.asnumpy(one), backend.asnumpy(two), rtol=1e-11, atol=1e-13)


def test_channels_last_is_the_same_without_a_copy(backend: Backend, rng: np.random.Generator) -> None:
    x = rng.standard_normal((3, 4, 5, 6)).astype("float32")
    last = np.ascontiguousarray(np.moveaxis(x, 1, -1))
    one = bn.instance_norm_forward(backend.asarray(x))[0]
    for axis in (-1, 3):
        two = bn.instance_norm_forward(backend.asarray(last), axis=axis)[0]
        np.testing.assert_allclose(np.moveaxis(backend.asnumpy(two), -1, 1), backend.asnumpy(one), rtol=1e-6, atol=1e-6)


def test_a_mask_leaves_positions_out(backend: Backend, rng: np.random.Generator) -> None:
    x, mask = rng.standard_normal((3, 4, 9)), np.ones((3, 9), bool)
    mask[1, 5:], mask[2, 2:] = False, False
    y, statistics = bn.instance_norm_forward(backend.asarray(x), mask=backend.asarray(mask))
    shorter, of_shorter = bn.instance_norm_forward(backend.asarray(np.ascontiguousarray(x[1:2, :, :5])))
    np.testing.assert_allclose(backend.asnumpy(y)[1, :, :5], backend.asnumpy(shorter)[0], rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(backend.asnumpy(statistics)[1], backend.asnumpy(of_shorter)[0], rtol=1e-12, atol=1e-13)
    assert not backend.asnumpy(y)[1, :, 5:].any()


def test_what_is_not_finite_stays_in_its_channel_of_its_example(backend: Backend, rng: np.random.Generator) -> None:
    x = rng.standard_normal((3, 4, 8)).astype("float32")
    x[1, 2, 3], x[2, 0, 0] = np.nan, np.inf
    y, _ = bn.instance_norm_forward(backend.asarray(x))
    wrong = np.isnan(backend.asnumpy(y)).any(2)
    assert np.argwhere(wrong).tolist() == [[1, 2], [2, 0]]


def test_16_bit_parameters_are_those_numbers_in_float32(backend: Backend, rng: np.random.Generator) -> None:
    for data in map(dtype_named, ("float16", "bfloat16")):
        x, dy = (rng.standard_normal((3, 4, 10)).astype(data) for _ in range(2))
        vectors = [rng.uniform(-2, 2, 4).astype(data) for _ in range(2)]
        found = []
        for kind in (data, np.dtype("float32")):
            on_x, on_dy, *on_vectors = backend.arrays(x, dy, *(vector.astype(kind) for vector in vectors))
            y, statistics = bn.instance_norm_forward(on_x, *on_vectors)
            grads = bn.instance_norm_backward(on_dy, on_x, *on_vectors, statistics)
            found.append([backend.asnumpy(array) for array in (y, *grads)])
        assert [array.dtype for array in found[0]] == [data] * 4
        for got, want in zip(*found, strict=True):
            np.testing.assert_array_equal(got.astype(float), want.astype(data).astype(float))


@pytest.mark.emulator
@pytest.mark.parametrize(("shape", "axis"), [((3, 20, 50), 1), ((2, 4, 130, 128), 1), ((2, 96, 128, 8), -1)])
def test_the_order_of_blocks_and_threads_changes_no_bit(
    emulated: EmulatorRuntime, rng: np.random.Generator, shape: tuple[int, ...], axis: int
) -> None:
    *tensors, gamma, beta = make_tensors(rng, shape, axis, np.dtype("float32"))
    x, dy, _, *vectors = (emulated.asarray(array) for array in (*tensors, gamma, beta))
    found = []
    for seed in range(3):
        with emulated.schedule(seed):
            y, statistics = bn.instance_norm_forward(x, *vectors, axis=axis)
            grads = bn.instance_norm_backward(dy, x, *vectors, statistics, axis=axis)
        found.append([np.array(array) for array in (y, statistics, *grads)])
    for others in found[1:]:
        for one, two in zip(found[0], others, strict=True):
            np.testing.assert_array_equal(one, two)


def test_in_place_and_replayed(backend: Backend, rng: np.random.Generator) -> None:
    x, dy = rng.standard_normal((2, 3, 4, 8))
    on_x, on_dy = backend.arrays(x, dy)
    y, statistics = bn.instance_norm_forward(on_x)
    wanted = bn.instance_norm_backward(on_dy, on_x, None, None, statistics)
    out = (on_dy, *backend.arrays(np.empty(4), np.empty(4)))
    for _ in range(3):
        on_dy[...] = backend.asarray(dy)
        assert bn.instance_norm_backward(on_dy, on_x, None, None, statistics, out=out)[0] is on_dy
        for got, want in zip(out, wanted, strict=True):
            np.testing.assert_array_equal(backend.asnumpy(got), backend.asnumpy(want))
    bn.instance_norm_forward(on_x, out=(on_x, statistics))
    np.testing.assert_array_equal(backend.asnumpy(on_x), backend.asnumpy(y))


def test_of_no_examples_there_is_nothing(backend: Backend) -> None:
    x = backend.asarray(np.zeros((0, 4, 5), "float32"))
    y, statistics = bn.instance_norm_forward(x)
    dx, dgamma, _ = bn.instance_norm_backward(x, x, None, None, statistics)
    assert (y.shape, statistics.shape, dx.shape) == ((0, 4, 5), (0, 3, 4), (0, 4, 5))
    assert not backend.asnumpy(dgamma).any()


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"x": np.zeros((4, 6), "float32")}, ValueError, r"x must have the shape \(N, C, \.\.\.\)"),
        ({"x": np.zeros((4, 6, 1), "float32")}, ValueError, "one position has no variance"),
        ({"axis": 0}, ValueError, "axis must be from 1 to 2, or from -2 to -1"),
        ({"axis": 3}, ValueError, "axis must be from 1 to 2, or from -2 to -1"),
        ({"axis": -3}, ValueError, "axis must be from 1 to 2, or from -2 to -1"),
        ({"axis": 1.0}, TypeError, "axis must be an integer"),
        ({"x": np.zeros((4, 6, 5), "int32")}, TypeError, "x must be float16"),
        ({"gamma": np.ones(5, "float32")}, ValueError, r"gamma must have the shape \(6,\)"),
        ({"dy": np.zeros((4, 6, 4), "float32")}, ValueError, "dy must have the shape"),
        ({"statistics": np.zeros((3, 6), "float32")}, ValueError, r"statistics must have the shape \(4, 3, 6\)"),
        ({"eps": 0.0}, ValueError, "eps must be at least"),
        ({"activation": "swish"}, ValueError, "activation"),
        ({"out": 3}, TypeError, "out must be a tuple"),
    ],
)
def test_what_is_wrong_is_said(backend: Backend, changes: dict[str, Any], kind: type, message: str) -> None:
    given: dict[str, Any] = {
        "x": np.zeros((4, 6, 5), "float32"),
        "dy": np.zeros((4, 6, 5), "float32"),
        "gamma": np.ones(6, "float32"),
        "statistics": np.zeros((4, 3, 6), "float32"),
        "eps": 1e-5,
        "axis": 1,
        "activation": "relu",
        "out": None,
    } | changes
    arrays = {name: backend.like(a) if isinstance(a, np.ndarray) else a for name, a in given.items()}
    x, gamma, options = arrays["x"], arrays["gamma"], {name: arrays[name] for name in ("axis", "activation", "out")}
    with refused(backend, kind, message, x, gamma):
        if not changes.keys() & {"dy", "statistics"}:
            bn.instance_norm_forward(x, gamma, eps=arrays["eps"], **options)
        bn.instance_norm_backward(arrays["dy"], x, gamma, None, arrays["statistics"], **options)
