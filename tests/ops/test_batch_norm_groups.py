"""Groups: each is a mini-batch of its own in one launch, with gamma and beta shared."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import bnkernels as bn
from bnkernels.ops.batch_norm.launch import one_block
from bnkernels.ops.batch_norm.problem import BACKWARD, FORWARD, INFERENCE, INPUT_GRADIENT, Problem
from tests.ops.test_batch_norm_layouts import as_rows, make_tensors
from tests.ops.test_batch_norm_masked import dtype_named, make_mask
from tools import oracle
from tools.backends import Backend
from tools.emulator import EmulatorRuntime

# T groups of (N, C), and others: one group; more groups than one block takes; several blocks that share a slice.
CASES = [((4, 12, 5), 1), ((1, 12, 5), 1), ((3, 70, 40), 1), ((300, 5, 3), 1), ((3, 4, 5, 6), 1), ((3, 4, 6, 5), -1)]


def grouped_oracle(forward: bool, *args: Any, statistics: Any = None, **options: Any) -> list[Any]:
    """Return the oracle of every group; arguments that are lists give each its own."""
    count = next(len(arg) for arg in args if isinstance(arg, list))
    function = oracle.forward if forward else oracle.backward
    pick = [[arg[t] if isinstance(arg, list) else arg for arg in args] for t in range(count)]
    extra = [{k: v[t] if isinstance(v, list) else v for k, v in options.items()} for t in range(count)]
    return [function(*given, **named) for given, named in zip(pick, extra, strict=True)]


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize(("shape", "axis"), CASES)
def test_every_group_is_a_mini_batch(
    backend: Backend, rng: np.random.Generator, shape: tuple[int, ...], axis: int, dtype: str, masked: bool
) -> None:
    groups, channels = shape[0], shape[1:][axis]
    of_x = axis if axis < 0 else axis + 1
    *tensors, gamma, beta = make_tensors(rng, shape, of_x, dtype_named(dtype))
    running = rng.standard_normal((groups, channels)), rng.uniform(0.1, 3, (groups, channels))
    running = [array.astype(gamma.dtype) for array in running]
    mask = np.array([make_mask(rng, shape[1:2]) for _ in range(groups)]) if masked else None
    x, dy, residual, on_gamma, on_beta, on_mean, on_var, on_mask = backend.arrays(*tensors, gamma, beta, *running, mask)
    options = {"axis": axis, "grouped": True, "mask": on_mask, "residual": residual, "activation": "sigmoid"}

    def rows_of(array: np.ndarray) -> list[np.ndarray]:
        """Return the valid rows of every group."""
        flat = [as_rows(each, axis) for each in array]
        return [f[m.repeat(len(f) // len(m))] for f, m in zip(flat, mask, strict=True)] if masked else flat

    x_rows, dy_rows, residual_rows = map(rows_of, tensors)
    extra = {"residual": residual_rows}
    pairs = list(zip(*running, strict=True))
    for given in (None, pairs):
        parameters = (gamma, beta, 1e-3, "sigmoid", given)
        if given is None:
            y, statistics = bn.batch_norm_forward(x, on_gamma, on_beta, eps=1e-3, **options)
            assert statistics.shape == (groups, 3, channels)
            grads = bn.batch_norm_backward(dy, x, on_gamma, on_beta, statistics, **options)
        else:
            y = bn.batch_norm_inference(x, on_gamma, on_beta, on_mean, on_var, eps=1e-3, **options)
            grads = bn.batch_norm_inference_backward(dy, x, on_gamma, on_beta, on_mean, on_var, eps=1e-3, **options)
        exact = grouped_oracle(True, x_rows, *parameters, **extra)
        exact_grads = grouped_oracle(False, dy_rows, x_rows, *parameters, **extra)
        dx, dgamma, dbeta, dresidual = map(backend.asnumpy, grads)
        outputs = (rows_of(backend.asnumpy(y)), rows_of(dx), rows_of(dresidual))
        for one, grad, *found in zip(exact, exact_grads, *outputs, strict=True):
            oracle.assert_within(found[0], one.y, one.z_bound, "y")
            oracle.assert_within(found[1], grad.dx, grad.dx_bound, "dx")
            oracle.assert_within(found[2], grad.dresidual, grad.dresidual_bound, "dresidual")
        for name, sums in (("dgamma", dgamma), ("dbeta", dbeta)):
            exact_sums = sum(getattr(grad, name) for grad in exact_grads)
            sizes = sum(getattr(grad, f"{name}_bound") + abs(getattr(grad, name)) * 1e-7 for grad in exact_grads)
            oracle.assert_within(sums, exact_sums, sizes, name)


def test_running_statistics_are_those_of_each_group(backend: Backend, rng: np.random.Generator) -> None:
    x = rng.standard_normal((5, 30, 4)) + np.arange(5)[:, None, None]
    on_x, mean, var = backend.arrays(x, np.zeros((5, 4)), np.ones((5, 4)))
    bn.batch_norm_forward(on_x, None, None, mean, var, momentum=1.0, grouped=True)
    np.testing.assert_allclose(backend.asnumpy(mean), x.mean(1), rtol=1e-13)
    np.testing.assert_allclose(backend.asnumpy(var), x.var(1, ddof=1), rtol=1e-13)


def test_time_steps_with_their_own_lengths(backend: Backend, rng: np.random.Generator) -> None:
    """Recurrent batch norm over padded sequences: at step t, the sequences longer than t count."""
    steps, sequences, units = 9, 12, 4
    lengths = rng.integers(3, steps + 1, sequences)
    mask = np.arange(steps)[:, None] < lengths
    x = np.where(mask[..., None], rng.standard_normal((steps, sequences, units)), np.nan)
    y, _ = bn.batch_norm_forward(backend.asarray(x), grouped=True, mask=backend.asarray(mask))
    y = backend.asnumpy(y)
    for t in range(steps):
        valid = mask[t]
        np.testing.assert_array_equal(y[t][~valid], 0)
        if valid.sum() > 1:
            np.testing.assert_allclose(y[t][valid].mean(0), 0, atol=1e-13)


@pytest.mark.parametrize("order", [(1, 0, 2), (2, 1, 0)], ids=["batch first", "reversed"])
def test_any_strides_give_the_same_bits(backend: Backend, rng: np.random.Generator, order: tuple) -> None:
    x, dy = (rng.standard_normal((7, 11, 6)) for _ in range(2))
    results = []
    for place in (lambda array: array, lambda array: array.transpose(order).copy().transpose(np.argsort(order))):
        on_x, on_dy = (backend.like(place(array)) for array in (x, dy))
        y, statistics = bn.batch_norm_forward(on_x, grouped=True, activation="elu")
        grads = bn.batch_norm_backward(on_dy, on_x, None, None, statistics, grouped=True, activation="elu")
        results.append([backend.asnumpy(array) for array in (y, statistics, *grads)])
    for one, two in zip(*results, strict=True):
        np.testing.assert_allclose(one, two, rtol=0 if backend.name != "reference" else 1e-13, atol=1e-14)


@pytest.mark.emulator
def test_one_launch_whose_order_changes_no_bit(emulated: EmulatorRuntime, rng: np.random.Generator) -> None:
    """The last block to arrive adds the parameters' gradients: whichever it is, and it leaves the counter at 0."""
    x, dy = (emulated.asarray(rng.standard_normal((9, 20, 6)).astype("float32")) for _ in range(2))
    _, statistics = bn.batch_norm_forward(x, grouped=True)
    emulated.reset()
    found = []
    for seed, resident in ((0, 1), (1, 3), (2, 9), (3, 4)):
        with emulated.schedule(seed, resident):
            grads = bn.batch_norm_backward(dy, x, None, None, statistics, grouped=True, activation="silu")
        found.append([np.array(array) for array in grads])
    launches = [record.launch for record in emulated.launches]
    assert len(launches) == 4
    assert launches[0].grid[1] == 9
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            np.testing.assert_array_equal(one, two)
    assert not emulated.workspace_array[:4].any()


@pytest.mark.emulator
def test_more_groups_than_a_grid_is_high(emulated: EmulatorRuntime, rng: np.random.Generator) -> None:
    """A block takes the groups b and b + 65535, one after the other."""
    x = rng.standard_normal((65540, 9, 2)).astype("float32")
    on_x = emulated.asarray(x)
    out = emulated.asarray(np.zeros_like(x)), emulated.asarray(np.zeros((65540, 3, 2), "float32"))
    with emulated.only_blocks([0, 3]):
        y, _ = bn.batch_norm_forward(on_x, grouped=True, out=out)
    for group in (0, 3, 65535, 65538):
        exact = oracle.forward(x[group], None, None, 1e-5)
        oracle.assert_within(np.asarray(y[group]), exact.y, exact.z_bound, f"group {group}")
    assert not np.asarray(y[[1, 65539]]).any()


def test_a_launch_covers_groups_and_rows_and_keeps_all_limits() -> None:
    rng = np.random.default_rng(0)
    for _ in range(500):
        sizes = [int(2 ** rng.uniform(0, top)) for top in (12, 14, 12, 10)]
        for name in ("float16", "float32", "float64"):
            dtype = np.dtype(name)
            for kind in (FORWARD, INFERENCE, BACKWARD, INPUT_GRADIENT):
                chosen = one_block(kind, Problem(*sizes, dtype, options=True))
                launch, (width, workers, _) = chosen.launch, chosen.launch.block
                assert launch.grid[0] * width >= sizes[2] > (launch.grid[0] - 1) * width
                assert launch.grid[2] == 1 or kind in (INFERENCE, INPUT_GRADIENT)
                assert workers & (workers - 1) == 0 or workers <= 64 or not launch.shared_bytes
                assert chosen.splits == (launch.grid[1] if kind is BACKWARD else 1)
                if chosen.splits > 1:  # counters and partial results fit the workspace
                    assert launch.grid[0] <= 2048
                    assert launch.grid[0] * launch.grid[1] * 2 * width * 8 <= 2**19


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((4, 5), {}, r"x must have the shape \(T, N, C, \.\.\.\), of T groups, got \(4, 5\); or pass grouped=False"),
        ((4, 1, 5), {}, r"x has the shape \(4, 1, 5\): one value per channel has no variance"),
        ((4, 6, 5), {"running_mean": np.zeros(5)}, r"running_mean must have the shape \(4, 5\), got \(5,\)"),
        ((4, 6, 5), {"mask": np.ones(6, bool)}, r"mask must have the shape \(4, 6\).*got \(6,\)"),
    ],
)
def test_wrong_groups_are_refused(backend: Backend, shape: tuple, options: dict, message: str) -> None:
    given = {name: backend.asarray(array) for name, array in options.items()}
    with pytest.raises(ValueError, match=message):
        bn.batch_norm_forward(backend.asarray(np.ones(shape)), grouped=True, **given)


@pytest.mark.parametrize("bad", [1, None, "yes"])
def test_grouped_is_true_or_false(backend: Backend, bad: Any) -> None:
    with pytest.raises(TypeError, match=f"grouped must be True or False, got {bad!r}"):
        bn.batch_norm_forward(backend.asarray(np.ones((4, 6, 5))), grouped=bad)


@pytest.mark.parametrize("shape", [(0, 4, 5), (3, 0, 5), (3, 4, 0)])
def test_empty_groups(backend: Backend, shape: tuple[int, ...]) -> None:
    x = backend.asarray(np.ones(shape))
    y, statistics = bn.batch_norm_forward(x, grouped=True)
    dx, dgamma, _ = bn.batch_norm_backward(x, x, None, None, statistics, grouped=True)
    assert (y.shape, dx.shape, statistics.shape, dgamma.shape) == (shape, shape, (shape[0], 3, shape[2]), shape[2:])
    assert not backend.asnumpy(statistics).any()
    assert not backend.asnumpy(dgamma).any()
