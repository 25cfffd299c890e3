"""One optimiser step over all parameters of a network: SGD, momentum, RMSProp, Adam. In place, step after step.

A CUDA graph replays the step that was captured: Adam's corrections, numbers that the host computes, are then those of
that step, which costs the same time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import count
from typing import Any

import numpy as np

import bnkernels as bn
from benchmarks.harness.case import Arrays, Call, Case, NotSupportedError, Op, on_both
from benchmarks.harness.samples import Sample, take
from benchmarks.peers import expression, pytorch

SIZES = [1568, 1_000_000]  # 64-20-10 with batch norm, padded; and beyond a core's own caches
LR = 0.01
STATES = {"sgd": (), "momentum": ("first",), "rmsprop": ("first",), "adam": ("first", "second")}


def inputs(case: Case, random: Callable[..., Any], rule: str) -> Arrays:
    """Return parameters, gradients and fresh state arrays.

    Raises
    ------
    NotSupportedError
        For 16-bit parameters, and for what belongs to other ops: more axes and epilogues.
    """
    if case.dtype not in ("float32", "float64") or len(case.shape) != 1 or case.epilogue:
        raise NotSupportedError(f"{case.op} is for (size,) in float32 or float64")
    arrays = {name: random(case.shape) for name in ("parameters", "gradients")}
    return arrays | {name: np.zeros_like(arrays["parameters"]) for name in STATES[rule]}


def ours(case: Case, arrays: Arrays, rule: str) -> Call:
    """Prepare our update."""
    update = getattr(bn, f"{rule}_update")
    given = [arrays[name] for name in ("parameters", "gradients", *STATES[rule])]
    steps = count(1)

    def call() -> tuple:
        update(*given, lr=LR, **({"step": next(steps)} if rule == "adam" else {}))
        return (given[0],)

    return call


def sgd(p: Any, g: Any, step: int) -> None:
    """Make a step as a user would write it."""
    p -= LR * g


def momentum(p: Any, g: Any, velocity: Any, step: int) -> None:
    """Make a step as a user would write it."""
    velocity *= 0.9
    velocity += g
    p -= LR * velocity


def rmsprop(p: Any, g: Any, square: Any, step: int) -> None:
    """Make a step as a user would write it."""
    square *= 0.9
    square += 0.1 * g * g
    p -= LR * g / (square**0.5 + 1e-8)


def adam(p: Any, g: Any, first: Any, second: Any, step: int) -> None:
    """Make a step as a user would write it."""
    first *= 0.9
    first += 0.1 * g
    second *= 0.999
    second += 0.001 * g * g
    p -= LR * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)) ** 0.5 + 1e-8)


RULES = {"sgd": sgd, "momentum": momentum, "rmsprop": rmsprop, "adam": adam}


def formulas(case: Case, arrays: Arrays, rule: str) -> Call:
    """Prepare the update that a user would write."""
    given = [arrays[name] for name in ("parameters", "gradients", *STATES[rule])]
    steps = count(1)

    def call() -> tuple:
        RULES[rule](*given, step=next(steps))
        return (given[0],)

    return call


def eager(case: Case, arrays: Arrays, rule: str, fused: bool = False) -> Call:
    """Prepare PyTorch's optimiser, with its fused kernel or as it comes."""
    torch = pytorch.load()
    parameters = pytorch.tensor_of(arrays["parameters"]).requires_grad_()
    parameters.grad = pytorch.tensor_of(arrays["gradients"])
    options: dict[str, Any] = {"fused": True} if fused else {}
    if rule == "adam":
        # On a GPU it counts its steps there, as nothing else can be captured.
        optimizer = torch.optim.Adam([parameters], lr=LR, capturable=parameters.is_cuda, **options)
    elif rule == "rmsprop":
        optimizer = torch.optim.RMSprop([parameters], lr=LR, alpha=0.9, capturable=parameters.is_cuda)
    else:
        optimizer = torch.optim.SGD([parameters], lr=LR, momentum=0.9 if rule == "momentum" else 0, **options)

    def call() -> tuple:
        optimizer.step()
        return (parameters.detach(),)

    return call


def reference(case: Case, arrays: Arrays, xp: Any, rule: str) -> tuple:
    """Return the parameters after the first step, from float64 arrays, which are overwritten."""
    return formulas(case, arrays, rule)()


def bytes_moved(case: Case, rule: str) -> int:
    """Return the bytes of parameters in and out, gradients in, state in and out."""
    return (3 + 2 * len(STATES[rule])) * case.size * case.itemsize


def op_of(rule: str) -> Op:
    """Return one rule with its cases and providers."""
    name = f"{rule}_update"
    fused = on_both("PyTorch eager, fused", partial(eager, rule=rule, fused=True), pytorch.absent, "torch")
    return Op(
        name,
        cases=[Case(name, "step", (size,)) for size in SIZES],
        inputs=partial(inputs, rule=rule),
        reference=partial(reference, rule=rule),
        bytes_moved=partial(bytes_moved, rule=rule),
        providers=(
            *on_both("bnkernels", partial(ours, rule=rule)),
            *expression.providers(partial(formulas, rule=rule)),
            *pytorch.providers(partial(eager, rule=rule)),
            *(fused if rule != "rmsprop" else ()),  # which has none
        ),
    )


SGD, MOMENTUM, RMSPROP, ADAM = map(op_of, STATES)


def sample_of(rule: str, **options: Any) -> Sample:
    """Return a call of one rule."""
    update, arrays = getattr(bn, f"{rule}_update"), ["parameters", *ARRAYS[rule]]
    names = " ".join(["parameters", "gradients", *ARRAYS[rule]])
    return Sample(
        "gradients",
        " ".join(arrays),
        lambda a: update(*take(a, names), lr=0.5, **options),
        sizes=({"P": 1000},),
        dtypes=("float32", "float64"),
        counted=True,
    )


ARRAYS = {"sgd": (), "momentum": ("velocity",), "rmsprop": ("square",), "adam": ("first", "second")}
SAMPLES = {
    "sgd_update": sample_of("sgd"),
    "momentum_update": sample_of("momentum"),
    "rmsprop_update": sample_of("rmsprop"),
    "adam_update": sample_of("adam", step=1),
    "scheduled_update": Sample(
        "gradients scalars",
        "parameters first second",
        lambda a: bn.scheduled_update("adam", *take(a, "parameters gradients"), take(a, "first second"), a["scalars"]),
        dtypes=("float32", "float64"),
    ),
}
