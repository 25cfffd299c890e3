"""Compile every kernel for every architecture, print the registers, and compare them with the committed baseline."""

from __future__ import annotations

import argparse
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from bnkernels import _source
from tests.compile import nvrtc

BASELINE = Path(__file__).with_name("baseline.json")

Table = dict[str, dict[str, nvrtc.Resources]]  # kernel -> architecture -> resources


def measure(architectures: list[int]) -> Table:
    """Compile everything in ``cuda/``, on all processors: processes, since threads wait for one another in NVRTC."""
    table: Table = {}
    jobs = [(_source.read(stem), architecture) for stem in _source.stems() for architecture in architectures]
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        for (_, architecture), found in zip(jobs, pool.map(nvrtc.resources, *zip(*jobs, strict=True)), strict=True):
            for kernel, resources in found.items():
                table.setdefault(kernel, {})[str(architecture)] = resources
    return dict(sorted(table.items()))


def render(table: Table) -> str:
    """Return the registers of every kernel (rows) on every architecture (columns), and what else is used."""
    architectures = sorted({architecture for row in table.values() for architecture in row}, key=int)
    width = max(map(len, table))
    lines = ["registers per thread", " " * width + "".join(f"{'sm_' + a:>8}" for a in architectures)]
    lines += [
        kernel.ljust(width) + "".join(f"{row[a].registers if a in row else '-':>8}" for a in architectures)
        for kernel, row in table.items()
    ]
    for field in nvrtc.Resources._fields[1:]:
        most = max(getattr(resources, field) for row in table.values() for resources in row.values())
        lines.append(f"{field.replace('_', ' ')}: at most {most} bytes")
    return "\n".join(lines)


def excesses(table: Table) -> list[str]:
    """Return what no kernel may use on any architecture, one line each.

    Spills and a stack are slow memory; shared memory is asked for at the launch, so that Python can count it.
    """
    return [
        f"{kernel} on sm_{architecture}: {getattr(resources, field)} bytes of {field.replace('_', ' ')}, must be 0"
        for kernel, row in table.items()
        for architecture, resources in row.items()
        for field in nvrtc.Resources._fields[1:]
        if getattr(resources, field)
    ]


def baseline_of(table: Table, version: str) -> dict:
    """Return what the baseline file holds: the registers, and the NVRTC they belong to."""
    registers = {kernel: {a: resources.registers for a, resources in row.items()} for kernel, row in table.items()}
    return {"nvrtc": version, "registers": registers}


def differences(found: dict, baseline: dict) -> list[str]:
    """Return how `found` differs from the baseline, a line per kernel; another NVRTC may use other registers."""
    new, old = found["registers"], baseline["registers"]
    lines = [f"{kernel}: not in the baseline" for kernel in sorted(new.keys() - old.keys())]
    lines += [f"{kernel}: in the baseline, but gone" for kernel in sorted(old.keys() - new.keys())]
    if found["nvrtc"] != baseline["nvrtc"]:
        return lines
    for kernel in sorted(new.keys() & old.keys()):
        changes = [
            f"sm_{architecture} {old[kernel].get(architecture, 'no')} -> {new[kernel].get(architecture, 'no')}"
            for architecture in sorted(new[kernel].keys() | old[kernel].keys(), key=int)
            if new[kernel].get(architecture) != old[kernel].get(architecture)
        ]
        if changes:
            lines.append(f"{kernel}: registers {', '.join(changes)}")
    return lines


def compare(found: dict) -> list[str]:
    """Return the differences from the committed baseline; say so where registers cannot be compared."""
    baseline = json.loads(BASELINE.read_text(encoding="utf-8"))
    compiled = {architecture for row in found["registers"].values() for architecture in row}
    rows = {
        kernel: {architecture: count for architecture, count in row.items() if architecture in compiled}
        for kernel, row in baseline["registers"].items()
    }
    baseline["registers"] = {kernel: row for kernel, row in rows.items() if row}  # some need newer architectures
    if found["nvrtc"] != baseline["nvrtc"]:
        print(f"NVRTC is {found['nvrtc']}, the baseline's is {baseline['nvrtc']}: registers are not compared")
    return differences(found, baseline)


def _dump(baseline: dict) -> str:
    """Return the baseline as JSON with one line per kernel, so that a change reads well in a diff."""
    rows = ",\n".join(f"  {json.dumps(kernel)}: {json.dumps(row)}" for kernel, row in baseline["registers"].items())
    return f'{{"nvrtc": {json.dumps(baseline["nvrtc"])}, "registers": {{\n{rows}\n}}}}\n'


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.compile", description=__doc__)
    parser.add_argument("--update", action="store_true", help="write the baseline instead of comparing with it")
    parser.add_argument("--only", type=int, nargs="+", metavar="SM", help="of these architectures, such as 80 90")
    options = parser.parse_args(arguments)
    architectures = [one for one in nvrtc.architectures() if options.only is None or one in options.only]
    if unknown := set(options.only or ()) - set(architectures):
        parser.error(f"NVRTC compiles for {nvrtc.architectures()}, not for {sorted(unknown)}")
    if options.update and options.only:
        parser.error("the baseline holds all architectures: leave out --only")
    try:
        table = measure(architectures)
    except nvrtc.CompileError as error:
        print(error, file=sys.stderr)
        return 1
    print(render(table))
    found = baseline_of(table, nvrtc.version())
    if options.update:
        BASELINE.write_text(_dump(found), encoding="utf-8")
    failures, changes = excesses(table), compare(found)
    print(*failures, *changes, sep="\n", file=sys.stderr)
    if changes:
        print("if these changes are meant: python -m tests.compile --update", file=sys.stderr)
    print(
        f"{len(table)} kernels for {len(architectures)} architectures with NVRTC {found['nvrtc']}: "
        f"{len(failures)} failures, {len(changes)} differences from the baseline"
    )
    return 1 if failures or changes else 0


if __name__ == "__main__":
    sys.exit(main())
