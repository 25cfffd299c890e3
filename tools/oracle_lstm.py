"""An LSTM by its formulas, step by step in extended precision: what tests of the op compare with."""

from __future__ import annotations

from typing import Any

import numpy as np

from tools.oracle import Extended

NAMES = ("x", "h0", "c0", "weight_ih", "weight_hh", "bias", "gamma_x", "gamma_h", "gamma_c", "beta_c")


def arguments(
    rng: np.random.Generator, sizes: tuple[int, int, int, int], norm: str | None, dtype: str
) -> dict[str, np.ndarray]:
    """Return random arguments by name, of sizes (T, N, I, H)."""
    steps, rows, inputs, units = sizes
    gates = 4 * units
    shapes = {"x": (steps, rows, inputs), "h0": (rows, units), "c0": (rows, units)}
    shapes |= {"weight_ih": (gates, inputs), "weight_hh": (gates, units), "bias": (gates,)}
    found = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    found["weight_ih"] /= np.sqrt(inputs)
    found["weight_hh"] /= np.sqrt(units)
    if norm:
        found |= {name: rng.uniform(0.3, 1, gates) for name in ("gamma_x", "gamma_h")}
        found |= {"gamma_c": rng.uniform(0.5, 1.5, units), "beta_c": rng.standard_normal(units)}
    return {name: array.astype(dtype) for name, array in found.items()}


def split(given: dict[str, Any]) -> tuple[tuple, tuple | None]:
    """Return the arguments of the op up to the bias, and the norms."""
    first = tuple(given[name] for name in NAMES[:6])
    return first, tuple(given[name] for name in NAMES[6:]) if "gamma_x" in given else None


def _sigmoid(a: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-a))


def _standardise(a: np.ndarray, norm: str, valid: np.ndarray, eps: float, known: tuple | None) -> tuple:
    """Return the normalised numbers, the mean and the variance."""
    if known is not None:
        mean, var = (array.astype(Extended) for array in known)
    elif norm == "batch":
        mean, var = a[valid].mean(0), a[valid].var(0)
    else:
        mean, var = a.mean(1, keepdims=True), a.var(1, keepdims=True)
    return (a - mean) / np.sqrt(var + Extended(eps)), mean, var


def forward(
    given: dict[str, np.ndarray],
    norm: str | None,
    lengths: np.ndarray | None = None,
    eps: float = 1e-5,
    population: list[tuple] | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[tuple]]:
    """Return y, h_n, c_n, and means and variances of every step, of the three parts: (mean_x, var_x, mean_h, ...)."""
    exact = {name: array.astype(Extended) for name, array in given.items()}
    x, h, c = exact["x"], exact["h0"].copy(), exact["c0"].copy()
    steps, rows, _ = x.shape
    y, moments = np.zeros((steps, *h.shape), Extended), []
    lengths = np.full(rows, steps) if lengths is None else lengths
    for t in range(steps):
        valid = lengths > t
        parts, found = [x[t] @ exact["weight_ih"].T, h @ exact["weight_hh"].T], []
        row = population and population[min(t, len(population) - 1)]
        if norm and valid.any():
            for number, name in enumerate(("gamma_x", "gamma_h")):
                known = row and row[2 * number : 2 * number + 2]
                hat, *two = _standardise(parts[number], norm, valid, eps, known)
                parts[number] = exact[name] * hat
                found += two
        i, f, g, o = np.split(parts[0] + parts[1] + exact["bias"], 4, axis=1)
        z = new = _sigmoid(f) * c + _sigmoid(i) * np.tanh(g)
        if norm and valid.any():
            hat, *two = _standardise(new, norm, valid, eps, row and row[4:6])
            z = exact["gamma_c"] * hat + exact["beta_c"]
            found += two
        moments.append(tuple(found))
        out = _sigmoid(o) * np.tanh(z)
        c, h = np.where(valid[:, None], new, c), np.where(valid[:, None], out, h)
        y[t] = np.where(valid[:, None], out, 0)
    return y, h, c, moments
