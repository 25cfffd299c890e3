"""Refusals of an op come before it has written anything: read-only outputs, overlaps through any memory."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import bnkernels as bn
from bnkernels import nn
from bnkernels.nn.optimizers import make_optimizer
from bnkernels.ops.batch_norm import problem
from tests.regress.calls import EVERY, EVERY_OUTPUT, make_arrays, named, run
from tests.regress.device import record_of, recording
from tests.regress.refusal import refused
from tools import backends
from tools.backends import Backend

NUMPY = backends.make("numpy")


@pytest.mark.parametrize("op", EVERY)
def test_unspoilt_calls_write_every_output_and_no_input(backend: Backend, op: str) -> None:
    """The calls of the tests below are refused for their fault alone."""
    arrays = make_arrays(op)
    on = {name: backend.asarray(array) for name, array in arrays.items()}
    run(op, on)
    written = {name for name in on if not np.array_equal(backend.asnumpy(on[name]), arrays[name])}
    never = {"workspace"}  # without a product behind it, or with one block
    never |= {"labels_out"}  # zeros before and after
    assert written - never == set(EVERY[op].writes) - never


# ---- read-only outputs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("op", "name"), EVERY_OUTPUT)
def test_a_read_only_output_is_refused_first(op: str, name: str) -> None:
    """NumPy noticed when it wrote, and what came before was changed by then."""
    arrays = make_arrays(op)
    arrays[name].flags.writeable = False
    with refused(NUMPY, ValueError, rf"{named(op, name)} must be writable, got a read-only .*copy", *arrays.values()):
        run(op, arrays)


@pytest.mark.parametrize("op", EVERY)
def test_inputs_may_be_read_only(op: str) -> None:
    arrays, usual = make_arrays(op), make_arrays(op)
    for name in EVERY[op].reads:
        arrays[name].flags.writeable = False
    run(op, arrays)
    run(op, usual)
    for name in EVERY[op].writes:
        np.testing.assert_array_equal(arrays[name], usual[name])


@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
def test_a_layer_refuses_to_own_what_is_read_only(name: str) -> None:
    arrays = {key: np.ones(3, "float32") for key in ("weight", "bias", "running_mean", "running_var")}
    nn.BatchNorm.from_arrays(**arrays)
    arrays[name].flags.writeable = False
    with pytest.raises(ValueError, match=f"{name} must be writable"):
        nn.BatchNorm.from_arrays(**arrays)


@pytest.mark.parametrize("kind", [nn.BatchNorm, nn.LayerNorm])
def test_a_layer_does_not_write_over_dy(kind: type) -> None:
    layer = kind(3)
    x, dy = (np.arange(12, dtype="float32").reshape(4, 3) for _ in range(2))
    layer.forward(x, training=True)
    dy.flags.writeable = False
    assert layer.backward(dy) is not dy


# ---- overlaps -------------------------------------------------------------------------------------------------------


def through_ctypes(array: np.ndarray) -> np.ndarray:
    block = (ctypes.c_char * array.nbytes).from_address(array.ctypes.data)
    return np.frombuffer(block, array.dtype).reshape(array.shape)


FOREIGN: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "dlpack": lambda array: np.from_dlpack(array),
    "memoryview": lambda array: np.frombuffer(memoryview(array).cast("B"), array.dtype).reshape(array.shape),
    "as_strided": lambda array: np.lib.stride_tricks.as_strided(array),
    "ctypes": through_ctypes,
}


def pairs(op: str) -> Iterator[tuple[str, str]]:
    """Yield each output of an op with an array of the same form, where it may not be that."""
    arrays, legal = make_arrays(op), {"dx", "ddy", "y", "out", "dlogits"}  # may be an input, exactly
    for name, other in product(EVERY[op].writes, EVERY[op].names):
        one, two = arrays[name], arrays[other]
        if other != name and one.dtype == two.dtype and one.size >= two.size and name not in legal | {"workspace"}:
            yield name, other


@pytest.mark.parametrize("way", FOREIGN)
@pytest.mark.parametrize("op", EVERY)
def test_an_overlap_through_foreign_memory_is_refused(op: str, way: str) -> None:
    """Only the arrays' owners were compared: what came from elsewhere had none, and inputs were overwritten."""
    for name, other in pairs(op):
        arrays = make_arrays(op)
        part = arrays[name].reshape(-1)[: arrays[other].size].reshape(arrays[other].shape)
        arrays[other] = FOREIGN[way](part)
        names = "|".join((named(op, name), named(op, other)))
        with refused(NUMPY, ValueError, f"({names}) overlaps ({names}) in memory", *arrays.values()):
            run(op, arrays)


def test_an_overlap_through_a_tensor_is_refused(torch: ModuleType) -> None:
    arrays = make_arrays("forward")
    arrays["gamma"] = torch.from_numpy(arrays["running_mean"]).numpy()
    with refused(NUMPY, ValueError, "running_mean overlaps gamma in memory", *arrays.values()):
        run("forward", arrays)


def test_an_output_that_begins_inside_its_input_through_foreign_memory() -> None:
    memory = np.arange(40.0)
    x, y, statistics = memory[:30].reshape(10, 3), np.from_dlpack(memory)[3:33].reshape(10, 3), np.empty((3, 3))
    with refused(NUMPY, ValueError, "y overlaps x in memory; y may be exactly x; pass a separate array", memory):
        bn.batch_norm_forward(x, out=(y, statistics))


def test_an_input_in_place_through_foreign_memory_is_legal() -> None:
    x = np.arange(12.0).reshape(4, 3)
    usual, _ = bn.batch_norm_forward(x)
    y, _ = bn.batch_norm_forward(x, out=(np.from_dlpack(x), np.empty((3, 3))))
    np.testing.assert_array_equal(y, usual)
    np.testing.assert_array_equal(x, usual)


def test_mapped_files_are_arrays(tmp_path: Path) -> None:
    x = np.arange(12.0).reshape(4, 3)
    mapped = np.memmap(tmp_path / "x", "float64", "w+", shape=(5, 3))
    mapped[:4] = x
    y, statistics = bn.batch_norm_forward(mapped[:4], out=(np.empty((4, 3)), np.empty((3, 3))))
    usual = bn.batch_norm_forward(x)
    np.testing.assert_array_equal(y, usual[0])
    np.testing.assert_array_equal(statistics, usual[1])
    with pytest.raises(ValueError, match="y overlaps x"):
        bn.batch_norm_forward(mapped[:4], out=(mapped[1:], statistics))


def test_neighbours_in_one_buffer_are_apart() -> None:
    """As in a network: everything is a view of one array, and nothing overlaps."""
    for buffer in (np.arange(64.0), np.from_dlpack(np.arange(64.0))):
        x, y = buffer[:12].reshape(4, 3), buffer[12:24].reshape(4, 3)
        vectors = [buffer[24 + 3 * i : 27 + 3 * i] for i in range(4)]
        bn.batch_norm_forward(x, *vectors, out=(y, buffer[40:49].reshape(3, 3)))
        np.testing.assert_allclose(y.mean(axis=0), vectors[1])  # beta


# ---- remembered launches --------------------------------------------------------------------------------------------


def test_no_op_launches_what_another_one_remembers() -> None:
    """The two backwards shared a table: the same arrays in the same order were taken for a call of the other one.

    One output less and one input more, so that there are as many in all, and an eps that the other one does not have.
    """
    caches = [kind.calls for kind in vars(problem).values() if isinstance(kind, problem.Pass)]
    assert len({id(cache) for cache in caches}) == len(caches) == 9
    arrays = make_arrays("residual_backward")
    with recording() as runtime:
        on = record_of(arrays)
        dx, dgamma, dbeta, dresidual = (on[name] for name in EVERY["residual_backward"].writes)
        dy, x, residual, gamma, beta, statistics = (on[name] for name in EVERY["residual_backward"].reads)
        run("residual_backward", on)
        assert len(runtime.launches) == 1
        given = dresidual, dy, residual, gamma, beta, statistics
        with pytest.raises(TypeError):
            bn.batch_norm_inference_backward(*given, residual=x, eps=None, activation="relu", out=(dx, dgamma, dbeta))
        assert len(runtime.launches) == 1


# ---- optimisers and networks ----------------------------------------------------------------------------------------


def test_a_step_that_is_refused_is_not_counted() -> None:
    model = bn.MLP((4, 5, 3))
    optimizer = make_optimizer("adam", model, 0.1)
    optimizer.lr = np.nan
    with pytest.raises(ValueError, match="lr must be"):
        optimizer.step()
    assert optimizer.steps == 0


BAD_STATES: dict[str, tuple[str, Callable[[Any], Any], type[Exception], str]] = {
    "text": ("1.weight", lambda a: np.full(a.shape, "a"), TypeError, "1.weight must hold real numbers, got <U1"),
    "objects": ("1.weight", lambda a: np.full(a.shape, None), TypeError, "1.weight must hold real numbers, got object"),
    "complex": ("0.weight", lambda a: a * 1j, TypeError, "0.weight must hold real numbers, got complex"),
    "too large": (
        "0.weight",
        lambda a: np.full(a.shape, 1e300),
        ValueError,
        "0.weight holds numbers beyond the range of",
    ),
    "masked": ("0.gamma", np.ma.masked_array, TypeError, "0.gamma must be a plain NumPy array"),
    "shape": ("0.running_var", lambda a: a[:2], ValueError, r"0.running_var must have the shape \(5,\), got \(2,\)"),
    "negative count": ("0.batches", lambda a: np.array(-3), ValueError, "0.batches must be from 0 to .*, got -3"),
    "half a count": ("0.batches", lambda a: np.array(1.5), TypeError, "0.batches must be an integer"),
}


@pytest.mark.parametrize("wrong", BAD_STATES)
def test_a_network_takes_a_state_whole_or_not_at_all(backend: Backend, wrong: str) -> None:
    name, spoil, error, message = BAD_STATES[wrong]
    good = bn.MLP((4, 5, 3), seed=1).state()
    model = bn.MLP((4, 5, 3), seed=9, xp=backend.xp)
    with refused(backend, error, f"the state's {message}", model.parameters, model.running):
        model.load_state(good | {name: spoil(good[name])})
    assert model.batches == 0
    model.load_state(good)


@pytest.mark.parametrize(
    "wrong", ["text", "objects", "complex", "too large", "masked", "negative count", "half a count"]
)
def test_an_optimiser_takes_a_state_whole_or_not_at_all(backend: Backend, wrong: str) -> None:
    _, spoil, error, message = BAD_STATES[wrong]
    model = bn.MLP((4, 5, 3), xp=backend.xp)
    optimizer = make_optimizer("adam", model, 0.1)
    good = optimizer.state() | {"first": np.ones(model.parameters.shape, "float32")}
    name = "steps" if "count" in wrong else "second"
    message = message.split(" ", 1)[1]
    with refused(backend, error, f"the state's {name} {message}", *optimizer.arrays.values()):
        optimizer.load_state(good | {name: spoil(good[name])})
    assert optimizer.steps == 0


def test_a_state_of_another_network_is_told_shortly() -> None:
    state = {f"{i}.weight": np.ones(3) for i in range(10_000)}
    for owner in (bn.MLP((4, 5, 3)), make_optimizer("sgd", bn.MLP((4, 5, 3)), 0.1)):
        with pytest.raises(ValueError, match="the state is") as caught:
            owner.load_state(state)
        assert len(str(caught.value)) < 400


@pytest.mark.parametrize("op", EVERY)
def test_the_table_names_every_array_as_messages_do(op: str) -> None:
    for name in EVERY[op].names:
        message = rf"^{named(op, name)}: expected a NumPy or a CuPy array, got builtins\.list"
        with pytest.raises(TypeError, match=message):
            run(op, make_arrays(op) | {name: [1.0]})
