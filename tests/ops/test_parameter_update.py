"""The optimisers' steps on all backends, against their formulas in extended precision over many steps."""

from __future__ import annotations

from contextlib import nullcontext
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import bnkernels as bn
from bnkernels.ops.parameter_update.op import parameter_update_launch
from tests.regress.refusal import refused
from tools import oracle
from tools.backends import Backend, emulated_runtime
from tools.emulator import EmulatorRuntime

SIZES = [1, 255, 256, 257, 1530]  # around a block, and the parameters of the network of the question
DTYPES = ["float32", "float64"]
RULES = {"sgd": 0, "momentum": 1, "rmsprop": 1, "adam": 2}  # number of arrays of state
SCHEDULED = ["sgd", "momentum", "adam"]
STEPS = 20
LR, MOMENTUM, DECAY, BETA1, BETA2 = 0.1, 0.9, 0.9, 0.9, 0.999
EPS = 0.25  # so large that a misplaced one is gross


def update(rule: str, arrays: list[Any], step: int, **options: Any) -> None:
    """Make one step of a rule; `arrays` are parameters, gradients and state."""
    given = {"adam": {"eps": EPS, "step": step}, "rmsprop": {"eps": EPS}}.get(rule, {}) | {"lr": LR, **options}
    getattr(bn, f"{rule}_update")(*arrays, **given)


class Exact:
    """A rule in extended precision, and how far the op may be from each array.

    Every array is followed by its bound: what it had, through the formula, and the roundings of this step.
    """

    def __init__(self, rule: str, parameters: np.ndarray) -> None:
        self.rule, self.u = rule, oracle.unit_roundoff(parameters.dtype)
        zero = np.zeros(parameters.shape, oracle.Extended)
        self.parameters, self.first, self.second = parameters.astype(oracle.Extended), zero, zero
        self.bounds = {"parameters": zero, "first": zero, "second": zero}

    def decay(self, name: str, keep: float, new: np.ndarray) -> None:
        """Set an array of state to ``keep`` times itself plus `new`."""
        kept = oracle.Extended(keep) * getattr(self, name)
        setattr(self, name, kept + new)
        rounding = oracle.SLACK * self.u * (np.abs(kept) + np.abs(new))
        self.bounds[name] = keep * self.bounds[name] + rounding

    def step(self, gradients: np.ndarray, number: int) -> None:
        """Make one step."""
        g = gradients.astype(oracle.Extended)
        if self.rule == "sgd":
            change, of_change = LR * g, 0
        elif self.rule == "momentum":
            self.decay("first", MOMENTUM, g)
            change, of_change = LR * self.first, LR * self.bounds["first"]
        elif self.rule == "rmsprop":
            self.decay("first", DECAY, (1 - oracle.Extended(DECAY)) * g * g)
            change = LR * g / (np.sqrt(self.first) + EPS)
            of_change = np.abs(change) * self.bounds["first"] / np.where(self.first == 0, 1, self.first) / 2
        else:
            self.decay("first", BETA1, (1 - oracle.Extended(BETA1)) * g)
            self.decay("second", BETA2, (1 - oracle.Extended(BETA2)) * g * g)
            correction1, correction2 = 1 - oracle.Extended(BETA1) ** number, 1 - oracle.Extended(BETA2) ** number
            root = np.sqrt(self.second / correction2) + EPS
            change = LR * self.first / correction1 / root
            of_root = self.bounds["second"] / np.where(self.second == 0, 1, self.second)  # relative, and halved below
            of_change = LR * self.bounds["first"] / correction1 / root + np.abs(change) * of_root / 2
        self.parameters = self.parameters - change
        rounding = oracle.SLACK * self.u * (np.abs(self.parameters) + np.abs(change))
        self.bounds["parameters"] = self.bounds["parameters"] + of_change + rounding


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rule", RULES)
def test_twenty_steps_match_extended_precision(
    backend: Backend, rng: np.random.Generator, rule: str, size: int, dtype: str
) -> None:
    parameters = rng.standard_normal(size).astype(dtype)
    state = [np.zeros(size, dtype) for _ in range(RULES[rule])]
    exact = Exact(rule, parameters)
    on_parameters, *on_state = backend.arrays(parameters, *state)
    for number in range(1, STEPS + 1):
        gradients = (rng.standard_normal(size) + 0.5).astype(dtype)
        on_gradients = backend.asarray(gradients)
        update(rule, [on_parameters, on_gradients, *on_state], number)
        exact.step(gradients, number)
        np.testing.assert_array_equal(backend.asnumpy(on_gradients), gradients)
    for name, array in zip(("parameters", "first", "second"), (on_parameters, *on_state), strict=False):
        oracle.assert_within(backend.asnumpy(array), getattr(exact, name), exact.bounds[name], name)


@pytest.mark.parametrize("shape", [(), (4, 1, 3, 3), (2, 0)])
@pytest.mark.parametrize(("rule", "scheduled"), [*((rule, False) for rule in RULES), *((r, True) for r in SCHEDULED)])
def test_arrays_of_any_shape_are_updated_as_flat_ones(
    backend: Backend, rng: np.random.Generator, rule: str, shape: tuple[int, ...], scheduled: bool
) -> None:
    plain = [rng.uniform(0.5, 2, shape).astype("float32") for _ in range(2 + RULES[rule])]
    found = []
    for arrays in (plain, [array.reshape(-1) for array in plain]):
        on = backend.arrays(*(array.copy() for array in arrays))
        for step in (1, 2):
            if scheduled:
                row = backend.asarray(bn.update_schedule(rule, LR, 1, before=step - 1)[0].astype("float32"))
                bn.scheduled_update(rule, on[0], on[1], tuple(on[2:]), row)
            else:
                update(rule, on, step)
        found.append([backend.asnumpy(array) for array in on])
    for array, flat in zip(*found, strict=True):
        np.testing.assert_array_equal(array.reshape(-1), flat)
    assert found[0][0].shape == shape
    assert plain[0].size == 0 or (found[0][0] != plain[0]).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gradient", [3.0, -3.0, 1e-3, -1e4])
def test_the_first_adam_step_is_the_learning_rate(backend: Backend, gradient: float, dtype: str) -> None:
    """The corrections undo the first decay exactly, so the step is lr times the sign, to the last digits."""
    parameters, gradients, first, second = backend.arrays(*(np.full(5, value, dtype) for value in (0, gradient, 0, 0)))
    bn.adam_update(parameters, gradients, first, second, step=1, lr=LR, eps=0.0)
    error = np.abs(backend.asnumpy(parameters).astype(oracle.Extended) + LR * np.sign(gradient))
    assert (error <= oracle.SLACK * oracle.unit_roundoff(np.dtype(dtype)) * LR).all()


LARGE = {"float32": [1.7e19, 1e20, -2.9e20], "float64": [4.1e153, 1e155, -2.1e155]}  # second stays finite


@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.filterwarnings("error")
def test_adams_first_steps_do_not_overflow(backend: Backend, dtype: str, scheduled: bool) -> None:
    """``second`` is finite, and ``second / (1 - beta2**step)`` is not: each step is the learning rate all the same."""
    gradients = backend.asarray(np.array(LARGE[dtype], dtype))
    parameters, first, second = backend.arrays(*(np.zeros(3, dtype) for _ in range(3)))
    schedule = backend.asarray(bn.update_schedule("adam", LR, 4).astype(dtype))
    for step in range(4):
        if scheduled:
            bn.scheduled_update("adam", parameters, gradients, (first, second), schedule[step])
        else:
            bn.adam_update(parameters, gradients, first, second, step=step + 1, lr=LR)
    wanted = -4 * LR * np.sign(LARGE[dtype])
    np.testing.assert_allclose(backend.asnumpy(parameters), wanted, rtol=100 * np.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.filterwarnings("error")
def test_a_squared_gradient_beyond_the_type_stops_its_parameter(backend: Backend, dtype: str) -> None:
    """As in PyTorch: second stays infinite. What is not finite in the gradients makes its parameter NaN."""
    largest = np.finfo(dtype).max
    given = np.array([largest, -largest, largest / 1e9, np.inf, -np.inf, np.nan, 1], dtype)
    arrays = parameters, gradients, *state = backend.arrays(np.zeros(7, dtype), given, *np.zeros((2, 7), dtype))
    for step, lr in enumerate((1e4, 0.25), 1):
        bn.adam_update(*arrays, step=step, lr=lr)
        gradients[...] = backend.asarray(np.array([1, 1, 1, 1, 1, 1, 1], dtype))
    found = backend.asnumpy(parameters)
    np.testing.assert_array_equal(found[:6], [0, 0, 0, np.nan, np.nan, np.nan])
    assert found[6] == pytest.approx(-10000.25)
    np.testing.assert_array_equal(backend.asnumpy(state[1])[:5], np.inf)
    arrays = backend.arrays(np.zeros(7, dtype), given, np.zeros(7, dtype))
    bn.rmsprop_update(*arrays, lr=1e4)
    np.testing.assert_array_equal(backend.asnumpy(arrays[0])[:6], [0, 0, 0, np.nan, np.nan, np.nan])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_zero_gradient_does_not_move(backend: Backend, dtype: str) -> None:
    parameters, gradients, first, second = backend.arrays(*(np.full(5, value, dtype) for value in (2, 0, 0, 0)))
    for step in (1, 2):
        bn.adam_update(parameters, gradients, first, second, step=step, lr=LR)
        bn.rmsprop_update(parameters, gradients, first, lr=LR)
    np.testing.assert_array_equal(backend.asnumpy(parameters), 2)


@pytest.mark.parametrize("rule", RULES)
def test_learning_rate_zero_leaves_the_parameters(backend: Backend, rng: np.random.Generator, rule: str) -> None:
    arrays = backend.arrays(*(rng.uniform(0.5, 2, 300) for _ in range(2 + RULES[rule])))
    before = backend.asnumpy(arrays[0]).copy()
    update(rule, arrays, 1, lr=0.0)
    np.testing.assert_array_equal(backend.asnumpy(arrays[0]), before)


@pytest.mark.parametrize(("momentum", "velocity"), [(0.0, 3.0), (1.0, 5.0)])
def test_momentum_is_what_is_left_of_the_velocity(backend: Backend, momentum: float, velocity: float) -> None:
    arrays = backend.arrays(np.array([1.0]), np.array([3.0]), np.array([2.0]))
    bn.momentum_update(*arrays, lr=0.5, momentum=momentum)
    assert backend.asnumpy(arrays[2])[0] == velocity
    assert backend.asnumpy(arrays[0])[0] == 1 - velocity / 2


@pytest.mark.parametrize("rule", RULES)
def test_no_parameters_are_no_error(backend: Backend, rule: str) -> None:
    arrays = backend.arrays(*(np.zeros(0) for _ in range(2 + RULES[rule])))
    update(rule, arrays, 1)
    assert all(array.shape == (0,) for array in arrays)


@pytest.mark.parametrize("rule", RULES)
def test_nan_stays_in_its_parameter(backend: Backend, rng: np.random.Generator, rule: str) -> None:
    plain = [rng.uniform(0.5, 2, 40) for _ in range(2 + RULES[rule])]
    spoilt = [array.copy() for array in plain]
    spoilt[1][7] = np.nan
    on, on_spoilt = backend.arrays(*plain), backend.arrays(*spoilt)
    update(rule, on, 1)
    update(rule, on_spoilt, 1)
    want, got = backend.asnumpy(on[0]), backend.asnumpy(on_spoilt[0])
    assert np.isnan(got[7])
    np.testing.assert_array_equal(np.delete(got, 7), np.delete(want, 7))


@pytest.mark.parametrize("rule", RULES)
def test_a_million_parameters(backend: Backend, rng: np.random.Generator, rule: str) -> None:
    """More vectors than threads of the largest grid, so threads stride; the emulator runs the blocks looked at."""
    size = 1_200_001
    plain = [rng.uniform(0.5, 2, size).astype("float32") for _ in range(2 + RULES[rule])]
    on = backend.arrays(*plain)
    assert parameter_update_launch(size // 4).grid[0] * 256 < size // 4
    some = np.r_[0, 1023, 1024, 2**20 - 1, 2**20, 2**20 + 1, size - 1]
    blocks = sorted({int(i) // 1024 % 1024 for i in some[:-1]})  # the last number is the first thread's
    with emulated_runtime().only_blocks(blocks) if backend.name == "emulator" else nullcontext():
        update(rule, on, 3)
    few = backend.arrays(*(array[some] for array in plain))
    update(rule, few, 3)
    for large, small in zip(on, few, strict=True):
        np.testing.assert_allclose(
            backend.asnumpy(large)[some], backend.asnumpy(small), rtol=0 if backend.name != "reference" else 1e-6
        )


OPTION_ERRORS = [
    ("sgd", {"lr": -0.1}, ValueError, "lr must be at least 0 and finite, got -0.1"),
    ("sgd", {"lr": np.nan}, ValueError, "lr must be at least 0 and finite, got nan"),
    ("momentum", {"lr": np.inf}, ValueError, "lr must be at least 0 and finite, got inf"),
    ("momentum", {"momentum": 1.1}, ValueError, "momentum must be between 0 and 1 and finite, got 1.1"),
    ("momentum", {"momentum": "much"}, TypeError, "momentum must be a number, got 'much'"),
    ("rmsprop", {"decay": 1.0}, ValueError, "decay must be .* got 1.0"),
    ("rmsprop", {"eps": -1}, ValueError, "eps must be at least 0 and finite, got -1"),
    ("adam", {"beta1": 1.0}, ValueError, "beta1 must be .* got 1.0"),
    ("adam", {"beta2": -0.1}, ValueError, "beta2 must be .* got -0.1"),
    ("adam", {"beta2": 1}, ValueError, "beta2 must be .* got 1"),
    ("adam", {"eps": -1e-8}, ValueError, "eps must be at least 0 and finite, got -1e-08"),
    ("adam", {"step": 0}, ValueError, r"step must be from 1 to \d+, got 0"),
    ("adam", {"step": -3}, ValueError, r"step must be from 1 to \d+, got -3"),
    ("adam", {"step": np.nan}, TypeError, "step must be an integer, got nan"),
    ("adam", {"step": 1.5}, TypeError, "step must be an integer, got 1.5"),
    ("adam", {"step": 10**400}, ValueError, r"step must be from 1 to \d+, got an integer of 1329 bits"),
    ("adam", {"step": None}, TypeError, "step must be .* got None"),
]


@pytest.mark.parametrize(("rule", "options", "error", "message"), OPTION_ERRORS)
def test_option_errors_say_what_came(
    backend: Backend, rule: str, options: dict, error: type[Exception], message: str
) -> None:
    arrays = backend.arrays(*(np.ones(6, "float32") for _ in range(2 + RULES[rule])))
    with refused(backend, error, message, *arrays):
        update(rule, arrays, **{"step": 1, **options})


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("spoilt", "error", "message"),
    [
        (np.ones((3, 2), "float32").T, ValueError, "parameters must be contiguous in C order"),
        (np.ones(6, "float16"), TypeError, "parameters must be float32 or float64, got float16"),
        (np.ones(6, "int64"), TypeError, "parameters must be float32 or float64, got int64"),
        (np.ones(12, "float32")[::2], ValueError, "parameters must be contiguous in C order"),
    ],
)
def test_parameters_of_the_wrong_kind(
    backend: Backend, rule: str, spoilt: np.ndarray, error: type[Exception], message: str
) -> None:
    arrays = [backend.like(spoilt), *backend.arrays(*(np.ones(6, "float32") for _ in range(1 + RULES[rule])))]
    with refused(backend, error, message, *arrays):
        update(rule, arrays, 1)


@pytest.mark.emulator
@pytest.mark.parametrize("rule", RULES)
def test_same_bits_in_every_schedule(emulated: EmulatorRuntime, rng: np.random.Generator, rule: str) -> None:
    plain = [rng.uniform(0.5, 2, 1530).astype("float32") for _ in range(2 + RULES[rule])]

    def run() -> list[np.ndarray]:
        on = [emulated.asarray(array) for array in plain]
        update(rule, on, 2)
        return on

    want = run()
    for seed in range(1, 7):
        with emulated.schedule(seed=seed, resident=(1, 2, 64)[seed % 3]):
            for one, other in zip(want, run(), strict=True):
                np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", RULES)
def test_twenty_steps_agree_with_torch(
    torch: ModuleType, backend: Backend, rng: np.random.Generator, rule: str, dtype: str
) -> None:
    parameters = rng.standard_normal(100).astype(dtype)
    leaf = torch.tensor(parameters.copy(), requires_grad=True)
    peers = {
        "sgd": lambda: torch.optim.SGD([leaf], lr=LR),
        "momentum": lambda: torch.optim.SGD([leaf], lr=LR, momentum=MOMENTUM),
        "rmsprop": lambda: torch.optim.RMSprop([leaf], lr=LR, alpha=DECAY, eps=EPS),
        "adam": lambda: torch.optim.Adam([leaf], lr=LR, betas=(BETA1, BETA2), eps=EPS),
    }
    peer = peers[rule]()
    on = backend.arrays(parameters, *(np.zeros(100, dtype) for _ in range(RULES[rule])))
    for number in range(1, STEPS + 1):
        gradients = (rng.standard_normal(100) + 0.5).astype(dtype)
        leaf.grad = torch.tensor(gradients)
        peer.step()
        update(rule, [on[0], backend.asarray(gradients), *on[1:]], number)
    tolerance = 1000 * float(np.finfo(dtype).eps)
    np.testing.assert_allclose(backend.asnumpy(on[0]), leaf.detach().numpy(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", SCHEDULED)
def test_numbers_from_a_schedule_make_the_same_steps(
    backend: Backend, rng: np.random.Generator, rule: str, dtype: str
) -> None:
    """Bit for bit: numbers in an array are those that would be passed."""
    arrays = [rng.standard_normal(300).astype(dtype) for _ in range(2)] + [np.zeros(300, dtype)] * RULES[rule]
    direct, scheduled = ([backend.asarray(array) for array in arrays] for _ in range(2))
    schedule = backend.asarray(bn.update_schedule(rule, LR, 3, before=2).astype(dtype))
    for i in range(3):
        update(rule, direct, 3 + i, **({"eps": 1e-8} if rule == "adam" else {}))
        bn.scheduled_update(rule, *scheduled[:2], tuple(scheduled[2:]), schedule[i])
    for one, two in zip(direct, scheduled, strict=True):
        if backend.is_numpy and rule == "adam":  # its corrections have been rounded to the data's type
            np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-7)
        else:
            np.testing.assert_array_equal(backend.asnumpy(one), backend.asnumpy(two))


def test_a_wrong_schedule_is_refused(backend: Backend) -> None:
    parameters, gradients, scalars = backend.arrays(*(np.ones(size, "float32") for size in (5, 5, 2)))
    with refused(backend, ValueError, r"scalars must have the shape \(3,\), got \(2,\)", parameters):
        bn.scheduled_update("sgd", parameters, gradients, (), scalars)
    with refused(backend, ValueError, r"state of momentum must be 1 arrays \(velocity\), got 0", parameters):
        bn.scheduled_update("momentum", parameters, gradients, (), scalars)
    with refused(backend, ValueError, "optimizer must be one of sgd, momentum, adam; got 'rmsprop'", parameters):
        bn.scheduled_update("rmsprop", parameters, gradients, (), scalars)
