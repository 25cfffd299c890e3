"""``python -m benchmarks``: the whole list of cases, or cases of one's own, beside every rival that is installed.

Without options it runs what this machine can run. Ctrl-C, or the end of the time given, keeps what was measured.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from time import monotonic

from tqdm import tqdm

from benchmarks.harness import records
from benchmarks.harness.case import DTYPES, EPILOGUES, LAYOUTS, Case, Op, Provider
from benchmarks.harness.measure import Row, measure, new_row
from benchmarks.harness.places import keep_memory, place_of, why_absent
from benchmarks.harness.targets import LAYOUT_OF, TARGETS, Target
from benchmarks.harness.timing import facts, results_folder
from benchmarks.ops import every_op

OPS = every_op()
PACKAGES = ("torch", "triton", "jax", "ml_dtypes")
CPU_LIMIT = 2**24  # elements; larger cases of the list are left to a GPU
FAILURES = ("failed", "wrong")

Task = tuple[Op, Case]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; return 1 if a provider failed or computed something wrong."""
    options = parse(arguments)
    if reason := why_absent(options.place):
        sys.exit(f"error: nothing can be measured on {options.place}: {reason}")
    providers = {op.name: chosen(op, options) for op in OPS.values()}
    tasks = [(op, case) for op, case in wanted(options) if providers[op.name]]
    # Time that is short is spent on the targets first, then on the plain ops.
    order = {target.case: i for i, target in enumerate(targets_of(options.place))}
    tasks.sort(key=lambda task: (order.get(task[1], len(order)), EPILOGUES.index(task[1].epilogue)))
    if not tasks:
        sys.exit("error: no case is left: python -m benchmarks --list shows what there is")
    if options.list:
        for op, case in tasks:
            print(f"{case}: {', '.join(provider.name for provider in providers[op.name])}")
        return 0
    about = facts(*PACKAGES, place=options.place)
    out = results_folder(about) / "ops.json" if options.save else options.out
    run = Run(tasks, providers, options)
    for rows in run.measured():
        if out:
            records.write(out, about, rows)
    rows = run.rows()
    print(records.table(rows))
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if version)
    print(f"\n{about['device']}; {versions}; commit {about['commit']}, {about['date']}")
    if out:
        print(f"written: {out} and {out.with_suffix('.csv')}")
    return int(any(row["status"].startswith(FAILURES) for row in rows))


class Run:
    """A list of cases being measured.

    Where providers compile for long, every case is first measured without them; then, as far as the time goes, again
    with all, which replaces the first rows: figures of one case always come from the same rounds.
    """

    def __init__(
        self, tasks: Sequence[Task], providers: dict[str, list[Provider]], options: argparse.Namespace
    ) -> None:
        self.tasks, self.providers, self.options = tasks, providers, options
        self._rows = {
            str(case): [new_row(case, provider, op.bytes_moved(case)) for provider in providers[op.name]]
            for op, case in tasks
        }
        self._end = monotonic() + options.seconds if options.seconds else None

    def rows(self) -> list[Row]:
        """Return the rows of all cases, in the order of the list."""
        return [row for rows in self._rows.values() for row in rows]

    def measured(self) -> Iterator[list[Row]]:
        """Measure; yield all rows after every case."""
        yield self.rows()
        try:
            steps = [*self._steps(slow=False), *self._steps(slow=True)]
            with tqdm(steps, unit="case", disable=None) as progress:
                for op, case, providers in progress:
                    if self._end and monotonic() > self._end:
                        self._mark("not measured: out of time")
                        break
                    progress.set_description(str(case))
                    self._measure(op, case, providers)
                    yield self.rows()
        except KeyboardInterrupt:
            print("interrupted: what was measured is kept", file=sys.stderr)
            self._mark("not measured: interrupted")
        yield self.rows()

    def _steps(self, slow: bool) -> Iterator[tuple[Op, Case, list[Provider]]]:
        for op, case in self.tasks:
            providers = self.providers[op.name]
            quick = [provider for provider in providers if not provider.slow_start]
            if not slow:
                yield op, case, quick
            elif any(provider.slow_start and not provider.absent() for provider in providers):
                yield op, case, providers

    def _measure(self, op: Op, case: Case, providers: list[Provider]) -> None:
        options = self.options
        if options.place == "cpu" and case.size > CPU_LIMIT and not options.shape:
            for row in self._rows[str(case)]:
                row["status"] = f"not measured: {case.size / 1e6:.0f} million elements are left to a GPU"
            return
        found = measure(op, case, providers, place_of(options.place), options.seconds_per_case)
        names = {row["provider"] for row in found}
        rest = [row for row in self._rows[str(case)] if row["provider"] not in names]
        for row in rest:
            absent = next(p.absent() for p in self.providers[op.name] if p.name == row["provider"])
            row["status"] = f"absent: {absent}" if absent else row["status"]
        self._rows[str(case)] = found + rest

    def _mark(self, status: str) -> None:
        for row in self.rows():
            if row["status"] == "not measured":
                row["status"] = status


def targets_of(place: str) -> Sequence[Target]:
    """Return the targets of a place; those of a GPU are cases of the list."""
    return TARGETS if place == "cpu" else ()


def wanted(options: argparse.Namespace) -> Iterator[Task]:
    """Yield the cases of the list and of the targets that the options leave, or those that a shape makes."""
    for name in options.op or OPS:
        op = OPS[name]
        aimed = [target.case for target in targets_of(options.place) if target.case.op == name]
        cases = dict.fromkeys(aimed if options.targets else [*aimed, *op.cases])
        if options.shape:
            directions = dict.fromkeys(case.direction for case in op.cases)
            cases = [
                Case(name, direction, shape, dtype, layout, epilogue)
                for shape in options.shape
                for dtype in options.dtype or ["float32"]
                for layout in options.layout or [LAYOUT_OF[len(shape)]]
                for epilogue in options.epilogue or [""]
                for direction in directions
                if len(shape) in {len(case.shape) for case in op.cases}
            ]
        for case in cases:
            if all(
                not allowed or value in allowed
                for allowed, value in (
                    (options.dtype, case.dtype),
                    (options.layout, case.layout),
                    (options.epilogue, case.epilogue),
                    (options.direction, case.direction),
                )
            ):
                yield op, case


def chosen(op: Op, options: argparse.Namespace) -> list[Provider]:
    """Return the op's providers in the place, those that were asked for."""
    return [
        provider
        for provider in op.providers
        if provider.place == options.place and (not options.providers or provider.name in options.providers)
    ]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options."""
    names = list(dict.fromkeys(provider.name for op in OPS.values() for provider in op.providers))
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    several = {"nargs": "+"}
    parser.add_argument("--op", **several, choices=OPS, metavar="OP", help=f"of {', '.join(OPS)}")
    parser.add_argument(
        "--shape", **several, type=shape, metavar="64x20", help="shapes of one's own: NxC, NxCxL, NxCxHxW"
    )
    parser.add_argument("--dtype", **several, choices=DTYPES)
    parser.add_argument("--layout", **several, choices=LAYOUTS)
    parser.add_argument("--direction", **several)
    parser.add_argument("--epilogue", **several, choices=EPILOGUES, help="'' is none")
    parser.add_argument("--providers", **several, choices=names, metavar="NAME", help="; ".join(names))
    parser.add_argument("--place", choices=("cpu", "cuda"), default="cpu" if why_absent("cuda") else "cuda")
    parser.add_argument("--targets", action="store_true", help="only the cases that have a target on a CPU")
    parser.add_argument("--seconds", type=float, help="stop after so long; what is not measured says so")
    parser.add_argument("--seconds-per-case", type=float, default=2.0, help="of timed rounds (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="PATH.json", help="write JSON there and CSV beside it")
    parser.add_argument("--save", action="store_true", help="write to benchmarks/results/<device>/ops.json")
    parser.add_argument("--quick", action="store_true", help="64 x 20 alone, few rounds: to see that it works")
    parser.add_argument("--list", action="store_true", help="show cases and providers, measure nothing")
    options = parser.parse_args(arguments)
    if options.out and options.out.suffix != ".json":
        parser.error(f"--out expects a path that ends in .json, got {options.out}")
    if options.quick:
        options.op, options.shape, options.seconds_per_case = ["batch_norm"], [(64, 20)], 0.05
    return options


def shape(text: str) -> tuple[int, ...]:
    """Parse 64x20."""
    sizes = tuple(int(size) if size.isdigit() else 0 for size in text.split("x"))
    if not 1 <= len(sizes) <= 4 or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"expected up to four positive sizes such as 64x20, got {text!r}")
    return sizes


if __name__ == "__main__":
    keep_memory()
    sys.exit(main())
