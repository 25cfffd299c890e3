"""The cases under pytest-benchmark: ``pytest benchmarks/ops/bench_X.py --benchmark-only``.

Every `Op` at the top level of a ``bench_*.py`` becomes a test of each case with each provider, as far as this machine
runs it in a moment. pytest-benchmark times a call and the wait for the device; ``extra_info`` has the device's own
times, by the protocol of `benchmarks.harness.measure`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from time import perf_counter
from typing import Any

import pytest

from benchmarks.harness.case import Case, Op, Provider
from benchmarks.harness.measure import OK, measure
from benchmarks.harness.places import cast, place_of, why_absent

MOST_ELEMENTS = {"cpu": 2**20, "cuda": 2**28}
SECONDS = 0.2


def pytest_pycollect_makeitem(collector: pytest.Module, name: str, obj: Any) -> list[pytest.Item] | None:
    """Collect an op as its benchmarks."""
    return list(benchmarks_of(collector, obj)) if isinstance(obj, Op) else None


def benchmarks_of(collector: pytest.Module, op: Op) -> Iterator[pytest.Item]:
    """Yield a test of every case with every provider whose place this machine has."""
    for provider in op.providers:
        place = provider.place
        if why_absent(place):
            continue
        for case in op.cases:
            if case.size <= MOST_ELEMENTS[place]:
                item = pytest.Function.from_parent(
                    collector, name=f"{case}-{place}-{provider.name}", callobj=benchmark_of(op, case, provider)
                )
                item.add_marker(pytest.mark.benchmark(timer=timer_of(place), group=f"{case} on {place}"))
                yield item


def timer_of(place: str) -> Callable[[], float]:
    """Return the clock of a place: on a GPU it waits for the stream of the calls before it looks."""

    def synchronising() -> float:
        place_of(place).clock("cupy").synchronise()
        return perf_counter()

    return perf_counter if place == "cpu" else synchronising


def benchmark_of(op: Op, case: Case, provider: Provider) -> Callable[[Any], None]:
    """Return a test function that checks and times one provider."""

    def test(benchmark: Any) -> None:
        place = place_of(provider.place)
        row = next(row for row in measure(op, case, [provider], place, SECONDS) if row["provider"] == provider.name)
        if row["status"].startswith(("failed", "wrong")):
            pytest.fail(row["status"], pytrace=False)
        if row["status"] != OK:
            pytest.skip(row["status"])
        benchmark.extra_info.update(row)
        clock = place.clock(provider.engine)
        with clock.working():
            call = provider.prepare(case, cast(case, op.inputs(case, place.random)))
            call()
            if provider.engine == "jax":
                benchmark(lambda: clock.synchronise(call()))
            else:
                benchmark(call)

    return test
