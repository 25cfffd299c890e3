"""LSTM layers: PyTorch's numbers and state, gradients, states between windows, population statistics."""

from __future__ import annotations

import copy
import pickle
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from bnkernels import nn
from tests.nn.common import assert_close, assert_gradients
from tools.backends import Backend

KINDS = [nn.LSTM, nn.LayerNormLSTM, nn.BatchNormLSTM]


def make(kind: type[nn.LSTM], backend: Backend, **options: Any) -> nn.LSTM:
    """Return two such layers of three inputs and four units, in float64."""
    more = {"steps": 5} if kind is nn.BatchNormLSTM else {}
    return kind(3, 4, **{"layers": 2, "dtype": "float64", "seed": 1, "xp": backend.xp} | more | options)


@pytest.mark.parametrize("options", [{}, {"num_layers": 2}, {"batch_first": True}, {"bias": False}], ids=str)
def test_is_pytorchs_with_its_state(
    torch: ModuleType, backend: Backend, rng: np.random.Generator, options: dict[str, Any]
) -> None:
    theirs = torch.nn.LSTM(3, 4, dtype=torch.float64, **options)
    ours = nn.from_torch(theirs, xp=backend.xp)
    layers = options.get("num_layers", 1)
    x, dy = rng.standard_normal((5, 7, 3)), rng.standard_normal((5, 7, 4))
    rows = 5 if "batch_first" in options else 7
    state, of_state = ([rng.standard_normal((layers, rows, 4)) for _ in range(2)] for _ in range(2))

    given = [torch.tensor(array, requires_grad=True) for array in (x, *state)]
    want, (h_n, c_n) = theirs(given[0], tuple(given[1:]))
    torch.autograd.backward([want, h_n, c_n], [torch.tensor(array) for array in (dy, *of_state)])
    y = ours(backend.asarray(x), state=tuple(backend.arrays(*state)))
    dx = ours.backward(backend.asarray(dy), state_gradient=tuple(backend.arrays(*of_state)))
    got = [y, *ours.state, dx, *ours.state_gradient, *ours.gradients.values()]
    gradients = [given[0].grad, given[1].grad, given[2].grad, *(each.grad for each in theirs.parameters())]
    for array, right in zip(got, [want, h_n, c_n, *gradients], strict=True):
        assert_close(backend, array, right.detach().numpy(), 1e-11)

    back = torch.nn.LSTM(3, 4, dtype=torch.float64, **options)
    back.load_state_dict({name: torch.from_numpy(array) for name, array in ours.state_dict().items()})
    assert all((mine == right).all() for mine, right in zip(back.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize("options", [{"bidirectional": True}, {"proj_size": 2}, {"dropout": 0.5, "num_layers": 2}])
def test_other_lstms_of_pytorch_are_refused(torch: ModuleType, options: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="module must be an LSTM of one direction without projection and dropout"):
        nn.from_torch(torch.nn.LSTM(3, 4, **options))


@pytest.mark.parametrize("options", [{}, {"output": "last"}, {"batch_first": True}, {"initial": "identity"}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_match_central_differences(
    backend: Backend, rng: np.random.Generator, kind: type[nn.LSTM], options: dict[str, Any]
) -> None:
    layer = make(kind, backend, **options)
    x = rng.standard_normal((5, 6, 3))
    shape = (6, 4) if "output" in options else (5, 6, 4)
    assert_gradients(backend, layer, x, rng.standard_normal(shape))
    if kind is nn.BatchNormLSTM:
        assert_gradients(backend, layer.eval(), x, rng.standard_normal(shape))


@pytest.mark.parametrize("kind", KINDS)
def test_windows_with_their_states_are_the_whole_sequence(
    backend: Backend, rng: np.random.Generator, kind: type[nn.LSTM]
) -> None:
    """In evaluation: population statistics begin anew with every window, so those of all steps are set alike."""
    layer = make(kind, backend).eval()
    x = rng.standard_normal((5, 6, 3))
    whole = backend.asnumpy(layer(backend.asarray(x)))
    ends = [backend.asnumpy(array) for array in layer.state]
    first = backend.asnumpy(layer(backend.asarray(x[:2])))
    rest = backend.asnumpy(layer(backend.asarray(x[2:]), state=layer.state))
    np.testing.assert_allclose(np.concatenate([first, rest]), whole, rtol=1e-12, atol=1e-12)
    for array, end in zip(layer.state, ends, strict=True):
        assert_close(backend, array, end)


def test_unequal_lengths_are_pytorchs_packed_sequences(
    torch: ModuleType, backend: Backend, rng: np.random.Generator
) -> None:
    theirs = torch.nn.LSTM(3, 4, num_layers=2, dtype=torch.float64)
    ours, lengths = nn.from_torch(theirs, xp=backend.xp), np.array([2, 5, 1, 4])
    x = rng.standard_normal((5, 4, 3))
    packed = torch.nn.utils.rnn.pack_padded_sequence(torch.tensor(x), lengths, enforce_sorted=False)
    want, (h_n, c_n) = theirs(packed)
    y = ours(backend.asarray(x), lengths=lengths)
    assert_close(backend, y, torch.nn.utils.rnn.pad_packed_sequence(want)[0].detach().numpy())
    assert_close(backend, ours.state[0], h_n.detach().numpy())
    assert_close(backend, ours.state[1], c_n.detach().numpy())
    ours.output = "last"
    assert_close(backend, ours(backend.asarray(x), lengths=lengths), h_n[-1].detach().numpy())


def test_population_statistics_are_of_every_step_and_counted(backend: Backend, rng: np.random.Generator) -> None:
    layer = make(nn.BatchNormLSTM, backend, layers=1, momentum=None, steps=2)
    batches = rng.standard_normal((3, 4, 6, 3))
    for batch in batches:
        layer(backend.asarray(batch))
    layer(backend.asarray(batches[0]), training=False)  # does not count
    parts = batches @ backend.asnumpy(layer.parameters["weight_ih_l0"]).T
    assert_close(backend, layer.buffers["running_mean_ih_l0"], parts.mean(2).mean(0)[:2])
    assert_close(backend, layer.buffers["running_var_ih_l0"], parts.var(2, ddof=1).mean(0)[:2])
    state = layer.state_dict()
    assert layer.batches == state["num_batches_tracked"] == 3
    other = make(nn.BatchNormLSTM, backend, layers=1, seed=9, steps=2)
    other.load_state_dict(state)
    assert other.batches == 3
    x = backend.asarray(batches[0])
    assert_close(backend, other.eval()(x), backend.asnumpy(layer.eval()(x)), 0)


def test_constant_first_steps_have_finite_gradients(backend: Backend, rng: np.random.Generator) -> None:
    """The first pixels of digits are 0 in every image: their variance is 0."""
    layer = make(nn.BatchNormLSTM, backend, output="last")
    x = rng.standard_normal((5, 6, 3))
    x[:2] = 0.0
    y = layer(backend.asarray(x))
    layer.backward(y)
    assert all(np.isfinite(backend.asnumpy(gradient)).all() for gradient in layer.gradients.values())
    assert np.abs(backend.asnumpy(y)).max() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_learns_with_an_optimiser_and_is_copied_and_saved(
    backend: Backend, rng: np.random.Generator, kind: type[nn.LSTM]
) -> None:
    options = {"dtype": "float64", "xp": backend.xp}
    model = nn.Sequential(make(kind, backend, output="last", input_gradient=False), nn.Linear(4, 2, seed=0, **options))
    optimizer, x = nn.Adam(model, lr=0.05), rng.standard_normal((5, 32, 3))
    want, losses = np.stack([x[0].sum(1), x[-1, :, 0]], 1), []
    for _ in range(60):
        error = model(backend.asarray(x)) - backend.asarray(want)
        losses.append(float((error * error).mean()))
        model.backward(error)
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        given = backend.asarray(x)
        assert_close(backend, other.eval()(given), backend.asnumpy(model.eval()(given)), 0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_forward_takes_the_memory_of_the_last_one(
    backend: Backend, rng: np.random.Generator, kind: type[nn.LSTM]
) -> None:
    """The next forward ends the time in which its backward can be asked for; a refused call leaves it."""
    layer, fresh = make(kind, backend), make(kind, backend)
    first, second, dy = (backend.asarray(rng.standard_normal(shape)) for shape in ((5, 6, 3), (5, 6, 3), (5, 6, 4)))
    layer(first)
    kept = layer._saved[1][0].cells
    with pytest.raises(ValueError, match="lengths must"):
        layer(second, lengths=[0] * 6)
    fresh(first)
    assert_close(backend, layer.backward(dy), backend.asnumpy(fresh.backward(dy)), 0)
    layer(second)
    assert layer._saved[1][0].cells is kept
    other = make(kind, backend)
    other(second)
    assert_close(backend, layer.backward(dy), backend.asnumpy(other.backward(dy)), 0)


def test_its_text_is_its_constructor() -> None:
    layer = nn.BatchNormLSTM(3, 4, steps=7, layers=2, batch_first=True, output="last", momentum=None, eps=1e-3)
    text = repr(layer)
    assert text.startswith(
        "BatchNormLSTM(3, 4, steps=7, momentum=None, layers=2, batch_first=True, output='last', eps=0.001, "
    )
    assert "weight_ih_l1 (16, 4)" in text
    assert "bias=False" in repr(nn.LSTM(3, 4, bias=False))


def test_what_does_not_fit_is_refused(backend: Backend) -> None:
    layer = make(nn.LSTM, backend)
    x = backend.asarray(np.zeros((5, 6, 3)))
    with pytest.raises(RuntimeError, match="backward needs what a forward keeps"):
        layer.backward(x)
    with pytest.raises(ValueError, match=r"x must have the shape \(T, N, I\) with 3 inputs, got the shape \(5, 3\)"):
        layer(backend.asarray(np.zeros((5, 3))))
    with pytest.raises(TypeError, match="x must be float64 for this LSTM, got float32"):
        layer(backend.asarray(np.zeros((5, 6, 3), "float32")))
    with pytest.raises(TypeError, match="state must be a tuple of two arrays, hidden states and cells, got"):
        layer(x, state=x)
    wrong = backend.asarray(np.zeros((2, 5, 4)))
    with pytest.raises(ValueError, match=r"state\[0\] must have the shape \(2, 6, 4\), got \(2, 5, 4\)"):
        layer(x, state=(wrong, wrong))
    y = layer(x)
    with pytest.raises(ValueError, match=r"state_gradient\[0\] must have the shape"):
        layer.backward(y, state_gradient=(wrong, wrong))
    with pytest.raises(ValueError, match=r"dy must have the shape \(5, 6, 4\)"):
        layer.backward(x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float16"}, "dtype must be float32 or float64 for this LSTM, got float16"),
        ({"output": "first"}, "output must be"),
        ({"initial": "zeros"}, "initial must be"),
        ({"layers": 0}, "layers must be"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nn.LSTM(3, 4, **options)
