"""Calls of the same form as in ``calls.py``, of ops whose arrays have shapes or types that their names do not say."""

from __future__ import annotations

from typing import Any

import numpy as np

import bnkernels as bn
from bnkernels.ops.fused_training.spec import LayerSpec, NetworkSpec
from tests.regress import calls
from tests.regress.calls import Call, _take

ROWS, INPUTS, OUTPUTS, GROUPS, STEPS, CLASSES = 6, 4, 3, 2, 2, 3
NETWORK = NetworkSpec((LayerSpec(INPUTS, 4, 0, 16, 20, 0, 4), LayerSpec(4, CLASSES, 24, -1, 36)))

MORE = {
    "layer_norm_forward": Call(
        ("x", "gamma", "beta"),
        ("y", "statistics"),
        (),
        lambda a: bn.layer_norm_forward(*_take(a, "x gamma beta"), out=_take(a, "y statistics")),
    ),
    "layer_norm_backward": Call(
        ("dy", "x", "gamma", "beta", "statistics"),
        ("dx", "dgamma", "dbeta", "workspace"),
        (),
        lambda a: bn.layer_norm_backward(
            *_take(a, "dy x gamma beta statistics"), workspace=a["workspace"], out=_take(a, "dx dgamma dbeta")
        ),
    ),
    "linear_forward": Call(
        ("x", "weight", "gamma", "beta"),
        ("y", "z", "statistics", "running_mean", "running_var"),
        (),
        lambda a: bn.linear_batch_norm_forward(
            *_take(a, "x weight gamma beta running_mean running_var"), out=_take(a, "y z statistics")
        ),
    ),
    "linear_backward": Call(
        ("dy", "x", "weight", "gamma", "beta", "z", "statistics"),
        ("dx", "dweight", "dgamma", "dbeta", "workspace"),
        (),
        lambda a: bn.linear_batch_norm_backward(
            *_take(a, "dy x weight gamma beta z statistics"),
            workspace=a["workspace"],
            out=_take(a, "dx dweight dgamma dbeta"),
        ),
    ),
    "grouped_forward": Call(
        ("x", "mask", "residual", "gamma", "beta"),
        ("y", "statistics", "running_mean", "running_var"),
        ("x", "mask", "residual"),
        lambda a: bn.batch_norm_forward(
            *_take(a, "x gamma beta running_mean running_var"),
            mask=a["mask"],
            residual=a["residual"],
            grouped=True,
            renorm=(3.0, 5.0),
            out=_take(a, "y statistics"),
        ),
    ),
    "residual_backward": Call(
        ("dy", "x", "residual", "gamma", "beta", "statistics"),
        ("dx", "dgamma", "dbeta", "dresidual"),
        ("dy", "x", "residual"),
        lambda a: bn.batch_norm_backward(
            *_take(a, "dy x gamma beta statistics"),
            residual=a["residual"],
            activation="relu",
            out=_take(a, "dx dgamma dbeta dresidual"),
        ),
    ),
    "mini_batch": Call(
        ("x", "labels", "schedule", "indices"),
        ("x_out", "labels_out", "scalars", "counter"),
        (),
        lambda a: bn.mini_batch(
            *_take(a, "x labels schedule counter"), indices=a["indices"], out=_take(a, "x_out labels_out scalars")
        ),
    ),
    "scheduled_update": Call(
        ("gradients", "scalars"),
        ("parameters", "first", "second"),
        (),
        lambda a: bn.scheduled_update(
            "adam", *_take(a, "parameters gradients"), _take(a, "first second"), a["scalars"]
        ),
    ),
    "fused_training": Call(
        ("x", "labels", "indices"),
        ("losses", "parameters", "velocity", "running"),
        (),
        lambda a: bn.fused_training(
            NETWORK,
            a["parameters"],
            (a["velocity"],),
            *_take(a, "running x labels"),
            batch=ROWS,
            indices=a["indices"],
            optimizer="momentum",
            lr=0.1,
            out=a["losses"],
        ),
    ),
}
EVERY = calls.CALLS | MORE
STATE_NAMES = {"fused_training": {"velocity": "first"}}  # what an op calls an array of its state
SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "layer_norm_forward": dict.fromkeys(("x", "y"), (ROWS, OUTPUTS)) | {"statistics": (3, ROWS)},
    "layer_norm_backward": dict.fromkeys(("dy", "x", "dx"), (ROWS, OUTPUTS))
    | {"statistics": (3, ROWS), "workspace": (512 * OUTPUTS,)},
    "linear_forward": {"x": (ROWS, INPUTS), "weight": (INPUTS, OUTPUTS)}
    | dict.fromkeys(("y", "z"), (ROWS, OUTPUTS))
    | {"statistics": (3, OUTPUTS)},
    "linear_backward": {"x": (ROWS, INPUTS), "weight": (INPUTS, OUTPUTS), "dweight": (INPUTS, OUTPUTS)}
    | dict.fromkeys(("dy", "z", "workspace"), (ROWS, OUTPUTS))
    | {"dx": (ROWS, INPUTS), "statistics": (3, OUTPUTS)},
    "grouped_forward": dict.fromkeys(("x", "y", "residual"), (GROUPS, ROWS, OUTPUTS))
    | {"statistics": (GROUPS, 5, OUTPUTS), "mask": (GROUPS, ROWS)}
    | dict.fromkeys(("running_mean", "running_var"), (GROUPS, OUTPUTS)),
    "residual_backward": dict.fromkeys(("dy", "x", "residual", "dx", "dresidual"), (ROWS, OUTPUTS))
    | {"statistics": (3, OUTPUTS)},
    "mini_batch": {"x": (STEPS * ROWS, INPUTS), "labels": (STEPS * ROWS,), "schedule": (STEPS, 3), "counter": (2,)}
    | {"indices": (STEPS, ROWS), "x_out": (ROWS, INPUTS), "labels_out": (ROWS,), "scalars": (3,)},
    "scheduled_update": dict.fromkeys(("parameters", "gradients", "first", "second"), (ROWS,)) | {"scalars": (3,)},
    "fused_training": {"x": (STEPS * ROWS, INPUTS), "labels": (STEPS * ROWS,), "indices": (STEPS, ROWS)}
    | {"losses": (STEPS,), "parameters": (40,), "velocity": (40,), "running": (8,)},
}
INTEGERS = {"labels": np.int32, "labels_out": np.int32, "indices": np.int32, "counter": np.uint32}


def make_every(op: str, dtype: str = "float32") -> dict[str, np.ndarray]:
    """Return valid arrays for a call, as `make_arrays` does for those of ``calls.py``."""
    if op in calls.CALLS:
        return calls.make_arrays(op, dtype)
    rng = np.random.default_rng(0)
    vectors = dict.fromkeys(("gamma", "beta", "dgamma", "dbeta", "running_mean", "running_var"), (OUTPUTS,))
    shapes = vectors | SHAPES[op]
    arrays = {name: rng.uniform(0.5, 2, shapes[name]).astype(dtype) for name in MORE[op].names}
    if "mask" in arrays:
        arrays["mask"] = np.arange(GROUPS * ROWS).reshape(GROUPS, ROWS) % 3 > 0
    for name in arrays.keys() & INTEGERS.keys():
        arrays[name] = np.zeros(shapes[name], INTEGERS[name])
    return arrays


def named(op: str, name: str) -> str:
    """Return what messages call an array."""
    table = STATE_NAMES.get(op, {})
    return {"parts": "moments"}.get(name, table.get(name, name))


EVERY_ARRAY = [(op, name) for op, call in EVERY.items() for name in call.names]
EVERY_OUTPUT = [(op, name) for op, call in EVERY.items() for name in call.writes]


def run(op: str, arrays: dict[str, Any]) -> Any:
    """Make a call."""
    return EVERY[op].run(arrays)
