"""Compile every kernel with every compiler, print the registers, and compare with the committed baseline."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from pathlib import Path

from bnkernels.runtime import source
from tools.compile import nvrtc, sass

FOLDER = Path(__file__).parent

# Constants that every launch has, here those of one group with GELU, the longest activation, and of layer norm; without
# them kernels would take more registers, and divide.
CONSTANTS = {
    f"batch_norm_{direction}_cooperative": (("activation", 6), ("masked", 0), ("groups", 1))
    for direction in ("forward", "backward")
}
CONSTANTS |= {
    f"layer_norm_{direction}{rows}": (("centred", 1), ("channel_groups", 1), ("inner", 1))
    for direction in ("forward", "backward")
    for rows in ("", "_cooperative")
}
FIGURES = ("registers", "instructions")  # keys of a baseline
FORBIDDEN = {
    "spill_stores": "bytes of spill stores",
    "spill_loads": "bytes of spill loads",
    "stack": "bytes of stack",
    "static_shared": "bytes of static shared memory",
    "contractible": "sums and products that ptxas may contract, which only fma may be",
    "float_atomics": "atomic sums, whose order changes from run to run",
}

Table = dict[str, dict[str, nvrtc.Resources]]  # kernel -> architecture -> resources
Baseline = dict[str, dict[str, dict[str, int]]]  # figure -> kernel -> architecture -> number


def measure(version: str, architectures: Sequence[int], stems: Sequence[str]) -> Table:
    """Compile files of ``cuda/`` on all processors: processes, since threads wait for one another in NVRTC.

    For some architectures the newest compiler's machine code is disassembled as well.
    """
    table: Table = {}
    newest = version == nvrtc.NEWEST
    jobs = [
        (
            source.read(stem, constants=CONSTANTS.get(stem, ())),
            architecture,
            version,
            newest and architecture in sass.ARCHITECTURES,
        )
        for stem in stems
        for architecture in architectures
    ]
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        for job, found in zip(jobs, pool.map(nvrtc.resources, *zip(*jobs, strict=True)), strict=True):
            for kernel, resources in found.items():
                table.setdefault(kernel, {})[str(job[1])] = resources
    return dict(sorted(table.items()))


def render(table: Table) -> str:
    """Return the registers of every kernel (rows) on every architecture (columns)."""
    architectures = sorted({architecture for row in table.values() for architecture in row}, key=int)
    width = max(map(len, table))
    lines = ["registers per thread", " " * width + "".join(f"{'sm_' + a:>8}" for a in architectures)]
    lines += [
        kernel.ljust(width) + "".join(f"{row[a].registers if a in row else '-':>8}" for a in architectures)
        for kernel, row in table.items()
    ]
    return "\n".join(lines)


def excesses(table: Table) -> list[str]:
    """Return the forbidden resources that kernels use, one line each.

    Spills and a stack are slow memory; shared memory is asked for at the launch, so that Python can count it. Loads
    through the read-only cache do not see what the launch itself writes, and any array may be written: blocks read
    what others wrote before a grid barrier, and an output may be an input.
    """
    lines = []
    for kernel, row in table.items():
        for architecture, resources in row.items():
            used = {what: getattr(resources, field) for field, what in FORBIDDEN.items()}
            if resources.code:
                used["loads by LDG.CONSTANT"] = resources.code.constant_loads
            lines += [f"{kernel} on sm_{architecture}: {n} {what}, must be 0" for what, n in used.items() if n]
    return lines


def figures(table: Table) -> Baseline:
    """Return what the baseline holds of a compiler."""
    registers = {kernel: {a: found.registers for a, found in row.items()} for kernel, row in table.items()}
    instructions = {
        kernel: {a: found.code.instructions for a, found in row.items() if found.code} for kernel, row in table.items()
    }
    return {"registers": registers, "instructions": {kernel: row for kernel, row in instructions.items() if row}}


def differences(found: Baseline, baseline: Baseline) -> list[str]:
    """Return how `found` differs from the figures of the same compiler in the baseline.

    What was not compiled for an architecture is not compared: some kernels need newer ones.
    """
    compiled = {architecture for row in found["registers"].values() for architecture in row}
    known: Baseline = {}
    for figure in FIGURES:
        rows = {kernel: {a: row[a] for a in row if a in compiled} for kernel, row in baseline.get(figure, {}).items()}
        known[figure] = {kernel: row for kernel, row in rows.items() if row}
    kernels, before = found["registers"].keys(), known["registers"].keys()
    lines = [f"{kernel}: not in the baseline" for kernel in sorted(kernels - before)]
    lines += [f"{kernel}: in the baseline, but gone" for kernel in sorted(before - kernels)]
    for kernel, figure in product(sorted(kernels & before), FIGURES):
        new, old = (rows[figure].get(kernel, {}) for rows in (found, known))
        changes = [
            f"sm_{architecture} {old.get(architecture, 'no')} -> {new.get(architecture, 'no')}"
            for architecture in sorted(new.keys() | old.keys(), key=int)
            if new.get(architecture) != old.get(architecture)
        ]
        if changes:
            lines.append(f"{kernel}: {figure} {', '.join(changes)}")
    return lines


def baseline_file(version: str) -> Path:
    """Return where the figures of a compiler are committed: one file for each, the newest one's is the known one."""
    return FOLDER / ("baseline.json" if version == nvrtc.NEWEST else f"baseline-{version}.json")


def baseline(version: str) -> Baseline | None:
    """Return the committed figures of a compiler, or None."""
    file = baseline_file(version)
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def update_baseline(version: str, found: Baseline) -> None:
    """Put `found` into the baseline of a compiler, and drop the kernels that no file makes any more.

    The JSON has one line per kernel, so that a change reads well in a diff.
    """
    known = baseline(version) or {}
    made = {kernel for stem in source.stems() for kernel in source.entry_points(stem)}
    parts = [f'{{"nvrtc": {json.dumps(version)}']
    for figure in FIGURES:
        kept = {kernel: row for kernel, row in known.get(figure, {}).items() if kernel in made}
        rows = [f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in sorted((kept | found[figure]).items())]
        if rows:
            parts.append(f'"{figure}": {{\n' + ",\n".join(rows) + "\n}")
    baseline_file(version).write_text(", ".join(parts) + "}\n", encoding="utf-8")


def check(version: str, table: Table, known: Baseline | None) -> int:
    """Print what is wrong about what a compiler made of the kernels; return how much is."""
    failures = excesses(table)
    changes = [] if known is None else differences(figures(table), known)
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


def of_kernels(table: Table, known: Baseline | None) -> Baseline | None:
    """Return the part of a baseline that concerns the kernels of a table."""
    if known is None:
        return None
    return {figure: {k: row for k, row in known.get(figure, {}).items() if k in table} for figure in FIGURES}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.compile", description=__doc__)
    parser.add_argument("--update", action="store_true", help="write the baseline instead of comparing with it")
    parser.add_argument("--only", type=int, nargs="+", metavar="SM", help="of these architectures, such as 80 90")
    parser.add_argument(
        "--kernel", nargs="+", metavar="STEM", choices=source.stems(), help="of these files of cuda/, without .cu"
    )
    parser.add_argument(
        "--nvrtc", nargs="+", metavar="VERSION", default=nvrtc.VERSIONS, help=f"folders of {nvrtc.FOLDER}; %(default)s"
    )
    options = parser.parse_args(arguments)
    if options.update and options.only:
        parser.error("the baseline holds all architectures: leave out --only")
    known = sorted({one for version in options.nvrtc for one in nvrtc.architectures(version)})
    if unknown := set(options.only or ()).difference(known):
        parser.error(f"NVRTC compiles for {known}, not for {sorted(unknown)}")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    try:
        options = parse(arguments)
        if nvrtc.NEWEST in options.nvrtc:
            sass.nvdisasm()
    except FileNotFoundError as missing:
        print(missing, file=sys.stderr)
        return 1
    wrong = 0
    for version in options.nvrtc:
        architectures = [one for one in nvrtc.architectures(version) if options.only is None or one in options.only]
        if not architectures:
            print(f"NVRTC {version} knows none of these architectures\n")
            continue
        try:
            table = measure(version, architectures, options.kernel or source.stems())
        except nvrtc.CompileError as error:
            print(f"NVRTC {version}", error, sep="\n", file=sys.stderr)
            wrong += 1
            continue
        if options.update:
            update_baseline(version, figures(table))
        known = baseline(version)
        print(f"NVRTC {version}", render(table), sep="\n")
        wrong += check(version, table, of_kernels(table, known) if options.kernel else known)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
