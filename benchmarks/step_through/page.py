"""The page with sliders, self-contained, and the picture for where no script runs, of the same recorded cases."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.timing import ROOT
from benchmarks.step_through.record import Step

TEMPLATE = Path(__file__).with_name("template.html")
PAGE, PICTURE = (ROOT / "docs" / "pictures" / f"step_through.{kind}" for kind in ("html", "svg"))
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8A7A00", "#6A4C93")
DRAWN, COST = (64, 256), 10  # examples and neurons of the picture; words that a wait costs
TITLES = {"example": "by example: three launches, all wait twice", "neuron": "by neuron: one launch, no block waits"}
SIDE, HALF, TOP, LINES, LINE = 360, 160, 50, 250, 9  # sizes in the picture

Case = Mapping[str, Any]


def pages(cases: Sequence[Case]) -> dict[Path, str]:
    """Return the text of each file that is written."""
    return {PAGE: html(cases), PICTURE: svg(cases)}


def html(cases: Sequence[Case]) -> str:
    """Return the page."""
    data = json.dumps(cases, separators=(",", ":"))
    return TEMPLATE.read_text(encoding="utf-8").replace("/*CASES*/", data)


def svg(cases: Sequence[Case]) -> str:
    """Return the picture: for each way the cells that blocks read and write, and below when."""
    drawn = [next(one for one in cases if key(one) == (way, *DRAWN)) for way in TITLES]
    longest = max(step.start + step.waits * COST + step.length for one in drawn for step in steps_of(one))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * SIDE + 40} 420" font-family="sans-serif" '
        'font-size="13">',
        "<title>Which block reads and writes which cells of a mini-batch, and when it waits</title>",
        f'<rect width="{2 * SIDE + 40}" height="420" fill="#fff"/>',
    ]
    for number, one in enumerate(drawn):
        parts += panel(one, number * (SIDE + 40), longest)
    return "\n".join([*parts, "</svg>"]) + "\n"


def key(one: Case) -> tuple[str, int, int]:
    """Return way, examples and neurons of a case."""
    return one["way"], one["examples"], one["neurons"]


def steps_of(one: Case) -> list[Step]:
    """Return the steps of all launches."""
    return [Step(*step) for launch in one["launches"] for step in launch["steps"]]


def panel(one: Case, left: int, longest: int) -> Iterator[str]:
    """Yield the elements of one way."""
    way, rows, columns = key(one)
    yield f'<g transform="translate({left} 0)">'
    yield f'<text x="0" y="20" font-size="15" font-weight="bold">{TITLES[way]}</text>'
    for at, name in ((0, f"x read: {rows} rows of {columns}"), (SIDE - HALF, "y written")):
        yield f'<text x="{at}" y="{TOP - 6}">{name}</text>'
    yield f'<text x="0" y="{LINES - 8}">a line for each block, time to the right</text>'
    ends: dict[int, float] = {}
    for step in steps_of(one):
        colour = COLOURS[step.block % len(COLOURS)]
        for at, places, opacity in ((0, step.read, 0.45), (SIDE - HALF, step.written, 1)):
            for r0, r1, c0, c1 in places if opacity == 1 or step.waits == 0 else ():
                x, y, width, height = c0 / columns * HALF, r0 / rows, (c1 - c0) / columns * HALF, (r1 - r0) / rows
                yield rect(at + x, TOP + y * HALF, width, height * HALF, colour, opacity)
        scale = SIDE / longest
        begin, y = (step.start + step.waits * COST) * scale, LINES + step.block * LINE
        before = ends.get(step.block, 0.0)
        if begin > before:
            yield rect(before, y, begin - before, LINE - 1, "#d0d0d0", 1)
        shade = (colour, 1) if step.written else (colour, 0.45) if step.read else ("#222222", 1)
        yield rect(begin, y, step.length * scale, LINE - 1, *shade)
        ends[step.block] = begin + step.length * scale
    legend = "pale: reads; full: writes; black: merges; grey: waits"
    yield f'<text x="0" y="{LINES + 16 * LINE + 16}" fill="#555">{legend}</text>'
    yield "</g>"


def rect(x: float, y: float, width: float, height: float, fill: str, opacity: float) -> str:
    """Return a rectangle."""
    shade = f'fill="{fill}"' + (f' fill-opacity="{opacity:g}"' if opacity < 1 else "")
    return f'<rect x="{x:.4g}" y="{y:.4g}" width="{width:.4g}" height="{height:.4g}" {shade}/>'
