"""Linear layers with float32 products on tensor cores (3xTF32): errors as derived, infinity and NaN as in float32."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest

import bnkernels as bn
from bnkernels.ops.linear_batch_norm.launch import choose
from bnkernels.ops.linear_batch_norm.problem import Problem
from bnkernels.runtime.seam import ceil_div
from tests.ops.test_linear_batch_norm import H200, assert_product, make, with_buffers
from tests.regress.refusal import refused
from tools import backends, oracle
from tools.backends import Backend
from tools.emulator import EmulatorRuntime
from tools.oracle_layer_norm import exact as layer_norm

TF32X3: dict[str, Any] = {"precision": "tf32x3"}
# (N, K, M): one of everything; the terms of an instruction, one fewer and one more; both sets of a warp's rows; rows in
# whole vectors of 16 bytes and not; several stages; two tiles of rows in the backward.
SIZES = [(2, 1, 1), (7, 7, 5), (33, 8, 4), (65, 9, 20), (300, 12, 6), (20, 100, 33), (12, 301, 5), (9, 300, 8)]


def roundings(terms: int) -> float:
    """Return what a product of exact factors may be off by, in units of 2^-24 times the sum of absolute products.

    A factor is its two parts up to 2^-23 of it, and the product of the low parts, at most 2^-22, is left out. Tensor
    cores cut off 4 terms, the sum so far and the new one, each at two roundings, and take the 8 terms of an instruction
    as two such sums (or as one, which is less). The large products begin at 0 in each instruction and are added in
    float32; the small ones, which are at most 2^-10 of all, are two instructions that go on with their sum. Then come
    the partial sums, and the small products.
    """
    groups = ceil_div(terms, 8)
    split, large, small = 4 + 4, 24 * (1 + 2**-10) + groups, 2 * 24 * groups * 2**-10
    return split + large + small + 5


def assert_close(backend: Backend, got: Any, a: np.ndarray, b: np.ndarray, what: str, **bounds: Any) -> None:
    """Check a product of matrices that are off by as much themselves; that of a library rounds once a term."""
    counted = (lambda terms: max(terms + 8, roundings(terms))) if backend.is_numpy else roundings
    assert_product(backend.asnumpy(got), a, b, what, **bounds, roundings=counted)


@pytest.mark.parametrize("norm", ["batch", "layer"])
@pytest.mark.parametrize("sizes", SIZES)
def test_is_a_product_and_its_norm(
    backend: Backend, rng: np.random.Generator, sizes: tuple[int, int, int], norm: str
) -> None:
    x, weight, dy, gamma, beta = arrays = make(rng, sizes, "float32")
    on_x, on_weight, on_dy, *vectors = backend.arrays(*arrays)
    given, options = (on_x, on_weight, *vectors), {"norm": norm, "activation": "relu"} | TF32X3
    y, z, statistics = bn.linear_batch_norm_forward(*given, eps=1e-3, **options)
    host_z = backend.asnumpy(z)
    assert_close(backend, z, x, weight, "z")
    dx, dweight, *_ = bn.linear_batch_norm_backward(on_dy, *given, z, statistics, **options)
    right: Any
    if norm == "batch":
        forward = oracle.forward(host_z, gamma, beta, 1e-3, "relu")
        oracle.assert_within(backend.asnumpy(y), forward.y, forward.z_bound, "y")
        right = oracle.backward(dy, host_z, gamma, beta, 1e-3, "relu")
    else:
        right = layer_norm(host_z, dy, gamma, beta, 1e-3, "relu")
        oracle.assert_within(backend.asnumpy(y), right.y, right.y_bound, "y")
    assert_close(backend, dweight, x.T, right.dx, "dweight", b_bound=right.dx_bound)
    assert_close(backend, dx, right.dx, weight.T, "dx", a_bound=right.dx_bound)


@pytest.mark.parametrize("sizes", [*SIZES, (512, 33, 1), (40, 20, 70)])
def test_both_parts_of_a_number_are_multiplied(
    backend: Backend, rng: np.random.Generator, sizes: tuple[int, int, int]
) -> None:
    """Factors of 14 digits and of 1: every product is its two parts exactly, and so are the sums, in any order."""
    rows, inputs, outputs = sizes
    x, weight = rng.integers(-(2**14), 2**14, (rows, inputs)), rng.integers(-1, 2, (inputs, outputs))
    dy = rng.integers(-1, 2, (rows, outputs))
    on_x, on_weight, on_dy = backend.arrays(*(array.astype("float32") for array in (x, weight, dy)))
    emulated = backends.emulated_runtime() if backend.name == "emulator" else None
    for sms in (132, 1) if emulated else (None,):
        with emulated.device_limits(H200._replace(sms=sms, tf32=True)) if emulated else nullcontext():
            _, z, _ = bn.linear_batch_norm_forward(on_x, on_weight, norm=None, **TF32X3)
            flipped = bn.linear_batch_norm_forward(on_weight.T.copy(), on_x.T.copy(), norm=None, **TF32X3)[1]
            _, dweight, *_ = bn.linear_batch_norm_backward(on_dy, on_x, on_weight, None, None, z, None, **TF32X3)
        for got, right in ((z, x @ weight), (flipped, (x @ weight).T), (dweight, x.T @ dy)):
            assert np.abs(right).max() < 2**24
            np.testing.assert_array_equal(backend.asnumpy(got), right)


SPECIAL = {
    "an infinity": [(0, 0, np.inf)],
    "both infinities": [(0, 0, np.inf), (0, 3, -np.inf)],
    "infinity and NaN": [(0, 0, np.inf), (0, 1, np.nan)],
    "NaN": [(0, 2, np.nan)],
    "NaN of a GPU": [(0, 2, np.uint32(0x7FFFFFFF).view(np.float32))],
    "negative NaN": [(0, 2, np.uint32(0xFFC00001).view(np.float32))],
    "the same term of two rows": [(0, 4, -np.inf), (5, 4, np.inf)],
}


@pytest.mark.parametrize("special", SPECIAL)
def test_infinity_and_nan_are_those_of_float32(backend: Backend, rng: np.random.Generator, special: str) -> None:
    """Factors of one digit, whose low part is 0, of 24, whose low part has either sign, and 0 are beside them."""
    x, weight, dy, *_ = make(rng, (21, 11, 14), "float32")
    weight[:, 0], weight[:, 1], weight[:, 2], weight[0, 3] = 1, -2, 0, 0
    of_dy = np.array(dy)
    for row, term, value in SPECIAL[special]:
        x[row, term] = of_dy[row, term] = value
    on_x, on_weight, on_dy, on_of_dy = backend.arrays(x, weight, dy, of_dy)

    def products(**options: Any) -> list[np.ndarray]:
        _, z, _ = bn.linear_batch_norm_forward(on_x, on_weight, norm=None, **options)
        transposed = bn.linear_batch_norm_forward(on_x, on_weight, norm="layer", **options)[1]
        found = [z, transposed]
        for gradient in (on_dy, on_of_dy):
            dx, dweight, *_ = bn.linear_batch_norm_backward(
                gradient, on_x, on_weight, None, None, z, None, norm=None, **options
            )
            found += [dx, dweight]
        return [backend.asnumpy(array) for array in found]

    kept = 0
    for got, right in zip(products(**TF32X3), products(), strict=True):
        special_ones = ~np.isfinite(right)
        np.testing.assert_array_equal(np.isfinite(got), ~special_ones)
        np.testing.assert_array_equal(got[special_ones], right[special_ones])
        kept += special_ones.sum()
    assert kept > 0


@pytest.mark.emulator
def test_the_last_numbers_below_infinity_count_as_infinite(emulated: EmulatorRuntime) -> None:
    """TF32 has no number between them and infinity; plain float32 products are finite."""
    backend, first = backends.make("emulator"), np.float32((2 - 2.0**-11) * 2.0**127)
    x = np.array([[np.nextafter(first, np.float32(0))], [first], [np.finfo("float32").max]], "float32")
    x, weight = backend.arrays(np.concatenate([x, -x]), np.full((1, 2), 0.5, "float32"))
    _, z, _ = bn.linear_batch_norm_forward(x, weight, norm=None)
    assert np.isfinite(backend.asnumpy(z)).all()
    found = backend.asnumpy(bn.linear_batch_norm_forward(x, weight, norm=None, **TF32X3)[1])
    np.testing.assert_allclose(found[[0, 3]], backend.asnumpy(z)[[0, 3]], rtol=2**-22)
    np.testing.assert_array_equal(found[[1, 2, 4, 5]], [[np.inf] * 2] * 2 + [[-np.inf] * 2] * 2)


@pytest.mark.emulator
@pytest.mark.parametrize(("sizes", "buffers"), [((70, 20, 33), 2), ((20, 100, 8), 1)])
@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_the_order_of_blocks_and_threads_changes_no_bit(
    emulated: EmulatorRuntime, rng: np.random.Generator, sizes: tuple[int, int, int], buffers: int, norm: str
) -> None:
    backend, options = backends.make("emulator"), {"norm": norm, "activation": "relu"} | TF32X3
    x, weight, dy, gamma, beta = backend.arrays(*make(rng, sizes, "float32"))

    def run() -> list[np.ndarray]:
        y, z, statistics = bn.linear_batch_norm_forward(x, weight, gamma, beta, **options)
        grads = bn.linear_batch_norm_backward(dy, x, weight, gamma, beta, z, statistics, **options)
        return [backend.asnumpy(array) for array in (y, z, statistics, *grads)]

    with emulated.device_limits(with_buffers(buffers)._replace(tf32=True)):
        first = run()
        assert {record.entry_point.rsplit("_", 2)[1] for record in emulated.launches} == {"tf32x3"}
        for seed in range(1, 3):
            with emulated.schedule(seed, resident=4):
                for one, two in zip(first, run(), strict=True):
                    assert np.isfinite(one).all()
                    np.testing.assert_array_equal(one, two)


def test_numpy_arrays_and_large_ones_are_multiplied_in_float32(backend: Backend, rng: np.random.Generator) -> None:
    if not backend.is_numpy:
        pytest.skip("of the other backends a library multiplies")
    for sizes in ((30, 9, 4), (600, 4, 3)):
        x, weight, dy, gamma, beta = make(rng, sizes, "float32")
        calls = [bn.linear_batch_norm_forward(x, weight, gamma, beta, **options) for options in (TF32X3, {})]
        grads = [
            bn.linear_batch_norm_backward(dy, x, weight, gamma, beta, *calls[0][1:], **options)
            for options in (TF32X3, {})
        ]
        for one, two in zip(calls[0] + grads[0], calls[1] + grads[1], strict=True):
            np.testing.assert_array_equal(one, two)


@pytest.mark.emulator
def test_the_precision_is_part_of_a_call_that_is_replayed(emulated: EmulatorRuntime, rng: np.random.Generator) -> None:
    backend, (rows, inputs, outputs) = backends.make("emulator"), (9, 7, 3)
    x, weight, dy, *_ = backend.arrays(*make(rng, (rows, inputs, outputs), "float32"))
    out = tuple(backend.empty((rows, outputs), "float32") for _ in range(2))
    workspace = backend.empty((rows, outputs), "float32")
    grads = None, backend.empty((inputs, outputs), "float32"), None, backend.empty((outputs,), "float32")
    kernels = []
    for precision in (None, "tf32x3", None, "tf32x3"):
        options = {"norm": None, "precision": precision}
        bn.linear_batch_norm_forward(x, weight, **options, out=out)
        given = dy, x, weight, None, None, out[1], None
        bn.linear_batch_norm_backward(*given, **options, input_gradient=False, workspace=workspace, out=grads)
        kernels.append(["tf32x3" in record.entry_point for record in emulated.launches[-2:]])
    assert kernels == [[False] * 2, [True] * 2] * 2


@pytest.mark.parametrize(
    ("dtype", "precision", "message"),
    [
        ("float32", "tf32", "precision must be one of tf32x3, None; got 'tf32'"),
        ("float32", 3, "precision must be one of tf32x3, None; got 3"),
        ("float64", "tf32x3", "precision='tf32x3' is for float32 data, got float64; pass precision=None"),
        ("float16", "tf32x3", "precision='tf32x3' is for float32 data, got float16; pass precision=None"),
    ],
)
def test_what_there_is_not_is_refused(
    backend: Backend, rng: np.random.Generator, dtype: str, precision: Any, message: str
) -> None:
    x, weight, dy, *_ = backend.arrays(*make(rng, (6, 3, 4), dtype))
    out = tuple(backend.empty((6, 4), x.dtype) for _ in range(2))
    with refused(backend, ValueError, message, *out):
        bn.linear_batch_norm_forward(x, weight, norm=None, precision=precision, out=out)
    _, z, _ = bn.linear_batch_norm_forward(x, weight, norm=None)
    with refused(backend, ValueError, message, *out):
        bn.linear_batch_norm_backward(dy, x, weight, None, None, z, None, precision=precision, workspace=out[0])


@pytest.mark.emulator
def test_devices_without_tf32_refuse(emulated: EmulatorRuntime, rng: np.random.Generator) -> None:
    backend, message = backends.make("emulator"), "precision='tf32x3' must have tensor cores that multiply TF32"
    with emulated.device_limits(H200._replace(tf32=False)):
        for sizes in ((6, 3, 4), (600, 3, 4)):
            x, weight, dy, *_ = backend.arrays(*make(rng, sizes, "float32"))
            out = backend.empty(dy.shape, "float32"), backend.empty(dy.shape, "float32")
            with refused(backend, ValueError, message, *out):
                bn.linear_batch_norm_forward(x, weight, norm=None, **TF32X3, out=out)
            with refused(backend, ValueError, message, out[0]):
                bn.linear_batch_norm_backward(dy, x, weight, None, None, dy, None, **TF32X3, workspace=out[0])


def test_the_launch_is_that_of_float32() -> None:
    limits, f32 = H200._replace(tf32=True), np.dtype("float32")
    for direction in ("forward", "backward"):
        for norm in ("batch", "layer", None):
            plain = choose(direction, Problem(64, 64, 20, f32), limits, True, norm)
            chosen = choose(direction, Problem(64, 64, 20, f32), limits, True, norm, "tf32x3")
            assert chosen == plain._replace(kernel=plain.kernel.replace("_f32", "_tf32x3_f32"))
