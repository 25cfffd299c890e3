"""The protocol: check every provider against float64, then time those that are right, interleaved in random order.

On a GPU a provider is timed in four ways. Cold: CUDA-graph replays of calls over many sets of buffers, larger together
than three times the second-level cache, which is flushed before every replay where they are not. Hot: replays over one
set. Host: what a call costs Python before it returns. End to end: a call and the wait for it. On a CPU there is one
set, and a call returns when it is done. Nothing here depends on which op or framework is measured.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from benchmarks.harness.case import EPS, Call, Case, NotSupportedError, Op, Provider, WrongResultError
from benchmarks.harness.clocks import Batch, Clock
from benchmarks.harness.places import COPY, COPY_MEMCPY, EMPTY, Gpu, Host, cast, copies, to_float64
from benchmarks.harness.timing import interleave, quantiles, round4

SUMMED, STORED = 1000, 4  # roundings that a right result may be off by: of the accumulator, and of the stored type
BURST = 20  # calls of one measurement of the host's time
BATCH_SECONDS = 2e-3  # a hot batch lasts about so long
MOST_CALLS = 300
ROUNDS = (5, 50)  # at least and at most
OK = "ok"

Row = dict[str, Any]


class Runner(NamedTuple):
    """A provider that computes a case rightly, ready to be timed."""

    provider: Provider
    clock: Clock
    calls: Sequence[Call]  # one for every set of buffers
    error: float
    backend: str


def measure(
    op: Op,
    case: Case,
    providers: Sequence[Provider],
    place: Host | Gpu,
    seconds: float = 2.0,
) -> list[Row]:
    """Measure a case; return a row for every provider, also for those that cannot do it.

    Parameters
    ----------
    op, case, providers
        Case of an op, and those that compute it.
    place : Host or Gpu
        CPU or GPU.
    seconds : float
        Duration of the timed rounds, about; there are at least `ROUNDS` [0] of them.
    """
    nbytes = op.bytes_moved(case)
    place.use_threads(case.threads)
    rows = {provider.name: new_row(case, provider, nbytes) for provider in providers}
    everybody = (*providers, *place.limits(nbytes))
    rows |= {limit.name: new_row(case, limit, nbytes) for limit in place.limits(nbytes)}
    try:
        with place.working():
            arrays = cast(case, op.inputs(case, place.random))
            exact = op.reference(case, to_float64(arrays), place.xp)
        held = sum(array.nbytes for array in arrays.values()) + sum(output.size for output in exact) * case.itemsize
        sets = place.sets(nbytes, held, len(everybody))
    except (NotSupportedError, MemoryError) as problem:
        for row in rows.values():
            row["status"] = f"not measured: {one_line(problem)}"
        return list(rows.values())
    runners = []
    for provider in everybody:
        row = rows[provider.name]
        checked = exact if provider in providers else None
        with place.working():
            made = ready(provider, case, copies(arrays, sets), checked, place)
        if isinstance(made, Runner):
            runners.append(made)
            row |= {"status": OK, "error": made.error, "backend": made.backend, "sets": sets}
        else:
            row["status"] = made
    del arrays, exact
    time_together(runners, rows, place, seconds)
    relate(rows)
    runners.clear()
    place.release()
    return list(rows.values())


def new_row(case: Case, provider: Provider, nbytes: int) -> Row:
    """Return a row in which nothing is measured."""
    return {
        "op": case.op,
        "direction": case.direction,
        "shape": "x".join(map(str, case.shape)),
        "dtype": case.dtype,
        "layout": case.layout,
        "epilogue": case.epilogue,
        "threads": case.threads,
        "place": provider.place,
        "provider": provider.name,
        "status": "not measured",
        "bytes": nbytes,
    }


def ready(provider: Provider, case: Case, sets: Sequence[dict], exact: tuple | None, place: Host | Gpu) -> Runner | str:
    """Prepare a provider on all sets and check its first call; return why it is not timed if it is not."""
    if reason := provider.absent():
        return f"absent: {reason}"
    try:
        clock = place.clock(provider.engine)
        backend = provider.describe(case, sets[0])
        calls = []
        with clock.working():
            for arrays in sets:
                calls.append(provider.prepare(case, arrays))
                outputs = calls[-1]()
                clock.synchronise(outputs)
                if len(calls) == 1:
                    error = 0.0 if exact is None else error_of(case, map(clock.to_float64, outputs), exact)
        return Runner(provider, clock, calls, error, backend)
    except NotSupportedError as problem:
        return one_line(problem)
    except WrongResultError as problem:
        return f"wrong result: {problem}"
    except Exception as problem:  # any error of a framework becomes its row; the others are measured
        return f"failed: {type(problem).__name__}: {one_line(problem)}"


def error_of(case: Case, found: Iterable[Any], exact: tuple) -> float:
    """Return the largest error of any output, relative to the output's largest element or 1, whichever is larger.

    Raises
    ------
    WrongResultError
        If it is larger than roundings explain, or NaN.
    """
    worst = 0.0
    allowed = STORED * EPS[case.dtype] + SUMMED * EPS[case.accumulator]
    outputs = list(found)
    if len(outputs) != len(exact):
        raise WrongResultError(f"{len(outputs)} outputs instead of {len(exact)}: not timed")
    for i, (output, right) in enumerate(zip(outputs, exact, strict=True)):
        if output.shape != right.shape:
            raise WrongResultError(f"output {i} has the shape {output.shape}, not {right.shape}: not timed")
        error = float(abs(output - right).max()) / max(1.0, float(abs(right).max()))
        if not error <= allowed:  # also if it is NaN
            raise WrongResultError(f"output {i} is off by {error:.3g}, more than {allowed:.3g}: not timed")
        worst = max(worst, error)
    return round4(worst)


# ---- timing ---------------------------------------------------------------------------------------------------------


def time_together(runners: Sequence[Runner], rows: dict[str, Row], place: Host | Gpu, seconds: float) -> None:
    """Time all runners in the same interleaved rounds; write medians and spreads into their rows."""
    measurements: dict[tuple[str, str], Callable[[], float]] = {}
    per_round = 0.0
    for runner in runners:
        row = rows[runner.provider.name]
        try:
            kinds, cost = kinds_of(runner, row, place)
        except Exception as problem:  # a capture that a framework refuses
            row["status"] = f"failed: {type(problem).__name__}: {one_line(problem)}"
            continue
        measurements |= {(runner.provider.name, kind): measure_kind for kind, measure_kind in kinds.items()}
        per_round += cost
    least, most = ROUNDS
    rounds = int(min(most, max(least, seconds / max(per_round, 1e-9))))
    numbered = list(measurements)  # NumPy, which shuffles the names, would take tuples apart
    figures = interleave({str(i): measurements[key] for i, key in enumerate(numbered)}, rounds)
    for i, (name, kind) in enumerate(numbered):
        for quantile, value in quantiles(1e6 * figures[str(i)]).items():
            rows[name][f"{kind}_us_{quantile}"] = value
    for name, _ in numbered:
        rows[name]["rounds"] = rounds


def kinds_of(runner: Runner, row: Row, place: Host | Gpu) -> tuple[dict[str, Callable[[], float]], float]:
    """Return the measurements of a runner by kind, and the seconds that a round of all of them takes."""
    clock, first = runner.clock, runner.calls[0]
    estimate = clock.batch([first] * 3, keep=False).run()
    count = int(min(MOST_CALLS, max(1, BATCH_SECONDS / max(estimate, 1e-9))))
    hot = clock.batch([first] * count, keep=False)
    kinds: dict[str, Callable[[], float]] = {"hot": hot.run}
    row |= {"method": clock.method} | nodes_of(hot, count)
    cost = hot.run() * count
    if place.cold:
        cold = clock.batch(runner.calls, keep=True)
        kinds["cold"] = cold.run
        kinds["host"] = lambda: burst(clock, first, BURST)
        kinds["end_to_end"] = lambda: burst(clock, first, 1, wait=True)
        cost += sum(kinds[kind]() * calls for kind, calls in (("cold", len(runner.calls)), ("host", 2 * BURST)))
    return kinds, cost


def burst(clock: Clock, call: Call, count: int, wait: bool = False) -> float:
    """Return the host's seconds per call of a few calls in a row, with the wait for them or without."""
    with clock.working():
        started = time.perf_counter()
        for _ in range(count):
            outputs = call()
        enqueued = time.perf_counter()
        clock.synchronise(outputs)
        finished = time.perf_counter()
    return ((finished if wait else enqueued) - started) / count


def nodes_of(batch: Batch, calls: int) -> Row:
    """Return the number and names of the kernels that a call launches, or the reason why they are not known."""
    if batch.nodes is None:
        return {}
    if batch.nodes.count is None:
        return {"kernels_problem": batch.nodes.problem}
    names = Counter(batch.nodes.names[: batch.nodes.count // calls])
    return {"kernels": batch.nodes.count / calls, "kernel_names": [f"{n} x {name}" for name, n in names.items()]}


def relate(rows: dict[str, Row]) -> None:
    """Add bandwidths, and what the figures are of the limits that were timed among them."""
    kind = "cold" if any("cold_us_median" in row for row in rows.values()) else "hot"
    copied = [
        rows[name][f"{kind}_us_median"] for name in (COPY, COPY_MEMCPY) if f"{kind}_us_median" in rows.get(name, {})
    ]
    empty = rows.get(EMPTY, {}).get("hot_us_median")
    for row in rows.values():
        us = row.get(f"{kind}_us_median")
        if not us:
            continue
        if row["provider"] != EMPTY:
            row["GB_per_s"] = round4(row["bytes"] / us / 1e3)
            if copied:
                row["percent_of_copy"] = round4(100 * min(copied) / us)
        if empty:
            row["times_empty"] = round4(row["hot_us_median"] / empty)


def one_line(problem: BaseException) -> str:
    """Return a message on one line, cut where a compiler's log would begin."""
    return " ".join(str(problem).split())[:200]
