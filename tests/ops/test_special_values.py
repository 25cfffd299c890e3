"""Legal numbers at the edges of their types, in every op: the values that are promised, and no warning.

Warnings are errors in this suite, so that a NumPy path that warns of what is right and documented fails here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import bnkernels as bn
from bnkernels.nn.mlp import MLP
from bnkernels.ops.activations import ACTIVATIONS
from bnkernels.runtime.arguments import accumulator
from tests.ops.test_batch_norm_exact_data import dtype_named
from tools.backends import Backend

DTYPES = ["float16", "bfloat16", "float32", "float64"]
ROWS, CHANNELS, SPOILT = 8, 5, 1
OTHERS = [0, 2, 3, 4]
EPS = 1e-3
BETA = np.array([0.5, -0.25, 0, 2, 1])
SIGNS = np.array([1, -1] * (ROWS // 2))


def special(kind: str, dtype: np.dtype) -> np.ndarray:
    """Return the values of a channel; none that makes a sum overflow."""
    numbers = np.finfo(accumulator(dtype)) if dtype.itemsize > 2 else ml_finfo(dtype)
    column = {
        "NaN": np.linspace(0, 1, ROWS),
        "infinity": np.linspace(0, 1, ROWS),
        "minus infinity": np.linspace(0, 1, ROWS),
        "large and equal": np.full(ROWS, float(numbers.max) / 64),
        "large and small": SIGNS * float(numbers.max) / 64,
        "subnormal": SIGNS * float(numbers.smallest_subnormal) * 3,
        "zero": np.zeros(ROWS),
    }[kind]
    if kind in BAD:
        column[2] = BAD[kind]
    return column.astype(dtype)


def ml_finfo(dtype: np.dtype) -> Any:
    """Return the limits of a type of 16 bits."""
    return np.finfo(dtype) if dtype == np.float16 else pytest.importorskip("ml_dtypes").finfo(dtype)


BAD = {"NaN": np.nan, "infinity": np.inf, "minus infinity": -np.inf}
KINDS = [*BAD, "large and equal", "large and small", "subnormal", "zero"]
Results = dict[str, np.ndarray]


def arguments(backend: Backend, dtype: np.dtype) -> tuple[Any, Any, Any, Any, Any]:
    """Return gamma, beta, dy, and running statistics."""
    acc_dtype = accumulator(dtype)
    dy = (np.arange(ROWS * CHANNELS).reshape(ROWS, CHANNELS) % 7 - 2.5).astype(dtype)
    vectors = (np.full(CHANNELS, 2.0), BETA, np.zeros(CHANNELS), np.ones(CHANNELS))
    gamma, beta, mean, var = backend.arrays(*(vector.astype(acc_dtype) for vector in vectors))
    return gamma, beta, backend.asarray(dy), mean, var


def named(*arrays: Any) -> Results:
    """Return a y and the gradients behind it."""
    return dict(zip(("y", "dx", "dgamma", "dbeta"), arrays, strict=False))


def training(backend: Backend, x: np.ndarray, **options: Any) -> Results:
    gamma, beta, dy, *running = arguments(backend, x.dtype)
    on_x = backend.asarray(x)
    y, statistics = bn.batch_norm_forward(on_x, gamma, beta, *running, eps=EPS, **options)
    options.pop("renorm", None)
    return named(y, *bn.batch_norm_backward(dy, on_x, gamma, beta, statistics, **options))


def masked(backend: Backend, x: np.ndarray, **options: Any) -> Results:
    return training(backend, x, mask=backend.asarray(np.ones(ROWS, bool)), **options)


def in_parts(backend: Backend, x: np.ndarray, **options: Any) -> Results:
    gamma, beta, dy, *running = arguments(backend, x.dtype)
    given = dy, backend.asarray(x), gamma, beta
    moments = np.stack([backend.asnumpy(bn.batch_norm_moments(backend.asarray(x[i : i + 4]))) for i in (0, 4)])
    statistics, _ = bn.batch_norm_statistics(backend.asarray(moments), *running, eps=EPS)
    y = bn.batch_norm_normalise(*given[1:], statistics, **options)
    sums = bn.batch_norm_gradient_sums(*given, statistics, **options)
    dx = bn.batch_norm_input_gradient(*given, statistics, sums, **options)[0]
    return named(y, dx, sums[1], sums[0])


def twice(backend: Backend, x: np.ndarray, **options: Any) -> Results:
    gamma, beta, dy, *_ = arguments(backend, x.dtype)
    on_x = backend.asarray(x)
    y, statistics = bn.batch_norm_forward(on_x, gamma, beta, eps=EPS, **options)
    given = dy, None, None, dy, on_x, gamma, beta, statistics
    return named(y, *bn.batch_norm_double_backward(*given, **options)[1:])


def layer(backend: Backend, x: np.ndarray, **options: Any) -> Results:
    """Layer norm of the columns of x, each of which is an example."""
    acc_dtype = accumulator(x.dtype)
    dy = backend.asarray((np.arange(x.size).reshape(x.T.shape) % 7 - 2.5).astype(x.dtype))
    gamma, beta = backend.arrays(np.full(ROWS, 2, acc_dtype), np.full(ROWS, 0.5, acc_dtype))
    on_x = backend.asarray(x.T)
    y, statistics = bn.layer_norm_forward(on_x, gamma, beta, eps=EPS, **options)
    dx, *_ = bn.layer_norm_backward(dy, on_x, gamma, beta, statistics, **options)
    return named(backend.asnumpy(y).T, backend.asnumpy(dx).T)


def linear(backend: Backend, x: np.ndarray, **options: Any) -> Results:
    """Normalise x times 1, channel by channel, so that a bad number stays in its product."""
    gamma, beta, dy, *running = arguments(backend, x.dtype)
    found = []
    for c in range(CHANNELS):
        one = slice(c, c + 1)
        on_x, on_dy = backend.asarray(x[:, one]), backend.asarray(backend.asnumpy(dy)[:, one])
        own = [backend.asarray(backend.asnumpy(vector)[one]) for vector in (gamma, beta, *running)]
        weight = backend.asarray(np.ones((1, 1), x.dtype))
        y, z, statistics = bn.linear_batch_norm_forward(on_x, weight, *own, eps=EPS, **options)
        grads = bn.linear_batch_norm_backward(on_dy, on_x, weight, *own[:2], z, statistics, **options)
        found.append([backend.asnumpy(array) for array in (y, grads[0], *grads[2:])])
    return named(*(np.concatenate(arrays, arrays[0].ndim - 1) for arrays in zip(*found, strict=True)))


FAMILIES: dict[str, Callable[..., Results]] = {
    "batch norm": training,
    "renormalised": lambda *given, **options: training(*given, renorm=(3.0, 5.0), **options),
    "masked": masked,
    "in parts": in_parts,
    "double backward": twice,
    "layer norm": layer,
    "linear": linear,
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["identity", "gelu"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_special_channel(
    backend: Backend, rng: np.random.Generator, family: str, activation: str, dtype: str
) -> None:
    """The others keep their bits; a NaN fills its own; one whose variance is 0 or out of range is phi(beta)."""
    x = rng.standard_normal((ROWS, CHANNELS)).astype(dtype_named(dtype))
    clean = FAMILIES[family](backend, x, activation=activation)
    for kind in KINDS:
        assert_the_others_keep_their_bits(backend, x, clean, family, kind, activation)


def assert_the_others_keep_their_bits(
    backend: Backend, x: np.ndarray, clean: Results, family: str, kind: str, activation: str
) -> None:
    """Compare the results with a special channel in `x` with those without."""
    data = x.dtype
    x[:, SPOILT] = special(kind, data)
    found = FAMILIES[family](backend, x, activation=activation)
    for name, array in found.items():
        got, want = (backend.asnumpy(one)[..., OTHERS] for one in (array, clean[name]))
        np.testing.assert_array_equal(got, want, err_msg=name)
    own = {name: backend.asnumpy(array)[..., SPOILT].astype(np.float64) for name, array in found.items()}
    if kind in BAD:
        assert np.isnan(own["y"]).all()
        assert np.isnan(own["dx"]).all()
        return
    assert all(np.isfinite(array).all() for array in own.values())
    beta = np.array([[0.5 if family == "layer norm" else BETA[SPOILT]]])
    zeros = accumulator(data).type(0).reshape(1, 1)
    phi_of_beta = alone(backend, zeros.astype(data), beta, activation)[0, 0]
    if kind == "large and small" and data == np.float16:
        return  # the squares are within float32
    if family == "renormalised":
        return  # which shifts by the running statistics
    np.testing.assert_allclose(own["y"], phi_of_beta, rtol=0, atol=1e-7 if kind == "subnormal" else 0)
    if kind == "large and small":
        np.testing.assert_array_equal(own["dx"], 0)


def alone(backend: Backend, x: np.ndarray, beta: np.ndarray, activation: str) -> np.ndarray:
    """Return phi(beta), which an inference without a mean gives."""
    acc_dtype = accumulator(x.dtype)
    vectors = backend.arrays(beta[0].astype(acc_dtype), *(np.full(x.shape[1], value, acc_dtype) for value in (0, 1)))
    y = bn.batch_norm_inference(backend.asarray(x), None, *vectors, eps=EPS, activation=activation)
    return backend.asnumpy(y).astype(np.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4096, 8), (4, 8, 64), (64, 8, 64)], ids=str)
def test_layouts_and_sizes_of_other_kernels(
    backend: Backend, rng: np.random.Generator, shape: tuple[int, ...], dtype: str
) -> None:
    """Matrices that NumPy works on in blocks, and channels in the middle: each kind in a channel of its own."""
    data = dtype_named(dtype)
    x = rng.standard_normal(shape)
    moved = np.moveaxis(x, 1, 0)
    for channel, kind in enumerate(KINDS):
        own = special(kind, data).astype(np.float64) / (4096 if kind.startswith("large") and dtype != "float16" else 1)
        moved[channel] = np.resize(own, moved[channel].shape)
    x = x.astype(data)
    beta = np.linspace(-1, 1, 8)
    gamma, on_beta, *running = backend.arrays(*(v.astype(accumulator(data)) for v in (beta, beta, 0 * beta, beta**2)))
    on_x, dy = backend.arrays(x, np.ones(shape, data))
    y, statistics = bn.batch_norm_forward(on_x, gamma, on_beta, *running)
    dx, *_ = bn.batch_norm_backward(dy, on_x, gamma, on_beta, statistics, activation="sigmoid")
    y, dx = (np.moveaxis(backend.asnumpy(array).astype(np.float64), 1, 0) for array in (y, dx))
    assert np.isnan(y[: len(BAD)]).all()
    assert np.isnan(dx[: len(BAD)]).all()
    assert np.isfinite(y[len(BAD) :]).all()
    assert np.isfinite(dx[len(BAD) :]).all()
    for channel in (3, 6) if dtype == "float16" else (3, 4, 6):
        np.testing.assert_array_equal(y[channel], beta.astype(accumulator(data)).astype(data)[channel].astype(float))


@pytest.mark.parametrize("dtype", DTYPES)
def test_running_statistics_at_the_edges(backend: Backend, dtype: str) -> None:
    """Inference with a variance of 0, infinity and NaN, a mean beyond 16 bits; no example changes another."""
    data = dtype_named(dtype)
    acc_dtype = accumulator(data)
    mean = np.array([1, 1, 1, 1e5, np.inf, 0], acc_dtype)
    var = np.array([0, np.inf, np.nan, 1, 1, np.finfo(acc_dtype).max], acc_dtype)
    x = np.ones((3, 6), data)
    gamma, beta, on_mean, on_var = backend.arrays(np.full(6, 2, acc_dtype), np.full(6, 0.5, acc_dtype), mean, var)
    on_x, dy = backend.arrays(x, x)
    y = backend.asnumpy(bn.batch_norm_inference(on_x, gamma, beta, on_mean, on_var, eps=EPS)).astype(np.float64)
    wanted = [0.5, 0.5, np.nan, 0.5 - 2 * 99999 / np.sqrt(1.001), -np.inf, 0.5]
    if dtype == "float16":
        wanted[3] = -np.inf
    np.testing.assert_allclose(y, np.broadcast_to(wanted, (3, 6)), rtol=2 * STEPS[dtype])
    dx, dgamma, dbeta = bn.batch_norm_inference_backward(dy, on_x, gamma, beta, on_mean, on_var, eps=EPS)
    dx = backend.asnumpy(dx).astype(np.float64)
    wanted = [2 / np.sqrt(EPS), 0, np.nan, 2 / np.sqrt(1.001), 2 / np.sqrt(1.001), 2 / np.sqrt(float(var[5]))]
    np.testing.assert_allclose(
        dx, np.broadcast_to(wanted, (3, 6)), rtol=2 * STEPS[dtype], atol=6e-8 if dtype == "float16" else 0
    )
    np.testing.assert_array_equal(backend.asnumpy(dbeta), 3)
    assert np.isfinite(backend.asnumpy(dgamma)[[0, 1, 3, 5]]).all()


STEPS = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23, "float64": 2.0**-52}
LIMITS = {  # limits of phi at -large, -tiny, 0, tiny, large; "large" is the number itself
    "identity": (-1, 0, 0, 0, 1),
    "relu": (0, 0, 0, 0, 1),
    "leaky_relu": (-0.01, 0, 0, 0, 1),
    "sigmoid": (None, 0.5, 0.5, 0.5, None),
    "tanh": (None, 0, 0, 0, None),
    "gelu": (0, 0, 0, 0, 1),
    "gelu_tanh": (0, 0, 0, 0, 1),
    "silu": (0, 0, 0, 0, 1),
    "elu": (None, 0, 0, 0, 1),
}
BOUNDED = {"sigmoid": (0, 1), "tanh": (-1, 1), "elu": (-1, np.nan)}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_at_the_edges(backend: Backend, activation: str, dtype: str) -> None:
    """Neither the largest numbers nor the smallest overflow on their way, forward, backward and twice backward."""
    limits = np.finfo(dtype)
    large, tiny = float(limits.max), float(limits.tiny)
    z = np.array([[-large, -tiny, 0, tiny, large]], dtype)
    mean, var = np.zeros(5, dtype), np.full(5, 1 - 2.0**-10, dtype)
    on_z, on_mean, on_var = backend.arrays(z, mean, var)
    options: dict[str, Any] = {"activation": activation, "eps": 2.0**-10}
    y = backend.asnumpy(bn.batch_norm_inference(on_z, None, None, on_mean, on_var, **options))[0]
    factors = LIMITS[activation]
    wanted = [BOUNDED[activation][i > 2] if f is None else f for i, f in enumerate(factors)]
    for i in (0, 4):
        if factors[i] is not None:
            wanted[i] *= large
    np.testing.assert_allclose(y, wanted, rtol=1e-6, atol=4 * tiny)
    dy = backend.asarray(np.ones((1, 5), dtype))
    dx, *_ = bn.batch_norm_inference_backward(dy, on_z, None, None, on_mean, on_var, **options)
    slopes = backend.asnumpy(dx)[0]
    assert np.isfinite(slopes).all()
    assert slopes[4] == (0 if activation in ("sigmoid", "tanh") else 1)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_logits_at_the_edges(backend: Backend, dtype: str) -> None:
    """The largest logits there are, equal ones, minus infinity beside finite ones, and what makes a row NaN."""
    most, inf, nan = float(np.finfo(dtype).max), np.inf, np.nan
    rows = [[most, most, most], [most, 0, -most / 2], [0, 1, -inf], [nan, 0, 0], [inf, 0, 0], [-inf, -inf, -inf]]
    logits, labels = np.array(rows, dtype), np.zeros(6, np.int32)
    loss, dlogits = (backend.asnumpy(a) for a in bn.softmax_cross_entropy(*backend.arrays(logits, labels)))
    np.testing.assert_allclose(loss[:3], [np.log(3), 0, np.log1p(np.e)], rtol=1e-6)
    assert np.isnan(loss[3:]).all()
    assert np.isfinite(dlogits[:3]).all()
    assert np.isnan(dlogits[3:]).all()
    np.testing.assert_allclose(dlogits[:3].sum(1), 0, atol=1e-7)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("norm", ["batch", "layer", "none"])
def test_a_network_that_diverges(backend: Backend, norm: str, dtype: str) -> None:
    """Layer by layer and in one call: examples and rates so large that parameters and losses leave the type."""
    large = float(np.finfo(dtype).max)
    x = np.tile(np.array([[1, -1, 0.5], [-1, 1, 0.25]], dtype) * (large / 256), (8, 1))
    x[0, 0] = large if norm == "none" else np.inf  # a norm makes of what is only large a number again
    y = (np.arange(16) % 2).astype(np.int32)
    for optimizer, states in (("sgd", 0), ("momentum", 1), ("adam", 2)):
        model = MLP((3, 4, 2), norm=norm, dtype=dtype)
        on_x, on_y, parameters, *state = backend.arrays(x, y, *[model.parameters] * (1 + states))
        running = backend.asarray(model.running) if model.running.size else None
        given = model.fused, parameters, tuple(state), running, on_x, on_y
        losses = bn.fused_training(*given, batch=4, optimizer=optimizer, lr=large / 64)
        assert not np.isfinite(backend.asnumpy(losses)[-1])
    if backend.is_numpy:
        model.parameters[:] = large
        logits = model.forward(x, training=True)
        model.backward(bn.softmax_cross_entropy(logits, y)[1])
        assert np.isnan(model.gradients).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_product_beyond_the_type(backend: Backend, dtype: str) -> None:
    """A linear layer without a norm gives infinity, and NaN where infinities of both signs meet."""
    data = dtype_named(dtype)
    most = float(ml_finfo(data).max if data.itemsize == 2 else np.finfo(data).max)
    x = np.array([[most, 1], [-most, 1], [0, 1]], data)
    weight = np.array([[most, 0], [0, 1]], data)
    y, z, _ = bn.linear_batch_norm_forward(*backend.arrays(x, weight), norm=None)
    np.testing.assert_array_equal(backend.asnumpy(y).astype(float), [[np.inf, 1], [-np.inf, 1], [0, 1]])
    grads = bn.linear_batch_norm_backward(*backend.arrays(x, x, weight), None, None, z, None, norm=None)
    dx, dweight = (backend.asnumpy(grad).astype(float) for grad in grads[:2])
    np.testing.assert_array_equal(dx, [[np.inf, 1], [-np.inf, 1], [0, 1]])
    np.testing.assert_array_equal(dweight, [[np.inf, 0], [0, 3]])


def test_a_folded_layer_beyond_16_bits() -> None:
    """A number that is too large becomes infinity, as everywhere."""
    weight, bias = np.full((1, 2), 60000, np.float16), np.zeros(1, np.float16)
    one = np.ones(1, np.float32)
    folded, moved = bn.fold_batch_norm(weight, bias, one * 1e30, None, one * 1e30, one)
    np.testing.assert_array_equal(folded, np.inf)
    np.testing.assert_array_equal(moved, -np.inf)
    scale, shift = bn.batch_norm_scale_shift(None, None, one * np.float32(np.inf), one * 0)
    assert (np.isfinite(scale).all(), shift[0]) == (True, -np.inf)
