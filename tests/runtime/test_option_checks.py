"""Messages of every op about a wrong option: its name, what was expected, what came in few words, and the way out."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

import bnkernels as bn
from benchmarks.ops.bench_fused_training import NETWORK
from bnkernels.nn.optimizers import make_optimizer
from bnkernels.runtime import checks as check
from tests.regress.calls import make_arrays
from tools.backends import Backend

MOST = 420  # characters of a message: what was expected, four arrays by shape and type, and the way out


class Evil:
    """Something whose text cannot be had."""

    def __repr__(self) -> str:
        raise RuntimeError("no text")


# ---- options --------------------------------------------------------------------------------------------------------

X, V = np.arange(12, dtype="float32").reshape(4, 3), np.ones(3, "float32")
MEAN, STATISTICS, LABELS = np.zeros(3, "float32"), np.ones((3, 3), "float32"), np.zeros(4, "int32")
MOMENTS = np.ones((1, 4, 3), "float32")


def fused(network: Any = NETWORK, **options: Any) -> Any:
    arrays = make_arrays("fused_training")
    given = arrays["parameters"], (), arrays["running"], arrays["x"], arrays["labels"]
    return bn.fused_training(network, *given, **{"batch": 6, "lr": 0.1} | options)


def mlp(**options: Any) -> bn.MLP:
    return bn.MLP(**{"sizes": (3, 4, 2)} | options)


def adam(**options: Any) -> None:
    bn.adam_update(*(np.ones(3, "float32") for _ in range(4)), **{"step": 1, "lr": 0.1} | options)


NUMBERS: dict[str, Callable[[Any], Any]] = {
    "forward: momentum": lambda v: bn.batch_norm_forward(X, momentum=v),
    "forward: alpha": lambda v: bn.batch_norm_forward(X, activation="elu", alpha=v),
    "forward: r_max": lambda v: bn.batch_norm_forward(X, None, None, MEAN.copy(), V.copy(), renorm=(v, 5.0)),
    "forward: d_max": lambda v: bn.batch_norm_forward(X, None, None, MEAN.copy(), V.copy(), renorm=(3.0, v)),
    "statistics: momentum": lambda v: bn.batch_norm_statistics(MOMENTS, momentum=v),
    "linear: momentum": lambda v: bn.linear_batch_norm_forward(X, X[:3], momentum=v),
    "sgd: lr": lambda v: bn.sgd_update(V.copy(), V, lr=v),
    "momentum: momentum": lambda v: bn.momentum_update(V.copy(), V, V.copy(), lr=0.1, momentum=v),
    "rmsprop: decay": lambda v: bn.rmsprop_update(V.copy(), V, V.copy(), lr=0.1, decay=v),
    "rmsprop: eps": lambda v: bn.rmsprop_update(V.copy(), V, V.copy(), lr=0.1, eps=v),
    "adam: lr": lambda v: adam(lr=v),
    "adam: beta1": lambda v: adam(beta1=v),
    "adam: beta2": lambda v: adam(beta2=v),
    "adam: eps": lambda v: adam(eps=v),
    "schedule: lr": lambda v: bn.update_schedule("adam", v, 3),
    "fused: lr": lambda v: fused(lr=v),
    "fused: momentum": lambda v: fused(NETWORK._replace(momentum=v)),
    "MLP: momentum": lambda v: mlp(momentum=v),
    "optimiser: lr": lambda v: make_optimizer("sgd", mlp(), v),
}
EPS: dict[str, Callable[[Any], Any]] = {
    "forward: eps": lambda v: bn.batch_norm_forward(X, eps=v),
    "masked: eps": lambda v: bn.batch_norm_forward(X, eps=v, mask=np.ones(4, bool)),
    "renorm: eps": lambda v: bn.batch_norm_forward(X, None, None, MEAN.copy(), V.copy(), renorm=(3.0, 5.0), eps=v),
    "inference: eps": lambda v: bn.batch_norm_inference(X, None, None, MEAN, V, eps=v),
    "inference_backward: eps": lambda v: bn.batch_norm_inference_backward(X, X, None, None, MEAN, V, eps=v),
    "statistics: eps": lambda v: bn.batch_norm_statistics(MOMENTS, eps=v),
    "layer norm: eps": lambda v: bn.layer_norm_forward(X, eps=v),
    "linear: eps": lambda v: bn.linear_batch_norm_forward(X, X[:3], eps=v),
    "linear layer norm: eps": lambda v: bn.linear_batch_norm_forward(X, X[:3], norm="layer", eps=v),
    "fused: eps": lambda v: fused(NETWORK._replace(eps=v)),
    "MLP: eps": lambda v: mlp(eps=v),
    "MLP of layer norm: eps": lambda v: mlp(norm="layer", eps=v),
}
FOLDING: dict[str, Callable[[Any], Any]] = {
    "fold: eps": lambda v: bn.fold_batch_norm(X[:3].astype("f8"), None, None, None, *[np.ones(3)] * 2, eps=v),
    "scale_shift: eps": lambda v: bn.batch_norm_scale_shift(None, None, *[np.ones(3)] * 2, eps=v),
}
INTEGERS: dict[str, Callable[[Any], Any]] = {
    "forward: axis": lambda v: bn.batch_norm_forward(X, axis=v),
    "fold: axis": lambda v: bn.fold_batch_norm(np.ones((3, 3)), None, None, None, *[np.ones(3)] * 2, axis=v),
    "adam: step": lambda v: adam(step=v),
    "schedule: steps": lambda v: (
        bn.update_schedule("adam", 0.1, v) if abs_of(v) < 9 else bn.update_schedule("adam", 0.1, -1)
    ),
    "schedule: before": lambda v: bn.update_schedule("adam", 0.1, 3, before=v),
    "rows: seed": lambda v: bn.random_rows(v, 3, 5),
    "rows: rows": lambda v: bn.random_rows(0, 3, v),
    "rows: start": lambda v: bn.random_rows(0, 3, 5, start=v),
    "fused: batch": lambda v: fused(batch=v),
    "fused: steps_before": lambda v: fused(steps_before=v),
    "fused: batches_before": lambda v: fused(batches_before=v),
    "fused: seed": lambda v: fused(seed=v, steps=2),
    "MLP: size": lambda v: mlp(sizes=(3, v, 2)) if abs_of(v) < 9 else mlp(sizes=(3, -1, 2)),
}
CHOICES: dict[str, Callable[[Any], Any]] = {
    "forward: activation": lambda v: bn.batch_norm_forward(X, activation=v),
    "layer norm: activation": lambda v: bn.layer_norm_forward(X, activation=v),
    "linear: norm": lambda v: bn.linear_batch_norm_forward(X, X[:3], norm=v),
    "schedule: optimizer": lambda v: bn.update_schedule(v, 0.1, 3),
    "scheduled: optimizer": lambda v: bn.scheduled_update(v, V.copy(), V, (), V),
    "fused: optimizer": lambda v: fused(optimizer=v),
    "fused: activation": lambda v: fused(NETWORK._replace(activation=v)),
    "fused: norm": lambda v: fused(NETWORK._replace(norm=v)),
    "MLP: norm": lambda v: mlp(norm=v),
    "MLP: activation": lambda v: mlp(activation=v),
    "MLP: dtype": lambda v: mlp(dtype=v),
    "optimiser: optimizer": lambda v: make_optimizer(v, mlp(), 0.1),
}


def kind_of(value: Any) -> str:
    """Return the name of a value's type, for the names of tests."""
    return type(value).__name__


def abs_of(value: Any) -> float:
    """Return how large a number is; a large one would take the memory for as many."""
    return abs(value) if isinstance(value, int) else 0


NO_NUMBERS = [
    "0.1",
    b"1",
    True,
    np.True_,
    [0.1],
    (0.1, 0.2),
    1j,
    np.complex64(1),
    np.array([0.1]),
    X,
    Evil(),
    "9" * 9999,
    {},
]
NO_INTEGERS = [5.5, "1", b"1", True, np.True_, None, [1], X, Evil(), "9" * 9999, np.float32(1), Fraction(1)]
NO_CHOICES = [["relu"], {}, 3, "x" * 9999, b"relu", np.array(["relu", "elu"]), Evil(), ("sgd",), X]


def said(name: str, call: Callable, value: Any, *errors: type[Exception]) -> str:
    """Return what was said, after the looks that every message must stand."""
    with pytest.raises(errors) as caught:
        call(value)
    message = str(caught.value)
    assert type(caught.value) in errors
    assert name.split(": ")[1] in message
    assert len(message) < MOST
    assert "[[" not in message, "contents of an array"
    return message


@pytest.mark.parametrize("option", [*NUMBERS, *EPS, *FOLDING])
def test_what_is_no_number(option: str) -> None:
    for value in NO_NUMBERS:
        if option == "fused: lr" and isinstance(value, (list, tuple, np.ndarray)):
            continue  # one for each model
        message = said(option, (NUMBERS | EPS | FOLDING)[option], value, TypeError)
        assert "must be a number, got" in message


@pytest.mark.parametrize("option", [*NUMBERS, *EPS, *FOLDING])
def test_numbers_beyond_all_bounds(option: str) -> None:
    for value in (10**400, -(10**400), 10**5000, float("nan"), float("inf"), np.float64("nan")):
        assert "got" in said(option, (NUMBERS | EPS | FOLDING)[option], value, ValueError)


@pytest.mark.parametrize("option", [*NUMBERS, *EPS, *FOLDING])
def test_any_kind_of_number_is_one(option: str) -> None:
    call = (NUMBERS | EPS | FOLDING)[option]
    numbers = (1, Fraction(1, 1), np.float32(1), np.int64(1), np.array(1.0))
    for value in (Fraction(1, 2), np.float64(0.5), np.array(0.5)) if "beta" in option or "decay" in option else numbers:
        found, expected = call(value), call(float(value))
        assert type(found) is type(expected)
        np.testing.assert_equal(*(one.state() if hasattr(one, "state") else one for one in (found, expected)))


@pytest.mark.parametrize("option", INTEGERS)
def test_what_is_no_integer(option: str) -> None:
    for value in NO_INTEGERS:
        if option == "fused: seed" and (value is None or isinstance(value, (list, np.ndarray))):
            continue  # one for each model, or none
        assert "got" in said(option, INTEGERS[option], value, TypeError)


@pytest.mark.parametrize("option", INTEGERS)
def test_integers_beyond_all_bounds(option: str) -> None:
    for value in (10**400, 10**5000, -(10**400)):
        if option == "schedule: before" and value > 0:
            continue  # see test_a_schedule_beyond_all_steps
        assert "got" in said(option, INTEGERS[option], value, ValueError)


def test_a_schedule_beyond_all_steps() -> None:
    with pytest.raises(ValueError, match=r"before must be from 0 to \d+, got an integer of 1329 bits"):
        bn.update_schedule("adam", 0.1, 3, before=10**400)


@pytest.mark.parametrize("option", CHOICES)
def test_what_is_no_choice(option: str) -> None:
    for value in NO_CHOICES:
        if option == "MLP: dtype" and isinstance(value, Evil):
            continue  # NumPy asks for the text
        assert "got" in said(option, CHOICES[option], value, ValueError)


@pytest.mark.parametrize(
    "value", [np.ones((100, 100)), [np.ones((100, 100))] * 50, "x" * 9999, Evil(), {"y": X}], ids=kind_of
)
@pytest.mark.parametrize(
    "op", ["forward", "backward", "layer_norm_forward", "linear_batch_norm_forward", "softmax_cross_entropy"]
)
def test_what_is_no_out(op: str, value: Any) -> None:
    a = make_arrays(op)
    calls: dict[str, Callable[[Any], Any]] = {
        "forward": lambda v: bn.batch_norm_forward(a["x"], out=v),
        "backward": lambda v: bn.batch_norm_backward(a["dy"], a["x"], None, None, a["statistics"], out=v),
        "layer_norm_forward": lambda v: bn.layer_norm_forward(a["x"], out=v),
        "linear_batch_norm_forward": lambda v: bn.linear_batch_norm_forward(a["x"], a["weight"], out=v),
        "softmax_cross_entropy": lambda v: bn.softmax_cross_entropy(a["logits"], a["labels"], out=v),
    }
    assert "got" in said("of: out", calls[op], value, TypeError)


# ---- eps ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", EPS)
def test_an_eps_that_float32_has_no_normal_number_for(option: str) -> None:
    """A constant channel was NaN, or on a GPU that flushes small numbers to zero."""
    for eps in (0, 0.0, -0.0, 1e-46, 1e-39, 1.17549e-38, -1e-5, 1e39, np.float32(0)):
        message = said(option, EPS[option], eps, ValueError)
        assert "smallest normal float32" in message or "largest float32" in message


@pytest.mark.parametrize("eps", [0.0, 5e-324, 2.2e-308])
@pytest.mark.parametrize("option", FOLDING)
def test_an_eps_that_float64_has_no_normal_number_for(option: str, eps: float) -> None:
    assert "smallest normal float64" in said(option, FOLDING[option], eps, ValueError)


@pytest.mark.parametrize(("dtype", "smallest"), [("float32", 1.1754944e-38), ("float64", 2.2250738585072014e-308)])
def test_a_constant_channel_is_beta_with_the_smallest_eps(backend: Backend, dtype: str, smallest: float) -> None:
    x, beta = backend.arrays(np.full((4, 3), 7, dtype), np.full(3, 0.5, dtype))
    mean, var = backend.arrays(np.full(3, 7, dtype), np.zeros(3, dtype))
    found = (
        bn.batch_norm_forward(x, None, beta, eps=smallest)[0],
        bn.batch_norm_forward(x, None, beta, eps=smallest, mask=backend.asarray(np.ones(4, bool)))[0],
        bn.batch_norm_inference(x, None, beta, mean, var, eps=smallest),
        bn.layer_norm_forward(x, None, beta, eps=smallest)[0],
        bn.linear_batch_norm_forward(x, backend.asarray(np.full((3, 3), 2, dtype)), None, beta, eps=smallest)[0],
    )
    for y in found:
        np.testing.assert_array_equal(backend.asnumpy(y), 0.5)


def test_what_messages_show() -> None:
    endless: list[Any] = []
    endless.append(endless)
    for value, text in (
        ("relu", "'relu'"),
        (np.float32(0.5), repr(np.float32(0.5))),
        (10**30, str(10**30)),
        (-(10**400), "an integer of 1329 bits"),
        (np.array(0.5), "a numpy.ndarray of the shape () and the type float64"),
        ((X, None), "(a numpy.ndarray of the shape (4, 3) and the type float32, None)"),
        (list(range(9)), "[0, 1, 2, 3, ... (9 of them)]"),
        (endless, "[a builtins.list]"),
        ({"x": X}, "a builtins.dict of 1"),
        ("x" * 200, "'" + "x" * 99 + "..."),
    ):
        assert check.shown(value) == text
    assert check.shown(Evil()).startswith("<tests.runtime.test_option_checks.Evil object at ")
