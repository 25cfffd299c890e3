"""The reference of all benchmarks against batch norm's own definition: formulas in one form, derivatives in another."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.harness.case import Case
from benchmarks.harness.places import Host, cast, to_float64
from benchmarks.ops.bench_batch_norm import inputs
from benchmarks.peers import expression

LAYOUTS = [((6, 3), "NC"), ((4, 3, 5), "NCL"), ((2, 3, 4, 5), "NCHW"), ((2, 3, 4, 5), "NHWC")]


def arrays_of(case: Case) -> dict[str, np.ndarray]:
    """Return the case's inputs in float64."""
    return to_float64(cast(case, inputs(case, Host().random)))


def channels_first(case: Case, array: np.ndarray) -> np.ndarray:
    """Return an array as (C, everything else)."""
    return np.moveaxis(array, case.channel_axis, 0).reshape(case.shape[1], -1)


@pytest.mark.parametrize("epilogue", ["", "relu", "add_relu"])
@pytest.mark.parametrize(("shape", "layout"), LAYOUTS)
def test_the_forward_is_the_definition(shape: tuple[int, ...], layout: str, epilogue: str) -> None:
    case = Case("batch_norm", "forward", shape, "float64", layout, epilogue)
    a = arrays_of(case)
    before = {name: array.copy() for name, array in a.items()}
    y, running_mean, running_var = expression.reference(case, a, np)
    for c, x in enumerate(channels_first(case, before["x"])):
        z = (x - np.mean(x)) / np.sqrt(np.var(x) + 1e-5) * before["gamma"][c] + before["beta"][c]
        if epilogue == "add_relu":
            z = z + channels_first(case, before["residual"])[c]
        wanted = np.maximum(z, 0) if epilogue else z
        np.testing.assert_allclose(channels_first(case, y)[c], wanted, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(running_mean[c], 0.9 * before["running_mean"][c] + 0.1 * np.mean(x))
        np.testing.assert_allclose(running_var[c], 0.9 * before["running_var"][c] + 0.1 * np.var(x, ddof=1))


@pytest.mark.parametrize("epilogue", ["", "relu", "add_relu"])
@pytest.mark.parametrize(("shape", "layout"), LAYOUTS)
def test_the_backward_is_the_derivative(shape: tuple[int, ...], layout: str, epilogue: str) -> None:
    case = Case("batch_norm", "backward", shape, "float64", layout, epilogue)
    a = arrays_of(case)
    gradients = expression.reference(case, a, np)
    names = ["x", "gamma", "beta"] + (["residual"] if epilogue == "add_relu" else [])
    assert len(gradients) == len(names)
    rng = np.random.default_rng(1)
    for name, gradient in zip(names, gradients, strict=True):
        direction = rng.standard_normal(a[name].shape)
        values = []
        for step in (1e-6, -1e-6):
            h, *_ = expression.forward(case, a | {name: a[name] + step * direction})
            values.append((h * a["dy"]).sum())
        slope = (values[0] - values[1]) / 2e-6
        np.testing.assert_allclose((gradient * direction).sum(), slope, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("epilogue", ["relu", "add_relu"])
def test_a_gradient_that_rounding_may_stop_is_0(dtype: str, epilogue: str) -> None:
    """Rounded twice, as a framework may do it that stores what comes before the ReLU, nothing changes."""
    pytest.importorskip("ml_dtypes", reason="bfloat16 needs ml_dtypes")
    case = Case("batch_norm", "backward", (2000, 5), dtype, "NC", epilogue)
    arrays = cast(case, inputs(case, Host().random))
    exact = to_float64(arrays)
    z, *_ = expression.forward(Case("batch_norm", "backward", case.shape, "float64"), exact)
    stored = z.astype(arrays["x"].dtype)
    if epilogue == "add_relu":
        z, stored = z + exact["residual"], stored + arrays["residual"]
    stopped = exact["dy"] == 0
    assert (stopped.mean() > 0.01) == (dtype == "bfloat16")
    assert ((z > 0) == (stored > 0))[~stopped].all()
