"""The same cases under pytest-benchmark: ``pytest benchmarks --benchmark-only``.

What pytest-benchmark times is a call and the wait for the device, the wall clock being read by a timer that waits. The
times of the device itself are in ``extra_info``, by the protocol of `benchmarks.harness.measure`.
"""

from __future__ import annotations

from collections.abc import Iterator
from time import perf_counter
from typing import Any

import pytest

from benchmarks.harness.case import Case, Op, Provider
from benchmarks.harness.measure import OK, measure
from benchmarks.harness.ops import OPS
from benchmarks.harness.places import cast, place_of, why_absent

MOST_ELEMENTS = {"cpu": 2**20, "cuda": 2**28}
SECONDS = 0.2


def timer_of(place: str) -> Any:
    """Return the clock of a place: on a GPU it waits for the stream of the calls before it looks."""

    def synchronising() -> float:
        place_of(place).clock("cupy").synchronise()
        return perf_counter()

    return perf_counter if place == "cpu" else synchronising


def parameters() -> Iterator[Any]:
    """Yield every case with every provider, as far as the place can run it in a moment."""
    for place in ("cpu", "cuda"):
        reason = why_absent(place)
        for op in OPS.values():
            for case in op.cases:
                for provider in op.providers:
                    if provider.place == place and case.size <= MOST_ELEMENTS[place] and not reason:
                        marks = pytest.mark.benchmark(timer=timer_of(place), group=f"{case} on {place}")
                        yield pytest.param(op, case, provider, marks=marks, id=f"{case}-{place}-{provider.name}")


@pytest.mark.parametrize(("op", "case", "provider"), list(parameters()))
def test_benchmark(benchmark: Any, op: Op, case: Case, provider: Provider) -> None:
    """Check and time one provider."""
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
