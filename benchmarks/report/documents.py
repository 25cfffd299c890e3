"""Write the figures of the files in ``benchmarks/results`` into the documents: ``python -m benchmarks.report``.

A table lies between the comments ``<!-- name -->`` and ``<!-- /name -->``. Whatever was there is replaced, so a figure
that no run produced cannot stay; where there is no run, the table says "not yet measured".
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.counts import static
from benchmarks.harness.timing import RESULTS, ROOT, results_folder
from benchmarks.report import accuracy, gpu, ops, overhead, train_step
from benchmarks.report.text import ABSENT, table
from benchmarks.steps import overhead_plot

DOCUMENTS = (ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in ("accuracy", "benchmarks", "numerics")))
PLACES = ("cpu", "cuda")
BASELINE = ROOT / "tools" / "compile" / "baseline.json"
ARCHITECTURES = ("80", "90", "120")  # of which the registers are shown: A100, H100, RTX 50


def load(path: Path) -> Any:
    """Return the content of a file of results, or None where no run has written it."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def latest(results: Path, name: str, place: str) -> Any:
    """Return the newest document of this name that a run in the place wrote, or None; dry runs do not count."""
    found = [document for path in results.glob(f"*/{name}") if (document := load(path))["place"] == place]
    if any(document.get("dry_run") for document in found):
        raise ValueError(f"{results}/*/{name} holds a dry run, whose figures are none; remove it")
    return max(found, key=lambda document: document["date"], default=None)


def kernels(results: Mapping[str, Any] | None, baseline: Mapping[str, Any] | None) -> str:
    """Return what was counted of every kernel on the emulator, and the registers that NVRTC gave it."""
    if results is None:
        return f"Launches, bytes and barriers: {ABSENT}."
    registers = {} if baseline is None else baseline["registers"]
    rows = []
    for row in results["kernels"]:
        op, source = row["op"], row["source"]
        module = re.sub(r"_(forward|backward)$", "", source)
        found = registers.get(row["kernel"], {})
        rows.append(
            [
                f"`{op}`",
                f"[kernel](cuda/{source}.cu), [op](bnkernels/{module}.py), [test](tests/test_{module}.py), "
                f"[bench](benchmarks/bench_{module}.py)",
                f"{extent(row['grid'])} of {extent(row['block'])}",
                f"{row['read']:,}",
                f"{row['written']:,}",
                str(row["barriers"]),
                " / ".join(str(found.get(name, ABSENT)) for name in ARCHITECTURES),
            ]
        )
    where = " / ".join(f"sm_{name}" for name in ARCHITECTURES)
    header = ["op", "files", "blocks of threads", "bytes read", "bytes written", "barriers", f"registers, {where}"]
    return table(header, rows)


def extent(sizes: Sequence[int]) -> str:
    """Return the extent of a grid or block, without the trailing ones."""
    return re.sub(r"( x 1)+$", "", " x ".join(map(str, sizes)))


def numerics(results: Mapping[str, Any] | None) -> str:
    """Return the errors of `benchmarks.accuracy.variance`: a row for every method, a column for every input."""
    if results is None:
        return f"Errors of the methods: {ABSENT}."
    names = list(results["errors"])
    measured = {method for row in results["errors"].values() for method in row}
    rows = [
        [
            method,
            *(f"{results['errors'][name][method]:.2g}" if method in measured else "not installed" for name in names),
        ]
        for method in results["methods"]
    ]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items() if version)
    return f"{table(['x =', *names], rows)}\n\n{results['rows']} rows; {versions}."


def sections(results: Path = RESULTS, baseline: Path = BASELINE) -> dict[str, str]:
    """Return every generated section by name."""
    step, cases, cost = (
        {place: latest(results, f"{name}.json", place) for place in PLACES}
        for name in ("train_step", "ops", "overhead")
    )
    return {
        "answer": train_step.answer(step),
        "pictures": overhead.pictures(cost, "benchmarks/results"),
        "rivals": ops.rivals(cases),
        "train_step": train_step.figures(step),
        "overhead": overhead.tables(cost),
        "ops": ops.summary(cases["cpu"]),
        "gpu": gpu.page(results, cases["cuda"]),
        "static": static.table(counts) if (counts := load(results / "static.json")) else f"Counts: {ABSENT}.",
        "kernels": kernels(load(results / "kernels.json"), load(baseline)),
        "accuracy": accuracy.tables(load(results / "accuracy.json")),
        "numerics": numerics(load(results / "numerics.json")),
    }


def render(text: str, contents: Mapping[str, str]) -> str:
    """Return a document with the sections it has a place for replaced.

    Raises
    ------
    ValueError
        If a section's comments do not come in a pair, or nobody knows the section.
    """
    opened, closed = re.findall(r"^<!-- (\w+) -->$", text, re.M), re.findall(r"^<!-- /(\w+) -->$", text, re.M)
    if opened != closed or len(set(opened)) < len(opened) or not set(opened) <= contents.keys():
        raise ValueError(f"expected pairs of comments of {', '.join(contents)}; got {opened}, closed by {closed}")
    for name in opened:
        inside = re.compile(f"(?<=<!-- {name} -->\\n).*?(?=<!-- /{name} -->)", re.S)
        text = inside.sub(lambda _, name=name: f"\n{contents[name]}\n\n", text)
    return text


def take(folder: Path, results: Path = RESULTS) -> list[Path]:
    """Copy what a run wrote into a folder to where its device's results belong; return where each file went.

    Raises
    ------
    ValueError
        If there is nothing to take, or it comes from a dry run.
    """
    documents = {path: load(path) for path in sorted(folder.glob("*.json"))}
    if not documents:
        raise ValueError(f"{folder} holds no results; make gpu and make bench write them")
    if dry := [path.name for path, document in documents.items() if document.get("dry_run")]:
        raise ValueError(f"{folder} comes from a dry run ({', '.join(dry)}): its figures are none")
    taken = []
    for path, document in documents.items():
        target = results / results_folder(document).name
        target.mkdir(parents=True, exist_ok=True)
        for file in (path, path.with_suffix(".csv")):
            if file.exists():
                taken.append(Path(shutil.copy(file, target)))
    return taken


def main(arguments: Sequence[str] | None = None) -> None:
    """Bring the documents up to date."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.splitlines()[0])
    parser.add_argument("--take", type=Path, metavar="FOLDER", help="first take the results that make gpu wrote there")
    options = parser.parse_args(arguments)
    if options.take:
        try:
            taken = take(options.take)
        except ValueError as error:
            sys.exit(f"error: {error}")
        print("\n".join(map(str, taken)))
        for folder in {path.parent for path in taken if path.name == "overhead.csv"}:
            overhead_plot.plot(folder)
    contents = sections()
    for path in DOCUMENTS:
        path.write_text(render(path.read_text(encoding="utf-8"), contents), encoding="utf-8")
