"""Linear layer, layer norm and activation in one: the product against exact sums, the rest against its layer norm."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import bnkernels as bn
from bnkernels.ops.linear_batch_norm.launch import choose
from bnkernels.ops.linear_batch_norm.problem import Problem
from bnkernels.runtime.seam import Limits
from tests.ops.test_batch_norm_masked import DTYPES
from tests.ops.test_linear_batch_norm import H200, SIZES, assert_product, make
from tests.regress.refusal import refused
from tools import backends, oracle
from tools.backends import Backend
from tools.emulator import EmulatorRuntime
from tools.oracle import Extended
from tools.oracle_layer_norm import exact

LAYER: dict[str, Any] = {"norm": "layer"}


@pytest.mark.parametrize(
    ("sizes", "dtype", "activation"),
    [(sizes, "float32", "relu") for sizes in (*SIZES, (1, 5, 3), (20, 7, 300))]
    + [(sizes, dtype, "tanh") for sizes in SIZES[::3] for dtype in ("float16", "bfloat16", "float64")],
)
def test_is_a_product_and_its_layer_norm(
    backend: Backend, rng: np.random.Generator, sizes: tuple[int, int, int], dtype: str, activation: str
) -> None:
    x, weight, dy, gamma, beta = arrays = make(rng, sizes, dtype)
    on_x, on_weight, on_dy, *vectors = backend.arrays(*arrays)
    options = LAYER | {"activation": activation}
    y, z, statistics = bn.linear_batch_norm_forward(on_x, on_weight, *vectors, eps=1e-3, **options)
    host_z = backend.asnumpy(z)
    assert_product(host_z, x, weight, "z")
    right = exact(host_z, dy, gamma, beta, 1e-3, activation)
    oracle.assert_within(backend.asnumpy(y), right.y, right.y_bound, "y")
    mean, low, rstd = backend.asnumpy(statistics).astype(Extended)
    np.testing.assert_allclose(mean + low, right.mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(rstd, right.rstd, rtol=1e-5)

    grads = bn.linear_batch_norm_backward(on_dy, on_x, on_weight, *vectors, z, statistics, **options)
    dx, dweight, dgamma, dbeta = map(backend.asnumpy, grads)
    oracle.assert_within(dgamma, right.dgamma, right.dgamma_bound, "dgamma")
    oracle.assert_within(dbeta, right.dbeta, right.dbeta_bound, "dbeta")
    rounded = oracle.STORED.get(x.dtype.name, (0, 0))
    dz_bound = right.dx_bound + rounded[0] * (np.abs(right.dx) + right.dx_bound) + rounded[1]
    assert_product(dweight, x.T, right.dx, "dweight", b_bound=dz_bound)
    assert_product(dx, right.dx, weight.T, "dx", a_bound=dz_bound)


@pytest.mark.parametrize("sizes", [(6, 2, 1100), (600, 3, 4)])
def test_beyond_the_chip_it_is_a_product_and_layer_norm(
    backend: Backend, rng: np.random.Generator, sizes: tuple[int, int, int]
) -> None:
    assert choose("forward", Problem(*sizes, np.dtype("float32")), H200, norm="layer") is None
    if backend.name == "emulator":
        pytest.skip("the emulator has no library of products")
    arrays = make(rng, sizes, "float32")
    on_x, on_weight, on_dy, *vectors = backend.arrays(*arrays)
    y, z, statistics = bn.linear_batch_norm_forward(on_x, on_weight, *vectors, **LAYER)
    right = exact(backend.asnumpy(z), *arrays[2:], 1e-5)
    oracle.assert_within(backend.asnumpy(y), right.y, right.y_bound, "y")
    _, _, dgamma, _ = bn.linear_batch_norm_backward(on_dy, on_x, on_weight, *vectors, z, statistics, **LAYER)
    oracle.assert_within(backend.asnumpy(dgamma), right.dgamma, right.dgamma_bound, "dgamma")


def test_without_what_is_optional(backend: Backend, rng: np.random.Generator) -> None:
    x, weight, dy, *_ = backend.arrays(*make(rng, (40, 9, 30), "float32"))
    y, z, statistics = bn.linear_batch_norm_forward(x, weight, **LAYER)
    right = exact(backend.asnumpy(z), backend.asnumpy(dy), None, None, 1e-5)
    oracle.assert_within(backend.asnumpy(y), right.y, right.y_bound, "y")
    grads = bn.linear_batch_norm_backward(dy, x, weight, None, None, z, statistics, **LAYER)
    repeated = bn.linear_batch_norm_backward(dy, x, weight, None, None, z, statistics, **LAYER, input_gradient=False)
    assert repeated[0] is None
    for got, wanted in zip(repeated[1:], grads[1:], strict=True):
        np.testing.assert_array_equal(backend.asnumpy(got), backend.asnumpy(wanted))


def test_a_nan_stays_in_its_example(backend: Backend, rng: np.random.Generator) -> None:
    x, weight, dy, gamma, beta = make(rng, (20, 7, 9), "float32")
    x[3, 2] = np.nan
    given = backend.arrays(x, weight, gamma, beta)
    y, z, statistics = bn.linear_batch_norm_forward(*given, **LAYER)
    finite = np.isfinite(backend.asnumpy(y)).all(1)
    assert finite.tolist() == [n != 3 for n in range(20)]
    dx, *_ = bn.linear_batch_norm_backward(*backend.arrays(dy), *given, z, statistics, **LAYER)
    assert np.isfinite(backend.asnumpy(dx)).all(1).tolist() == finite.tolist()


@pytest.mark.emulator
@pytest.mark.parametrize("dtype", DTYPES[-2:])
def test_the_order_of_blocks_and_threads_changes_no_bit(
    emulated: EmulatorRuntime, rng: np.random.Generator, dtype: str
) -> None:
    backend = backends.make("emulator")
    x, weight, dy, *vectors = backend.arrays(*make(rng, (33, 20, 40), dtype))
    found = []
    with emulated.device_limits(Limits(4, 227 * 1024, 228 * 1024, True)):
        for seed in range(4):
            with emulated.schedule(seed, resident=4):
                y, z, statistics = bn.linear_batch_norm_forward(x, weight, *vectors, activation="gelu", **LAYER)
                given = dy, x, weight, *vectors, z, statistics
                grads = bn.linear_batch_norm_backward(*given, activation="gelu", **LAYER)
            found.append([backend.asnumpy(array) for array in (y, z, statistics, *grads)])
    assert [record.launch.cooperative for record in emulated.launches[:2]] == [False, True]
    for others in found[1:]:
        for one, two in zip(found[0], others, strict=True):
            assert np.isfinite(one).all()
            np.testing.assert_array_equal(one, two)


def test_a_block_owns_examples() -> None:
    sizes = Problem(64, 64, 20, np.dtype("float32"))
    plan = choose("forward", sizes, H200, norm="layer")
    assert (plan.launch.grid[0], plan.width) == (16, 4)
    plan = choose("backward", sizes, H200, norm="layer")
    assert (plan.launch.grid[0], plan.width, plan.launch.cooperative) == (16, 4, True)
    assert choose("backward", sizes, H200, False, "layer").launch.cooperative  # dweight is of all examples


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm": "group"}, "norm must be one of batch, layer, None; got 'group'"),
        ({"statistics": np.zeros((3, 5), "float32")}, r"statistics must have the shape \(3, 8\)"),
        ({"statistics": None}, "statistics must be those of the forward"),
        ({"running_mean": np.zeros(5, "float32")}, "running_mean belongs to batch norm"),
    ],
)
def test_what_is_wrong_is_refused(backend: Backend, changes: dict[str, Any], message: str) -> None:
    arrays = {"statistics": np.zeros((3, 8), "float32"), "running_mean": None} | changes
    x, weight, z = backend.arrays(*(np.zeros(s, "float32") for s in ((8, 3), (3, 5), (8, 5))))
    statistics, running_mean = backend.arrays(arrays["statistics"], arrays["running_mean"])
    norm = changes.get("norm", "layer")
    with refused(backend, ValueError, message, x, weight, z):
        if running_mean is not None:
            bn.linear_batch_norm_forward(x, weight, running_mean=running_mean, norm=norm)
        bn.linear_batch_norm_backward(z, x, weight, None, None, z, statistics, norm=norm)
