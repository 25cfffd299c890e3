"""Linear layer, norm and activation in one: the product against exact sums, the rest against its batch norm."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bnkernels as bn
from bnkernels.ops.linear_batch_norm.launch import choose
from bnkernels.ops.linear_batch_norm.problem import Problem
from bnkernels.runtime.seam import Limits, ceil_div
from tests.ops.test_batch_norm_masked import DTYPES, dtype_named
from tools import backends, oracle
from tools.backends import Backend
from tools.emulator import EmulatorRuntime
from tools.emulator.build import CUDA, CUDA_VARIABLE, ROOT, read_sources, write_sources
from tools.oracle import Extended, accumulator, unit_roundoff

# (N, K, M): the question's; one of everything; all three subwarp sizes and two tiles of rows; more terms than fit;
# sizes that nothing divides; a tile of rows in the backward that is not the first.
SIZES = [
    (64, 64, 20),
    (2, 1, 1),
    (7, 3, 5),
    (33, 65, 4),
    (100, 40, 9),
    (200, 31, 7),
    (300, 10, 6),
    (512, 8, 3),
    (5, 300, 2),
    (9, 6, 70),
]
H200 = Limits(132, 227 * 1024, 228 * 1024, True)


def make(rng: np.random.Generator, sizes: tuple[int, int, int], dtype: str) -> list[np.ndarray]:
    """Return x, weight, dy in the type, gamma and beta in that of the accumulator."""
    rows, inputs, outputs = sizes
    kind = dtype_named(dtype)
    x, weight, dy = (
        (rng.standard_normal(s)).astype(kind) for s in ((rows, inputs), (inputs, outputs), (rows, outputs))
    )
    gamma, beta = rng.uniform(0.5, 1.5, outputs), rng.standard_normal(outputs)
    return [x, weight, dy, gamma.astype(accumulator(x.dtype)), beta.astype(accumulator(x.dtype))]


def assert_product(
    got: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
    what: str,
    a_bound: Any = 0,
    b_bound: Any = 0,
    roundings: Callable[[int], float] = lambda terms: terms + 8,
) -> None:
    """Check a product of matrices that are off by as much themselves; `roundings` counts those of a sum."""
    a, b = a.astype(Extended), b.astype(Extended)
    terms = roundings(a.shape[1])
    if got.dtype.itemsize == 2:  # tensor cores cut off 8 terms, the sum so far and the new one, each at two roundings
        terms = 20 * ceil_div(a.shape[1] + 8, 8)
    bound = terms * unit_roundoff(got.dtype) * (np.abs(a) @ np.abs(b))
    bound = bound + (np.abs(a) @ (b_bound + 0 * b)) + ((a_bound + 0 * a) @ np.abs(b))
    oracle.assert_within(got, a @ b, bound, what)


@pytest.mark.parametrize(
    ("dtype", "activation"), [("float16", "relu"), ("bfloat16", "tanh"), ("float32", "relu"), ("float64", "tanh")]
)
@pytest.mark.parametrize("sizes", SIZES)
def test_is_a_product_and_its_batch_norm(
    backend: Backend, rng: np.random.Generator, sizes: tuple[int, int, int], dtype: str, activation: str
) -> None:
    x, weight, dy, gamma, beta = arrays = make(rng, sizes, dtype)
    on_x, on_weight, on_dy, on_gamma, on_beta = backend.arrays(*arrays)
    given = on_x, on_weight, on_gamma, on_beta
    y, z, statistics = bn.linear_batch_norm_forward(*given, eps=1e-3, activation=activation)
    host_z = backend.asnumpy(z)
    assert_product(host_z, x, weight, "z")
    exact = oracle.forward(host_z, gamma, beta, 1e-3, activation)
    oracle.assert_within(backend.asnumpy(y), exact.y, exact.z_bound, "y")
    mean, low, rstd = backend.asnumpy(statistics).astype(Extended)
    np.testing.assert_allclose(mean + low, exact.mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(rstd, exact.rstd, rtol=1e-5)

    grads = bn.linear_batch_norm_backward(on_dy, *given, z, statistics, activation=activation)
    dx, dweight, dgamma, dbeta = map(backend.asnumpy, grads)
    right = oracle.backward(dy, host_z, gamma, beta, 1e-3, activation)
    oracle.assert_within(dgamma, right.dgamma, right.dgamma_bound, "dgamma")
    oracle.assert_within(dbeta, right.dbeta, right.dbeta_bound, "dbeta")
    rounded = oracle.STORED.get(x.dtype.name, (0, 0))
    dz_bound = right.dx_bound + rounded[0] * (np.abs(right.dx) + right.dx_bound) + rounded[1]
    assert_product(dweight, x.T, right.dx, "dweight", b_bound=dz_bound)
    assert_product(dx, right.dx, weight.T, "dx", a_bound=dz_bound)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(64, 64, 20), (1, 5, 3), (300, 10, 6)])
def test_without_a_norm_is_a_linear_layer(
    backend: Backend, rng: np.random.Generator, sizes: tuple[int, int, int], dtype: str
) -> None:
    x, weight, dy, _, beta = arrays = make(rng, sizes, dtype)
    on_x, on_weight, on_dy, _, on_beta = backend.arrays(*arrays)
    given = on_x, on_weight, None, on_beta
    y, z, statistics = bn.linear_batch_norm_forward(*given, norm=None, activation="sigmoid")
    assert statistics is None
    host_z = backend.asnumpy(z)
    assert_product(host_z, x, weight, "z")
    frozen = (np.zeros_like(beta), np.ones_like(beta))
    exact = oracle.forward(host_z, None, beta, 0.0, "sigmoid", frozen)
    oracle.assert_within(backend.asnumpy(y), exact.y, exact.z_bound, "y")
    grads = bn.linear_batch_norm_backward(on_dy, *given, z, None, activation="sigmoid")
    assert grads[2] is None
    dx, dweight, _, dbeta = (None if array is None else backend.asnumpy(array) for array in grads)
    right = oracle.backward(dy, host_z, None, beta, 0.0, "sigmoid", frozen)
    oracle.assert_within(dbeta, right.dbeta, right.dbeta_bound, "dbeta")
    rounded = oracle.STORED.get(x.dtype.name, (0, 0))
    dz_bound = right.dx_bound + rounded[0] * (np.abs(right.dx) + right.dx_bound) + rounded[1]
    assert_product(dweight, x.T, right.dx, "dweight", b_bound=dz_bound)
    assert_product(dx, right.dx, weight.T, "dx", a_bound=dz_bound)


@pytest.mark.parametrize("activation", ["identity", "leaky_relu", "gelu", "gelu_tanh", "silu", "elu", "sigmoid"])
def test_every_activation(backend: Backend, rng: np.random.Generator, activation: str) -> None:
    x, weight, dy, gamma, beta = backend.arrays(*make(rng, (20, 6, 5), "float32"))
    y, z, statistics = bn.linear_batch_norm_forward(x, weight, gamma, beta, activation=activation)
    grads = bn.linear_batch_norm_backward(dy, x, weight, gamma, beta, z, statistics, activation=activation)
    hosts = [backend.asnumpy(array) for array in (dy, z, gamma, beta)]
    exact, right = oracle.forward(*hosts[1:], 1e-5, activation), oracle.backward(*hosts, 1e-5, activation)
    oracle.assert_within(backend.asnumpy(y), exact.y, exact.z_bound, "y")
    oracle.assert_within(backend.asnumpy(grads[2]), right.dgamma, right.dgamma_bound, "dgamma")


@pytest.mark.parametrize("unbiased", [True, False])
def test_running_statistics_move_as_batch_norm_moves_them(
    backend: Backend, rng: np.random.Generator, unbiased: bool
) -> None:
    x, weight, *_ = make(rng, (40, 7, 5), "float64")
    before = rng.standard_normal(5), rng.uniform(1, 2, 5)
    running = backend.arrays(*before)
    options = {"momentum": 0.3, "unbiased": unbiased}
    _, z, _ = bn.linear_batch_norm_forward(*backend.arrays(x, weight), None, None, *running, **options)
    host = backend.asnumpy(z)
    np.testing.assert_allclose(backend.asnumpy(running[0]), 0.7 * before[0] + 0.3 * host.mean(0), rtol=1e-12)
    wanted = 0.7 * before[1] + 0.3 * host.var(0, ddof=int(unbiased))
    np.testing.assert_allclose(backend.asnumpy(running[1]), wanted, rtol=1e-12)


def test_a_mean_far_from_0_costs_no_digits(backend: Backend) -> None:
    x = (2.0**20 + np.arange(64) % 11).astype("float32")[:, None]
    y, z, _ = bn.linear_batch_norm_forward(*backend.arrays(x, np.ones((1, 3), "float32")))
    exact = oracle.forward(backend.asnumpy(z), None, None, 1e-5)
    np.testing.assert_allclose(backend.asnumpy(y), exact.y.astype("float64"), rtol=1e-6, atol=1e-6)


def test_a_nan_stays_in_its_neuron(backend: Backend, rng: np.random.Generator) -> None:
    x, weight, dy, gamma, beta = make(rng, (40, 7, 9), "float32")
    weight[2, 4] = np.nan
    given = backend.arrays(x, weight, gamma, beta)
    y, z, statistics = bn.linear_batch_norm_forward(*given, activation="tanh")
    grads = bn.linear_batch_norm_backward(backend.asarray(dy), *given, z, statistics, activation="tanh")
    for array in (y, z, statistics, grads[1], grads[2], grads[3]):
        wrong = np.isnan(backend.asnumpy(array)).reshape(-1, 9)
        assert wrong[:, 4].all() or array is statistics
        assert not np.delete(wrong, 4, axis=1).any()


def test_outputs_are_written_where_they_are_wanted(backend: Backend, rng: np.random.Generator) -> None:
    rows, inputs, outputs = 30, 8, 5
    x, weight, dy, gamma, beta = backend.arrays(*make(rng, (rows, inputs, outputs), "float32"))
    shapes = (rows, outputs), (rows, outputs), (3, outputs)
    out = tuple(backend.empty(shape, "float32") for shape in shapes)
    found = bn.linear_batch_norm_forward(x, weight, gamma, beta, out=out)
    assert all(one is two for one, two in zip(found, out, strict=True))
    for one, two in zip(found, bn.linear_batch_norm_forward(x, weight, gamma, beta), strict=True):
        np.testing.assert_array_equal(backend.asnumpy(one), backend.asnumpy(two))
    _, z, statistics = found
    out = (None, *(backend.empty(shape, "float32") for shape in ((inputs, outputs), (outputs,), (outputs,))))
    given = dy, x, weight, gamma, beta, z, statistics
    workspace = backend.empty((rows, outputs), "float32")
    grads = bn.linear_batch_norm_backward(*given, input_gradient=False, workspace=workspace, out=out)
    assert all(one is two for one, two in zip(grads, out, strict=True))
    for one, two in zip(grads[1:], bn.linear_batch_norm_backward(*given)[1:], strict=True):
        np.testing.assert_array_equal(backend.asnumpy(one), backend.asnumpy(two))


@pytest.mark.parametrize("sizes", [(0, 4, 3), (600, 4, 3), (4, 1100, 3), (4, 0, 3)])
def test_beyond_the_kernels_a_library_multiplies(
    backend: Backend, rng: np.random.Generator, sizes: tuple[int, int, int]
) -> None:
    x, weight, dy, gamma, beta = make(rng, sizes, "float64")
    if backend.name == "emulator":
        backends.emulated_runtime().reset()
    given = backend.arrays(x, weight, gamma, beta)
    _, z, statistics = bn.linear_batch_norm_forward(*given, activation="tanh")
    dx, dweight, *_ = bn.linear_batch_norm_backward(backend.asarray(dy), *given, z, statistics, activation="tanh")
    np.testing.assert_allclose(backend.asnumpy(z), x @ weight, rtol=1e-12, atol=1e-12)
    exact = oracle.backward(dy, x @ weight, gamma, beta, 1e-5, "tanh") if len(x) else None
    dz = np.zeros_like(dy) if exact is None else exact.dx.astype("float64")
    np.testing.assert_allclose(backend.asnumpy(dweight), x.T @ dz, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(backend.asnumpy(dx), dz @ weight.T, rtol=1e-9, atol=1e-9)
    if backend.name == "emulator":
        names = [record.source for record in backends.emulated_runtime().launches]
        assert not any(name.startswith("linear") for name in names)


@pytest.mark.emulator
@pytest.mark.parametrize("norm", ["batch", None])
def test_one_launch_each_with_as_many_barriers_with_batch_norm_as_without(
    emulated: EmulatorRuntime, rng: np.random.Generator, norm: str | None
) -> None:
    backend, (rows, inputs, outputs) = backends.make("emulator"), (64, 64, 20)
    x, weight, dy, gamma, beta = backend.arrays(*make(rng, (rows, inputs, outputs), "float32"))
    gamma = gamma if norm else None
    with emulated.device_limits(Limits(4, 227 * 1024, 228 * 1024, True)):
        _, z, statistics = bn.linear_batch_norm_forward(x, weight, gamma, beta, norm=norm)
        bn.linear_batch_norm_backward(dy, x, weight, gamma, beta, z, statistics)
    forward, backward = emulated.launches
    assert (forward.source, backward.source) == ("linear_batch_norm_forward", "linear_batch_norm_backward")
    of_product = 2 + 1 + 2  # around the copies of a stage, in front of the partial sums, and around their addition
    assert forward.counts.barriers == of_product + 1, "and one behind the activation"
    assert backward.launch.cooperative
    # Around the derivatives, a product, the grid barrier, and two products.
    assert backward.counts.barriers == 2 + of_product + 2 + 2 * of_product
    if emulated.build not in ("plain", "coverage"):
        return
    vectors = 4 * outputs * (2 if norm else 1)  # gamma and beta, and their gradients
    statistics_bytes = 4 * 3 * outputs if norm else 0
    total = forward.counts.total
    assert total.unique_bytes_read == x.nbytes + weight.nbytes + vectors
    assert total.bytes_written == 2 * z.nbytes + statistics_bytes
    total = backward.counts.total
    for array in (dy, z, weight):
        read = backward.counts.of(array)
        assert read.unique_bytes_read == array.nbytes
        # Unoptimised, the numbers that a tile reads in place of missing ones count too.
        assert emulated.build == "coverage" or read.bytes_read == array.nbytes
    counter = 4 * backward.launch.grid[0]
    assert total.bytes_written == x.nbytes + weight.nbytes + z.nbytes + vectors + counter


def with_buffers(buffers: int) -> Limits:
    """Return a device whose shared memory has room for so many buffers of a product."""
    return Limits(4, (48, 227)[buffers - 1] * 1024, 228 * 1024, True)


@pytest.mark.emulator
@pytest.mark.parametrize("buffers", [1, 2])
@pytest.mark.parametrize("sizes", [(9, 300, 8), (12, 301, 5), (300, 136, 4), (5, 1000, 3)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_of_several_stages(
    emulated: EmulatorRuntime, rng: np.random.Generator, dtype: str, sizes: tuple[int, int, int], buffers: int
) -> None:
    """Terms that several stages hold, in whole vectors and not; integers are exact in every type and order."""
    rows, inputs, outputs = sizes
    x, weight, dy = (
        rng.integers(-1, 2, shape).astype("float64") for shape in ((rows, inputs), (inputs, outputs), (rows, outputs))
    )
    backend = backends.make("emulator")
    on_x, on_weight, on_dy = backend.arrays(*(array.astype(dtype_named(dtype)) for array in (x, weight, dy)))
    with emulated.device_limits(with_buffers(buffers)):
        plan = choose("forward", Problem(*sizes, np.dtype(dtype_named(dtype))), with_buffers(buffers))
        assert plan.stages == buffers
        y, z, _ = bn.linear_batch_norm_forward(on_x, on_weight, None, None, norm=None, activation="identity")
        given = on_dy, on_x, on_weight, None, None, z, None
        dx, dweight, *_ = bn.linear_batch_norm_backward(*given, activation="identity")
    for found, right in ((y, x @ weight), (dx, dy @ weight.T), (dweight, x.T @ dy)):
        np.testing.assert_array_equal(backend.asnumpy(found).astype("float64"), right)


@pytest.mark.emulator
@pytest.mark.parametrize(("sizes", "buffers"), [((70, 20, 33), 2), ((20, 300, 8), 2), ((20, 300, 8), 1)])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_the_order_of_blocks_and_threads_changes_no_bit(
    emulated: EmulatorRuntime, rng: np.random.Generator, dtype: str, sizes: tuple[int, int, int], buffers: int
) -> None:
    backend = backends.make("emulator")
    given = backend.arrays(*make(rng, sizes, dtype))
    x, weight, dy, gamma, beta = given

    def run() -> list[np.ndarray]:
        y, z, statistics = bn.linear_batch_norm_forward(x, weight, gamma, beta, activation="gelu")
        grads = bn.linear_batch_norm_backward(dy, x, weight, gamma, beta, z, statistics, activation="gelu")
        return [backend.asnumpy(array) for array in (y, z, statistics, *grads)]

    with emulated.device_limits(with_buffers(buffers)):
        first = run()
        for seed in range(1, 4):
            with emulated.schedule(seed, resident=4):
                for one, two in zip(first, run(), strict=True):
                    assert np.isfinite(one).all()
                    np.testing.assert_array_equal(one, two)


@pytest.mark.slow
@pytest.mark.emulator
def test_16_bits_without_tensor_cores(emulated: EmulatorRuntime, tmp_path: Path) -> None:
    """Code path of sm_75, in a process of its own with kernels of its own."""
    sources, product = read_sources(CUDA), "lib/gemm/product.cuh"
    changed = sources[product].replace("#if BNK_TENSOR_CORES\n    if constexpr", "#if 0\n    if constexpr")
    assert changed != sources[product]
    write_sources(sources | {product: changed}, tmp_path)
    test = f"{__file__}::test_is_a_product_and_its_batch_norm"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "emulator and float16", test]
    environment = os.environ | {CUDA_VARIABLE: str(tmp_path)}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert f"{2 * len(SIZES)} passed" in run.stdout  # bfloat16 too


def test_tensor_cores_sum_what_one_rounding_would_lose(backend: Backend) -> None:
    """Products of 16-bit numbers are exact in float32, and so are these sums, in any order."""
    x = np.tile([[256.0, 0.125, -256.0, 1.0]], (16, 5)).astype("float16")
    weight = np.tile([[256.0], [0.125], [256.0], [0.0]], (5, 3)).astype("float16")
    _, z, _ = bn.linear_batch_norm_forward(*backend.arrays(x, weight), norm=None)
    np.testing.assert_array_equal(backend.asnumpy(z), np.full((16, 3), 5 / 64, "float16"))


def test_the_launch_follows_from_the_sizes() -> None:
    f32, f64 = np.dtype("float32"), np.dtype("float64")
    plan = choose("forward", Problem(64, 1024, 1024, f32), H200)
    assert (plan.launch.grid[0], plan.width) == (128, 8)
    plan = choose("backward", Problem(64, 64, 20, f32), H200)
    assert (plan.launch.grid[0], plan.width, plan.launch.cooperative) == (16, 4, True)
    assert not choose("backward", Problem(64, 64, 20, f32), H200, False).launch.cooperative
    small = H200._replace(shared_bytes=40 * 1024)
    assert choose("forward", Problem(64, 64, 20, f32), small) is not None
    assert choose("forward", Problem(512, 64, 20, f64), small) is None
    alone = H200._replace(cooperative=False)
    assert choose("backward", Problem(64, 64, 20, f32), alone) is None
    assert choose("backward", Problem(64, 64, 20, f32), alone, False) is not None
    assert choose("backward", Problem(64, 64, 1000, f32), H200._replace(sms=4)).launch.grid[0] == 4
