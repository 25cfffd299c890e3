"""A repeated call is launched again without checks; nothing but the very same call may pass for one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import bnkernels as bn
from bnkernels.runtime import registry, replay
from tests.regress.calls import EVERY, make_arrays, named, run
from tests.regress.device import Device, RecordedArray, RecordingRuntime
from tools import backends

NEVER_KEPT = {"adam_update", "fused_training", "grouped_forward", "instance_norm_backward"}
OPS = [op for op in EVERY if op not in NEVER_KEPT]
ARRAYS = [(op, name) for op in OPS for name in EVERY[op].names]
LARGER_IS_RIGHT = [(op, "workspace") for op in OPS if op.startswith(("layer_norm_backward", "rms_norm_backward"))]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    """Return a device whose runtime is registered, for arrays of a type that no op has seen."""
    found = Device(RecordingRuntime())
    found.runtime.array_type = type("RecordedArray", (RecordedArray,), {})
    monkeypatch.setattr(registry, "runtimes", dict(registry.runtimes))
    registry.register(found.runtime)
    launch = replay.Call.launch

    def counted(self: replay.Call, *given: Any, **options: Any) -> None:
        found.checked += 1
        launch(self, *given, **options)

    monkeypatch.setattr(replay.Call, "launch", counted)
    return found


# ---- the same call --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "dtype"),  # the linear backward in float64 takes two blocks: a cooperative launch
    [(op, "float32") for op in OPS] + [(op, "float64") for op in OPS if op != "linear_batch_norm_backward"],
)
def test_the_same_call_is_the_same_launch(device: Device, op: str, dtype: str) -> None:
    """Also with other objects whose facts are the same."""
    on = device.arrays(op, dtype)
    for arrays in (on, on, device.arrays(op, dtype)):
        run(op, arrays)
    assert (device.checked, len(device.runtime.launches)) == (1, 3)
    first, *others = device.runtime.launches
    for other in others:
        assert other[:3] == first[:3]
        assert other.arguments.tobytes() == first.arguments.tobytes()
        assert not other.arguments.flags.writeable


def test_outputs_come_back_as_they_went_in(device: Device) -> None:
    on = device.arrays("forward")
    for _ in range(2):
        assert [*map(id, run("forward", on))] == [id(on["y"]), id(on["statistics"])]
    on = device.arrays("inference")
    assert all(run("inference", on) is on["out"] for _ in range(2))


@pytest.mark.emulator
def test_what_is_computed_follows_the_values() -> None:
    backend = backends.make("emulator")
    arrays = make_arrays("forward")
    on, reference = ({name: make(array) for name, array in arrays.items()} for make in (backend.asarray, np.array))
    for step in range(3):
        for mine in (on, reference):
            mine["x"][...] = arrays["x"] * (step + 1)
            run("forward", mine)
        for name in EVERY["forward"].writes:
            np.testing.assert_allclose(backend.asnumpy(on[name]), reference[name], rtol=1e-5, atol=1e-6)


# ---- another array --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("op", "name"), ARRAYS)
def test_another_address_is_another_launch(device: Device, op: str, name: str) -> None:
    on = device.arrays(op)
    run(op, on)
    on[name].address = 2**30
    run(op, on)
    assert device.checked == 2
    arguments = device.runtime.launches[-1].arguments
    assert 2**30 in [arguments[member] for member in arguments.dtype.names if arguments.dtype[member] == np.uint64]


@pytest.mark.parametrize(("op", "name"), ARRAYS)
@pytest.mark.parametrize(
    ("fact", "spoil", "error"),
    [
        ("shape", lambda array: (*array.shape[:-1], array.shape[-1] + 1), ValueError),
        ("dtype", lambda array: np.dtype("uint32" if array.dtype.kind == "i" else "int32"), TypeError),
        ("device_number", lambda array: 1, ValueError),
    ],
    ids=["shape", "dtype", "device"],
)
def test_a_fact_that_changes_in_place_is_checked_again(
    device: Device, op: str, name: str, fact: str, spoil: Any, error: type[Exception]
) -> None:
    on = device.arrays(op)
    run(op, on)
    device.runtime.launches.clear()
    right = getattr(on[name], fact)
    setattr(on[name], fact, spoil(on[name]))
    if fact == "shape" and (op, name) in LARGER_IS_RIGHT:
        run(op, on)
        assert device.checked == 2
        return
    for _ in range(2):  # a refused call is not kept either
        with pytest.raises(error):
            run(op, on)
    assert not device.runtime.launches
    setattr(on[name], fact, right)
    run(op, on)
    assert len(device.runtime.launches) == 1


@pytest.mark.parametrize(("op", "name"), ARRAYS)
def test_strides_that_change_in_place_are_seen(device: Device, op: str, name: str) -> None:
    on = device.arrays(op)
    run(op, on)
    on[name].strides = tuple(2 * stride for stride in on[name].strides)
    if name in EVERY[op].any_strides:
        run(op, on)
        assert device.checked == 2
        arguments = device.runtime.launches[-1].arguments
        strides = {int(arguments[member]) for member in arguments.dtype.names if member.startswith(f"{name}_")}
        assert on[name].strides[0] // on[name].dtype.itemsize in strides
        return
    with pytest.raises(ValueError, match=f"{named(op, name)} must be contiguous in C order"):
        run(op, on)
    assert len(device.runtime.launches) == 1


@pytest.mark.parametrize(("op", "name"), [(op, name) for op in OPS for name in EVERY[op].writes])
def test_arrays_that_start_to_overlap_are_refused(device: Device, op: str, name: str) -> None:
    on = device.arrays(op)
    run(op, on)
    on[name].address = on[EVERY[op].reads[0]].address + 4
    with pytest.raises(ValueError, match="overlaps"):
        run(op, on)
    assert len(device.runtime.launches) == 1


def test_all_arrays_on_another_device_are_another_launch(device: Device) -> None:
    on = device.arrays("forward")
    run("forward", on)
    for array in on.values():
        array.device_number = 1
    run("forward", on)
    assert device.checked == 2
    assert device.runtime.launches[-1].like.device_number == 1


@pytest.mark.parametrize("op", OPS)
def test_an_array_of_another_kind_is_refused(device: Device, op: str) -> None:
    on = device.arrays(op)
    run(op, on)
    for name in on:
        other = type("Other", (type(on[name]),), {})
        spoilt = dict(on)
        spoilt[name] = other(on[name].shape, on[name].dtype, on[name].address)
        with pytest.raises(TypeError, match=r"expected a NumPy or a CuPy array, got .*Other"):
            run(op, spoilt)
    assert len(device.runtime.launches) == 1


@pytest.mark.parametrize("op", [op for op in OPS if "gamma" in EVERY[op].names])
def test_what_is_absent_is_part_of_the_call(device: Device, op: str) -> None:
    on = device.arrays(op)
    run(op, on)
    without = on | {"gamma": None}
    for _ in range(2):
        run(op, without)
        run(op, on)
    assert device.checked == 2
    assert [record.arguments["gamma"] == 0 for record in device.runtime.launches] == [False, True, False, True, False]


def test_a_call_that_makes_its_output_is_never_kept(device: Device) -> None:
    x = device.arrays("inference")["x"]
    for out in (None, (None,), ()):
        call = replay.ReplayCache().replay(out, (x,))
        assert (call.replayed, call._cache) == (False, None)
    on = device.arrays("inference")
    for _ in range(2):
        y = bn.batch_norm_inference(*(on[name] for name in EVERY["inference"].reads))
        assert device.runtime.launches[-1].arguments["y"] == y.address


def test_a_gradient_that_is_not_wanted_is_part_of_the_call(device: Device) -> None:
    on = device.arrays("linear_batch_norm_backward")
    arrays = [on[name] for name in ("dy", "x", "weight", "gamma", "beta", "z", "statistics")]
    gradients = on["dweight"], on["dgamma"], on["dbeta"]
    for wanted in (True, False, True, False):
        out = on["dx"] if wanted else None, *gradients
        bn.linear_batch_norm_backward(*arrays, input_gradient=wanted, workspace=on["workspace"], out=out)
        assert (device.runtime.launches[-1].arguments["dx"] == 0) == (not wanted)
    assert device.checked == 2


def test_a_call_without_out_is_never_kept(device: Device) -> None:
    on = device.arrays("forward")
    run("forward", on)
    for _ in range(2):
        y, _ = bn.batch_norm_forward(on["x"])
        assert device.runtime.launches[-1].arguments["y"] == y.address
    assert device.checked == 3
    running = device.arrays("inference")
    for _ in range(2):
        y = bn.batch_norm_inference(on["x"], None, None, running["running_mean"], running["running_var"])
        assert device.runtime.launches[-1].arguments["y"] == y.address
    assert device.checked == 5


@pytest.mark.parametrize("wrong", ["list", "too few", "too many", "a None", "empty"])
def test_a_wrong_out_is_refused_after_a_right_one(device: Device, wrong: str) -> None:
    on = device.arrays("forward")
    run("forward", on)
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
    assert device.checked == len(device.runtime.allocations) == 2
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
    assert device.checked == 1
    for other in ({"momentum": 0.5}, {"eps": 0.5}, {"activation": "tanh"}, {"alpha": 0.75}, {"axis": -1}):
        before = device.checked
        forward(on, **{"momentum": 0.25, "activation": "elu"} | other)
        assert device.checked == before + 1
        arguments = device.runtime.launches[-1].arguments
        for name in other.keys() & {"momentum", "eps", "alpha"}:
            assert arguments[name] == other[name]


def test_an_option_that_can_change_is_never_kept(device: Device) -> None:
    on, momentum = device.arrays("forward"), np.array(0.25)
    forward(on, momentum=momentum)
    momentum[...] = 0.5
    forward(on, momentum=momentum)
    assert [record.arguments["momentum"] for record in device.runtime.launches] == [0.25, 0.5]
