"""Relations between two results that hold without knowing the right one: no oracle takes part, so none can be wrong.

The large shapes take the cooperative kernels, on the emulator in several blocks a slice of channels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import bnkernels as bn
from bnkernels.runtime.arguments import accumulator
from tests.ops.test_batch_norm_exact_data import dtype_named, small_device
from tools.backends import Backend

SHAPES = [(70, 5), (5, 6, 3, 7), (1100, 3), (1024, 24), (4, 5, 32, 64)]  # the last two are large
LARGE = SHAPES[3:]
Arrays = dict[str, np.ndarray]


def make_arrays(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype) -> Arrays:
    """Return inputs in which nothing is symmetric, with gamma of both signs."""
    channels, acc_dtype = shape[1], accumulator(dtype)
    tensors = {name: (rng.standard_normal(shape) + 0.3).astype(dtype) for name in ("x", "dy", "residual")}
    gamma = rng.uniform(0.5, 2, channels) * rng.choice([-1, 1], channels)
    vectors = {"gamma": gamma, "beta": rng.standard_normal(channels), "mean": rng.standard_normal(channels)}
    vectors["var"] = rng.uniform(0.5, 2, channels)
    return tensors | {name: vector.astype(acc_dtype) for name, vector in vectors.items()}


def run(backend: Backend, arrays: Arrays, eps: float = 1e-5, activation: str = "relu") -> Arrays:
    """Return all that the four ops write; running statistics start at 0."""
    on = {name: backend.asarray(array) for name, array in arrays.items()}
    parameters = on["gamma"], on["beta"]
    running = backend.arrays(np.zeros_like(arrays["mean"]), np.zeros_like(arrays["var"]))
    options: dict[str, Any] = {"activation": activation, "residual": on.get("residual")}
    with small_device(backend):
        y, statistics = bn.batch_norm_forward(on["x"], *parameters, *running, unbiased=False, eps=eps, **options)
        grads = bn.batch_norm_backward(on["dy"], on["x"], *parameters, statistics, **options)
        given = *parameters, on["mean"], on["var"]
        frozen = bn.batch_norm_inference(on["x"], *given, eps=eps, **options)
        frozen_grads = bn.batch_norm_inference_backward(on["dy"], on["x"], *given, eps=eps, **options)
    gradients = ("dx", "dgamma", "dbeta", "dresidual")
    named = dict(zip(("y", "mean", "mean_low", "rstd"), (y, *statistics), strict=True))
    named |= {"running_mean": running[0], "running_var": running[1], "frozen_y": frozen}
    named |= dict(zip(gradients, grads, strict=False))
    named |= dict(zip((f"frozen_{name}" for name in gradients), frozen_grads, strict=False))
    return {name: backend.asnumpy(array) for name, array in named.items()}


def assert_same_bits(got: Arrays, want: Arrays) -> None:
    """Fail at the first array that differs."""
    assert got.keys() == want.keys()
    for name, array in want.items():
        np.testing.assert_array_equal(got[name], array, err_msg=name)


def scaled(arrays: Arrays, **factors: float) -> Arrays:
    """Return the arrays, some of them times a number, which must be exact."""
    return {name: array * array.dtype.type(factors.get(name, 1)) for name, array in arrays.items()}


@pytest.mark.parametrize(
    ("shape", "dtype"), [*((shape, "bfloat16") for shape in SHAPES if shape != LARGE[0]), (LARGE[0], "float32")]
)
def test_powers_of_two_pass_through(
    backend: Backend, rng: np.random.Generator, shape: tuple[int, ...], dtype: str
) -> None:
    """``BN(2^k x, 4^k eps)`` is ``BN(x, eps)``, and gradients are linear in dy: all bits but those of the exponents."""
    arrays, eps = make_arrays(rng, shape, dtype_named(dtype)), float(np.float32(1e-5))
    once = run(backend, arrays, eps)
    for two in (2.0**-20, 2.0**-5, 2.0**5, 2.0**20):
        of_x = {"mean": two, "mean_low": two, "rstd": 1 / two, "running_mean": two, "running_var": two**2}
        of_dy = {"dx": 8 / two, "dgamma": 8, "dbeta": 8, "dresidual": 8}
        of_dy |= {f"frozen_{name}": factor for name, factor in of_dy.items()}
        got = run(backend, scaled(arrays, x=two, mean=two, var=two**2, dy=8), eps * two**2)
        assert_same_bits(got, scaled(once, **of_x, **of_dy))


@pytest.mark.parametrize(("shape", "dtype"), [(shape, "float32") for shape in SHAPES[1:]] + [(LARGE[1], "float16")])
def test_negating_x_is_negating_gamma(
    backend: Backend, rng: np.random.Generator, shape: tuple[int, ...], dtype: str
) -> None:
    """Rounding knows no sign, so every bit is the same."""
    arrays = make_arrays(rng, shape, np.dtype(dtype))
    flips = dict.fromkeys(("mean", "mean_low", "running_mean", "dx", "dgamma", "frozen_dx", "frozen_dgamma"), -1)
    want = scaled(run(backend, scaled(arrays, gamma=-1), activation="tanh"), **flips)
    assert_same_bits(run(backend, scaled(arrays, x=-1, mean=-1), activation="tanh"), want)


def at_channels(arrays: Arrays, order: np.ndarray) -> Arrays:
    """Return the arrays with these channels."""
    return {name: array[order] if array.ndim == 1 else array[:, order] for name, array in arrays.items()}


@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_permuted_channels_give_permuted_bits(
    backend: Backend, rng: np.random.Generator, shape: tuple[int, ...]
) -> None:
    """A channel has the same bits in any place of any block."""
    arrays, order = make_arrays(rng, shape, np.dtype("float32")), rng.permutation(shape[1])
    want, got = at_channels(run(backend, arrays), order), run(backend, at_channels(arrays, order))
    if backend.name != "reference":
        assert_same_bits(got, want)
    for name, array in want.items():  # NumPy's products with ones may add in another order at the end of a row
        np.testing.assert_allclose(got[name], array, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(("spoilt", "bad"), [("x", np.inf), ("dy", np.nan), ("residual", np.nan)])
@pytest.mark.parametrize("shape", [SHAPES[1], *LARGE], ids=str)
def test_a_bad_number_stays_in_its_channel(
    backend: Backend, rng: np.random.Generator, shape: tuple[int, ...], spoilt: str, bad: float
) -> None:
    """The other channels keep their bits in all that is written; its own does not hide it."""
    arrays = make_arrays(rng, shape, np.dtype("float32"))
    arrays["gamma"][1], arrays["residual"][shape[0] // 2, 1] = 2, 100  # relu lets it pass
    clean = run(backend, arrays)
    arrays[spoilt][shape[0] // 2, 1] = bad
    got = run(backend, arrays)
    others = np.delete(np.arange(shape[1]), 1)
    assert_same_bits(at_channels(got, others), at_channels(clean, others))
    everywhere, somewhere = {
        "x": (("y", "dx", "mean", "running_var"), ("frozen_y",)),
        "dy": (("dx", "dgamma", "dbeta"), ("dresidual", "frozen_dx")),
        "residual": ((), ("y", "frozen_y")),
    }[spoilt]
    own = {name: array[1] if array.ndim == 1 else array[:, 1] for name, array in got.items()}
    assert not any(np.isfinite(own[name]).any() for name in everywhere)
    assert not any(np.isfinite(own[name]).all() for name in somewhere)


@pytest.mark.parametrize(("shape", "dtype"), [*((shape, "float32") for shape in SHAPES[1:]), (SHAPES[2], "float64")])
def test_a_shift_changes_the_mean_and_nothing_else(
    backend: Backend, rng: np.random.Generator, shape: tuple[int, ...], dtype: str
) -> None:
    """Data on a grid, so that the shift is exact: 65536 deviations cost float32 no more than a rounding or two."""
    arrays, shift = make_arrays(rng, shape, np.dtype(dtype)), {"float32": 2.0**16, "float64": 2.0**40}[dtype]
    arrays |= {name: np.round(arrays[name] * 64) / arrays[name].dtype.type(64) for name in ("x", "mean")}
    moved = arrays | {name: arrays[name] + arrays[name].dtype.type(shift) for name in ("x", "mean")}
    near, far = run(backend, arrays, activation="tanh"), run(backend, moved, activation="tanh")
    two_parts = far["mean"].astype(np.longdouble) - shift + far["mean_low"]
    u, rows = np.finfo(dtype).eps / 2, arrays["x"].size / shape[1]
    np.testing.assert_allclose(two_parts, near["mean"] + near["mean_low"].astype(np.longdouble), rtol=0, atol=8 * u)
    for name, array in near.items():
        if name in ("mean", "mean_low", "running_mean"):
            continue
        scale = (1 + np.abs(array).max()) * (np.sqrt(rows) if array.ndim == 1 else 1)
        np.testing.assert_allclose(far[name], array, rtol=0, atol=16 * u * scale, err_msg=name)


@pytest.mark.parametrize(
    ("shape", "activation"),
    [(SHAPES[1], "identity"), (SHAPES[2], "tanh"), (LARGE[0], "tanh"), (LARGE[1], "leaky_relu")],
)
def test_the_gradient_sees_neither_shift_nor_scale(
    backend: Backend, rng: np.random.Generator, shape: tuple[int, ...], activation: str
) -> None:
    """With a negligible eps, y depends on neither mean nor size of x: dx is orthogonal to ones and to x.

    Whatever follows. And the gradients of the parameters are sums of dresidual.
    """
    arrays = make_arrays(rng, shape, np.dtype("float32"))
    got = run(backend, arrays, eps=1e-30, activation=activation)
    rows = tuple(axis for axis in range(len(shape)) if axis != 1)
    along = (slice(None), *[None] * (len(shape) - 2))
    x, dx, g = (array.astype(np.float64) for array in (arrays["x"], got["dx"], got["dresidual"]))
    xhat = (x - x.mean(rows)[along]) / x.std(rows)[along]
    u = np.finfo(np.float32).eps / 2
    for direction in (np.ones_like(xhat), xhat):
        size = (np.abs(dx) * (1 + np.abs(direction))).sum(rows)
        assert (np.abs((dx * direction).sum(rows)) <= 16 * u * size).all()
    for name, terms in (("dbeta", g), ("dgamma", g * xhat)):
        assert (np.abs(terms.sum(rows) - got[name]) <= 16 * u * (np.abs(g) * (1 + np.abs(xhat))).sum(rows)).all(), name


@pytest.mark.parametrize("shape", [(64, 20), (2, 6, 8, 16)], ids=str)
def test_a_batch_repeated_has_the_same_output(
    backend: Backend, rng: np.random.Generator, shape: tuple[int, ...]
) -> None:
    """The same examples 16 times: other kernels, the same statistics, y and dx; sums are 16 times as large."""
    arrays = make_arrays(rng, shape, np.dtype("float32"))
    times = 16
    repeated = {name: np.concatenate([array] * times) if array.ndim > 1 else array for name, array in arrays.items()}
    once, often = run(backend, arrays, activation="tanh"), run(backend, repeated, activation="tanh")
    tolerance = 16 * np.finfo(np.float32).eps
    for name, array in once.items():
        if name == "mean_low":
            continue
        got = often[name].reshape(times, *array.shape) if array.ndim > 1 else often[name]
        factor = times if name.endswith(("dgamma", "dbeta")) else 1
        scale = tolerance * (1 + np.abs(array).max())
        np.testing.assert_allclose(got / factor, np.broadcast_to(array, got.shape), 0, scale, err_msg=name)


@pytest.mark.parametrize("cut", [1, 37, 512])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_statistics_of_the_parts_merge_to_those_of_the_whole(
    backend: Backend, rng: np.random.Generator, dtype: str, cut: int
) -> None:
    """Chan's formula on two parts of unequal length and mean, one of them a single example where `cut` is 1."""
    x = rng.standard_normal((1024, 32)) + np.where(np.arange(1024) < cut, 100, -3)[:, None]
    x = x.astype(dtype)

    def moments(part: np.ndarray) -> tuple[int, Any, Any]:
        """Count, mean and biased variance as the op finds them."""
        if len(part) == 1:
            return 1, part[0].astype(np.float64), 0.0
        running = backend.arrays(np.zeros(32, dtype), np.zeros(32, dtype))
        with small_device(backend):
            bn.batch_norm_forward(backend.asarray(part), None, None, *running, momentum=1.0, unbiased=False)
        return len(part), *(backend.asnumpy(array).astype(np.float64) for array in running)

    (n, mean_a, var_a), (m, mean_b, var_b), (count, mean, var) = map(moments, (x[:cut], x[cut:], x))
    assert n + m == count
    tolerance = 8 * float(np.finfo(dtype).eps)
    np.testing.assert_allclose((n * mean_a + m * mean_b) / count, mean, rtol=0, atol=tolerance * 103)
    merged = (n * var_a + m * var_b + (mean_a - mean_b) ** 2 * n * m / count) / count
    np.testing.assert_allclose(merged, var, rtol=tolerance)
