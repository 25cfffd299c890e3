"""Errors of the usual ways of computing a variance, and of ours, against the exact batch norm.

``python -m benchmarks.accuracy.variance`` prints the table and writes ``benchmarks/results/numerics.json``; with
``benchmarks.report`` it gets into ``docs/generated/variance.md``. Our kernels run on the emulator, so it needs g++.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

import bnkernels as bn
from benchmarks.harness.timing import RESULTS, facts, version_of, write_json
from tools import backends

ROWS, CHANNELS, LANES = 16384, 4, 256  # like a block of 256 threads, each with every 256th row
EPS = 1e-5

Moments = tuple[np.ndarray, np.ndarray]  # mean and variance, shape (C,), float32


def samples(rows: int = ROWS, channels: int = CHANNELS) -> dict[str, np.ndarray]:
    """Return the inputs by name, float64."""
    z = np.random.default_rng(0).standard_normal((rows, channels))
    outlier = z.copy()
    outlier[0] = 1e4
    return {
        "z": z,
        "5 + 0.1 z": 5 + 0.1 * z,
        "1e4 + z": 1e4 + z,
        "1e7 + z": 1e7 + z,
        "4097 + 0.001 z": 4097 + 1e-3 * z,
        "z, but first row 1e4": outlier,
        "constant 12345.678": np.full_like(z, 12345.678),
    }


def tree(values: np.ndarray) -> np.ndarray:
    """Sum over the lanes, pairwise, in float32."""
    while len(values) > 1:
        values = values[: len(values) // 2] + values[len(values) // 2 :]
    return values[0]


def lane_sums(x: np.ndarray) -> np.ndarray:
    """Sum over the rows as a block of threads does: every lane its own, one after the other, then the lanes."""
    total = np.zeros((LANES, x.shape[1]), np.float32)
    for chunk in x.reshape(-1, LANES, x.shape[1]):
        total += chunk
    return tree(total)


def squares(x: np.ndarray) -> Moments:
    """Return E[x^2] - E[x]^2."""
    mean = lane_sums(x) / np.float32(ROWS)
    return mean, np.maximum(lane_sums(x * x) / np.float32(ROWS) - mean * mean, 0)


def two_pass(x: np.ndarray) -> Moments:
    """Return the mean, then the mean square about it."""
    mean = lane_sums(x) / np.float32(ROWS)
    return mean, lane_sums((x - mean) ** 2) / np.float32(ROWS)


def welford(x: np.ndarray) -> Moments:
    """Return Welford's update in every lane, and Chan's merge of the lanes."""
    mean, m2 = np.zeros((2, LANES, x.shape[1]), np.float32)
    for count, chunk in enumerate(x.reshape(-1, LANES, x.shape[1]), start=1):
        delta = chunk - mean
        mean += delta / np.float32(count)
        m2 += delta * (chunk - mean)
    size = np.float32(ROWS // LANES)
    while len(mean) > 1:
        half = len(mean) // 2
        delta = mean[half:] - mean[:half]
        m2 = m2[:half] + m2[half:] + delta * delta * (size / 2)
        mean, size = mean[:half] + delta / 2, size * 2
    return mean[0], m2[0] / np.float32(ROWS)


def shifted(x: np.ndarray) -> Moments:
    """Return the moments of x - x[0], in one pass."""
    moved_mean, var = squares(x - x[0])
    return x[0] + moved_mean, var


def normalise(moments: Callable[[np.ndarray], Moments]) -> Callable[[np.ndarray], np.ndarray]:
    """Return the batch norm with these moments, the mean rounded to one float32."""

    def batch_norm(x: np.ndarray) -> np.ndarray:
        mean, var = moments(x)
        return (x - mean) / np.sqrt(var + np.float32(EPS))

    return batch_norm


def rounded_mean(x: np.ndarray) -> np.ndarray:
    """Return the batch norm with perfect moments of which the mean is rounded to one float32."""
    exact_x = x.astype(np.float64)
    return (x - exact_x.mean(0).astype(np.float32)) / np.sqrt(exact_x.var(0) + EPS)


def shifted_pair(x: np.ndarray) -> np.ndarray:
    """Return the batch norm of x - x[0], whose mean is therefore kept in two numbers."""
    moved = x - x[0]
    mean, var = squares(moved)
    return (moved - mean) / np.sqrt(var + np.float32(EPS))


def kernel(x: np.ndarray) -> np.ndarray:
    """Return the output of our kernel, emulated."""
    backend = backends.make("emulator")
    return backend.asnumpy(bn.batch_norm_forward(backend.asarray(x), eps=EPS)[0])


def cpu_path(x: np.ndarray) -> np.ndarray:
    """Return the output of our CPU path."""
    return bn.batch_norm_forward(x, eps=EPS)[0]


def torch(x: np.ndarray) -> np.ndarray:
    """Return PyTorch's output on the CPU."""
    import torch

    return torch.nn.functional.batch_norm(torch.from_numpy(x), None, None, training=True, eps=EPS).numpy()


METHODS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "E[x²] - E[x]²": normalise(squares),
    "two passes": normalise(two_pass),
    "Welford, Chan": normalise(welford),
    "shift by x[0], mean in one": normalise(shifted),
    "shift by x[0], mean in two": shifted_pair,
    "exact, mean rounded": rounded_mean,
    "PyTorch, CPU": torch,
    "our CPU path": cpu_path,
    "our kernel": kernel,
}


def error(y: np.ndarray, x: np.ndarray) -> float:
    """Return the largest error of `y`, in units of 2^-23 (1 + |y|): about the last place of float32."""
    exact_x = x.astype(np.longdouble)
    exact = (exact_x - exact_x.mean(0)) / np.sqrt(exact_x.var(0) + np.longdouble(EPS))
    return float(np.max(np.abs(y - exact) / (1 + np.abs(exact))) * 2**23)


def main() -> None:
    """Compute the table, print it and write it."""
    methods = {name: method for name, method in METHODS.items() if method is not torch or version_of("torch")}
    table = {}
    for name, exact_x in samples().items():
        x = exact_x.astype(np.float32)
        table[name] = {method: float(f"{error(compute(x), x):.2g}") for method, compute in methods.items()}
        print(name, table[name])
    write_json(RESULTS / "numerics.json", {**facts("torch"), "rows": ROWS, "methods": list(METHODS), "errors": table})


if __name__ == "__main__":
    main()
