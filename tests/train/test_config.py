"""The configuration of a run: what is refused, and the defaults that depend on other values."""

import json
import os
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import pytest

from bnkernels.ops.fused_training.launch import OPTIMIZERS
from bnkernels.train.config import DEFAULT_EPOCHS, DEFAULT_LEARNING_RATES, ConfigError, TrainingConfig
from bnkernels.train.run_config import require_memory


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "cifar"}, "dataset must be one of digits, mnist, npz; got 'cifar'"),
        ({"norm": "group"}, "norm must be one of"),
        ({"activation": "softplus"}, "activation must be one of"),
        ({"optimizer": "lion"}, "optimizer must be one of"),
        ({"dtype": "float16"}, "dtype must be one of"),
        ({"device": "tpu"}, "device must be one of"),
        ({"hidden": ()}, "hidden must be"),
        ({"hidden": (20, 0)}, "hidden must be"),
        ({"batch_size": 1}, "batch size must be at least 2, got 1"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"steps": 0, "epochs": None}, "steps must be at least 1, got 0"),
        ({"epochs": 2, "steps": 2}, "epochs or steps, not both"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"lr": 0}, "lr must be a positive number, got 0"),
        ({"lr": -0.1}, "lr must be a positive number"),
        ({"lr": float("nan")}, "lr must be a positive number"),
        ({"lr": float("inf")}, "lr must be a positive number"),
        ({"lr": "1e-3"}, "lr must be a positive number, got '1e-3': give a float such as 0.1"),
        ({"lr": True}, "lr must be a positive number, got True"),
        ({"lr": -0.0}, "lr must be a positive number, got -0.0"),
        ({"lr": 10**400}, "lr must be a positive number, got a number of 1329 bits"),
        ({"lr": np.float32("nan")}, "lr must be a positive number"),
        ({"lr": np.full(9, 0.1)}, "lr must be a positive number, got a value of type ndarray"),
        ({"seed": None}, "seed must be a whole number, got None: give an int"),
        ({"seed": 2**128}, f"seed must be at most {2**128 - 1}"),
        ({"steps": 5.5}, "steps must be a whole number, got 5.5"),
        ({"steps": np.float64(5)}, "steps must be a whole number"),
        ({"steps": 10**399}, f"steps must be at most {2**63 - 1}, got a number of 1326 bits"),
        ({"steps": 10**5000}, "got a number of 16610 bits"),
        ({"epochs": True}, "epochs must be a whole number, got True"),
        ({"epochs": np.True_}, "epochs must be a whole number"),
        ({"epochs": "3"}, "epochs must be a whole number, got '3'"),
        ({"models": "x" * 5000}, r"models must be a whole number, got 'x{39}\.\.\. \(5002 characters\)"),
        ({"batch_size": None}, "batch size must be a whole number, got None"),
        ({"batch_size": [64]}, "batch size must be a whole number, got a value of type list"),
        ({"hidden": 20}, r"hidden must be the widths of at least one layer, such as \(20,\), got 20"),
        ({"hidden": "20"}, "hidden must be the widths of at least one layer"),
        ({"hidden": np.array(20)}, "hidden must be the widths of at least one layer"),
        ({"hidden": (20.0,)}, "hidden must be a whole number, got 20.0"),
        ({"hidden": np.ones((2, 2), int)}, "hidden must be a whole number, got a value of type ndarray"),
        ({"dtype": np.dtype("float32")}, "dtype must be one of float32, float64; got a value of type"),
        ({"dtype": None}, "dtype must be one of float32, float64; got None"),
        ({"norm": np.array(["both", "batch"])}, "norm must be one of .*; got a value of type ndarray"),
        ({"norm": ["both"]}, "norm must be one of .*; got a value of type list"),
        ({"data": 3}, "data must be a path, got 3"),
        ({"data": "a\0b"}, "data must be a path, got text with a null character"),
        ({"data": ""}, "data must be a path, got empty text"),
    ],
)
def test_a_bad_configuration_says_what_is_wrong(changes, message):
    with pytest.raises(ConfigError, match=message):
        TrainingConfig(**changes)


def test_every_optimizer_has_a_default_learning_rate():
    assert DEFAULT_LEARNING_RATES.keys() == OPTIMIZERS.keys()
    assert {TrainingConfig(optimizer=name).lr for name in OPTIMIZERS} == set(DEFAULT_LEARNING_RATES.values())


def test_the_length_is_in_epochs_or_in_steps():
    assert (TrainingConfig().epochs, TrainingConfig().steps) == (DEFAULT_EPOCHS, None)
    assert (TrainingConfig(steps=7).epochs, TrainingConfig(steps=7).steps) == (None, 7)


def test_the_path_of_the_data_is_kept_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert TrainingConfig(data="data.npz").data == os.path.join(tmp_path, "data.npz")


def test_a_list_of_widths_is_as_good_as_a_tuple():
    assert TrainingConfig(hidden=[30, 20]) == TrainingConfig(hidden=(30, 20))


@pytest.mark.parametrize(
    ("norm", "norms"),
    [("both", ("batch", "none")), ("all", ("batch", "layer", "none")), ("layer", ("layer",)), ("none", ("none",))],
)
def test_norm_names_the_networks(norm, norms):
    assert TrainingConfig(norm=norm).norms == norms


@pytest.mark.parametrize(
    "options",
    [
        {"seed": np.int64(3), "steps": np.uint8(5), "models": np.int32(2), "batch_size": np.array(32)},
        {"epochs": np.int16(2), "lr": np.float32(0.1)},
        {"lr": 1},
        {"lr": np.int64(1)},
        {"lr": np.float16(0.5)},
        {"hidden": np.array([8, 4])},
        {"hidden": (width for width in (8, 4))},
        {"hidden": range(3, 5)},
        {"norm": np.str_("batch"), "dtype": np.str_("float64")},
        {"seed": 2**128 - 1},
        {"data": Path("data.npz")},
        {"data": b"data.npz"},
        {"data": "not UTF-8 \udcff"},
    ],
    ids=lambda options: "-".join(options),
)
def test_whatever_is_kept_is_pythons_own_and_survives_json(options):
    """A checkpoint holds the configuration as JSON: what NumPy brings must not be found out at the first save."""
    config = TrainingConfig(**options)
    assert TrainingConfig(**json.loads(json.dumps(asdict(config), allow_nan=False))) == config
    for field in fields(config):
        assert type(getattr(config, field.name)) in (str, int, float, tuple, type(None)), field.name
    assert {type(width) for width in config.hidden} == {int}
    for name in options.keys() - {"hidden", "data"}:
        assert getattr(config, name) == options[name]


def test_networks_that_memory_cannot_hold_are_refused_with_the_bytes(monkeypatch):
    monkeypatch.setattr("bnkernels.train.run_config.total_memory", lambda: 10**6)
    sizes, values = (64, 1000, 10), 65 * 1000 + 1001 * 10
    with pytest.raises(
        ConfigError, match=rf"take {4 * (2 * 2 * values + 64 * 1010):,} bytes .*than the 1,000,000 there"
    ):
        require_memory(TrainingConfig(), sizes, 2)
    require_memory(TrainingConfig(norm="batch"), sizes, 64)
    for options, rows in (({"norm": "batch"}, 1000), ({"norm": "batch", "models": 2}, 2), ({"dtype": "float64"}, 2)):
        with pytest.raises(ConfigError, match="give narrower layers"):
            require_memory(TrainingConfig(**options), sizes, rows)
    monkeypatch.setattr("bnkernels.train.run_config.total_memory", lambda: None)
    require_memory(TrainingConfig(hidden=(10**18,)), (64, 10**18, 10), 2)
