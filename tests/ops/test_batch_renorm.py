"""Batch renormalisation: its algorithm 1, its two limits, and r and d as constants of the gradient."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import bnkernels as bn
from tools import oracle
from tools.backends import Backend
from tools.oracle import Extended

EPS = 1e-3


def make(rng: np.random.Generator, dtype: str) -> dict[str, np.ndarray]:
    """Return data whose running statistics are near for some channels and far for others."""
    arrays = {name: rng.standard_normal((90, 6)) for name in ("x", "dy")}
    arrays |= {"gamma": rng.uniform(-2, 2, 6), "beta": rng.standard_normal(6)}
    arrays["running_mean"] = np.array([0, 0.1, -0.2, 3, -5, 0])
    arrays["running_var"] = np.array([1, 1.2, 0.8, 0.01, 40, 1])
    return {name: array.astype(dtype) for name, array in arrays.items()}


def r_and_d(arrays: dict[str, np.ndarray], r_max: float, d_max: float) -> tuple[np.ndarray, np.ndarray]:
    """Return r and d in extended precision."""
    x, mean, var = (arrays[name].astype(Extended) for name in ("x", "running_mean", "running_var"))
    running = np.sqrt(var + Extended(arrays["x"].dtype.type(EPS)))
    r = np.sqrt(x.var(0) + Extended(arrays["x"].dtype.type(EPS))) / running
    return np.clip(r, 1 / Extended(r_max), Extended(r_max)), np.clip(
        (x.mean(0) - mean) / running, -Extended(d_max), Extended(d_max)
    )


def run(backend: Backend, arrays: dict[str, np.ndarray], renorm: Any, activation: str = "tanh", **more: Any) -> dict:
    """Return all outputs by name."""
    on = {name: backend.asarray(array) for name, array in (arrays | more).items()}
    options = {"activation": activation, **({"mask": on["mask"]} if "mask" in on else {})}
    given = [on[name] for name in ("x", "gamma", "beta", "running_mean", "running_var")]
    y, statistics = bn.batch_norm_forward(*given, eps=EPS, renorm=renorm, **options)
    grads = bn.batch_norm_backward(on["dy"], *given[:3], statistics, **options)
    found = {"y": y, "statistics": statistics, "mean": given[3], "var": given[4]}
    found |= dict(zip(("dx", "dgamma", "dbeta"), grads, strict=True))
    return {name: backend.asnumpy(array) for name, array in found.items()}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("limits", [(3.0, 5.0), (1.5, 0.25)])
def test_renorm_is_algorithm_1(
    backend: Backend, rng: np.random.Generator, dtype: str, limits: tuple[float, float]
) -> None:
    """With r and d given it is batch norm with gamma r for gamma and gamma d + beta for beta."""
    arrays = make(rng, dtype)
    found = run(backend, arrays, limits)
    r, d = r_and_d(arrays, *limits)
    u = oracle.unit_roundoff(np.dtype(dtype))
    oracle.assert_within(found["statistics"][3], r, 8 * u * r, "r")
    oracle.assert_within(found["statistics"][4], d, 8 * u * (1 + np.abs(d)) * r, "d")
    gamma, beta = (arrays[name].astype(Extended) for name in ("gamma", "beta"))
    exact = oracle.forward(arrays["x"], gamma * r, gamma * d + beta, EPS, "tanh")
    # Roundings of d move z by gamma times as much.
    slack = 2 * exact.z_bound + 8 * u * np.abs(gamma) * (1 + np.abs(d)) * (1 + r)
    oracle.assert_within(found["y"], exact.y, slack, "y")
    grads = oracle.backward(arrays["dy"], arrays["x"], gamma * r, gamma * d + beta, EPS, "tanh")
    more = np.abs(arrays["dy"]).sum(0) * slack.max(0)
    oracle.assert_within(found["dbeta"], grads.dbeta, grads.dbeta_bound + more, "dbeta")
    oracle.assert_within(found["dgamma"], r * grads.dgamma + d * grads.dbeta, (r + abs(d)) * (more * 8), "dgamma")
    oracle.assert_within(found["dx"], grads.dx, grads.dx_bound + np.abs(gamma * r) * more * 8, "dx")


def test_limits_of_1_and_0_are_batch_norm(backend: Backend, rng: np.random.Generator) -> None:
    arrays = make(rng, "float64")
    found = run(backend, arrays, (1, 0))
    plain = run(backend, arrays, None)
    for name in ("y", "dx", "dgamma", "dbeta", "mean", "var"):
        np.testing.assert_allclose(found[name], plain[name], rtol=1e-11, atol=1e-13, err_msg=name)
    np.testing.assert_array_equal(found["statistics"][3:], [[1] * 6, [0] * 6])


def test_without_limits_the_output_is_that_of_inference(backend: Backend, rng: np.random.Generator) -> None:
    arrays = make(rng, "float64")
    given = [arrays[name] for name in ("x", "gamma", "beta", "running_mean", "running_var")]
    want = bn.batch_norm_inference(*given, eps=EPS, activation="tanh")
    found = run(backend, arrays, (1e6, 1e6))
    np.testing.assert_allclose(found["y"], want, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(found["mean"], 0.9 * arrays["running_mean"] + 0.1 * arrays["x"].mean(0), rtol=1e-12)


def test_renorm_of_the_valid_rows(backend: Backend, rng: np.random.Generator) -> None:
    arrays = make(rng, "float64")
    mask = rng.random(90) < 0.5
    found = run(backend, arrays, (2.0, 1.0), mask=mask)
    alone = run(backend, arrays | {name: arrays[name][mask] for name in ("x", "dy")}, (2.0, 1.0))
    for name, got in found.items():
        got = got[mask] if name in ("y", "dx") else got
        np.testing.assert_allclose(got, alone[name], rtol=1e-11, atol=1e-12, err_msg=name)
    nothing = run(backend, arrays, (2.0, 1.0), mask=np.zeros(90, bool))
    np.testing.assert_array_equal(nothing["statistics"], [[0] * 6] * 3 + [[1] * 6, [0] * 6])


def test_the_gradient_takes_r_and_d_for_constants(backend: Backend, rng: np.random.Generator) -> None:
    """Central differences of the formula with r and d held still."""
    arrays = make(rng, "float64")
    found = run(backend, arrays, (1.5, 0.5), "identity")
    r, d = r_and_d(arrays, 1.5, 0.5)

    def loss(x: np.ndarray) -> float:
        xhat = (x - x.mean(0)) / np.sqrt(x.var(0) + EPS)
        return float(((arrays["gamma"] * (xhat * r + d) + arrays["beta"]) * arrays["dy"]).sum())

    for index in [(0, 0), (7, 3), (40, 4), (89, 5)]:
        step = np.zeros_like(arrays["x"])
        step[index] = 1e-5
        numeric = (loss(arrays["x"] + step) - loss(arrays["x"] - step)) / 2e-5
        assert abs(numeric - found["dx"][index]) <= 1e-6 * (1 + abs(numeric))


@pytest.mark.parametrize(
    ("renorm", "error", "message"),
    [
        (3.0, TypeError, r"renorm must be a tuple \(r_max, d_max\), such as \(3\.0, 5\.0\), got 3\.0"),
        ((3.0,), TypeError, r"renorm must be a tuple \(r_max, d_max\)"),
        ((0.5, 1.0), ValueError, "r_max must be at least 1 and finite, got 0.5"),
        ((2.0, -1.0), ValueError, "d_max must be at least 0 and finite, got -1.0"),
        ((2.0, float("nan")), ValueError, "d_max must be at least 0 and finite, got nan"),
    ],
)
def test_wrong_renorm_limits_are_refused(backend: Backend, renorm: Any, error: type, message: str) -> None:
    x, mean, var = backend.arrays(np.ones((4, 3)), np.zeros(3), np.ones(3))
    with pytest.raises(error, match=message):
        bn.batch_norm_forward(x, None, None, mean, var, renorm=renorm)


def test_renorm_needs_running_statistics(backend: Backend) -> None:
    with pytest.raises(TypeError, match="running_mean must be an array, got None"):
        bn.batch_norm_forward(backend.asarray(np.ones((4, 3))), renorm=(3.0, 5.0))
