"""The configuration of a run: what is refused, and the defaults that depend on other values."""

import os

import pytest

from bnkernels.config import DEFAULT_EPOCHS, DEFAULT_LEARNING_RATES, ConfigError, TrainingConfig
from bnkernels.optimizers import OPTIMIZERS


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
