"""LSTM: forward against its formulas in extended precision, backward against central differences."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import bnkernels as bn
from bnkernels.ops.lstm import kernels
from tools import backends, oracle_lstm
from tools.backends import Backend
from tools.oracle import Extended

NORMS = [None, "batch", "layer"]
# (T, N, I, H): one of everything but examples; few; a step of the paper's kind; more units than a block has; more
# examples, and more units, than the threads of a kernel hold.
SIZES = [(1, 2, 1, 1), (4, 5, 3, 3), (3, 33, 1, 20), (2, 3, 7, 70), (2, 131, 2, 9), (2, 3, 2, 530)]
LENGTHS = np.array([3, 5, 1, 5, 2])  # for T = 5, in no order


def by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every step be a launch of its own."""
    monkeypatch.setattr(kernels, "choose_sequence", lambda *given: None)


@pytest.fixture(params=[*backends.PARAMETERS, pytest.param("by_step", marks=pytest.mark.emulator)])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    """Return each place an op runs in; the emulator with sequences in one launch where they fit, and without."""
    name = "emulator" if request.param == "by_step" else request.param
    if request.param == "by_step":
        by_step(monkeypatch)
    with backends.entered(name) as backend:
        yield backend
    if name == "emulator":
        backends.emulated_runtime().check_guards()


def call(backend: Backend, given: dict[str, np.ndarray], **options: Any) -> tuple:
    """Return the results of a forward on a backend."""
    on = {name: None if array is None else backend.asarray(array) for name, array in given.items()}
    first, norms = oracle_lstm.split(on)
    return bn.lstm_forward(*first, norms, **options)


def gradients(backend: Backend, saved: Any, *given: np.ndarray | None) -> dict[str, np.ndarray]:
    """Return the gradients of a backward by the names of their arguments."""
    *first, dnorms = bn.lstm_backward(*backend.arrays(*given), saved)
    return {
        name: np.array(backend.asnumpy(array))
        for name, array in zip(oracle_lstm.NAMES, (*first, *(dnorms or ())), strict=dnorms is not None)
    }


def bound(sizes: tuple[int, int, int, int], dtype: str) -> float:
    """Return how far a result near 1 may be off: roundings of the products and of a step, times the steps."""
    steps, _, inputs, units = sizes
    return steps * (inputs + units + 40) * float(np.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("sizes", SIZES)
def test_forward_is_its_formulas(
    backend: Backend, rng: np.random.Generator, sizes: tuple[int, int, int, int], norm: str | None, dtype: str
) -> None:
    given = oracle_lstm.arguments(rng, sizes, norm, dtype)
    eps = 0.1  # with which few examples do not make small variances
    *found, _ = call(backend, given, norm=norm, eps=eps)
    for got, right in zip(found, oracle_lstm.forward(given, norm, eps=eps)[:3], strict=True):
        assert got.dtype == dtype
        assert (np.abs(backend.asnumpy(got) - right) <= bound(sizes, dtype)).all()
    without = call(backend, given, norm=norm, eps=eps, keep=False)
    assert without[3] is None
    for one, two in zip(without[:3], found, strict=True):
        np.testing.assert_array_equal(backend.asnumpy(one), backend.asnumpy(two))


def loss_of(given: dict[str, np.ndarray], weights: list[np.ndarray], norm: str | None, **options: Any) -> Extended:
    """Return a weighted sum of the outputs, in extended precision."""
    found = oracle_lstm.forward(given, norm, **options)[:3]
    return sum((weight * array).sum() for weight, array in zip(weights, found, strict=True))


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("sizes", SIZES)
def test_gradients_are_those_of_the_reference(
    backend: Backend, rng: np.random.Generator, sizes: tuple[int, int, int, int], norm: str | None, ragged: bool
) -> None:
    steps, rows, _, units = sizes
    given = oracle_lstm.arguments(rng, sizes, norm, "float64")
    lengths = np.arange(rows) % steps + 1 if ragged else None
    weights = [rng.standard_normal(shape) for shape in ((steps, rows, units), (rows, units), (rows, units))]
    found = gradients(backend, call(backend, given, norm=norm, lengths=lengths, eps=0.1)[3], *weights)
    with backends.entered("reference") as plain:
        right = gradients(plain, call(plain, given, norm=norm, lengths=lengths, eps=0.1)[3], *weights)
    for name, gradient in found.items():
        limit = 1e-13 * (rows + units) * np.abs(right[name]).max()
        np.testing.assert_allclose(gradient, right[name], rtol=0, atol=limit, err_msg=name)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_gradients_of_float32_are_those_of_float64_but_for_roundings(
    backend: Backend, rng: np.random.Generator, norm: str | None, ragged: bool
) -> None:
    sizes = 5, 5, 3, 9
    given, lengths = oracle_lstm.arguments(rng, sizes, norm, "float32"), LENGTHS if ragged else None
    weights = [rng.standard_normal(shape).astype("float32") for shape in ((5, 5, 9), (5, 9), (5, 9))]
    found = []
    for dtype in ("float32", "float64"):
        saved = call(backend, {n: a.astype(dtype) for n, a in given.items()}, norm=norm, lengths=lengths, eps=0.1)[3]
        found.append(gradients(backend, saved, *(weight.astype(dtype) for weight in weights)))
    for name, gradient in found[0].items():
        size = np.abs(found[1][name]).max()
        np.testing.assert_allclose(gradient, found[1][name], rtol=0, atol=4 * size * bound(sizes, "float32"))


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_backward_is_central_differences(
    backend: Backend, rng: np.random.Generator, norm: str | None, ragged: bool
) -> None:
    sizes = steps, rows, _, units = 5, 5, 3, 4
    given, lengths = oracle_lstm.arguments(rng, sizes, norm, "float64"), LENGTHS if ragged else None
    weights = [rng.standard_normal(shape) for shape in ((steps, rows, units), (rows, units), (rows, units))]
    found = gradients(backend, call(backend, given, norm=norm, lengths=lengths)[3], *weights)
    assert found.keys() == given.keys()
    h = Extended(1e-8)  # far above the roundings of extended precision, and far below what bends
    for name, gradient in found.items():
        assert gradient.shape == given[name].shape
        for _ in range(2):
            direction = rng.standard_normal(gradient.shape)
            ends = [given | {name: given[name] + sign * h * direction} for sign in (1, -1)]
            high, low = (loss_of(end, weights, norm, lengths=lengths) for end in ends)
            size = np.abs(gradient * direction).sum()
            assert abs((high - low) / (2 * h) - (gradient * direction).sum()) <= 1e-9 * (1 + size), name


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("ragged", [False, True])
def test_without_a_norm_it_is_pytorchs(
    backend: Backend, rng: np.random.Generator, torch: ModuleType, dtype: str, ragged: bool
) -> None:
    sizes = 5, 5, 3, 7
    given = oracle_lstm.arguments(rng, sizes, None, dtype)
    lstm = torch.nn.LSTM(3, 7).to(getattr(torch, dtype))
    tensors = {name: torch.from_numpy(array.copy()).requires_grad_() for name, array in given.items()}
    parameters = {name: tensors[name] for name in ("weight_ih", "weight_hh")} | {"bias_ih": tensors["bias"]}
    parameters |= {"bias_hh": torch.zeros_like(tensors["bias"])}
    parameters = {f"{name}_l0": tensor for name, tensor in parameters.items()}
    x, state = tensors["x"], (tensors["h0"][None], tensors["c0"][None])
    rnn = torch.nn.utils.rnn
    inputs = rnn.pack_padded_sequence(x, LENGTHS, enforce_sorted=False) if ragged else x
    y, (h_n, c_n) = torch.func.functional_call(lstm, parameters, (inputs, state))
    y = rnn.pad_packed_sequence(y)[0] if ragged else y
    *found, saved = call(backend, given, lengths=LENGTHS if ragged else None)
    for got, right in zip(found, (y, h_n[0], c_n[0]), strict=True):
        np.testing.assert_allclose(backend.asnumpy(got), right.detach().numpy(), rtol=0, atol=bound(sizes, dtype))
    weights = [rng.standard_normal(tuple(array.shape)).astype(dtype) for array in (y, h_n[0], c_n[0])]
    for grads, loss in (
        (weights, sum((torch.from_numpy(w) * a).sum() for w, a in zip(weights, (y, h_n[0], c_n[0]), strict=True))),
        ((None, weights[1], None), (torch.from_numpy(weights[1]) * h_n[0]).sum()),
    ):
        right = torch.autograd.grad(loss, list(tensors.values()), retain_graph=True)
        for (name, got), wanted in zip(gradients(backend, saved, *grads).items(), right, strict=True):
            np.testing.assert_allclose(got, wanted.numpy(), rtol=0, atol=40 * bound(sizes, dtype), err_msg=name)


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_constant_inputs_have_finite_gradients(backend: Backend, rng: np.random.Generator, norm: str) -> None:
    """As the first pixels of images: the variance is exactly 0, of all parts if the states begin equal too."""
    given = oracle_lstm.arguments(rng, (6, 5, 1, 4), norm, "float32")
    given["x"][:4] = 0.1
    given["h0"][...], given["c0"][...] = 0, 0
    y, h_n, _, saved = call(backend, given, norm=norm)
    found = gradients(backend, saved, None, np.ones(h_n.shape, "float32"), None)
    assert all(np.isfinite(array).all() for array in (backend.asnumpy(y), *found.values()))
    if norm == "batch":  # every example is beta, exactly
        rows = backend.asnumpy(y)[:4]
        np.testing.assert_array_equal(rows, np.broadcast_to(rows[:, :1], rows.shape))
        assert np.ptp(backend.asnumpy(y)[4:], axis=1).max() > 0


def test_two_windows_are_the_sequence(backend: Backend, rng: np.random.Generator) -> None:
    """And the gradients of the second window go through its first states into the first: backward through time."""
    given = oracle_lstm.arguments(rng, (6, 3, 2, 4), None, "float64")
    *whole, saved = call(backend, given)
    dy = rng.standard_normal((6, 3, 4))
    right = gradients(backend, saved, dy, None, None)
    *first, saved_first = call(backend, given | {"x": given["x"][:2]})
    then = {"x": given["x"][2:], "h0": backend.asnumpy(first[1]), "c0": backend.asnumpy(first[2])}
    *second, saved_second = call(backend, given | then)
    for got, wanted in zip(second[1:], whole[1:], strict=True):
        np.testing.assert_allclose(backend.asnumpy(got), backend.asnumpy(wanted), rtol=1e-13)
    of_second = gradients(backend, saved_second, dy[2:], None, None)
    of_first = gradients(backend, saved_first, dy[:2], of_second["h0"], of_second["c0"])
    for name in ("weight_ih", "weight_hh", "bias"):
        np.testing.assert_allclose(of_first[name] + of_second[name], right[name], rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(of_first["h0"], right["h0"], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
@pytest.mark.parametrize("norm", NORMS)
def test_no_steps_or_no_examples(backend: Backend, rng: np.random.Generator, norm: str | None, shape: tuple) -> None:
    given = oracle_lstm.arguments(rng, (*shape, 2, 4), norm, "float32")
    y, h_n, c_n, saved = call(backend, given, norm=norm)
    assert y.shape == (*shape, 4)
    for got, right in ((h_n, given["h0"]), (c_n, given["c0"])):
        np.testing.assert_array_equal(backend.asnumpy(got), right)
    found = gradients(backend, saved, None, np.ones((shape[1], 4), "float32"), None)
    assert (found.pop("h0") == 1).all()
    assert not any(array.any() for array in found.values())


def test_what_is_none_is_0(backend: Backend, rng: np.random.Generator) -> None:
    given = oracle_lstm.arguments(rng, (3, 4, 2, 5), None, "float64")
    zeros = {name: np.zeros_like(given[name]) for name in ("h0", "c0", "bias")}
    *right, saved = call(backend, given | zeros)
    *found, other = call(backend, given | dict.fromkeys(zeros))
    for one, two in zip(found, right, strict=True):
        np.testing.assert_array_equal(backend.asnumpy(one), backend.asnumpy(two))
    wanted = gradients(backend, saved, np.ones((3, 4, 5)), np.zeros((4, 5)), np.zeros((4, 5)))
    got = gradients(backend, other, np.ones((3, 4, 5)), None, None)
    for name in wanted:
        np.testing.assert_array_equal(got[name], wanted[name])


def test_outputs_are_written_where_they_are_wanted(backend: Backend, rng: np.random.Generator) -> None:
    given = oracle_lstm.arguments(rng, (3, 4, 2, 5), "layer", "float32")
    wanted = call(backend, given, norm="layer")
    out = tuple(backend.empty(array.shape, "float32") for array in wanted[:3])
    found = call(backend, given, norm="layer", out=out)
    for one, two, three in zip(found, out, wanted, strict=False):
        assert one is two
        np.testing.assert_array_equal(backend.asnumpy(one), backend.asnumpy(three))
    dh_n = backend.asarray(np.ones((4, 5), "float32"))
    *right, dnorms = bn.lstm_backward(None, dh_n, None, found[3])
    *some, their_norms = out = (
        *(backend.empty(array.shape, "float32") for array in right),
        tuple(backend.empty(array.shape, "float32") for array in dnorms),
    )
    *got, of_norms = bn.lstm_backward(None, dh_n, None, found[3], out=out)
    for one, two, three in zip((*got, *of_norms), (*some, *their_norms), (*right, *dnorms), strict=True):
        assert one is two
        np.testing.assert_array_equal(backend.asnumpy(one), backend.asnumpy(three))
    dx, *others = bn.lstm_backward(None, dh_n, None, found[3], input_gradient=False, out=(None, *out[1:]))
    assert dx is None
    for one, two in zip(others[:5], right[1:], strict=True):
        np.testing.assert_array_equal(backend.asnumpy(one), backend.asnumpy(two))


@pytest.mark.parametrize("norm", NORMS)
def test_memory_of_an_earlier_forward_is_used_again(
    backend: Backend, rng: np.random.Generator, norm: str | None
) -> None:
    """Where it is enough, whatever it holds."""
    given = oracle_lstm.arguments(rng, (5, 5, 2, 3), norm, "float64")
    dy = rng.standard_normal((5, 5, 3))
    saved = call(backend, given, norm=norm)[3]
    for steps, lengths, fits in ((5, LENGTHS, True), (3, None, True), (1, None, False), (5, None, True)):
        some = given | {"x": given["x"][:steps]}
        *right, fresh = call(backend, some, norm=norm, lengths=lengths)
        *found, again = call(backend, some, norm=norm, lengths=lengths, reuse=saved)
        assert (again.gates is saved.gates) == fits
        for one, two in zip(found, right, strict=True):
            np.testing.assert_array_equal(backend.asnumpy(one), backend.asnumpy(two))
        wanted = gradients(backend, fresh, dy[:steps], None, None)
        for name, gradient in gradients(backend, again, dy[:steps], None, None).items():
            np.testing.assert_array_equal(gradient, wanted[name], err_msg=name)
    other = call(backend, given | {"x": given["x"][:, :4], "h0": given["h0"][:4], "c0": given["c0"][:4]}, norm=norm)[3]
    assert call(backend, given, norm=norm, reuse=other)[3].gates is not other.gates


def test_nan_stays_in_its_example_without_batch_norm(backend: Backend, rng: np.random.Generator) -> None:
    for norm in (None, "layer"):
        given = oracle_lstm.arguments(rng, (3, 4, 2, 5), norm, "float32")
        given["x"][1, 2, 0] = np.nan
        y, _, _, saved = call(backend, given, norm=norm)
        bad = np.isnan(backend.asnumpy(y)).all(2)
        np.testing.assert_array_equal(bad, (np.arange(3)[:, None] >= 1) & (np.arange(4) == 2))
        dx = gradients(backend, saved, np.ones((3, 4, 5), "float32"), None, None)["x"]
        np.testing.assert_array_equal(np.isfinite(dx).all((0, 2)), np.arange(4) != 2)
