"""LSTM of padded sequences, and the population statistics of every time step."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ops.test_lstm import LENGTHS, NORMS, backend, bound, call, gradients, loss_of
from tools import oracle_lstm
from tools.backends import Backend
from tools.oracle import Extended

__all__ = ["backend"]  # the fixture


@pytest.mark.parametrize("norm", NORMS)
def test_padding_changes_nothing(backend: Backend, rng: np.random.Generator, norm: str | None) -> None:
    """A batch of sequences of which none is longer than 3 is a batch of 3 steps."""
    given = oracle_lstm.arguments(rng, (5, 4, 2, 6), norm, "float64")
    lengths = np.array([3, 2, 3, 1])
    weights = [rng.standard_normal(shape) for shape in ((5, 4, 6), (4, 6), (4, 6))]
    *found, saved = call(backend, given, norm=norm, lengths=lengths)
    grads = gradients(backend, saved, *weights)
    short = given | {"x": given["x"][:3]}
    other = short | {"x": np.where((np.arange(3)[:, None] < lengths)[..., None], short["x"], 7)}
    assert not backend.asnumpy(found[0])[3:].any()
    assert not grads["x"][3:].any()
    for same in (short, other):
        *right, saved = call(backend, same, norm=norm, lengths=lengths)
        again = gradients(backend, saved, weights[0][:3], *weights[1:])
        for got, wanted in zip((backend.asnumpy(found[0])[:3], *found[1:]), right, strict=True):
            np.testing.assert_array_equal(backend.asnumpy(got), backend.asnumpy(wanted))
        for name, gradient in (grads | {"x": grads["x"][:3]}).items():
            np.testing.assert_allclose(gradient, again[name], rtol=1e-12, atol=1e-13, err_msg=name)


@pytest.mark.parametrize("norm", NORMS)
def test_examples_of_a_length_are_a_batch_of_their_own(
    backend: Backend, rng: np.random.Generator, norm: str | None
) -> None:
    """An example that ends with the first step is no part of the statistics of the others behind it."""
    given = oracle_lstm.arguments(rng, (4, 6, 2, 3), norm, "float64")
    given["x"][0, 3:], given["h0"][3:], given["c0"][3:] = given["x"][0, :3], given["h0"][:3], given["c0"][:3]
    y, h_n, c_n, _ = call(backend, given, norm=norm, lengths=[4, 4, 4, 1, 1, 1])
    some = given | {"x": given["x"][:, :3], "h0": given["h0"][:3], "c0": given["c0"][:3]}
    right = call(backend, some, norm=norm)
    for got, wanted in zip((backend.asnumpy(y)[:, :3], h_n[:3], c_n[:3]), right[:3], strict=True):
        np.testing.assert_allclose(backend.asnumpy(got), backend.asnumpy(wanted), rtol=1e-11, atol=1e-12)
    np.testing.assert_array_equal(backend.asnumpy(h_n)[3:], backend.asnumpy(y)[0, 3:])


def population(units: int, steps: int, dtype: str = "float64") -> list[np.ndarray]:
    """Return population statistics before the first mini-batch."""
    shapes = [(steps, 4 * units)] * 4 + [(steps, units)] * 2
    return [np.full(shape, number % 2, dtype) for number, shape in enumerate(shapes)]


@pytest.mark.parametrize("lengths", [None, LENGTHS, np.array([5, 2, 2, 1, 1])])
def test_every_step_has_population_statistics(
    backend: Backend, rng: np.random.Generator, lengths: np.ndarray | None
) -> None:
    given = oracle_lstm.arguments(rng, (5, 5, 2, 3), "batch", "float64")
    running = backend.arrays(*population(3, 4))
    call(backend, given, norm="batch", running=tuple(running), momentum=0.25, lengths=lengths)
    counts = [5 if lengths is None else int((lengths > t).sum()) for t in range(5)]
    moments = oracle_lstm.forward(given, "batch", lengths)[3]
    for number, (got, first) in enumerate(zip(running, population(3, 4), strict=True)):
        for t in range(4):
            new, n = moments[t][number], counts[t]
            right = 0.75 * first[t] + 0.25 * new * (n / (n - 1) if number % 2 else 1) if n > 1 else first[t]
            np.testing.assert_allclose(backend.asnumpy(got)[t], right.astype(float), rtol=1e-9, atol=1e-10)


def test_the_population_is_an_average_of_all_mini_batches(backend: Backend, rng: np.random.Generator) -> None:
    given = [oracle_lstm.arguments(rng, (2, 5, 2, 3), "batch", "float64") for _ in range(3)]
    running = backend.arrays(*population(3, 2))
    for before, one in enumerate(given):
        call(backend, one, norm="batch", running=tuple(running), momentum=None, batches_before=before)
    means = [oracle_lstm.forward(one, "batch")[3][1][4] for one in given]
    np.testing.assert_allclose(backend.asnumpy(running[4])[1], np.mean(means, 0).astype(float), rtol=1e-9, atol=1e-12)


def test_inference_takes_the_population_and_the_last_step_beyond(backend: Backend, rng: np.random.Generator) -> None:
    sizes = 5, 4, 2, 3
    given = oracle_lstm.arguments(rng, sizes, "batch", "float64")
    running = [np.abs(array + rng.standard_normal(array.shape) / 8) for array in population(3, 3)]
    on = tuple(backend.arrays(*running))
    *found, saved = call(backend, given, norm="batch", running=on, training=False)
    known = [tuple(array[t] for array in running) for t in range(3)]
    for got, right in zip(found, oracle_lstm.forward(given, "batch", population=known)[:3], strict=True):
        assert (np.abs(backend.asnumpy(got) - right) <= bound(sizes, "float64")).all()
    for one, two in zip(on, running, strict=True):
        np.testing.assert_array_equal(backend.asnumpy(one), two)
    weights = [rng.standard_normal(array.shape) for array in found]
    h = Extended(1e-8)  # far above the roundings of extended precision, and far below what bends
    for name, gradient in gradients(backend, saved, *weights).items():
        direction = rng.standard_normal(gradient.shape)
        ends = [given | {name: given[name] + sign * h * direction} for sign in (1, -1)]
        high, low = (loss_of(end, weights, "batch", population=known) for end in ends)
        size = np.abs(gradient * direction).sum()
        assert abs((high - low) / (2 * h) - (gradient * direction).sum()) <= 1e-9 * (1 + size), name


def test_one_example_is_enough_in_inference(backend: Backend, rng: np.random.Generator) -> None:
    given = oracle_lstm.arguments(rng, (2, 3, 2, 3), "batch", "float64")
    running = tuple(backend.arrays(*population(3, 2)))
    y = backend.asnumpy(call(backend, given, norm="batch", running=running, training=False)[0])
    one = given | {name: array[..., 1:2, :] for name, array in given.items() if name in ("x", "h0", "c0")}
    alone = call(backend, one, norm="batch", running=running, training=False)[0]
    np.testing.assert_allclose(backend.asnumpy(alone), y[:, 1:2], rtol=1e-13, atol=1e-14)
