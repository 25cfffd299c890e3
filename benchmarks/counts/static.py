"""Counts of every kernel on every shape, without a GPU: launch, traffic, registers, occupancy, predicted time.

``python -m benchmarks.counts.static`` prints the table and writes ``benchmarks/results/static.json``, a function of the
sources alone (with ml_dtypes, without which there are no bfloat16 arrays). Bytes and barriers are counted on the
emulator, registers are those of the baseline that ``make compile`` checks, and what follows from them is computed by
`benchmarks.counts.limits`: predicted, not measured.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from math import prod
from typing import Any

from benchmarks.counts import devices, limits
from benchmarks.counts.counting import CASES, Count, counted, extent, fewest_bytes
from benchmarks.harness.case import Case, NotSupportedError
from benchmarks.harness.timing import RESULTS, round4, write_json
from tools.compile import __main__ as compiled
from tools.compile import nvrtc

PATH = RESULTS / "static.json"
COUNTED, WAITING = "counted", "not supported yet"
TARGETS = (devices.A100, devices.H200, devices.B200, devices.RTX_5090)  # one of each architecture
PREDICTED = devices.H200
MOST = 2**24  # numbers that are counted of a case: seconds on the emulator

Row = dict[str, Any]


def rows(cases: Iterable[Case] | None = None) -> list[Row]:
    """Return a row for every launch of every case, and one for every case that cannot be counted.

    Parameters
    ----------
    cases : iterable of Case, optional
        Default: all.

    Returns
    -------
    list of dict
        Flat. The case; `status`: ``counted``, or why not; `counted_on`: a shape; `launches` of a call. Of the launch
        its `source` and `kernel`, `blocks`, `grid`, `block`, `shared_bytes`, `barriers` of a block, and the bytes that
        are `read` and `written` (each counted once), `accessed_read` and `accessed_written` (by every access); of the
        case the `fewest_bytes`. For every architecture (80, 90, ...) `registers`, `blocks_per_sm`, `occupancy`, and on
        its device in `TARGETS` `waves` and `busy_sms`. For `PREDICTED`, in microseconds, what the launch cannot
        undercut, cold and hot, and by what; and what no kernel can.
    """
    registers = compiled.baseline(nvrtc.NEWEST)["registers"]
    found = []
    for case in CASES if cases is None else cases:
        about = describe(case)
        try:
            counts, where = counted(case, MOST)
        except NotSupportedError as reason:
            # Why the op refuses depends on versions of other packages; that it does, on the sources alone.
            status = WAITING if str(reason).startswith(WAITING) else f"not counted: {reason}"
            found.append(about | {"status": status})
            continue
        about |= {"status": COUNTED, "counted_on": where, "launches": len(counts)}
        found += [about | row_of(case, count, registers[count.kernel]) for count in counts]
    return found


def describe(case: Case) -> Row:
    """Return the fields that identify a case."""
    names = ("op", "direction", "dtype", "layout", "epilogue")
    return {"shape": extent(case.shape)} | {name: getattr(case, name) for name in names}


def row_of(case: Case, count: Count, registers: Mapping[str, int]) -> Row:
    """Return all figures of a launch."""
    launch = count.launch
    blocks, threads, moved = prod(launch.grid), prod(launch.block), count.read + count.written
    row: Row = {"source": count.source, "kernel": count.kernel, "blocks": blocks}
    row |= {"grid": extent(launch.grid), "block": extent(launch.block), "shared_bytes": launch.shared_bytes}
    row |= {name: getattr(count, name) for name in Count._fields[3:]} | {"fewest_bytes": fewest_bytes(case)}
    for device in TARGETS:
        name = device.architecture.name
        fits = limits.occupancy(device.architecture, threads, registers[name], launch.shared_bytes)
        row |= {
            f"registers_{name}": registers[name],
            f"blocks_per_sm_{name}": fits.blocks,
            f"occupancy_{name}": round4(fits.share),
            # None where no block fits: a device with less shared memory gets another launch.
            f"waves_{name}": round4(limits.waves(device, blocks, fits.blocks)) if fits.blocks else None,
            f"busy_sms_{name}": limits.busy_sms(device, blocks),
        }
    work = limits.Work(blocks, moved, count.accessed_read + count.accessed_written, count.barriers)
    for name, cold in (("cold", True), ("hot", False)):
        predicted = limits.predict(PREDICTED, work, cold=cold)
        row |= {f"predicted_{name}_us": round4(predicted.seconds * 1e6), f"bound_{name}": predicted.bound}
    return row | {"best_possible_us": round4(limits.best_possible(PREDICTED, row["fewest_bytes"]) * 1e6)}


def document_of(found: list[Row]) -> dict[str, Any]:
    """Return the content of ``static.json``."""
    return {"predicted_for": PREDICTED.name, "nvrtc": nvrtc.NEWEST, "rows": found}


# ---- the table ------------------------------------------------------------------------------------------------------

HEADER = (
    "case",
    "blocks of threads",
    "shared bytes",
    "bytes read once (in all)",
    "bytes written",
    "accessed / fewest",
    "launches",
    "barriers",
    "registers",
    "occupancy, %",
    "SMs at work",
    "µs at least, cold (hot)",
    "bound, cold",
    "any kernel, µs at least",
)


def table(document: Mapping[str, Any]) -> str:
    """Return the Markdown of a document as ``static.json`` holds it: a line per launch, and below what has none.

    Epilogues that change nothing but what is computed share a line.
    """
    shown = [row for row in document["rows"] if row["status"] == COUNTED]
    same: dict[tuple[str, ...], list[str]] = {}
    for row in shown:
        same.setdefault((name_of(row), *cells_of(row)), []).append(row["epilogue"])
    lines = [HEADER, *((with_epilogues(name, found), *cells) for (name, *cells), found in same.items())]
    text = ["| " + " | ".join(cells) + " |" for cells in lines]
    text.insert(1, "| --- |" + " ---: |" * (len(HEADER) - 1))
    names = " / ".join(f"sm_{device.architecture.name}" for device in TARGETS)
    notes = [
        f"Registers and occupancy: {names}, by NVRTC {document['nvrtc']}. SMs at work, and times: "
        f"{document['predicted_for']}; predicted, not measured: no launch of this grid and these bytes can take less, "
        "and no kernel whatever less than the last column says. Bytes and barriers are counted on the emulator. The "
        "launches are those of that device; occupancy 0: another device, with less shared memory, gets other launches."
    ]
    scaled = dict.fromkeys(
        f"{row['shape']} on {row['counted_on']}" for row in shown if row["counted_on"] != row["shape"]
    )
    if scaled:
        notes.append(
            f"Counted on some of the channels, since the blocks of the others do the same: {', '.join(scaled)}."
        )
    left = list(waiting(document["rows"]))
    return "\n\n".join(["\n".join(text), *notes, *(["\n".join(left)] if left else [])])


def name_of(row: Row) -> str:
    """Return a launch as the table shows it, without its epilogue."""
    layout = "" if row["layout"] == "NC" else row["layout"]
    kernel = f"({row['kernel']})" if row["launches"] > 1 else ""
    words = [f"`{row['op']}`", row["direction"], row["shape"].replace("x", " x "), row["dtype"], layout, kernel]
    return " ".join(filter(None, words))


def with_epilogues(name: str, epilogues: Iterable[str]) -> str:
    """Return a name and what may follow the op."""
    named = [epilogue or "nothing" for epilogue in epilogues]
    return name if named == ["nothing"] else f"{name}, then {' or '.join(named)}"


def cells_of(row: Row) -> list[str]:
    """Return the cells of a launch behind its name."""
    names = [device.architecture.name for device in TARGETS]
    grid, block = (re.sub("(x1)+$", "", row[name]).replace("x", " x ") for name in ("grid", "block"))
    accessed = row["accessed_read"] + row["accessed_written"]
    return [
        f"{grid} of {block}",
        f"{row['shared_bytes']:,}",
        f"{row['read']:,} ({row['accessed_read']:,})",
        f"{row['written']:,}",
        f"{accessed / row['fewest_bytes']:.2f}",
        str(row["launches"]),
        str(row["barriers"]),
        " / ".join(str(row[f"registers_{name}"]) for name in names),
        " / ".join(f"{100 * row[f'occupancy_{name}']:.0f}" for name in names),
        f"{row[f'busy_sms_{PREDICTED.architecture.name}']} of {PREDICTED.sms}",
        f"{row['predicted_cold_us']:.3g} ({row['predicted_hot_us']:.3g})",
        row["bound_cold"],
        f"{row['best_possible_us']:.3g}",
    ]


def waiting(found: Iterable[Row]) -> Iterator[str]:
    """Yield a line for the shapes that wait for the same: what, and in brackets which directions and epilogues."""
    cases: dict[tuple[str, str, str, str], dict[str, list[str]]] = {}
    for row in found:
        if row["status"] != COUNTED:
            what = row["direction"] + (f" +{row['epilogue']}" if row["epilogue"] else "")
            shapes = cases.setdefault((row["status"], row["op"], row["dtype"], row["layout"]), {})
            shapes.setdefault(row["shape"], []).append(what)
    for (status, op, dtype, layout), shapes in cases.items():
        for what in dict.fromkeys(map(tuple, shapes.values())):
            same = [shape for shape, whats in shapes.items() if tuple(whats) == what]
            yield f"* {status}: `{op}` {dtype} {layout} {', '.join(same)} ({', '.join(what)})"


def main() -> None:
    """Count, print and write."""
    document = document_of(rows())
    print(table(document))
    write_json(PATH, document)


if __name__ == "__main__":
    main()
