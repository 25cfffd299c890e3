"""Fused training: many steps of multilayer perceptrons in one launch, weights and optimiser state on the chip.

CuPy arrays run ``cuda/fused_training.cu``, one block a network, or ``fused_training_multi_block.cu``, several a
network; NumPy arrays run ``cpu.py``, or where nothing is compiled the same steps op by op.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from bnkernels.ops.activations import activation_named
from bnkernels.ops.fused_training import reference
from bnkernels.ops.fused_training.launch import MOST_EXAMPLES, OPTIMIZERS, Problem, choose, why_not
from bnkernels.ops.fused_training.spec import LayerSpec, NetworkSpec, check_network, check_offsets, check_rows
from bnkernels.ops.mini_batch.op import check_seed
from bnkernels.ops.parameter_update.op import ADAM_EPS, BETA1, BETA2
from bnkernels.ops.parameter_update.schedule import state_names, update_schedule
from bnkernels.runtime import checks as check
from bnkernels.runtime.arguments import addresses, empty, pack
from bnkernels.runtime.arrays import AnyArray, Array
from bnkernels.runtime.cpu import kernels
from bnkernels.runtime.operands import Operands
from bnkernels.runtime.seam import LaunchPlan, Runtime
from bnkernels.runtime.workspace import barrier_counters

__all__ = ["LayerSpec", "NetworkSpec", "fused_training"]
CPU = "bnkernels.ops.fused_training.cpu"
OPERANDS = Operands(
    "losses parameters first second running", "x labels indices", optional="losses first second running indices"
)


def fused_training(
    network: NetworkSpec,
    parameters: Array,
    state: tuple[Array, ...],
    running: Array | None,
    x: Array,
    labels: AnyArray,
    *,
    batch: int,
    indices: AnyArray | None = None,
    seed: int | Sequence[int] | None = None,
    steps: int | None = None,
    optimizer: str = "sgd",
    lr: float | Sequence[float],
    steps_before: int = 0,
    batches_before: int = 0,
    out: Array | None = None,
) -> Array:
    """Train a network, or several independent ones at once, for many steps.

    Parameters
    ----------
    network : NetworkSpec
        Specification of the networks, such as `MLP.fused`.
    parameters : array, shape (P,) or (M, P), float32 or float64
        All parameters, of one model or of M; updated in place. Layers begin at multiples of 4.
    state : tuple of arrays, shape of `parameters`
        State of the optimiser: (), (velocity,) or (first, second); updated in place.
    running : array, shape (R,) or (M, R), or None
        All running statistics, updated in place. None: not tracked.
    x : array, shape (rows, inputs), dtype of `parameters`
        Examples; C order. Never written.
    labels : array, shape (rows,), int32
        Classes of the examples. On a GPU a wrong one makes the loss and the parameters NaN: to look would wait for the
        device.
    batch : int
        Examples of a mini-batch, at least 2; on a GPU at most 512.
    indices : array, shape (steps, batch) or (M, steps, batch), int32, optional
        Rows of the mini-batches, of all models or of each. On a GPU they are not checked: to look would wait for the
        device. Without them the mini-batches are the rows in their order; what is left over is not used.
    seed : int or sequence of M ints, optional
        Seed, or one for each model. If given, mini-batches are drawn with replacement, as `random_rows` says.
    steps : int, optional
        Number of steps, if there is a seed.
    optimizer : {"sgd", "momentum", "adam"}
        Optimiser, with the constants of `sgd_update`, `momentum_update` (0.9) and `adam_update`.
    lr : float or sequence of M floats
        Learning rate, or one for each model.
    steps_before, batches_before : int
        Number of steps already made, for Adam and for drawing, and of mini-batches that the running statistics have
        seen, for a momentum of None.
    out : array, shape (steps,) or (M, steps), dtype of `parameters`, optional
        Array for the losses.

    Returns
    -------
    array, shape (steps,) or (M, steps), dtype of `parameters`
        The mean cross-entropy of every step, in nats, before its update.

    Raises
    ------
    TypeError, ValueError
        If an argument is wrong, the network does not fit, or, for NumPy arrays, a label or an index is out of range;
        nothing is written then.

    Notes
    -----
    One launch, whatever the number of steps; nothing synchronises. The results are those of single ops but for the
    order of sums: a few roundings a step. Source: ``cuda/fused_training.cu``.

    References
    ----------
    .. [1] S. Ioffe and C. Szegedy, "Batch Normalization", 2015, arXiv:1502.03167.

    Examples
    --------
    >>> import numpy as np
    >>> layers = (LayerSpec(2, 4, 0, 8, 12), LayerSpec(4, 2, 16, -1, 24))
    >>> weights = np.linspace(-1, 1, 8)
    >>> parameters = np.concatenate([weights, np.ones(4), np.zeros(4), -weights, np.zeros(4)])
    >>> x = np.array([[0.0, 0], [1, 1], [0, 1], [1, 0]] * 25)
    >>> labels = np.array([0, 0, 1, 1] * 25, np.int32)
    >>> losses = fused_training(NetworkSpec(layers), parameters, (), None, x, labels, batch=4, lr=0.5)
    >>> losses.shape, bool(losses[-1] < losses[0])
    ((25,), True)
    """
    check_network(network, parameters)
    batch = check.integer("batch", batch)
    counts = {"steps_before": steps_before, "batches_before": batches_before}
    before = tuple(check.integer(name, count, 0, check.MOST_COUNTED) for name, count in counts.items())
    state_names(optimizer, state)
    first, second = (*state, None, None)[:2]
    arrays = (out, parameters, first, second, running, x, labels, indices)
    if (seed is None) != (steps is None) or (seed is not None and indices is not None):
        raise ValueError("seed and steps go together, and without indices: they draw the mini-batches")
    runtime, args = OPERANDS.check(*arrays)
    models, steps = _sizes(args, network, batch, steps, None if runtime is None else MOST_EXAMPLES)
    rates = np.array([check.number("lr", rate, 0) for rate in _of_each("lr", lr, models)])
    seeds = None if seed is None else np.array([check_seed(one) for one in _of_each("seed", seed, models)], np.uint32)
    losses = empty(runtime, (*parameters.shape[:-1], steps), parameters) if out is None else out
    schedule = _schedule(network, optimizer, steps, *before)
    if steps == 0:
        return losses
    if runtime is None:
        check_rows(network, labels, indices, steps, batch, seeds is not None)
        engine = kernels(CPU) or reference
        engine.train(network, batch, optimizer, arrays[1:], losses, rates, seeds, schedule, before[0])
        return losses
    count = 0 if running is None else running.shape[-1]
    problem = Problem(network, batch, optimizer, parameters.dtype, parameters.shape[-1], count, models)
    plan = choose(problem, runtime.limits(x))
    if plan is None:
        raise ValueError(
            f"the network does not fit: {why_not(problem, runtime.limits(x))}; train it layer by layer, or as a graph"
        )
    _launch(
        runtime,
        problem,
        plan,
        arrays[1:],
        losses,
        (np.array(problem.table, np.int32), schedule, rates, seeds),
        before[0],
    )
    return losses


def _launch(
    runtime: Runtime, problem: Problem, plan: LaunchPlan, arrays: tuple, losses: Any, host: tuple, steps_before: int
) -> None:
    """Enqueue the one launch.

    Its argument holds numbers of this call alone, such as the steps before, so it is not replayed. `arrays` are those
    of `OPERANDS` without the losses, `host` arrays on the host.
    """
    network, dtype, (*updated, x, labels, indices) = problem.network, problem.dtype, arrays
    table, schedule, rates, seeds = (
        None if array is None else runtime.on_device(array if array.dtype.kind in "iu" else array.astype(dtype), x)
        for array in host
    )
    given = [x, labels, indices, seeds, schedule, table, *updated, losses, rates]
    index_stride = indices[0].size if indices is not None and len(indices.shape) == 3 else 0
    counts = problem.parameters, problem.running, problem.rows, index_stride, x.shape[0], steps_before
    numbers = schedule.shape[0], problem.batch, len(network.layers), *counts
    phi = activation_named(network.activation)
    scalars = BETA1, BETA2, 1 - BETA1, 1 - BETA2, ADAM_EPS, float(network.unbiased), network.eps, phi.alpha
    codes = phi.code, OPTIMIZERS[problem.optimizer]
    workspace, counter, of_several = None, 0, (0, 1, 0, 0, 0, 0)
    if plan.width:
        of_several = problem.workspace_count, plan.splits, plan.width, plan.stages, problem.widest, plan.kept
        workspace = empty(runtime, (problem.models, problem.workspace_count), x)  # free when all is enqueued
        counter = barrier_counters(runtime.workspace(x))
    pointers = *addresses(runtime, *given, workspace), counter
    numbers = *numbers, network.scratch_rows, *of_several
    record = pack(plan.arguments, *pointers, *numbers, *scalars, *codes, problem.subwarp_size)
    absent = [(name, 0) for name, array in (("indices", indices), ("seeds", seeds)) if array is None]
    launch = replace(plan.launch, constants=(*plan.launch.constants, *absent))
    runtime.launch(plan.source, plan.kernel, launch, record, x)


def _schedule(network: NetworkSpec, optimizer: str, steps: int, steps_before: int, batches_before: int) -> np.ndarray:
    """Return momentum of batch norm and Adam's two corrections for every step, in float64."""
    number = np.arange(1, steps + 1, dtype=np.float64)
    momentum = 1 / (number + batches_before) if network.momentum is None else np.full(steps, network.momentum)
    schedule = update_schedule(optimizer, 0.0, steps, before=steps_before)
    schedule[:, 0] = momentum
    return schedule


def _of_each(name: str, given: Any, models: int) -> list[Any]:
    """Return one value for each model."""
    if not (isinstance(given, Sequence) or getattr(given, "ndim", 0) == 1) or isinstance(given, (str, bytes)):
        return [given] * models
    if len(given) != models:
        raise ValueError(f"{name} must be a number or {models} of them, one for each model, got {check.shown(given)}")
    return list(given)


def _sizes(
    args: dict[str, check.Argument | None], network: NetworkSpec, batch: int, drawn: int | None, most: int | None
) -> tuple[int, int]:
    """Check all arrays; return the numbers of models and of steps, which are `drawn` if given."""
    parameters, x = args["parameters"], args["x"]
    check.float32_or_float64(parameters)
    if most is None and not 2 <= batch < 2**31:
        raise ValueError(f"batch must be from 2 to 2**31 - 1, got {check.shown(batch)}")
    if most is not None and not 2 <= batch <= most:
        wanted = f"batch must be from 2 to {most}"
        raise ValueError(f"{wanted}, got {check.shown(batch)}; train larger mini-batches layer by layer")
    inputs = network.layers[0].inputs
    if len(x.shape) != 2 or x.shape[1] != inputs or x.shape[0] >= 2**31:
        raise ValueError(f"x must have the shape (rows, {inputs}), of less than 2**31 rows, got {x.shape}")
    if len(parameters.shape) not in (1, 2) or 0 in parameters.shape[:-1]:
        raise ValueError(f"parameters must have the shape (P,), or (M, P) with M of at least 1, got {parameters.shape}")
    *of_models, count = parameters.shape
    check_offsets(network, count, None if args["running"] is None else (0, *args["running"].shape)[-1])
    steps, indices = x.shape[0] // batch, args["indices"]
    if drawn is not None:
        steps = check.integer("steps", drawn, 0)
        if x.shape[0] == 0:
            raise ValueError("x must have rows to draw from, got none; or pass neither seed nor steps")
    if indices is not None:
        own = of_models if len(indices.shape) == 3 else []
        steps = (*indices.shape, 0)[len(own)]
        check.contiguous(indices, (*own, steps, batch), np.dtype(np.int32))
    check.contiguous(x, x.shape, parameters.dtype)
    check.contiguous(args["labels"], x.shape[:1], np.dtype(np.int32))
    for name in ("parameters", "first", "second"):
        check.contiguous(args[name], parameters.shape, parameters.dtype)
    if args["running"] is not None:
        check.contiguous(args["running"], (*of_models, *args["running"].shape[-1:]), parameters.dtype)
    check.contiguous(args["losses"], (*of_models, steps), parameters.dtype)
    return of_models[0] if of_models else 1, steps
