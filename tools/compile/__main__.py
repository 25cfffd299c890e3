"""Compile every kernel with every compiler, print the registers, and compare them with the committed baseline."""

from __future__ import annotations

import argparse
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from bnkernels.runtime import source
from tools.compile import nvrtc

FOLDER = Path(__file__).parent

Table = dict[str, dict[str, nvrtc.Resources]]  # kernel -> architecture -> resources
Registers = dict[str, dict[str, int]]  # kernel -> architecture -> registers of a thread


def measure(version: str, architectures: list[int]) -> Table:
    """Compile everything in ``cuda/``, on all processors: processes, since threads wait for one another in NVRTC."""
    table: Table = {}
    jobs = [(source.read(stem), architecture, version) for stem in source.stems() for architecture in architectures]
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        for (_, architecture, _), found in zip(jobs, pool.map(nvrtc.resources, *zip(*jobs, strict=True)), strict=True):
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


def registers_of(table: Table) -> Registers:
    """Return what the baseline holds of a compiler."""
    return {kernel: {a: resources.registers for a, resources in row.items()} for kernel, row in table.items()}


def differences(found: Registers, baseline: Registers) -> list[str]:
    """Return how `found` differs from the registers of the same compiler in the baseline, a line per kernel.

    What was not compiled for an architecture is not compared: some kernels need newer ones.
    """
    compiled = {architecture for row in found.values() for architecture in row}
    rows = {kernel: {a: row[a] for a in row if a in compiled} for kernel, row in baseline.items()}
    known = {kernel: row for kernel, row in rows.items() if row}
    lines = [f"{kernel}: not in the baseline" for kernel in sorted(found.keys() - known.keys())]
    lines += [f"{kernel}: in the baseline, but gone" for kernel in sorted(known.keys() - found.keys())]
    for kernel in sorted(found.keys() & known.keys()):
        new, old = found[kernel], known[kernel]
        changes = [
            f"sm_{architecture} {old.get(architecture, 'no')} -> {new.get(architecture, 'no')}"
            for architecture in sorted(new.keys() | old.keys(), key=int)
            if new.get(architecture) != old.get(architecture)
        ]
        if changes:
            lines.append(f"{kernel}: registers {', '.join(changes)}")
    return lines


def baseline_file(version: str) -> Path:
    """Return where the registers of a compiler are committed: one file for each, the newest one's is the known one."""
    return FOLDER / ("baseline.json" if version == nvrtc.NEWEST else f"baseline-{version}.json")


def baseline(version: str) -> Registers | None:
    """Return the committed registers of a compiler, or None."""
    file = baseline_file(version)
    return json.loads(file.read_text(encoding="utf-8"))["registers"] if file.exists() else None


def write_baseline(version: str, registers: Registers) -> None:
    """Write the registers of a compiler as JSON with one line per kernel, so that a change reads well in a diff."""
    rows = ",\n".join(f"  {json.dumps(kernel)}: {json.dumps(row)}" for kernel, row in registers.items())
    text = f'{{"nvrtc": {json.dumps(version)}, "registers": {{\n{rows}\n}}}}\n'
    baseline_file(version).write_text(text, encoding="utf-8")


def check(version: str, table: Table, known: Registers | None) -> int:
    """Print what a compiler made of the kernels and what is wrong about it; return how much is."""
    print(f"NVRTC {version}", render(table), sep="\n")
    failures = excesses(table)
    changes = [] if known is None else differences(registers_of(table), known)
    print(*failures, *changes, sep="\n", file=sys.stderr)
    if changes:
        print("if these changes are meant: python -m tools.compile --update", file=sys.stderr)
    compared = f"{len(changes)} differences from the baseline" if known is not None else "which the baseline lacks"
    architectures = {architecture for row in table.values() for architecture in row}
    print(
        f"{len(table)} kernels for {len(architectures)} architectures with NVRTC {version}: "
        f"{len(failures)} failures, {compared}\n"
    )
    return len(failures) + len(changes)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.compile", description=__doc__)
    parser.add_argument("--update", action="store_true", help="write the baseline instead of comparing with it")
    parser.add_argument("--only", type=int, nargs="+", metavar="SM", help="of these architectures, such as 80 90")
    parser.add_argument(
        "--nvrtc", nargs="+", metavar="VERSION", default=nvrtc.VERSIONS, help=f"folders of {nvrtc.FOLDER}; %(default)s"
    )
    options = parser.parse_args(arguments)
    known = {version: nvrtc.architectures(version) for version in options.nvrtc}
    if unknown := set(options.only or ()).difference(*known.values()):
        parser.error(f"NVRTC compiles for {sorted(set().union(*known.values()))}, not for {sorted(unknown)}")
    if options.update and options.only:
        parser.error("the baseline holds all architectures: leave out --only")
    wrong = 0
    for version, architectures in known.items():
        try:
            table = measure(version, [one for one in architectures if options.only is None or one in options.only])
        except nvrtc.CompileError as error:
            print(f"NVRTC {version}", error, sep="\n", file=sys.stderr)
            wrong += 1
            continue
        if not table:
            print(f"NVRTC {version} knows none of these architectures\n")
            continue
        if options.update:
            write_baseline(version, registers_of(table))
        wrong += check(version, table, baseline(version))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
