"""A model of many ranks: what a training step costs, fitted to 1 to 4 measured ranks and extrapolated to 10,000.

A step is local work, collectives, and waiting for the slowest rank before each of them:

* the local work of a way is its step on one rank, where the exchanges are with itself;
* an all-gather of m bytes from each of N ranks takes ``a log2(N) + b m (N - 1)``; an all-reduce of gradients, which is
  assumed for all ways, ``a log2(N) + 2 b m (N - 1) / N``;
* the slowest of N ranks takes longer than its work w by the largest of ``N w / u`` delays drawn from those measured of
  pieces of work u: one large delay decides, not many small ones. No delay is longer than the longest measured;
* a, b and the delays are those of this machine. Ranks in excess of the cores share them.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks.distributed.rank import STEPS
from bnkernels.train.plots import require_matplotlib

MOMENTS, SUMS, FLOAT = 16, 12, 4  # bytes for each channel, forward and backward, and of a gradient
GROUP = 8
RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 10000)
WAYS = {
    "synchronised, one all-gather": "#000000",
    "synchronised, merged in two steps": "#0072B2",
    f"groups of {GROUP} ranks": "#009E73",
    "delayed statistics": "#CC79A7",
    "ghost batches": "#D55E00",
}
DRAWS = 4001  # points of the integral over a distribution


class Network(NamedTuple):
    """A measured network.

    Attributes
    ----------
    work, synchronised, ghost : float
        Microseconds of a step on one rank: without any exchange, and with the exchanges of both ways, with itself.
    channels : tuple of int
        Widths of its normalised layers.
    parameters : int
        Number of parameters.
    """

    work: float
    synchronised: float
    ghost: float
    channels: tuple[int, ...]
    parameters: int


class Machine(NamedTuple):
    """Constants that were fitted.

    Attributes
    ----------
    a : float
        Microseconds of a round of messages.
    b : float
        Microseconds for a byte.
    piece : float
        Microseconds of the piece of work whose delays were measured.
    at, delay : numpy.ndarray
        Distribution of the delays: probabilities, and microseconds.
    cores : int
        Number of cores.
    """

    a: float
    b: float
    piece: float
    at: np.ndarray
    delay: np.ndarray
    cores: int

    def gather(self, nbytes: float, ranks: float) -> float:
        """Return the time of an all-gather."""
        return self.a * math.log2(ranks) + self.b * nbytes * (ranks - 1) if ranks > 1 else 0.0

    def reduce(self, nbytes: float, ranks: float) -> float:
        """Return the time of an all-reduce."""
        return self.a * math.log2(ranks) + 2 * self.b * nbytes * (ranks - 1) / ranks if ranks > 1 else 0.0

    def waiting(self, work: float, ranks: float) -> float:
        """Return by how much the slowest of some ranks takes longer for its work than one does on average."""
        return self._largest(ranks * work / self.piece) - self._largest(work / self.piece) if ranks > 1 else 0.0

    def _largest(self, draws: float) -> float:
        """Return the expected largest of so many delays: the integral of ``Q(u ** (1 / draws))``."""
        u = (np.arange(DRAWS) + 0.5) / DRAWS
        return float(np.interp(u ** (1 / max(draws, 1)), self.at, self.delay).mean())


def fit(document: Mapping[str, Any]) -> Machine:
    """Return the machine of a document of measurements: relative least squares of all all-gathers of several ranks."""
    rows = [row for row in document["gathers"] if row["ranks"] > 1]
    terms = np.array([[math.log2(row["ranks"]), row["bytes"] * (row["ranks"] - 1)] for row in rows])
    times = np.array([row["us"]["median"] for row in rows])
    a, b = np.linalg.lstsq(terms / times[:, None], np.ones(len(rows)), rcond=None)[0]
    cores = document["cores"]
    delays = max((row for row in document["delays"] if row["ranks"] <= cores), key=lambda row: row["ranks"])
    delay = delays["us"] * np.maximum(np.array(delays["relative"]) - 1, 0)
    return Machine(max(float(a), 0), max(float(b), 0), delays["us"], np.array(delays["at"]), delay, cores)


def networks(document: Mapping[str, Any]) -> dict[str, Network]:
    """Return the measured networks by name."""
    alone = [row for row in document["steps"] if row["ranks"] == 1]
    times = {(row["network"], row["way"]): row["us"]["median"] for row in alone}
    sizes = {row["network"]: row["parameters"] for row in alone}
    return {
        name: Network(
            *(times[name, way] for way in ("alone", "synchronised", "ghost batches")), STEPS[name][0][1:-1], parameters
        )
        for name, parameters in sizes.items()
    }


def predict(machine: Machine, network: Network, way: str, ranks: int, limited: bool = False) -> float:
    """Return the microseconds of a step; `limited` ranks share the cores that there are."""
    work = network.ghost if way == "ghost batches" else network.synchronised
    work *= max(1.0, ranks / machine.cores) if limited else 1.0
    exchange = machine.reduce(FLOAT * network.parameters, ranks)
    sizes = [each * channels for channels in network.channels for each in (MOMENTS, SUMS)]
    points = len(sizes)
    if way == "ghost batches":
        return work + machine.waiting(work, ranks) + exchange
    if way == "delayed statistics":
        hidden = sum(machine.gather(size, ranks) for size in sizes) - work
        return work + machine.waiting(work, ranks) + exchange + max(hidden, 0.0)
    members = min(ranks, GROUP) if way.startswith("groups") else ranks
    if way == "synchronised, merged in two steps" and ranks > 1:
        side = math.sqrt(members)
        gathers = sum(2 * machine.gather(size, side) for size in sizes)
    else:
        gathers = sum(machine.gather(size, members) for size in sizes)
    pieces = work / (points + 1)
    waiting = points * machine.waiting(pieces, members) + machine.waiting(pieces, ranks)
    waiting = max(waiting, machine.waiting(work, ranks))  # to wait more often shortens no wait for the gradients
    return work + waiting + gathers + exchange


def validation(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return measured and predicted steps of the measured numbers of ranks, whose exchange is an all-gather."""
    machine, rows = fit(document), []
    for row in document["steps"]:
        if row["way"] == "alone" or row["ranks"] == 1:
            continue
        network, ranks = networks(document)[row["network"]], row["ranks"]
        way = "ghost batches" if row["way"] == "ghost batches" else "synchronised, one all-gather"
        nbytes = FLOAT * network.parameters
        gathered = machine.gather(nbytes, ranks) - machine.reduce(nbytes, ranks)
        predicted = predict(machine, network, way, ranks, limited=True) + gathered
        rows.append(row | {"predicted": predicted, "measured": row["us"]["median"]})
    return rows


def draw(document: Mapping[str, Any]) -> bytes:
    """Return an SVG image: a panel for each network, a line for each way."""
    require_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure

    machine, found = fit(document), networks(document)
    with matplotlib.rc_context({"svg.hashsalt": "bnkernels", "svg.fonttype": "none"}):
        figure = Figure(figsize=(9, 4), layout="constrained", facecolor="white")
        figure.suptitle(
            "Predicted time of a training step, relative to one rank that exchanges nothing; each has 64 examples\n"
            f"fitted to 1 to 4 ranks on {document['device']}",
            fontsize=10,
        )
        for axes, (name, network) in zip(np.atleast_1d(figure.subplots(1, len(found))), found.items(), strict=True):
            axes.set_title(f"{name}, {network.work:.3g} µs of work", fontsize=10)
            for way, colour in WAYS.items():
                times = [predict(machine, network, way, ranks) / network.work for ranks in RANKS]
                axes.plot(RANKS, times, color=colour, linewidth=1.6, label=way)
            axes.axvspan(1, 4, color="#DDDDDD", alpha=0.6, linewidth=0)
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_xlim(1, RANKS[-1])
            axes.set_xlabel("ranks (grey: measured)")
            axes.grid(alpha=0.25)
        figure.axes[0].set_ylabel("time of a step / work")
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
        image = io.BytesIO()
        figure.savefig(image, format="svg", metadata={"Date": None})
    return image.getvalue()


def breaking(machine: Machine, network: Network, way: str, most: float = 1.1, ranks: Sequence[int] = RANKS) -> int:
    """Return the largest number of ranks up to which a way takes at most so many times the step of ghost batches."""
    last = 1
    for count in ranks:
        if predict(machine, network, way, count) > most * predict(machine, network, "ghost batches", count):
            break
        last = count
    return last
