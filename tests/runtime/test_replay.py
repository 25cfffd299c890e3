"""A repeated call is launched again without checks; nothing but the very same call may pass for one."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import bnkernels as bn
from bnkernels.ops.batch_norm import call as batch_norm
from bnkernels.ops.batch_norm.problem import BACKWARD, FORWARD, INFERENCE, INFERENCE_BACKWARD
from bnkernels.runtime import arguments, registry, replay
from tests.regress.calls import CALLS, make_arrays
from tests.regress.device import RecordedArray, RecordingRuntime
from tools import backends

OPS = ("forward", "backward", "inference", "inference_backward")
ARRAYS = [(op, name) for op in OPS for name in CALLS[op].names]


class Device:
    """A runtime, its arrays, and the number of calls that took the long way."""

    def __init__(self, runtime: RecordingRuntime) -> None:
        self.runtime, self.packed = runtime, 0

    def arrays(self, op: str, dtype: str = "float32") -> dict[str, RecordedArray]:
        """Return the arrays of a call, far apart from one another."""
        return {
            name: self.runtime.array_type(array.shape, array.dtype, 2**20 * (position + 1))
            for position, (name, array) in enumerate(make_arrays(op, dtype).items())
        }


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    """Return a device whose runtime is registered, with no launch known to any op."""
    found = Device(RecordingRuntime())
    monkeypatch.setattr(registry, "runtimes", dict(registry.runtimes))
    registry.register(found.runtime)
    for kind in (FORWARD, INFERENCE, BACKWARD, INFERENCE_BACKWARD):
        monkeypatch.setitem(vars(kind), "calls", replay.ReplayCache())
    batch_norm._planned.cache_clear()  # plans hold on to their runtime

    def counted(*given: Any) -> np.ndarray:
        found.packed += 1
        return arguments.pack(*given)

    monkeypatch.setattr(batch_norm, "pack", counted)
    yield found
    batch_norm._planned.cache_clear()


# ---- the same call --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("op", OPS)
def test_the_same_call_is_the_same_launch(device: Device, op: str, dtype: str) -> None:
    on = device.arrays(op, dtype)
    for _ in range(3):
        CALLS[op].run(on)
    assert (device.packed, len(device.runtime.launches)) == (1, 3)
    first, *others = device.runtime.launches
    for other in others:
        assert other[:3] == first[:3]
        assert other.arguments.tobytes() == first.arguments.tobytes()
        assert not other.arguments.flags.writeable


@pytest.mark.parametrize("op", OPS)
def test_other_objects_with_the_same_facts_are_the_same_call(device: Device, op: str) -> None:
    CALLS[op].run(device.arrays(op))
    CALLS[op].run(device.arrays(op))
    assert device.packed == 1


def test_outputs_come_back_as_they_went_in(device: Device) -> None:
    on = device.arrays("forward")
    for _ in range(2):
        assert [*map(id, CALLS["forward"].run(on))] == [id(on["y"]), id(on["statistics"])]
    on = device.arrays("inference")
    assert all(CALLS["inference"].run(on) is on["out"] for _ in range(2))


@pytest.mark.emulator
def test_what_is_computed_follows_the_values() -> None:
    backend = backends.make("emulator")
    arrays = make_arrays("forward")
    on, twin = ({name: make(array) for name, array in arrays.items()} for make in (backend.asarray, np.array))
    for step in range(3):
        for mine in (on, twin):
            mine["x"][...] = arrays["x"] * (step + 1)
            CALLS["forward"].run(mine)
        for name in CALLS["forward"].writes:
            np.testing.assert_allclose(backend.asnumpy(on[name]), twin[name], rtol=1e-5, atol=1e-6)


# ---- another array --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("op", "name"), ARRAYS)
def test_another_address_is_another_launch(device: Device, op: str, name: str) -> None:
    on = device.arrays(op)
    CALLS[op].run(on)
    on[name].address = 2**30
    CALLS[op].run(on)
    assert device.packed == 2
    arguments = device.runtime.launches[-1].arguments
    member = {"out": "y", "statistics": "mean" if op == "backward" else name}.get(name, name)
    if op == "inference_backward":
        member = {"running_mean": "mean", "running_var": "rstd"}.get(name, member)
    assert arguments[member] == 2**30


@pytest.mark.parametrize(("op", "name"), ARRAYS)
@pytest.mark.parametrize(
    ("fact", "spoil", "error"),
    [
        ("shape", lambda array: (*array.shape[:-1], array.shape[-1] + 1), ValueError),
        ("dtype", lambda array: np.dtype("float64"), TypeError),
        ("device_number", lambda array: 1, ValueError),
    ],
    ids=["shape", "dtype", "device"],
)
def test_a_fact_that_changes_in_place_is_checked_again(
    device: Device, op: str, name: str, fact: str, spoil: Any, error: type[Exception]
) -> None:
    on = device.arrays(op)
    CALLS[op].run(on)
    device.runtime.launches.clear()
    right = getattr(on[name], fact)
    setattr(on[name], fact, spoil(on[name]))
    for _ in range(2):  # a refused call is not kept either
        with pytest.raises(error):
            CALLS[op].run(on)
    assert not device.runtime.launches
    setattr(on[name], fact, right)
    CALLS[op].run(on)
    assert len(device.runtime.launches) == 1


@pytest.mark.parametrize(("op", "name"), ARRAYS)
def test_strides_that_change_in_place_are_seen(device: Device, op: str, name: str) -> None:
    on = device.arrays(op)
    CALLS[op].run(on)
    on[name].strides = tuple(2 * stride for stride in on[name].strides)
    if name in CALLS[op].any_strides:
        CALLS[op].run(on)
        assert device.packed == 2
        assert device.runtime.launches[-1].arguments[f"{name}_outer"] == 2 * make_arrays(op)[name].shape[1]
        return
    with pytest.raises(ValueError, match=f"{name} must be contiguous in C order"):
        CALLS[op].run(on)
    assert len(device.runtime.launches) == 1


@pytest.mark.parametrize(("op", "name"), [(op, name) for op in OPS for name in CALLS[op].writes])
def test_arrays_that_start_to_overlap_are_refused(device: Device, op: str, name: str) -> None:
    on = device.arrays(op)
    CALLS[op].run(on)
    on[name].address = on["gamma"].address
    with pytest.raises(ValueError, match="overlaps"):
        CALLS[op].run(on)
    assert len(device.runtime.launches) == 1


def test_all_arrays_on_another_device_are_another_launch(device: Device) -> None:
    on = device.arrays("forward")
    CALLS["forward"].run(on)
    for array in on.values():
        array.device_number = 1
    CALLS["forward"].run(on)
    assert device.packed == 2
    assert device.runtime.launches[-1].like.device_number == 1


@pytest.mark.parametrize("op", OPS)
def test_an_array_of_another_kind_is_refused(device: Device, op: str) -> None:
    on = device.arrays(op)
    CALLS[op].run(on)
    for name in on:
        other = type("Other", (type(on[name]),), {})
        spoilt = dict(on)
        spoilt[name] = other(on[name].shape, on[name].dtype, on[name].address)
        with pytest.raises(TypeError, match=r"expected a NumPy or a CuPy array, got .*Other"):
            CALLS[op].run(spoilt)
    assert len(device.runtime.launches) == 1


@pytest.mark.parametrize("op", OPS)
def test_what_is_absent_is_part_of_the_call(device: Device, op: str) -> None:
    on = device.arrays(op)
    CALLS[op].run(on)
    without = on | {"gamma": None}
    for _ in range(2):
        CALLS[op].run(without)
        CALLS[op].run(on)
    assert device.packed == 2
    assert [record.arguments["gamma"] == 0 for record in device.runtime.launches] == [False, True, False, True, False]


def test_a_call_without_out_is_never_kept(device: Device) -> None:
    on = device.arrays("forward")
    CALLS["forward"].run(on)
    for _ in range(2):
        y, _ = bn.batch_norm_forward(on["x"])
        assert device.runtime.launches[-1].arguments["y"] == y.address
    assert device.packed == 3
    inference = on["x"], None, None, on["running_mean"], on["running_var"]
    for _ in range(2):
        y = bn.batch_norm_inference(*inference)
        assert device.runtime.launches[-1].arguments["y"] == y.address
    assert device.packed == 5


@pytest.mark.parametrize("wrong", ["list", "too few", "too many", "a None", "empty"])
def test_a_wrong_out_is_refused_after_a_right_one(device: Device, wrong: str) -> None:
    on = device.arrays("forward")
    CALLS["forward"].run(on)
    out = on["y"], on["statistics"]
    spoilt = {"list": list(out), "too few": out[:1], "too many": (*out, out[0]), "a None": (out[0], None), "empty": ()}
    with pytest.raises(TypeError, match="out must be a tuple of the 2 arrays"):
        bn.batch_norm_forward(on["x"], on["gamma"], on["beta"], out=spoilt[wrong])


def test_a_copied_input_is_copied_every_time(device: Device) -> None:
    kind = device.runtime.array_type
    x, y = (kind((4, 3, 2, 2), "float32", address) for address in (2**20, 2**21))
    statistics = kind((3, 3), "float32", 2**22)
    x.strides = (48, 16, 4, 8)  # no one stride walks through its inner axes
    for _ in range(2):
        bn.batch_norm_forward(x, out=(y, statistics))
    assert device.packed == len(device.runtime.allocations) == 2
    read = [record.arguments["x"] for record in device.runtime.launches]
    assert read == [copy.address for copy in device.runtime.allocations]


# ---- another option -------------------------------------------------------------------------------------------------


def forward(on: dict[str, Any], **options: Any) -> None:
    bn.batch_norm_forward(on["x"], on["gamma"], on["beta"], out=(on["y"], on["statistics"]), **options)


@pytest.mark.parametrize(
    ("option", "error"),
    [
        ({"axis": 1.0}, TypeError),
        ({"momentum": 0.1 + 0j}, TypeError),
        ({"eps": np.array([1e-5, 1e-5])}, TypeError),
        ({"activation": np.str_("elu")}, ValueError),
        ({"activation": ["elu"]}, ValueError),
        ({"alpha": [0.5]}, TypeError),
        ({"eps": float("nan")}, ValueError),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else value.__name__,
)
def test_an_option_equal_to_a_right_one_is_refused_as_ever(device: Device, option: dict, error: type) -> None:
    on = device.arrays("forward")
    right = {"axis": 1, "momentum": 0.1, "eps": 1e-5, "activation": "elu", "alpha": 0.5}
    forward(on, **right)
    with pytest.raises(error):
        forward(on, **right | option)
    assert len(device.runtime.launches) == 1


def test_an_equal_option_is_the_same_call_and_another_is_not(device: Device) -> None:
    on = device.arrays("forward")
    forward(on, momentum=0.25, activation="elu")
    forward(on, momentum=float("0.25"), activation="".join("elu"))
    assert device.packed == 1
    for other in ({"momentum": 0.5}, {"eps": 0.5}, {"activation": "tanh"}, {"alpha": 0.75}, {"axis": -1}):
        before = device.packed
        forward(on, **{"momentum": 0.25, "activation": "elu"} | other)
        assert device.packed == before + 1
        arguments = device.runtime.launches[-1].arguments
        for name in other.keys() & {"momentum", "eps", "alpha"}:
            assert arguments[name] == other[name]


def test_an_option_that_can_change_is_never_kept(device: Device) -> None:
    on, momentum = device.arrays("forward"), np.array(0.25)
    forward(on, momentum=momentum)
    momentum[...] = 0.5
    forward(on, momentum=momentum)
    assert [record.arguments["momentum"] for record in device.runtime.launches] == [0.25, 0.5]


# ---- memory and threads ---------------------------------------------------------------------------------------------


def test_what_is_kept_is_bounded(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "MOST_ADDRESSES", 4)
    monkeypatch.setattr(replay, "MOST_EACH", 2)
    on = device.arrays("forward")
    for place in range(10):
        on["y"].address = 2**30 + 2**20 * place
        for eps in (0.1, 0.2, 0.3):
            forward(on, eps=eps)
        launches = FORWARD.calls._entries
        assert 1 <= len(launches) <= 4
        assert all(len(entries) <= 2 for entries in launches.values())
    before = device.packed
    forward(on, eps=0.3)  # the last is known
    assert device.packed == before


@pytest.mark.parametrize("op", OPS)
def test_no_array_is_kept(device: Device, op: str) -> None:
    on = device.arrays(op)
    CALLS[op].run(on)
    CALLS[op].run(on)
    device.runtime.launches.clear()
    references = [weakref.ref(array) for array in on.values()]
    on.clear()
    gc.collect()
    assert [reference() for reference in references] == [None] * len(references)


def test_threads_launch_their_own_calls(device: Device) -> None:
    calls, start = 200, threading.Barrier(4)

    def work(number: int) -> None:
        on = device.arrays("forward")
        for array in on.values():
            array.address += 2**40 * number
        start.wait()
        for step in range(calls):
            forward(on, eps=(0.25, 0.5)[step % 2])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    records = [record.arguments for record in device.runtime.launches]
    for number in range(4):
        mine = [record for record in records if int(record["y"]) >> 40 == number]
        assert len(mine) == calls
        assert all(int(record[name]) >> 40 == number for record in mine for name in ("x", "gamma", "statistics"))
        assert sum(record["eps"] == 0.5 for record in mine) == calls // 2
