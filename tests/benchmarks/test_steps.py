"""Training steps beyond their losses: kernels on the emulator, captures, compilers, running statistics, names."""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest

from benchmarks import steps
from benchmarks.harness.case import WrongResultError
from benchmarks.steps import jax_xla, pytorch
from benchmarks.steps.expression import ExpressionStep
from benchmarks.steps.ours import OurStep
from benchmarks.steps.step import Batches, State, Step, check_losses, initial_state, norm_of, sizes_of, stopwatch
from tools import backends, emulator

NORMS = ("none", "batch", "layer")
SIZES = (12, 7, 6, 5)
RATE = 1e-3


def random_batches(count: int = 4) -> Batches:
    """Return mini-batches of 16 random examples."""
    rng = np.random.default_rng(1)
    x, labels = rng.standard_normal((count, 16, SIZES[0])), rng.integers(0, SIZES[-1], (count, 16))
    return list(zip(x.astype("f4"), labels.astype("i4"), strict=True))


def check_step(make: Callable[[State, str, float], Step], norm: str, optimizer: str) -> None:
    """Compare the losses with float64; after a timed run and a reset they are the same again."""
    state, batches = initial_state(SIZES, norm), random_batches()
    reference = ExpressionStep(state, optimizer, RATE, dtype="float64")
    step = make(state, optimizer, RATE)
    prepared = step.prepare_all(batches)
    found = step.losses(prepared)
    check_losses("step", found, reference.losses(batches), roundings=32)
    assert stopwatch(step, batches, warm_up=1)() > 0
    step.reset()
    np.testing.assert_array_equal(step.losses(prepared), found)


class EmulatedCuPy(backends.EmulatedNumPy):
    """Kernels on the emulator behind as much of CuPy as our step needs."""

    def __init__(self) -> None:
        super().__init__(backends.emulated_runtime())
        self.waits = 0
        self.cuda = types.SimpleNamespace(get_current_stream=lambda: types.SimpleNamespace(synchronize=self._wait))

    def _wait(self) -> None:
        self.waits += 1

    def empty(self, shape: tuple[int, ...], dtype: object) -> emulator.EmulatedArray:
        """Return emulated NaN."""
        return self.asarray(np.full(shape, np.nan, dtype))


@pytest.mark.emulator
@pytest.mark.parametrize("norm", ["none", "layer", "batch"])
def test_our_step_runs_the_kernels_and_waits_for_them(norm: str) -> None:
    xp = EmulatedCuPy()
    check_step(partial(OurStep, xp=xp), norm, "adam")
    assert xp.waits == 4, "before and after the timed steps, in the untimed and the timed run"


@pytest.mark.parametrize(("norm", "optimizer"), [("none", "sgd"), ("batch", "momentum"), ("layer", "adam")])
def test_a_captured_step_reads_the_mini_batch_it_is_given(norm: str, optimizer: str) -> None:
    pytest.importorskip("torch", reason="PyTorch is not installed")

    def repeated(work: Callable[[], None]) -> Callable[[], None]:
        """Stand for a capture on the CPU: warm up, then repeat the work itself."""
        for _ in range(pytorch.GraphStep.WARM_UPS):
            work()
        return work

    check_step(partial(pytorch.GraphStep, device="cpu", capture=repeated), norm, optimizer)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # the compiler's own
@pytest.mark.parametrize(("norm", "optimizer"), [("none", "sgd"), ("batch", "momentum"), ("layer", "adam")])
def test_the_compiled_step_computes_the_losses_of_float64(norm: str, optimizer: str) -> None:
    pytest.importorskip("torch", reason="PyTorch is not installed")
    check_step(pytorch.CompiledStep, norm, optimizer)


@pytest.mark.parametrize("name", ["NumPy expression", "PyTorch", "JAX jit"])
def test_running_statistics_follow_the_mini_batches(name: str) -> None:
    maker = steps.makers("cpu", (name,))[name]
    if reason := maker.absent():
        pytest.skip(f"{name}: {reason}")
    state = initial_state(SIZES, "batch")
    ours, theirs = OurStep(state, "sgd", RATE), maker.make(state, "sgd", RATE)
    for step in (ours, theirs):
        step.run(step.prepare_all(random_batches()))
    if isinstance(theirs, pytorch.TorchStep):
        norms = {0: theirs.model[1], 1: theirs.model[4]}
        keys = ("running_mean", "running_var")
        found = {f"{i}.{key}": getattr(norm, key) for i, norm in norms.items() for key in keys}
    else:
        found = theirs.carry[1] if isinstance(theirs, jax_xla.JaxStep) else theirs.running
    assert found.keys() == {name for name in state if "running" in name}
    for key, array in found.items():
        np.testing.assert_allclose(np.asarray(array), ours.model.state()[key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("place", ["cpu", "cuda"])
def test_jax_computes_on_its_default_device_alone(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax_xla, "find_spec", lambda name: name)
    monkeypatch.setattr(jax_xla, "load", lambda: types.SimpleNamespace(default_backend=lambda: "tpu"))
    assert jax_xla.absent(place) == "its default device is of the kind tpu"


def test_the_same_weights_whatever_the_norm() -> None:
    states = {norm: initial_state(SIZES, norm) for norm in NORMS}
    assert [norm_of(state) for state in states.values()] == list(NORMS)
    assert {sizes_of(state) for state in states.values()} == {SIZES}
    for one, other in itertools.combinations(states.values(), 2):
        for i in range(3):
            np.testing.assert_array_equal(one[f"{i}.weight"], other[f"{i}.weight"])


@pytest.mark.parametrize("spoilt", [np.nan, 1e-4])
def test_wrong_losses_are_an_error(spoilt: float) -> None:
    exact = np.array([2.0, 1.0])
    assert check_losses("step", exact * (1 + 1e-7), exact, roundings=8) < 2
    with pytest.raises(WrongResultError, match=r"step: the losses are off by .* not timed"):
        check_losses("step", exact + np.array([0, spoilt]), exact, roundings=8)


def test_makers_are_found_by_place_and_name() -> None:
    assert list(steps.makers("cpu"))[:3] == ["bnkernels", "bnkernels fused", "NumPy expression"]
    assert list(steps.makers("cuda"))[:4] == ["bnkernels", "bnkernels graph", "bnkernels fused", "CuPy expression"]
    assert "PyTorch, compiled" in steps.makers("cuda")
    assert "PyTorch, compiled" not in steps.makers("cpu")
    assert list(steps.makers("cpu", ("PyTorch, compiled",))) == ["PyTorch, compiled"]
    with pytest.raises(ValueError, match="nobody at cpu is named Torch; there are bnkernels, "):
        steps.makers("cpu", ("Torch",))
