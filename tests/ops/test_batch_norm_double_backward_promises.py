"""Promises of the double backward beside its values: memory, special values, errors, traffic, and its benchmark."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from benchmarks.harness.case import Case, NotSupportedError, Provider
from benchmarks.harness.clocks import HostClock
from benchmarks.harness.measure import error_of
from benchmarks.harness.places import cast, to_float64
from benchmarks.ops.bench_batch_norm_double_backward import OP
from bnkernels.ops.batch_norm.launch import SERIAL_WORKERS
from tests.ops.test_batch_norm_double_backward import (
    LIKE_X,
    VECTORS,
    call,
    make,
    on_device,
    run,
    statistics_of,
    without,
)
from tests.regress.calls import CALLS, make_arrays
from tests.regress.refusal import refused
from tools.backends import Backend
from tools.emulator import EmulatorRuntime
from tools.oracle_double_backward import OUTPUTS


@pytest.mark.parametrize("aliased", LIKE_X)
@pytest.mark.parametrize("shape", [(64, 20), (4, 3, 70)])
def test_ddy_in_the_place_of_an_input(
    backend: Backend, rng: np.random.Generator, shape: tuple[int, ...], aliased: str
) -> None:
    arrays = make(rng, shape, "float32")
    on = on_device(backend, arrays)
    statistics = statistics_of(on)
    fresh = call(on, statistics, activation="silu")
    out = on[aliased], *(backend.empty(array.shape, "float32") for array in fresh[1:])
    for got, want in zip(call(on, statistics, out, activation="silu"), fresh, strict=True):
        np.testing.assert_array_equal(backend.asnumpy(got), backend.asnumpy(want))
    message = "dx overlaps .* in memory; ddy may be exactly ddx or dy or x or residual or ddresidual; pass a separate"
    with refused(backend, ValueError, message):
        call(on, statistics, (backend.empty(shape, "float32"), on[aliased], *out[2:]), activation="silu")


def test_nan_and_infinity_stay_in_their_channel(backend: Backend, rng: np.random.Generator) -> None:
    arrays = make(rng, (70, 5), "float32")
    clean = run(backend, arrays, activation="gelu")
    for name in LIKE_X:
        for bad in (np.nan, np.inf):
            spoilt = arrays | {name: arrays[name].copy()}
            spoilt[name][3, 1] = bad
            found = run(backend, spoilt, activation="gelu")
            for output in OUTPUTS:
                others = [0, 2, 3, 4]
                np.testing.assert_array_equal(found[output][..., others], clean[output][..., others])
            assert name == "residual" or not np.isfinite(found["dx"][:, 1]).all()
            assert not np.isnan(bad) or np.isnan(found["dx"][:, 1]).all()


def test_an_empty_batch_has_no_gradients(backend: Backend) -> None:
    arrays = {name: np.zeros((0, 3), "float32") for name in LIKE_X} | dict.fromkeys(VECTORS)
    found = run(backend, arrays)
    assert found["ddy"].shape == found["dx"].shape == found["dresidual"].shape == (0, 3)
    np.testing.assert_array_equal([found["dgamma"], found["dbeta"]], 0)


def test_refuses_what_does_not_belong_together(backend: Backend, rng: np.random.Generator) -> None:
    on = on_device(backend, make(rng, (6, 3), "float32"))
    statistics = statistics_of(on)
    message = "ddresidual belongs to a residual, and residual is None; pass residual, or no ddresidual"
    with refused(backend, ValueError, message, *on.values()):
        call(without(on, "residual"), statistics)
    message = r"out must be a tuple of the 4 arrays \(ddy, dx, dgamma, dbeta\), got "
    with refused(backend, TypeError, message, *on.values()):
        call(without(on, "residual", "ddresidual"), statistics, out=(on["dy"],))
    for name, bad, error, text in (
        ("ddx", np.ones((6, 2), "float32"), ValueError, r"ddx must have the shape \(6, 3\), got \(6, 2\)"),
        ("ddresidual", np.ones((6, 3)), TypeError, "ddresidual must be float32, got float64; convert it with"),
        ("ddgamma", np.ones(2, "float32"), ValueError, r"ddgamma must have the shape \(3,\), got \(2,\)"),
    ):
        with refused(backend, error, text, *on.values()):
            call(on | {name: backend.asarray(bad)}, statistics)


@pytest.mark.emulator
@pytest.mark.parametrize("shape", [(64, 20), (600, 3), (3, 4, 50)])
def test_one_launch_reads_every_input_twice(emulated: EmulatorRuntime, shape: tuple[int, ...]) -> None:
    if emulated.build not in ("plain", "coverage"):
        pytest.skip(f"the build {emulated.build!r} does not count accesses")
    arrays = make(np.random.default_rng(0), shape, "float32")
    on = {name: emulated.asarray(array) for name, array in arrays.items()}
    statistics = statistics_of(on)
    emulated.reset()
    found = call(on, statistics, activation="tanh")
    (record,) = emulated.launches
    assert record.counts.barriers == (2 if record.launch.block[1] > SERIAL_WORKERS else 1)
    for name in LIKE_X:
        assert record.counts.of(on[name]).bytes_read == 2 * on[name].nbytes
    for array in found:
        assert record.counts.of(array).bytes_written == array.nbytes


def test_the_call_of_the_regression_tests_is_this_op(backend: Backend) -> None:
    arrays = make_arrays("double_backward")
    on = {name: backend.asarray(array) for name, array in arrays.items()}
    CALLS["double_backward"].run(on)
    extra = dict.fromkeys(("residual", "ddresidual"))
    for name, want in zip(OUTPUTS, call({**on, **extra}, on["statistics"], activation="tanh"), strict=False):
        np.testing.assert_array_equal(backend.asnumpy(on[name]), backend.asnumpy(want))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize(("shape", "layout"), [((6, 5), "NC"), ((4, 3, 5, 6), "NCHW"), ((4, 3, 5, 6), "NHWC")])
@pytest.mark.parametrize("provider", [p for p in OP.providers if p.place == "cpu"], ids=lambda p: p.name)
def test_who_is_measured_computes_the_reference(
    provider: Provider, shape: tuple[int, ...], layout: str, dtype: str
) -> None:
    if reason := provider.absent():
        pytest.skip(reason)
    case = Case(OP.name, "double backward", shape, dtype, layout)
    arrays = cast(case, OP.inputs(case, partial(np.random.default_rng(0).standard_normal, dtype=np.float32)))
    exact = OP.reference(case, to_float64(arrays), np)
    outputs = provider.prepare(case, cast(case, arrays))()
    assert error_of(case, map(HostClock().to_float64, outputs), exact) < (5e-3 if dtype == "float16" else 1e-6)


def test_the_benchmark_is_right_by_our_own_op_and_refuses_epilogues() -> None:
    case = Case(OP.name, "double backward", (6, 5), "float64")
    arrays = OP.inputs(case, np.random.default_rng(0).standard_normal)
    assert OP.bytes_moved(case) == 5 * 6 * 5 * 8
    for got, want in zip(OP.providers[0].prepare(case, arrays)(), OP.reference(case, arrays, np), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)
    with pytest.raises(NotSupportedError, match="is for no epilogue"):
        OP.inputs(Case(OP.name, "double backward", (6, 5), epilogue="relu"), np.random.default_rng(0).standard_normal)
