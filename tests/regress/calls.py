"""Every op with all of its arrays by name, for the tests that spoil, move, misalign or count them one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

import bnkernels as bn

ROWS, CHANNELS = 6, 3

SHAPES = {
    **dict.fromkeys(("x", "dy", "y", "dx", "ddx", "ddy", "out", "logits", "dlogits"), (ROWS, CHANNELS)),
    **dict.fromkeys(
        ("gamma", "beta", "running_mean", "running_var", "dgamma", "dbeta", "ddgamma", "ddbeta"), (CHANNELS,)
    ),
    **dict.fromkeys(("parameters", "gradients", "velocity", "first", "second"), (ROWS,)),
    **dict.fromkeys(("statistics", "sums"), (3, CHANNELS)),
    **dict.fromkeys(("moments", "merged"), (4, CHANNELS)),
    "parts": (2, 4, CHANNELS),
    "mask": (ROWS,),
    "labels": (ROWS,),
    "loss": (ROWS,),
}


class Call(NamedTuple):
    """An op, the names of the arrays it reads and writes, and how to call it with them."""

    reads: tuple[str, ...]
    writes: tuple[str, ...]
    any_strides: tuple[str, ...]  # those whose layout is free
    run: Callable[[dict[str, Any]], Any]

    @property
    def names(self) -> tuple[str, ...]:
        """All arrays."""
        return (*self.reads, *self.writes)


def _take(arrays: dict[str, Any], names: str) -> tuple:
    return tuple(arrays[name] for name in names.split())


CALLS = {
    "forward": Call(
        ("x", "gamma", "beta"),
        ("running_mean", "running_var", "y", "statistics"),
        ("x",),
        lambda a: bn.batch_norm_forward(
            *_take(a, "x gamma beta running_mean running_var"), out=_take(a, "y statistics")
        ),
    ),
    "backward": Call(
        ("dy", "x", "gamma", "beta", "statistics"),
        ("dx", "dgamma", "dbeta"),
        ("dy", "x"),
        lambda a: bn.batch_norm_backward(
            *_take(a, "dy x gamma beta statistics"), activation="relu", out=_take(a, "dx dgamma dbeta")
        ),
    ),
    "inference": Call(
        ("x", "gamma", "beta", "running_mean", "running_var"),
        ("out",),
        ("x",),
        lambda a: bn.batch_norm_inference(*_take(a, "x gamma beta running_mean running_var"), out=a["out"]),
    ),
    "inference_backward": Call(
        ("dy", "x", "gamma", "beta", "running_mean", "running_var"),
        ("dx", "dgamma", "dbeta"),
        ("dy", "x"),
        lambda a: bn.batch_norm_inference_backward(
            *_take(a, "dy x gamma beta running_mean running_var"), out=_take(a, "dx dgamma dbeta")
        ),
    ),
    "double_backward": Call(
        ("ddx", "ddgamma", "ddbeta", "dy", "x", "gamma", "beta", "statistics"),
        ("ddy", "dx", "dgamma", "dbeta"),
        ("ddx", "dy", "x"),
        lambda a: bn.batch_norm_double_backward(
            *_take(a, "ddx ddgamma ddbeta dy x gamma beta statistics"),
            activation="tanh",
            out=_take(a, "ddy dx dgamma dbeta"),
        ),
    ),
    "masked_forward": Call(
        ("x", "mask", "gamma", "beta"),
        ("running_mean", "running_var", "y", "statistics"),
        ("x", "mask"),
        lambda a: bn.batch_norm_forward(
            *_take(a, "x gamma beta running_mean running_var"), mask=a["mask"], out=_take(a, "y statistics")
        ),
    ),
    "masked_backward": Call(
        ("dy", "x", "mask", "gamma", "beta", "statistics"),
        ("dx", "dgamma", "dbeta"),
        ("dy", "x", "mask"),
        lambda a: bn.batch_norm_backward(
            *_take(a, "dy x gamma beta statistics"), mask=a["mask"], out=_take(a, "dx dgamma dbeta")
        ),
    ),
    "moments": Call(
        ("x", "mask"),
        ("moments",),
        ("x", "mask"),
        lambda a: bn.batch_norm_moments(a["x"], mask=a["mask"], out=a["moments"]),
    ),
    "statistics": Call(
        ("parts",),
        ("running_mean", "running_var", "statistics", "merged"),
        (),
        lambda a: bn.batch_norm_statistics(
            *_take(a, "parts running_mean running_var"), out=_take(a, "statistics merged")
        ),
    ),
    "normalise": Call(
        ("x", "gamma", "beta", "statistics"),
        ("out",),
        ("x",),
        lambda a: bn.batch_norm_normalise(*_take(a, "x gamma beta statistics"), out=a["out"]),
    ),
    "gradient_sums": Call(
        ("dy", "x", "gamma", "beta", "statistics"),
        ("sums",),
        ("dy", "x"),
        lambda a: bn.batch_norm_gradient_sums(*_take(a, "dy x gamma beta statistics"), out=a["sums"]),
    ),
    "input_gradient": Call(
        ("dy", "x", "gamma", "beta", "statistics", "sums"),
        ("dx",),
        ("dy", "x"),
        lambda a: bn.batch_norm_input_gradient(*_take(a, "dy x gamma beta statistics sums"), out=(a["dx"],)),
    ),
    "softmax_cross_entropy": Call(
        ("logits", "labels"),
        ("loss", "dlogits"),
        (),
        lambda a: bn.softmax_cross_entropy(*_take(a, "logits labels"), out=_take(a, "loss dlogits")),
    ),
    "sgd": Call(
        ("gradients",), ("parameters",), (), lambda a: bn.sgd_update(*_take(a, "parameters gradients"), lr=0.5)
    ),
    "momentum": Call(
        ("gradients",),
        ("parameters", "velocity"),
        (),
        lambda a: bn.momentum_update(*_take(a, "parameters gradients velocity"), lr=0.5),
    ),
    "adam": Call(
        ("gradients",),
        ("parameters", "first", "second"),
        (),
        lambda a: bn.adam_update(*_take(a, "parameters gradients first second"), step=1, lr=0.5),
    ),
}
EVERY_ARRAY = [(op, name) for op, call in CALLS.items() for name in call.names]


def make_arrays(op: str, dtype: str = "float32", seed: int = 0) -> dict[str, np.ndarray]:
    """Return valid arrays for a call, those to be written filled with positive numbers too."""
    rng = np.random.default_rng(seed)
    arrays = {name: rng.uniform(0.5, 2, SHAPES[name]).astype(dtype) for name in CALLS[op].names}
    if "labels" in arrays:
        arrays["labels"] = rng.integers(0, CHANNELS, ROWS)
    if "mask" in arrays:
        arrays["mask"] = np.arange(ROWS) % 3 > 0
    return arrays
