"""Loss, optimisers and further batch norms as benchmarks: every provider that is installed computes the reference."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

from benchmarks.harness.case import Arrays, Case, NotSupportedError, Op, Provider
from benchmarks.harness.clocks import HostClock
from benchmarks.harness.measure import error_of
from benchmarks.harness.places import cast, to_float64
from benchmarks.ops import (
    bench_batch_norm_statistics,
    bench_group_norm,
    bench_layer_norm,
    bench_lstm,
    bench_matmul,
    bench_parameter_update,
    bench_softmax_cross_entropy,
    every_op,
    modules,
)
from benchmarks.peers import EPSILON

ELSEWHERE = {"batch_norm", "batch_norm_double_backward", "fused_training", "mini_batch"}  # tested with the op
OPS = [op for op in every_op().values() if op.name not in ELSEWHERE]
UPDATES = {rule: every_op()[f"{rule}_update"] for rule in bench_parameter_update.STATES}
NO_HALVES = [bench_softmax_cross_entropy.OP, bench_lstm.OP, bench_matmul.OP, *UPDATES.values()]
SMALL = {1: (100,), 2: (6, 5), 3: (6, 7, 5), 4: (3, 4, 5, 2)}
PAIRS = [(op, provider) for op in OPS for provider in op.providers if provider.place == "cpu"]
IDS = [f"{op.name}, {provider.name}" for op, provider in PAIRS]


def test_every_bench_module_declares_an_op() -> None:
    for module in modules():
        assert any(isinstance(value, Op) for value in vars(module).values()), module.__name__


def small(op: Op, dtype: str) -> Case:
    """Return a small case of an op."""
    return Case(op.name, op.cases[0].direction, SMALL[len(op.cases[0].shape)], dtype)


def arrays_of(op: Op, case: Case) -> Arrays:
    """Return the arrays of a case, as the harness makes them."""
    return cast(case, op.inputs(case, partial(np.random.default_rng(0).standard_normal, dtype=np.float32)))


def prepared(op: Op, provider: Provider, case: Case) -> Callable[[], tuple]:
    """Return a provider's call on arrays of its own, or skip."""
    if reason := provider.absent():
        pytest.skip(reason)
    return provider.prepare(case, arrays_of(op, case))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("op", "provider"), PAIRS, ids=IDS)
def test_the_first_call_is_the_reference(op: Op, provider: Provider, dtype: str) -> None:
    case = small(op, dtype)
    outputs = prepared(op, provider, case)()
    exact = op.reference(case, to_float64(arrays_of(op, case)), np)
    assert error_of(case, map(HostClock().to_float64, outputs), exact) < 1e-6


@pytest.mark.parametrize("name", ["bnkernels", "NumPy expression", "PyTorch eager"])
def test_parts_are_merged_like_the_reference(name: str) -> None:
    op, case = bench_batch_norm_statistics.OP, Case("batch_norm_statistics", "merge", (5, 7))
    provider = next(p for p in op.providers if (p.name, p.place) == (name, "cpu"))
    outputs = prepared(op, provider, case)()
    exact = op.reference(case, to_float64(arrays_of(op, case)), np)
    assert error_of(case, map(HostClock().to_float64, outputs), exact) < 1e-6
    parts = arrays_of(op, case)["parts"].astype(np.float64)
    second = (parts[:, 3] + parts[:, 0] * parts[:, 1] ** 2).sum(0) / parts[:, 0].sum(0)
    np.testing.assert_allclose(exact[1] ** -2 - EPSILON, second - exact[0] ** 2, rtol=1e-6)


@pytest.mark.parametrize("direction", bench_layer_norm.ALONE)
@pytest.mark.parametrize("name", ["bnkernels", "NumPy expression", "PyTorch eager"])
def test_a_layer_norm_alone_is_the_reference(name: str, direction: str) -> None:
    op, case = bench_layer_norm.OP, Case("layer_norm", direction, (6, 9))
    provider = next(p for p in op.providers if (p.name, p.place) == (name, "cpu"))
    call = prepared(op, provider, case)
    exact = op.reference(case, to_float64(arrays_of(op, case)), np)
    for _ in range(2):
        assert error_of(case, map(HostClock().to_float64, call()), exact) < 1e-6


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("name", ["bnkernels", "NumPy expression", "PyTorch eager"])
def test_a_group_norm_of_channels_that_come_last_is_the_reference(name: str, direction: str) -> None:
    op, case = bench_group_norm.OP, Case("group_norm", direction, (2, 64, 3, 5), layout="NHWC")
    provider = next(p for p in op.providers if (p.name, p.place) == (name, "cpu"))
    outputs = prepared(op, provider, case)()
    assert outputs[0].shape == (2, 3, 5, 64)
    exact = op.reference(case, to_float64(arrays_of(op, case)), np)
    assert error_of(case, map(HostClock().to_float64, outputs), exact) < 1e-6


@pytest.mark.parametrize("direction", bench_lstm.NORMS)
@pytest.mark.parametrize("name", ["bnkernels", "PyTorch eager"])
def test_every_lstm_is_the_reference(name: str, direction: str) -> None:
    op, case = bench_lstm.OP, Case("lstm", direction, SMALL[4], "float64")
    provider = next(p for p in op.providers if (p.name, p.place) == (name, "cpu"))
    call = prepared(op, provider, case)
    exact = op.reference(case, to_float64(arrays_of(op, case)), np)
    for _ in range(2):
        assert error_of(case, map(HostClock().to_float64, call()), exact) < 1e-6


@pytest.mark.parametrize("provider", UPDATES["adam"].providers[::2], ids=lambda p: p.name)
@pytest.mark.parametrize("rule", UPDATES)
def test_every_call_is_the_next_step(rule: str, provider: Provider) -> None:
    """Only the first call is checked in a run, but what is timed are those after it."""
    op = UPDATES[rule]
    if rule == "rmsprop" and provider.name == "PyTorch eager, fused":
        pytest.skip("PyTorch has no such kernel")
    case = small(op, "float64")
    call = prepared(op, next(p for p in op.providers if (p.name, p.place) == (provider.name, "cpu")), case)
    expected = bench_parameter_update.formulas(case, arrays_of(op, case), rule)
    for _ in range(3):
        (found,), (right,) = call(), expected()
        np.testing.assert_allclose(HostClock().to_float64(found), right, rtol=1e-12)


def test_steps_by_hand() -> None:
    p, g, m, s = (np.array([value]) for value in (1.0, 2.0, 0.5, 0.25))
    bench_parameter_update.sgd(p, g, step=1)
    assert p == pytest.approx(0.98)
    bench_parameter_update.momentum(p, g, m, step=1)
    assert (m[0], p[0]) == pytest.approx((2.45, 0.9555))
    bench_parameter_update.adam(p, g, m, s, step=2)
    assert (m[0], s[0]) == pytest.approx((2.405, 0.25375))
    assert p == pytest.approx(0.9555 - 0.01 * (2.405 / 0.19) / ((0.25375 / 0.001999) ** 0.5 + 1e-8))
    p, s = np.array([1.0]), np.array([0.25])
    bench_parameter_update.rmsprop(p, g, s, step=1)
    assert (s[0], p[0]) == pytest.approx((0.625, 1 - 0.02 / 0.625**0.5))


def test_loss_and_gradient_by_hand() -> None:
    op = bench_softmax_cross_entropy.OP
    arrays = {"logits": np.log([[1.0, 3.0], [1.0, 1.0]]), "labels": np.array([1, 0], np.int32)}
    losses, dlogits = op.reference(small(op, "float64"), arrays, np)
    np.testing.assert_allclose(losses, np.log([4 / 3, 2]))
    np.testing.assert_allclose(dlogits, [[0.125, -0.125], [-0.25, 0.25]])


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_bytes_are_those_of_the_arrays_that_have_to_move(op: Op) -> None:
    case = small(op, "float32")
    arrays = arrays_of(op, case)
    written = [*op.reference(case, to_float64(arrays), np)]
    states = [arrays[name] for name in ("first", "second") if name in arrays]
    read = sum(array.nbytes for array in arrays.values())
    assert op.bytes_moved(case) == read + sum(4 * output.size for output in (*written, *states))


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_labels_and_states_fit_the_case(op: Op) -> None:
    arrays = arrays_of(op, op.cases[0])
    if "labels" in arrays:
        assert arrays["labels"].dtype == np.int32
        assert set(arrays["labels"]) <= set(range(op.cases[0].shape[1]))
        assert len(set(arrays["labels"])) > 2
    assert all(not arrays[name].any() for name in ("first", "second") if name in arrays)


@pytest.mark.parametrize(
    ("op", "given"), [(op, {"epilogue": "relu"}) for op in OPS] + [(op, {"dtype": "float16"}) for op in NO_HALVES]
)
def test_what_belongs_to_other_ops_is_refused(op: Op, given: dict[str, Any]) -> None:
    case = Case(op.name, op.cases[0].direction, op.cases[0].shape, **given)
    with pytest.raises(NotSupportedError, match=f"{op.name} is for"):
        op.inputs(case, np.random.default_rng(0).standard_normal)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_names_are_one_per_place(op: Op) -> None:
    names = [(provider.place, provider.name) for provider in op.providers]
    assert len(set(names)) == len(names)
    assert names[:2] == [("cpu", "bnkernels"), ("cuda", "bnkernels")]
    ours = {name for place, name in names if place == "cpu"} ^ {name for place, name in names if place == "cuda"}
    assert ours - {"torch.compile", "bnkernels, 3xTF32"} == {"NumPy expression", "CuPy expression"}
