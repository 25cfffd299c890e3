"""Write the figures of the files in ``benchmarks/results`` into the documents: ``python -m benchmarks.report``.

A table lies between the comments ``<!-- name -->`` and ``<!-- /name -->``. Whatever was there is replaced, so a figure
that no run produced cannot stay; where there is no run, the table says "not yet measured".
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS, ROOT

ABSENT = "not yet measured"
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "numerics.md")
BASELINE = ROOT / "tests" / "compile" / "baseline.json"
ARCHITECTURES = ("80", "90", "120")  # of which the registers are shown: A100, H100, RTX 50

NORMS = {"batch": "batch norm", "none": "no norm"}
OPTIMIZERS = {"sgd": "SGD", "momentum": "momentum", "adam": "Adam"}
RATIOS = {
    "with / without": "ours: batch norm / no norm",
    "PyTorch with / without": "PyTorch: batch norm / no norm",
    "ours / PyTorch, batch norm": "batch norm: ours / PyTorch",
    "ours / NumPy expression, batch norm": "batch norm: ours / NumPy expression",
}


def load(path: Path) -> Any:
    """Return the content of a file of results, or None where no run has written it."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table; all columns but the first are figures."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))


def train_step(results: Mapping[str, Any] | None) -> str:
    """Return the figures of `bench_train_step`."""
    if results is None:
        return f"Training step on the CPU and on a GPU: {ABSENT}."
    used = [name for name in OPTIMIZERS if name in results["ratios"]]
    titles = [OPTIMIZERS[name] for name in used]
    times = {(row["maker"], row["norm"], row["optimizer"]): row["us"] for row in results["rows"]}
    makers = [*dict.fromkeys(row["maker"] for row in results["rows"])]
    rows = [
        [f"{maker}, {title}", *(spread(times[maker, norm, name]) for name in used)]
        for maker in makers
        for norm, title in NORMS.items()
    ]
    rows += [[maker, *["not installed"] * len(used)] for maker in results["absent"]]
    rows.append(["any of them on a GPU", *[ABSENT] * len(used)])
    ratios = [
        [title, *(f"{results['ratios'][name][key]['median']:.2f}" for name in used)]
        for key, title in RATIOS.items()
        if key in results["ratios"][used[0]]
    ]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items() if version)
    protocol = results["protocol"]
    return "\n\n".join(
        [
            f"Microseconds per training step: median (p20 to p80) of {protocol['rounds']} interleaved rounds of "
            f"{protocol['steps_per_round']} steps. {results['device']}, {results['threads']} thread; {versions}; "
            f"commit {results['commit']}, {results['date']}.",
            table(["µs per step", *titles], rows),
            "Ratios of times, each the median over the rounds:",
            table(["ratio", *titles], ratios),
            accuracy(results["accuracy"]),
            table(["target", "found", ""], map(target_row, results["targets"])),
        ]
    )


def spread(us: Mapping[str, float]) -> str:
    """Return a cell: median (p20 to p80)."""
    return f"{us['median']:.0f} ({us['p20']:.0f} to {us['p80']:.0f})"


def accuracy(found: Mapping[str, Any]) -> str:
    """Return what the trainer's defaults reach."""
    rows = []
    for norm, title in NORMS.items():
        steps = ["never" if count is None else str(count) for count in found[norm]["steps_to_95"]]
        seeds = ", ".join(f"{value:.4f}" for value in found[norm]["seeds"])
        rows.append([title, f"{found[norm]['mean']:.4f}", seeds, ", ".join(steps)])
    return table(["digits, default options", "mean test accuracy", "by seed", "steps to 95 %, by seed"], rows)


def target_row(target: Mapping[str, Any]) -> list[str]:
    """Return the row of one target."""
    outcome = {True: "met", False: "**not met**", None: ABSENT}[target["met"]]
    return [target["target"], ABSENT if target["found"] is None else f"{target['found']:.4g}", outcome]


def answer(results: Mapping[str, Any] | None) -> str:
    """Return the measured sentence under the question."""
    if results is None:
        return f"What a step with batch norm costs relative to one without: {ABSENT}."
    ratios = results["ratios"]["sgd"]
    sentence = (
        f"On a CPU a step of ours with batch norm takes {ratios['with / without']['median']:.2f} times one without"
    )
    if torch := ratios.get("ours / PyTorch, batch norm"):
        sentence += f" and {torch['median']:.2f} times PyTorch's with batch norm"
    return f"{sentence} (one thread, SGD; [figures below](#figures)). On a GPU: {ABSENT}."


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
    """Return the errors of `benchmarks.numerics`: a row for every method, a column for every input."""
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
    cpu = load(results / "cpu.json")
    return {
        "answer": answer(cpu),
        "train_step": train_step(cpu),
        "kernels": kernels(load(results / "kernels.json"), load(baseline)),
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


def main() -> None:
    """Bring the documents up to date."""
    contents = sections()
    for path in DOCUMENTS:
        path.write_text(render(path.read_text(encoding="utf-8"), contents), encoding="utf-8")


if __name__ == "__main__":
    main()
