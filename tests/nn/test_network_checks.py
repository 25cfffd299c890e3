"""Wrong networks are refused, by the fused trainer and by MLP, before anything is changed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import bnkernels as bn
from benchmarks.ops.bench_fused_training import NETWORK
from bnkernels.ops.fused_training.spec import NetworkSpec as Spec
from tests.regress.calls import make_arrays
from tests.regress.refusal import refused
from tools import backends
from tools.backends import Backend

NUMPY = backends.make("numpy")

# ---- networks -------------------------------------------------------------------------------------------------------

FIRST, LAST = NETWORK.layers
NETWORKS: dict[str, tuple[Any, type[Exception], str]] = {
    "none": (None, TypeError, "network must be a NetworkSpec, such as MLP.fused, got None"),
    "an MLP": (bn.MLP((3, 4, 2)), TypeError, "network must be a NetworkSpec"),
    "a list": (Spec([FIRST, LAST]), TypeError, "layers of the network must be a tuple"),
    "no layer": (Spec(()), TypeError, "layers of the network must be a tuple of at least one LayerSpec"),
    "tuples": (Spec((tuple(FIRST), tuple(LAST))), TypeError, "layers of the network must be a tuple"),
    "negative": (Spec((FIRST._replace(outputs=-4), LAST)), ValueError, "outputs of layer 0 must be from 1 to"),
    "of no input": (Spec((FIRST._replace(inputs=0), LAST)), ValueError, "inputs of layer 0 must be from 1 to"),
    "fraction": (
        Spec((FIRST, LAST._replace(weight=24.0))),
        TypeError,
        "weight of layer 1 must be an integer, got 24.0",
    ),
    "huge": (
        Spec((FIRST, LAST._replace(shift=2**31))),
        ValueError,
        "shift of layer 1 must be from 0 to 2147483647",
    ),
    "unlike": (
        Spec((FIRST, LAST._replace(inputs=5))),
        ValueError,
        "as many inputs as the one before has outputs",
    ),
    "norm at the end": (
        Spec((FIRST, LAST._replace(gamma=0))),
        ValueError,
        "last layer gives the logits and has no norm",
    ),
    "beyond": (Spec((FIRST, LAST._replace(shift=40))), ValueError, "multiples of 4 within the 40 parameters"),
    "misaligned": (
        Spec((FIRST._replace(gamma=17), LAST)),
        ValueError,
        "multiples of 4 within the 40 parameters",
    ),
    "overlap": (
        Spec((FIRST, LAST._replace(weight=12))),
        ValueError,
        "weight of layer . takes .* and overlaps weight of",
    ),
    "shared": (
        Spec((FIRST._replace(shift=16), LAST)),
        ValueError,
        "(gamma|shift) of layer 0 takes 16 to 19 and overlaps",
    ),
    "statistics": (
        Spec((FIRST._replace(variance=2), LAST)),
        ValueError,
        "mean of layer 0 takes 0 to 3 and overlaps var",
    ),
    "no statistics": (
        Spec((FIRST._replace(mean=-1), LAST)),
        ValueError,
        "must lie within the 8 running statistics",
    ),
    "momentum": (NETWORK._replace(momentum=7), ValueError, "momentum must be between 0 and 1 and finite, got 7"),
    "unbiased": (NETWORK._replace(unbiased=1), TypeError, "unbiased must be True or False, got 1"),
    "eps": (NETWORK._replace(eps=-1.0), ValueError, "eps must be at least 1.175e-38"),
    "eps nan": (NETWORK._replace(eps=np.nan), ValueError, "eps must be finite, got nan"),
    "activation": (NETWORK._replace(activation=["relu"]), ValueError, "activation must be one of"),
    "norm": (NETWORK._replace(norm=None), ValueError, "norm must be one of batch, layer; got None"),
}


@pytest.mark.parametrize("wrong", NETWORKS)
def test_a_network_is_checked_whole(backend: Backend, wrong: str) -> None:
    """Sizes and places went to the kernel as they were, which wrote wherever they said."""
    network, error, message = NETWORKS[wrong]
    a = {name: backend.asarray(array) for name, array in make_arrays("fused_training").items()}
    given = a["parameters"], (a["velocity"],), a["running"], a["x"], a["labels"]
    with refused(backend, error, message, *a.values()):
        bn.fused_training(network, *given, batch=6, optimizer="momentum", lr=0.1)


@pytest.mark.parametrize("state", [None, 3, np.ones(40, "float32"), "velocity"], ids=lambda value: type(value).__name__)
def test_a_state_is_a_tuple(state: Any) -> None:
    arrays = make_arrays("fused_training")
    given = arrays["running"], arrays["x"], arrays["labels"]
    with refused(NUMPY, TypeError, "state must be a tuple of arrays, for momentum 1, got", *arrays.values()):
        bn.fused_training(NETWORK, arrays["parameters"], state, *given, batch=6, optimizer="momentum", lr=0.1)
    with refused(NUMPY, TypeError, "state must be a tuple of arrays, for momentum 1, got", *arrays.values()):
        bn.scheduled_update("momentum", arrays["parameters"], arrays["velocity"], state, np.ones(3, "float32"))


def test_counts_before_are_not_negative() -> None:
    a = make_arrays("fused_training")
    given = a["parameters"], (), a["running"], a["x"], a["labels"]
    for name in ("steps_before", "batches_before"):
        with pytest.raises(ValueError, match=f"{name} must be from 0 to"):
            bn.fused_training(NETWORK, *given, batch=6, lr=0.1, **{name: -1})


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
@pytest.mark.parametrize(("name", "value"), [("labels", 3), ("labels", -1), ("indices", 12), ("indices", -1)])
def test_a_wrong_label_or_index_changes_nothing_on_numpy(optimizer: str, name: str, value: int) -> None:
    """It was found in its mini-batch, when all before it had been trained on."""
    a = make_arrays("fused_training")
    a["indices"] = np.arange(12, dtype="int32").reshape(2, 6)
    a[name].reshape(-1)[11] = value  # in the last step
    state = tuple(np.ones_like(a["parameters"]) for _ in range({"sgd": 0, "momentum": 1, "adam": 2}[optimizer]))
    given = a["parameters"], state, a["running"], a["x"], a["labels"]
    for indices in (a["indices"], None) if name == "labels" else (a["indices"],):
        with refused(NUMPY, ValueError, rf"{name} must be from 0 to \d+, .*; got {value}", *a.values(), *state):
            bn.fused_training(NETWORK, *given, batch=6, optimizer=optimizer, lr=0.1, indices=indices)
    if name == "labels":
        with refused(NUMPY, ValueError, "labels must be from 0 to 2", *a.values(), *state):
            bn.fused_training(NETWORK, *given, batch=6, optimizer=optimizer, lr=0.1, seed=1, steps=3)
        a["indices"][1, 5] = 0  # nobody looks at that row then
        bn.fused_training(NETWORK, *given, batch=6, optimizer=optimizer, lr=0.1, indices=a["indices"])


# ---- MLP ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["batch", "layer", "none"])
def test_a_network_names_what_it_was_given(backend: Backend, norm: str) -> None:
    """Running statistics, gradients and NumPy's product were named, which nobody had passed."""
    model = bn.MLP((4, 5, 3), norm=norm, xp=backend.xp)
    x, wide, few, flat = backend.arrays(
        *(np.ones((6, 4), t) for t in ("f4", "f8")), np.ones((6, 3), "f4"), np.ones(4, "f4")
    )
    with pytest.raises(RuntimeError, match=r"call forward\(x, training=True\) before it"):
        model.backward(few)
    for array, error, message in (
        (wide, TypeError, r"x must be float32, got float64; convert it with x\.astype\('float32'\)"),
        (few, ValueError, r"x must have the shape \(N, 4\), got \(6, 3\)"),
        (flat, ValueError, r"x must have the shape \(N, 4\), got \(4,\)"),
        ([[1.0] * 4], TypeError, "^x: expected a NumPy or a CuPy array, got builtins.list"),
        (None, TypeError, "x must be an array, got None"),
    ):
        with refused(backend, error, message, model.parameters, model.running):
            model.forward(array, training=True)
    logits = model.forward(x, training=True)
    for array, error, message in (
        (backend.asarray(np.ones((6, 3))), TypeError, "dlogits must be float32, got float64"),
        (few[:5], ValueError, r"dlogits must have the shape \(6, 3\), got \(5, 3\)"),
        (x, ValueError, r"dlogits must have the shape \(6, 3\), got \(6, 4\)"),
    ):
        with refused(backend, error, message, model.gradients):
            model.backward(array)
    model.backward(logits)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sizes": 20}, TypeError, r"sizes must be a sequence such as \(64, 20, 10\), got 20"),
        ({"sizes": (4, 5.5, 3)}, TypeError, "a size must be an integer, got 5.5"),
        ({"sizes": (4, 0, 3)}, ValueError, "all positive"),
        ({"xp": "cupy"}, TypeError, "xp must be an array module, numpy or cupy, got 'cupy'; import it"),
        ({"dtype": "float16"}, ValueError, "dtype must be float32 or float64, got 'float16'"),
        ({"dtype": "single precision"}, ValueError, "dtype must be float32 or float64, got 'single precision'"),
        ({"norm": "none", "eps": 0.0}, ValueError, "eps must be at least"),
        ({"norm": "none", "momentum": 2}, ValueError, "momentum must be between 0 and 1"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else None,
)
def test_a_network_that_cannot_be(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        bn.MLP(**{"sizes": (3, 4, 2)} | options)


@pytest.mark.parametrize("dtype", [np.float64, np.dtype("float64"), "float64", "f8", float])
def test_a_data_type_is_what_numpy_takes_for_one(dtype: Any) -> None:
    model = bn.MLP((3, 4, 2), dtype=dtype)
    assert (model.dtype, model.parameters.dtype) == ("float64", np.float64)
