"""LSTM: arguments that are wrong are refused with the way out, and nothing is written."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import bnkernels as bn
from tests.regress.refusal import refused
from tools.backends import Backend

T, N, K, H = 3, 4, 2, 5  # time steps, examples, inputs, hidden units
F32 = np.float32


def norms() -> tuple[np.ndarray, ...]:
    return tuple(np.ones(length, F32) for length in (4 * H, 4 * H, H, H))


def running(steps: int = 3) -> tuple[np.ndarray, ...]:
    return tuple(np.ones((steps, length), F32) for length in (*[4 * H] * 4, H, H))


def on(backend: Backend, value: Any) -> Any:
    """Return arrays, and those of tuples, on a backend; lists stay on the host."""
    if isinstance(value, tuple):
        return tuple(on(backend, one) for one in value)
    return backend.asarray(value) if isinstance(value, np.ndarray) else value


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": np.ones((T, N), F32)}, ValueError, r"x must have the shape \(T, N, I\), time first, got \(3, 4\)"),
        ({"x": np.ones((T, N, 0), F32)}, ValueError, "x must have at least one input"),
        ({"x": np.ones((T, N, K), "float16")}, TypeError, "x must be float32 or float64, got float16"),
        ({"h0": np.ones((N, H + 1), F32)}, ValueError, r"h0 must have the shape \(4, 5\), got \(4, 6\)"),
        ({"c0": np.ones((N, H))}, TypeError, "c0 must be float32, got float64"),
        ({"weight_ih": np.ones((H, K), F32)}, ValueError, r"weight_ih must have the shape \(20, 2\), got \(5, 2\)"),
        ({"weight_hh": np.ones((H, 4 * H), F32)}, ValueError, r"weight_hh must have the shape \(4 H, H\)"),
        ({"weight_hh": np.ones((0, 0), F32)}, ValueError, r"weight_hh must have the shape \(4 H, H\)"),
        ({"bias": np.ones(H, F32)}, ValueError, r"bias must have the shape \(20,\), got \(5,\)"),
        ({"bias": np.ones(40, F32)[::2]}, ValueError, "bias must be contiguous in C order"),
        ({"norm": "group"}, ValueError, "norm must be one of batch, layer, None; got 'group'"),
        ({"norm": "batch"}, ValueError, r"norms must be \(gamma_x, gamma_h, gamma_c, beta_c\) with norm='batch'"),
        ({"norms": norms()}, ValueError, "norms belong to a norm"),
        ({"norm": "layer", "norms": norms()[:3]}, TypeError, r"norms must be a tuple of the 4 arrays \(gamma_x"),
        ({"norm": "layer", "norms": norms()[::-1]}, ValueError, r"gamma_x must have the shape \(20,\), got \(5,\)"),
        ({"running": running()}, ValueError, "running belongs to batch norm; with norm=None there is none to update"),
        ({"norm": "batch", "norms": norms(), "training": False}, ValueError, "running must be given with training=F"),
        ({"norm": "batch", "norms": norms(), "running": running(0)}, ValueError, "at least one time step"),
        ({"norm": "batch", "norms": norms(), "running": running()[1:]}, TypeError, "a tuple of the 6 arrays"),
        (
            {"norm": "batch", "norms": norms(), "running": (*running()[:5], np.ones((2, H), F32))},
            ValueError,
            r"var_c must have the shape \(3, 5\), got \(2, 5\)",
        ),
        ({"training": 1}, TypeError, "training must be True or False"),
        ({"keep": None}, TypeError, "keep must be True or False"),
        ({"momentum": 2.0}, ValueError, "momentum must be at least 0 and|momentum must be between 0 and 1"),
        ({"eps": 0}, ValueError, "eps must be at least"),
        ({"lengths": [1, 2, 3]}, ValueError, r"lengths must have the shape \(4,\), one for every example, got \(3,\)"),
        ({"lengths": [1, 2, 3, 4]}, ValueError, "lengths must be from 1 to T, here 3, got 4"),
        ({"lengths": [1, 0, 3, 3]}, ValueError, "lengths must be from 1 to T, here 3, got 0; leave empty sequences"),
        ({"lengths": [1.0, 2, 3, 3]}, TypeError, "lengths must be integers, got float64"),
        ({"lengths": 3}, TypeError, "lengths must be a NumPy array of integers, or a list"),
        ({"out": ()}, TypeError, r"out must be a tuple of the 3 arrays \(y, h_n, c_n\)"),
        ({"reuse": ()}, TypeError, "reuse must be the last result of lstm_forward with keep=True"),
    ],
)
def test_what_is_wrong_is_refused(
    backend: Backend, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    given: dict[str, Any] = {
        "x": np.ones((T, N, K), F32),
        "h0": np.ones((N, H), F32),
        "c0": np.ones((N, H), F32),
        "weight_ih": np.ones((4 * H, K), F32),
        "weight_hh": np.ones((4 * H, H), F32),
        "bias": np.ones(4 * H, F32),
    } | change
    strided = backend.like(given.pop("bias"))
    given = {name: value if name == "lengths" else on(backend, value) for name, value in given.items()}
    given["bias"] = strided
    with refused(backend, error, message):
        bn.lstm_forward(**given)


def test_one_example_has_no_variance(backend: Backend) -> None:
    x, ih, hh = (np.ones(shape, F32) for shape in ((T, 1, K), (4 * H, K), (4 * H, H)))
    with refused(backend, ValueError, "x has one example: one value per unit has no variance"):
        bn.lstm_forward(
            on(backend, x), None, None, on(backend, ih), on(backend, hh), None, on(backend, norms()), norm="batch"
        )


def test_lengths_stay_on_the_host(backend: Backend) -> None:
    if backend.is_numpy:
        pytest.skip("these arrays are on the host")
    x, ih, hh = (np.ones(shape, F32) for shape in ((T, N, K), (4 * H, K), (4 * H, H)))
    with refused(backend, TypeError, "pass cupy.asnumpy of them"):
        bn.lstm_forward(*on(backend, (x,)), None, None, *on(backend, (ih, hh)), lengths=on(backend, np.full(N, T)))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"saved": None}, TypeError, "saved must be the last result of lstm_forward with keep=True, got None"),
        ({"dy": np.ones((T, N, H + 1), F32)}, ValueError, r"dy must have the shape \(3, 4, 5\), got \(3, 4, 6\)"),
        ({"dh_n": np.ones((N, H))}, TypeError, "dh_n must be float32, got float64"),
        ({"dc_n": np.ones(H, F32)}, ValueError, r"dc_n must have the shape \(4, 5\)"),
        ({"input_gradient": 1}, TypeError, "input_gradient must be True or False"),
        ({"out": (1, 2)}, TypeError, r"out must be the tuple of arrays \(dx, dh0, dc0, .*, dbias, None\)"),
    ],
)
def test_what_is_wrong_is_refused_backwards(
    backend: Backend, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    x, ih, hh = (np.ones(shape, F32) for shape in ((T, N, K), (4 * H, K), (4 * H, H)))
    saved = bn.lstm_forward(on(backend, x), None, None, on(backend, ih), on(backend, hh))[3]
    given = {"dy": None, "dh_n": None, "dc_n": None, "saved": saved} | change
    given = {name: value if name == "saved" else on(backend, value) for name, value in given.items()}
    with refused(backend, error, message):
        bn.lstm_backward(**given)


def test_gradients_must_not_lie_in_what_is_read(backend: Backend) -> None:
    x, ih, hh = (np.ones(shape, F32) for shape in ((T, N, K), (4 * H, K), (4 * H, H)))
    x, ih, hh, _, *states = on(backend, (x, ih, hh, np.ones(4 * H, F32), np.ones((N, H), F32), np.ones((N, H), F32)))
    saved = bn.lstm_forward(x, None, None, ih, hh)[3]
    good = on(backend, tuple(np.ones(shape, F32) for shape in ((4 * H, K), (4 * H, H), (4 * H,))))
    with refused(backend, ValueError, "dx overlaps x in memory", x, *states):
        bn.lstm_backward(None, states[0], None, saved, out=(x, *on(backend, (np.ones((N, H), F32),) * 2), *good, None))
