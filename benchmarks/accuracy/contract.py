"""The accuracy contract, measured: how far every result of batch norm is from the exact one, on inputs that tell.

``python -m benchmarks.accuracy.contract`` prints the errors and writes ``benchmarks/results/accuracy.json``; with
``benchmarks.report`` they get into ``docs/generated/accuracy.md``. ``tests/benchmarks/test_accuracy.py`` holds our
results to the contract. Our kernels run on the emulator, so it needs g++.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np

import bnkernels as bn
from benchmarks.accuracy import variance
from benchmarks.harness.timing import RESULTS, facts, version_of, write_json
from bnkernels.runtime.arguments import accumulator
from tools import backends
from tools.oracle import SLACK, STORED, Extended

ROWS, CHANNELS = 20000, 4  # no power of two, by which a mean would be exact
INNER = 100  # rows of an example where PyTorch sees (N, C, L), for which it sums in another way
EPS = 2.0**-17  # near the usual 1e-5, and the same number in every type
DTYPES = ("float32", "float64", "float16", "bfloat16")
FEW = SLACK / 2  # last places, of what is computed and kept in float32 or float64: as in all tests
ROUNDED = 0.501  # last places, of what is rounded to 16 bits at the end: half of one, and few of float32's
PROMISED = "promised"

Results = dict[str, np.ndarray]  # by quantity
Errors = dict[str, float]  # by quantity, in the units of `errors`


class Case(NamedTuple):
    """Arguments of a batch norm; gamma and beta have the type of the accumulator."""

    x: np.ndarray
    gamma: np.ndarray
    beta: np.ndarray
    dy: np.ndarray


def inputs(rows: int = ROWS, channels: int = CHANNELS) -> dict[str, np.ndarray]:
    """Return x by name, float64."""
    cases = variance.samples(rows, channels)
    larger = {"1e6 + z": 1e6 + cases["z"]}
    return cases | larger | {f"constant {c:.0e}": np.full_like(cases["z"], c) for c in (1e7, 1e10)}


def data_type(name: str) -> np.dtype:
    """Return the data type of this name; bfloat16 is that of ml_dtypes."""
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def make(x: np.ndarray, dtype: str) -> Case | None:
    """Return the case of an input in a data type; None where the type has no such numbers."""
    rng = np.random.default_rng(1)
    acc_dtype = accumulator(data_type(dtype))
    gamma = rng.uniform(0.5, 2, x.shape[1]) * rng.choice([-1, 1], x.shape[1])
    beta = rng.integers(-16, 17, x.shape[1]) / 8  # in every data type: a constant channel gives exactly that
    dy = rng.standard_normal(x.shape) + 0.3
    with np.errstate(over="ignore"):
        x = x.astype(data_type(dtype))
    if not np.isfinite(x.astype(np.float64)).all():
        return None
    return Case(x, gamma.astype(acc_dtype), beta.astype(acc_dtype), dy.astype(x.dtype))


def promise(case: Case) -> Errors:
    """Return the largest error of each quantity that the contract allows; none where every channel is constant."""
    stored = ROUNDED if case.x.dtype.name in STORED else FEW
    limits = {"mean": FEW, "rstd": FEW, "y": stored, "dx": stored, "dgamma": FEW, "dbeta": FEW}
    return limits | {"mean": 0.0, "y": 0.0, "dgamma": 0.0} if (case.x == case.x[0]).all() else limits


def errors(case: Case, results: Results) -> Errors:
    """Return the largest error of each quantity; infinite where a result is not finite.

    The units take the size of the terms that a result is made of, times the distance from 1 to the next number of the
    type it is kept in. The mean is taken in two parts, and so is the exact one: even extended precision does not hold
    a large mean to the last place of float64 data.
    """
    x, gamma, beta, dy = (array.astype(Extended) for array in case)
    first = x.mean(0)
    rest = (x - first).mean(0)
    centred = (x - first) - rest
    rstd = 1 / np.sqrt((centred * centred).mean(0) + Extended(EPS))
    xhat = centred * rstd
    dgamma, dbeta = (dy * xhat).sum(0), dy.sum(0)
    size, size_of_sum = 1 + np.abs(xhat), (np.abs(dy) * (1 + np.abs(xhat))).sum(0)
    exact = {
        "rstd": (rstd, rstd),
        "y": (gamma * xhat + beta, np.abs(gamma) * size + np.abs(beta)),
        "dx": (
            gamma * rstd * (dy - (dbeta + xhat * dgamma) / len(x)),
            np.abs(gamma) * rstd * (np.abs(dy) + size * size_of_sum / len(x)),
        ),
        "dgamma": (dgamma, size_of_sum),
        "dbeta": (dbeta, np.abs(dy).sum(0)),
    }
    off = {"mean": ((results["mean"].astype(Extended) - first) + (results["mean_low"] - rest)) * rstd}
    off |= {name: (results[name].astype(Extended) - value) / unit for name, (value, unit) in exact.items()}
    return {name: worst(error) / last_place(results[name].dtype) for name, error in off.items()}


def worst(error: np.ndarray) -> float:
    """Return the largest size; NaN counts as infinite."""
    return float(np.nan_to_num(np.abs(error), nan=np.inf).max())


def last_place(dtype: np.dtype) -> float:
    """Return the distance from 1 to the next number."""
    return float(2 * STORED[dtype.name][0]) if dtype.name in STORED else float(np.finfo(dtype).eps)


def kept(found: Errors, promised: Errors) -> bool:
    """Return whether no error is larger than promised."""
    return all(found[name] <= limit for name, limit in promised.items())


def ours(backend: backends.Backend, case: Case) -> Results:
    """Return the results of our op on a backend."""
    x, gamma, beta, dy = backend.arrays(*case)
    y, statistics = bn.batch_norm_forward(x, gamma, beta, eps=EPS)
    dx, dgamma, dbeta = bn.batch_norm_backward(dy, x, gamma, beta, statistics)
    mean, mean_low, rstd = backend.asnumpy(statistics)
    found = {name: backend.asnumpy(a) for name, a in {"y": y, "dx": dx, "dgamma": dgamma, "dbeta": dbeta}.items()}
    return {"mean": mean, "mean_low": mean_low, "rstd": rstd, **found}


def pytorch(case: Case, inner: int = 1) -> Results:
    """Return PyTorch's results on the CPU, of x as (N, C), or as (N / inner, C, inner). Its mean is a single number."""
    import torch

    torch.set_num_threads(1)
    channels = case.x.shape[1]

    def to(array: np.ndarray) -> torch.Tensor:
        if array.ndim == 2 and inner > 1:
            array = np.ascontiguousarray(array.reshape(-1, inner, channels).swapaxes(1, 2))
        if array.dtype.name == "bfloat16":
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    def back(tensor: torch.Tensor) -> np.ndarray:
        tensor = tensor.detach()
        if tensor.dtype == torch.bfloat16:
            array = tensor.view(torch.int16).numpy().view(data_type("bfloat16"))
        else:
            array = tensor.numpy()
        return array.swapaxes(1, 2).reshape(-1, channels) if array.ndim == 3 else array

    x, gamma, beta = (to(array).requires_grad_() for array in case[:3])
    y, mean, rstd = torch.native_batch_norm(x, gamma, beta, None, None, True, 0.1, EPS)
    y.backward(to(case.dy))
    found = {"mean": mean, "rstd": rstd, "y": y, "dx": x.grad, "dgamma": gamma.grad, "dbeta": beta.grad}
    return {name: back(tensor) for name, tensor in found.items()} | {"mean_low": np.zeros_like(back(mean))}


def ways() -> dict[str, Callable[[Case], Results]]:
    """Return what is measured, by name."""
    found = {
        "our kernels, emulated": lambda case: ours(backends.make("emulator"), case),
        "our CPU path": lambda case: ours(backends.make("numpy"), case),
    }
    if version_of("torch"):
        found |= {"PyTorch, CPU, (N, C)": pytorch, "PyTorch, CPU, (N, C, L)": partial(pytorch, inner=INNER)}
    return found


def rounded(found: Errors) -> dict[str, float | str]:
    """Return errors to two digits; JSON has no infinity."""
    return {name: float(f"{error:.2g}") if np.isfinite(error) else "not finite" for name, error in found.items()}


def rows_of(name: str, case: Case, methods: Mapping[str, Callable[[Case], Results]]) -> list[dict[str, Any]]:
    """Return a row of what is promised for a case, and one for every way of computing it."""
    about = {"dtype": case.x.dtype.name, "input": name}
    promised = promise(case)
    rows = [{**about, "way": PROMISED, **promised}]
    for way, compute in methods.items():
        found = errors(case, compute(case))
        rows.append({**about, "way": way, **rounded(found), "kept": kept(found, promised)})
        print(*rows[-1].values(), flush=True)
    return rows


def main() -> None:
    """Measure, print and write."""
    methods = ways()
    cases = [(name, make(x, dtype)) for dtype in DTYPES for name, x in inputs().items()]
    rows = [row for name, case in cases if case is not None for row in rows_of(name, case, methods)]
    about = {**facts("ml_dtypes", "torch"), "rows": ROWS, "channels": CHANNELS}
    write_json(RESULTS / "accuracy.json", {**about, "errors": rows})


if __name__ == "__main__":
    main()
