"""An LSTM over whole sequences: without a norm, with recurrent batch norm, with layer norm; a forward, or both ways.

A case's shape is (time steps, mini-batch, inputs, units). Both ways is what a training step does: a forward and the
gradients of everything but the input.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import bnkernels as bn
from benchmarks.harness.case import Arrays, Call, Case, NotSupportedError, Op, on_both
from benchmarks.harness.places import array_module
from benchmarks.harness.samples import Sample, take
from benchmarks.peers import EPSILON, expression, pytorch

# Images row by row, pixel by pixel in part, and a layer as large as a library's.
SHAPES = [(28, 64, 28, 100), (64, 64, 1, 100), (64, 128, 256, 256)]
NORMS = {
    f"{direction}{name}": norm
    for direction in ("forward", "both ways")
    for name, norm in (("", None), (", batch norm", "batch"), (", layer norm", "layer"))
}
NAMES = ("x", "h0", "c0", "weight_ih", "weight_hh", "bias")
OF_NORMS = ("gamma_x", "gamma_h", "gamma_c", "beta_c")


def inputs(case: Case, random: Callable[..., Any]) -> Arrays:
    """Return the arguments of the forward, and for both ways dy.

    Raises
    ------
    NotSupportedError
        For an epilogue, 16-bit data, and for other shapes than (time steps, mini-batch, inputs, units).
    """
    if case.epilogue or len(case.shape) != 4 or case.itemsize == 2:
        raise NotSupportedError(f"{case.op} is for (steps, mini-batch, inputs, units) in float32 or float64")
    steps, rows, terms, units = case.shape
    arrays = {"x": random((steps, rows, terms)), "h0": random((rows, units)), "c0": random((rows, units))}
    arrays |= {"weight_ih": random((4 * units, terms)) * terms**-0.5}
    arrays |= {"weight_hh": random((4 * units, units)) * units**-0.5, "bias": random((4 * units,))}
    if NORMS[case.direction]:
        lengths = 4 * units, 4 * units, units, units
        arrays |= {name: abs(random((length,))) / 4 + 0.25 for name, length in zip(OF_NORMS, lengths, strict=True)}
    return arrays | ({"dy": random((steps, rows, units))} if is_both(case) else {})


def is_both(case: Case) -> bool:
    """Tell whether the case is a forward and a backward."""
    return case.direction.startswith("both")


def ours(case: Case, arrays: Arrays) -> Call:
    """Prepare our op."""
    norm = NORMS[case.direction]
    given = tuple(arrays[name] for name in NAMES)
    norms = tuple(arrays[name] for name in OF_NORMS) if norm else None
    *out, saved = bn.lstm_forward(*given, norms, norm=norm, eps=EPSILON)
    out = tuple(out)
    if not is_both(case):
        return lambda: bn.lstm_forward(*given, norms, norm=norm, eps=EPSILON, keep=False, out=out)[:1]
    grads = bn.lstm_backward(arrays["dy"], None, None, saved, input_gradient=False)

    def both() -> tuple:
        again = bn.lstm_forward(*given, norms, norm=norm, eps=EPSILON, reuse=saved, out=out)[3]
        bn.lstm_backward(arrays["dy"], None, None, again, input_gradient=False, out=grads)
        return out[0], *grads[1:6], *(grads[6] or ())

    return both


def _standardised(xp: Any, a: Any, norm: str) -> tuple[Any, Any]:
    axis = 0 if norm == "batch" else 1
    centred = a - a.mean(axis, keepdims=True)
    rstd = ((centred * centred).mean(axis, keepdims=True) + EPSILON) ** -0.5
    return centred * rstd, rstd


def _through(g: Any, hat: Any, rstd: Any, norm: str) -> Any:
    axis = 0 if norm == "batch" else 1
    return rstd * (g - g.mean(axis, keepdims=True) - hat * (g * hat).mean(axis, keepdims=True))


def formulas(case: Case, arrays: Arrays) -> Call:
    """Prepare what a user would write."""
    a, xp, norm = arrays, array_module(arrays["x"]), NORMS[case.direction]

    def forward() -> tuple:
        h, c, y, kept = a["h0"], a["c0"], [], []
        for x in a["x"]:
            before, parts = (h, c), [x @ a["weight_ih"].T, h @ a["weight_hh"].T]
            if norm:
                parts = [_standardised(xp, part, norm) for part in parts]
                z = a["gamma_x"] * parts[0][0] + a["gamma_h"] * parts[1][0] + a["bias"]
            else:
                z = parts[0] + parts[1] + a["bias"]
            i, f, g, o = xp.split(z, 4, axis=1)
            i, f, g, o = 1 / (1 + xp.exp(-i)), 1 / (1 + xp.exp(-f)), xp.tanh(g), 1 / (1 + xp.exp(-o))
            c = f * c + i * g
            cell = _standardised(xp, c, norm) if norm else None
            tanh = xp.tanh(a["gamma_c"] * cell[0] + a["beta_c"] if norm else c)
            h = o * tanh
            y.append(h)
            kept.append((x, *before, i, f, g, o, tanh, parts, cell))
        return xp.stack(y), kept

    return (lambda: _both(a, xp, norm, *forward())) if is_both(case) else lambda: forward()[:1]


def _both(a: Arrays, xp: Any, norm: str | None, y: Any, kept: list) -> tuple:
    """Return y and the gradients."""
    grads = {name: 0 for name in (*NAMES[3:], *(OF_NORMS if norm else ()))}
    dh, dc = xp.zeros_like(a["h0"]), xp.zeros_like(a["c0"])
    for dy, (x, h_before, c_before, i, f, g, o, tanh, parts, cell) in zip(a["dy"][::-1], kept[::-1], strict=True):
        dh = dh + dy
        dz = dh * o * (1 - tanh * tanh)
        if norm:
            grads["gamma_c"] = grads["gamma_c"] + (dz * cell[0]).sum(0)
            grads["beta_c"] = grads["beta_c"] + dz.sum(0)
            dz = _through(dz * a["gamma_c"], *cell, norm)
        dc = dc + dz
        of_gates = dc * g * i * (1 - i), dc * c_before * f * (1 - f), dc * i * (1 - g * g), dh * tanh * o * (1 - o)
        of_x = of_h = of_gates = xp.concatenate(of_gates, 1)
        dc = dc * f
        grads["bias"] = grads["bias"] + of_gates.sum(0)
        if norm:
            for name, part in zip(("gamma_x", "gamma_h"), parts, strict=True):
                grads[name] = grads[name] + (of_gates * part[0]).sum(0)
            of_x = _through(of_gates * a["gamma_x"], *parts[0], norm)
            of_h = _through(of_gates * a["gamma_h"], *parts[1], norm)
        grads["weight_ih"] = grads["weight_ih"] + of_x.T @ x
        grads["weight_hh"] = grads["weight_hh"] + of_h.T @ h_before
        dh = of_h @ a["weight_hh"]
    return y, dh, dc, *grads.values()


def torch_eager(case: Case, arrays: Arrays) -> Call:
    """Prepare the layer of PyTorch; with a norm, which it does not have, a loop over its operators."""
    torch, norm = pytorch.load(), NORMS[case.direction]
    tensors = {name: pytorch.tensor_of(array) for name, array in arrays.items()}
    wanted = [tensors[name] for name in (*NAMES[1:], *(OF_NORMS if norm else ()))]

    def forward() -> Any:
        return (torch_loop(torch, tensors, norm) if norm else _torch_layer(torch, tensors))[0]

    if not is_both(case):

        def alone() -> tuple:
            with torch.no_grad():
                return (forward(),)

        return alone
    for tensor in wanted:
        tensor.requires_grad_()

    def both() -> tuple:
        y = forward()
        dh0, dc0, *others = torch.autograd.grad(y, wanted, tensors["dy"])
        return y.detach(), dh0, dc0, *others

    return both


def _torch_layer(torch: Any, a: Arrays) -> tuple:
    weights = a["weight_ih"], a["weight_hh"], a["bias"], torch.zeros_like(a["bias"])
    state = a["h0"][None], a["c0"][None]
    return torch.lstm(a["x"], state, weights, True, 1, 0.0, False, False, False)


def torch_loop(torch: Any, a: Arrays, norm: str) -> tuple:
    """Return y by a loop over PyTorch's operators."""
    functional, h, c, y = torch.nn.functional, a["h0"], a["c0"], []

    def standardised(part: Any, gamma: Any, beta: Any = None) -> Any:
        if norm == "layer":
            return functional.layer_norm(part, part.shape[1:], gamma, beta, EPSILON)
        return functional.batch_norm(part, None, None, gamma, beta, True, 0.1, EPSILON)

    for x in a["x"]:
        z = standardised(x @ a["weight_ih"].T, a["gamma_x"]) + standardised(h @ a["weight_hh"].T, a["gamma_h"])
        i, f, g, o = (z + a["bias"]).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * standardised(c, a["gamma_c"], a["beta_c"]).tanh()
        y.append(h)
    return (torch.stack(y),)


def reference(case: Case, arrays: Arrays, xp: Any) -> tuple:
    """Return the right outputs from float64 arrays."""
    return formulas(case, arrays)()


def bytes_moved(case: Case) -> int:
    """Return the bytes of the arguments, of y, and of the gradients; without what is kept in between."""
    steps, rows, terms, units = case.shape
    states, weights = 2 * rows * units, 4 * units * (terms + units + 1)
    norms = 10 * units if NORMS[case.direction] else 0
    once = steps * rows * (terms + units) + states + weights + norms
    both = steps * rows * units + states + weights + norms
    return (once + both * is_both(case)) * case.itemsize


OP = Op(
    "lstm",
    cases=[Case("lstm", direction, shape) for shape in SHAPES for direction in NORMS],
    inputs=inputs,
    reference=reference,
    bytes_moved=bytes_moved,
    providers=(
        *on_both("bnkernels", ours),
        *expression.providers(formulas),
        *pytorch.providers(torch_eager),
    ),
)

AXES = {"x": "T SNK", "y": "T SNC", "dy": "T SNC", "bias": "A 4*C"}
AXES |= dict.fromkeys(("h0", "c0", "h_n", "c_n", "dh_n", "dc_n"), "T NC")
AXES |= {"weight_ih": "T 4*CK", "weight_hh": "T 4*CC", "gamma_x": "A 4*C", "gamma_h": "A 4*C"}
AXES |= dict.fromkeys(("gamma_c", "beta_c"), "A C")
AXES |= dict.fromkeys(("mean_x", "var_x", "mean_h", "var_h"), "A S4*C") | dict.fromkeys(("mean_c", "var_c"), "A SC")
RUNNING = "mean_x var_x mean_h var_h mean_c var_c"
# Several blocks; more than the threads of a kernel hold, or by unit than a sequence in one launch takes.
BY_UNIT = {"N": 6, "C": 33}, {"S": 1, "N": 520, "C": 3}
BY_EXAMPLE = {"N": 6, "C": 33}, {"S": 1, "N": 3, "C": 530}
LARGE_EPSILON = 1e4  # products of positive numbers have means that are far from 0, whose roundings it keeps small


def forward_of(a: Arrays, norm: str | None = None) -> tuple:
    """Call the forward of a sample; return what its backward takes."""
    norms = take(a, " ".join(OF_NORMS)) if norm else None
    running = take(a, RUNNING) if norm == "batch" else None
    return bn.lstm_forward(
        *take(a, " ".join(NAMES)), norms, running, norm=norm, eps=LARGE_EPSILON, out=take(a, "y h_n c_n")
    )


def backward_of(a: Arrays, norm: str | None = None) -> None:
    """Call the forward and the backward of a sample."""
    bn.lstm_backward(*take(a, "dy dh_n dc_n"), forward_of(a, norm)[3])


def _sample(run: Callable[..., Any], norm: str | None = None) -> Sample:
    behind = "dy dh_n dc_n" if run is backward_of else ""
    reads = f"{' '.join(NAMES)} {' '.join(OF_NORMS) if norm else ''} {behind}"
    writes = f"y h_n c_n {RUNNING if norm == 'batch' else ''}"
    sizes = BY_EXAMPLE if norm == "layer" else BY_UNIT
    types = ("float32", "float64")
    return Sample(reads, writes, partial(run, norm=norm), specs=AXES, sizes=sizes, dtypes=types)


SAMPLES: dict[str, Sample] = {}  # each of these is one launch, which a sequence is not
VARIANTS = {
    f"lstm_{direction}_{norm or 'plain'}": _sample(run, norm)
    for direction, run in (("forward", forward_of), ("backward", backward_of))
    for norm in (None, "batch", "layer")
}
