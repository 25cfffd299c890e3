"""Folding: one layer that does what two did."""

from __future__ import annotations

import numpy as np
import pytest

import bnkernels as bn
from tools.backends import Backend

NAMES = ("gamma", "beta", "running_mean", "running_var")


def vectors(rng: np.random.Generator, channels: int, dtype: str) -> dict[str, np.ndarray]:
    """Return parameters and running statistics, with a mean that matters."""
    return {name: rng.uniform(0.5, 2, channels).astype(dtype) + (10 if name == "running_mean" else 0) for name in NAMES}


@pytest.mark.parametrize("absent", [(), ("gamma",), ("beta",), ("gamma", "beta")])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_scale_and_shift_are_the_inference(
    backend: Backend, rng: np.random.Generator, dtype: str, absent: tuple[str, ...]
) -> None:
    x = rng.standard_normal((50, 7)).astype(dtype)
    given = vectors(rng, 7, dtype) | dict.fromkeys(absent)
    x_there, *there = backend.arrays(x, *given.values())
    y = backend.asnumpy(bn.batch_norm_inference(x_there, *there))
    scale, shift = map(backend.asnumpy, bn.batch_norm_scale_shift(*there))
    assert scale.dtype == shift.dtype == np.dtype(dtype)
    # Both round a shift of some tens, and the result.
    np.testing.assert_allclose(scale * x + shift, y, atol=200 * np.finfo(dtype).eps, rtol=0)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(("axis", "shape"), [(0, (5, 3)), (1, (3, 5)), (-1, (3, 5)), (0, (5, 3, 2, 2))])
def test_one_layer_does_what_two_did(
    backend: Backend, rng: np.random.Generator, axis: int, shape: tuple[int, ...], with_bias: bool
) -> None:
    weight, bias = rng.standard_normal(shape), rng.standard_normal(5) if with_bias else None
    given = vectors(rng, 5, "float64")

    def layer(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
        """Apply the weights to flattened inputs."""
        rows = np.moveaxis(weight, axis, 0).reshape(5, -1)
        return x @ rows.T + (0 if bias is None else bias)

    x = rng.standard_normal((20, weight.size // 5))
    two = bn.batch_norm_inference(layer(x, weight, bias), *given.values(), eps=1e-3)
    folded = bn.fold_batch_norm(*backend.arrays(weight, bias, *given.values()), eps=1e-3, axis=axis)
    one = layer(x, *map(backend.asnumpy, folded))
    np.testing.assert_allclose(one, two, rtol=1e-12, atol=1e-12)
    assert folded[0].shape == shape


@pytest.mark.parametrize("groups", [2, 3])
def test_each_group_of_a_transposed_convolution_folds_as_one_of_its_own(
    backend: Backend, rng: np.random.Generator, groups: int
) -> None:
    inputs, outputs = 2, 5  # numbers of channels of one group
    weight = rng.standard_normal((groups * inputs, outputs, 3, 2))
    bias, given = rng.standard_normal(groups * outputs), vectors(rng, groups * outputs, "float64")
    options = {"eps": 1e-3, "axis": 1}
    folded = bn.fold_batch_norm(*backend.arrays(weight, bias, *given.values()), groups=groups, **options)
    for group in range(groups):
        own = slice(group * outputs, (group + 1) * outputs)
        ins = slice(group * inputs, (group + 1) * inputs)
        vector = (array[own] for array in given.values())
        one = bn.fold_batch_norm(*backend.arrays(weight[ins], bias[own], *vector), **options)
        np.testing.assert_array_equal(backend.asnumpy(folded[0])[ins], backend.asnumpy(one[0]))
        np.testing.assert_array_equal(backend.asnumpy(folded[1])[own], backend.asnumpy(one[1]))


def test_the_trained_network_folds_into_linear_layers(rng: np.random.Generator) -> None:
    model = bn.MLP((6, 5, 3), seed=1)
    for _ in range(20):
        model.forward(rng.standard_normal((16, 6)).astype("float32") + 1, training=True)
    state = model.state()
    x = rng.standard_normal((9, 6)).astype("float32")
    weight, bias = bn.fold_batch_norm(state["0.weight"], None, *(state[f"0.{name}"] for name in NAMES), axis=1)
    logits = np.maximum(x @ weight + bias, 0) @ state["1.weight"] + state["1.bias"]
    np.testing.assert_allclose(logits, model.forward(x, training=False), rtol=1e-4, atol=1e-5)


def test_nothing_given_is_written(backend: Backend, rng: np.random.Generator) -> None:
    arrays = [rng.standard_normal((5, 3)), rng.standard_normal(5), *vectors(rng, 5, "float64").values()]
    there = backend.arrays(*arrays)
    bn.fold_batch_norm(*there)
    for before, after in zip(arrays, there, strict=True):
        np.testing.assert_array_equal(backend.asnumpy(after), before)


V = np.ones(5)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((np.ones((5, 3)), None, V, V, V, V), {"axis": 2}, ValueError, "one of the 2 axes of weight"),
        ((np.ones((5, 3)), None, V, V, V, V), {"axis": 1}, ValueError, r"3 channels along axis 1.*name the axis"),
        ((np.ones((5, 3)), np.ones(3), V, V, V, V), {}, ValueError, r"bias must have the shape \(5,\)"),
        ((np.ones((5, 3)), None, np.ones(4), V, V, V), {}, ValueError, "gamma must be a vector of as many channels"),
        ((np.ones((5, 3)), None, V, V, V, np.ones((5, 1))), {}, ValueError, "running_var must be a vector"),
        ((np.ones((5, 3)), None, V, V, V, V), {"eps": -1}, ValueError, "eps must be at least 2.225e-308"),
        ((np.ones((4, 5)), None, V, V, V, V), {"groups": 0, "axis": 1}, ValueError, "groups must be"),
        ((np.ones((4, 5)), None, V, V, V, V), {"groups": 2}, ValueError, "axis=0 and a weight of the shape"),
        ((np.ones((4, 5)), None, V, V, V, V), {"groups": 3, "axis": 1}, ValueError, "must divide the inputs"),
        ((np.ones((4, 5)), None, V, V, V, V), {"groups": 2, "axis": 1}, ValueError, "10 channels along axis 1"),
        (([[1.0]], None, V, V, V, V), {}, TypeError, "expected a NumPy or a CuPy array"),
        ((np.ones((5, 3)), None, V, V, None, V), {}, TypeError, "running_mean must be an array, got None"),
    ],
)
def test_bad_arguments_are_refused(arguments: tuple, options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        bn.fold_batch_norm(*arguments, **options)
