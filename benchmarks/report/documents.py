"""Write the figures of the files in ``benchmarks/results`` into the documents: ``python -m benchmarks.report``.

A page in ``docs/generated`` is written whole. The README has a table of its own, between the comments
``<!-- speed -->`` and ``<!-- /speed -->``. Whatever was there is replaced, so a figure that no run produced cannot
stay; where there is no run, the page says "not yet measured".
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
from benchmarks.report import (
    accuracy,
    budget,
    distributed,
    front,
    gpu,
    ops,
    overhead,
    partition,
    recurrent,
    sequence,
    targets,
    train_step,
)
from benchmarks.report.text import ABSENT, PLACES, Page, missing, paragraphs, table
from benchmarks.steps import overhead_plot
from benchmarks.steps.sequence import draw

README, GENERATED = ROOT / "README.md", ROOT / "docs" / "generated"
BASELINE = ROOT / "tools" / "compile" / "baseline.json"
ARCHITECTURES = ("80", "90", "120")  # columns of the register table: A100, H100, RTX 50


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
        found = registers.get(row["kernel"], {})
        rows.append(
            [
                f"`{row['op']}`",
                files(row["source"]),
                f"`{row['kernel']}`",
                f"{extent(row['grid'])} of {extent(row['block'])}",
                f"{row['read']:,}",
                f"{row['written']:,}",
                str(row["barriers"]),
                " / ".join(str(found.get(name, ABSENT)) for name in ARCHITECTURES),
            ]
        )
    where = " / ".join(f"sm_{name}" for name in ARCHITECTURES)
    figures = "blocks of threads", "bytes read", "bytes written", "barriers", f"registers, {where}"
    return table(["op", "files", "kernel", *figures], rows)


def files(source: str) -> str:
    """Return links to everything that has the name of a kernel's op."""
    op = re.sub(r"_(forward|backward)$", "", source)
    places = (f"bnkernels/ops/{op}{rest}" for rest in (".py", "/op.py", "/training.py"))
    paths = {
        "kernel": f"cuda/{source}.cu",
        "op": next(place for place in places if (ROOT / place).is_file()),
        "test": f"tests/ops/test_{op}.py",
    }
    paths["bench"] = f"benchmarks/ops/bench_{op}.py"
    return ", ".join(f"[{name}](../../{path})" for name, path in paths.items())


def extent(sizes: Sequence[int]) -> str:
    """Return the extent of a grid or block, without the trailing ones."""
    return re.sub(r"( x 1)+$", "", " x ".join(map(str, sizes)))


def variance(results: Mapping[str, Any] | None) -> str:
    """Return the errors of the ways to a variance: a row for every method, a column for every input."""
    if results is None:
        return f"Errors of the methods: {ABSENT}."
    errors = results["errors"]
    rows = [
        [method, *(f"{found[method]:.2g}" for found in errors.values())]
        for method in results["methods"]
        if all(method in found for found in errors.values())
    ]
    absent = missing(dict.fromkeys(set(results["methods"]) - {row[0] for row in rows}, "not installed"))
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items() if version)
    return paragraphs(table(["x =", *errors], rows), f"{results['rows']} rows; {versions}.", absent)


def pages(results: Path = RESULTS, baseline: Path = BASELINE) -> dict[str, Page]:
    """Return every generated page by the name of its file."""
    step, cases, cost, lstms = (
        {place: latest(results, f"{name}.json", place) for place in PLACES}
        for name in ("train_step", "ops", "overhead", "sequence")
    )
    protocol = "How it is measured: [benchmarks](../benchmarks.md)."
    return {
        "targets.md": Page(
            "Targets on a CPU",
            "Medians of the same rounds: ours with outputs that exist already, beside the fastest of the rivals named "
            f"and a copy of as many bytes. {protocol}",
            targets.page(cases["cpu"], step["cpu"], cost["cpu"]),
        ),
        "partition.md": Page(
            "By example or by neuron",
            "Forward and backward of a batch-norm layer, compiled, with barriers that spin: cut by example all threads "
            f"wait for one another twice each way, cut by neuron never. {protocol}",
            partition.page(latest(results, "partition.json", "cpu"), "../../benchmarks/results"),
        ),
        "distributed.md": Page(
            "Synchronised batch norm on several ranks",
            "Processes of one thread each under mpiexec, beside one another in the same run. What is exchanged: "
            f"[synchronised batch norm](../synchronised.md). {protocol}",
            distributed.page(latest(results, "distributed.json", "cpu"), "../../benchmarks/results"),
        ),
        "training_step.md": Page("Training steps", protocol, train_step.figures(step)),
        "overhead.md": Page(
            "What a normalisation costs a training step",
            f"Time of a step relative to the same framework's step without, in the same round. {protocol}",
            overhead.tables(cost, "../../benchmarks/results"),
        ),
        "sequence.md": Page(
            "LSTMs with a norm and without",
            "What is trained: [recurrent layers](../recurrent.md). Steps are those of the first "
            "evaluation, one an epoch, at or above a test accuracy: median over the seeds, lowest and highest.",
            sequence.tables(lstms, "../../benchmarks/results"),
        ),
        "ops.md": Page(
            "Ops beside other libraries",
            f"Training forward and backward. {protocol}",
            paragraphs(
                f"## Batch norm, {ops.QUESTION[0].replace('x', ' x ')}",
                ops.of_the_question(cases),
                "## All cases",
                ops.summary(cases["cpu"]),
            ),
        ),
        "gpu.md": Page("On a GPU", protocol, gpu.page(results, cases["cuda"])),
        "accuracy.md": Page(
            "Accuracy, measured",
            "What is promised and how it is measured: [accuracy](../accuracy.md). **Bold**: beyond what is promised.",
            accuracy.tables(load(results / "accuracy.json")),
        ),
        "variance.md": Page(
            "Ways to a variance, and their errors",
            "Largest error of `y` in units of 2^-23 (1 + abs(y)); what the rows mean: [accuracy](../accuracy.md).",
            variance(load(results / "numerics.json")),
        ),
    } | counted_pages(results, baseline, cases["cuda"], step["cuda"])


def counted_pages(results: Path, baseline: Path, cases: Any, step: Any) -> dict[str, Page]:
    """Return the pages of what was counted without a GPU, `cases` and `step` being what was measured on one."""
    counted = "Counted on the [emulator](../emulator.md), registers by NVRTC."
    return {
        "counts.md": Page(
            "What the kernels do, case by case",
            f"{counted} Times are lower bounds, predicted and not measured.",
            static.table(counts) if (counts := load(results / "static.json")) else f"Counts: {ABSENT}.",
        ),
        "budget.md": Page(
            "Instructions and cycles, counted from machine code",
            "Longest path of a warp on sm_90, by NVRTC and nvdisasm, with the launches of an H200. What fits while "
            "memory moves the data is the budget; **bold**: beyond the target. Predicted times are not measured. `make "
            "sass` counts; `benchmarks/counts/budget.py` says how.",
            budget.page(load(results / "budget.json"), cases, step),
        ),
        "kernels.md": Page(
            "The kernels of one training step",
            "64 examples, 64 inputs, 20 neurons, 10 classes, float32, launched as on an H200; optimisers on all "
            f"parameters at once. Bytes of global memory are counted once each. {counted}",
            kernels(load(results / "kernels.json"), load(baseline)),
        ),
        "recurrent.md": Page(
            "Launches and bytes of an LSTM",
            "float32, with all gradients but those of the inputs. Counted, not measured: no times. `python -m "
            "benchmarks.counts.recurrent` counts; what the ops do: [recurrent layers](../recurrent.md).",
            recurrent.page(load(results / "recurrent.json")),
        ),
    }


def sections(results: Path = RESULTS) -> dict[str, str]:
    """Return the generated sections of the README by name."""
    cases, step = (
        {place: latest(results, f"{name}.json", place) for place in PLACES} for name in ("ops", "train_step")
    )
    return {"speed": front.speed(cases, step)}


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
        for path in taken:
            if path.name == "sequence.json":
                path.with_suffix(".png").write_bytes(draw(load(path)))
    README.write_text(render(README.read_text(encoding="utf-8"), sections()), encoding="utf-8")
    written = pages()
    for name, page in written.items():
        (GENERATED / name).write_text(str(page), encoding="utf-8")
    print(written["targets.md"].body)
