"""Names in the documents exist: links and their anchors, files of the tree, targets of make, modules to run."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from pkgutil import resolve_name

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "notebooks").glob("*.ipynb")),
]
NOW = [page for page in PAGES if page.name != "CHANGELOG.md"]  # which names what there was
FOLDERS = "bnkernels|cuda|tests|tools|benchmarks|examples|notebooks|docs"
NEVER = {"cuda/__init__.py"}  # CONTRIBUTING says why
FILE = re.compile(rf"`((?:{FOLDERS})/[\w./*-]+\.(?:py|cuh?|h|cpp|md|txt|json))(?:::\w+)?`")


def prose(page: Path) -> str:
    """Return the text of a page, or of the cells of a notebook that are text."""
    text = page.read_text(encoding="utf-8")
    if page.suffix != ".ipynb":
        return text
    return "\n\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown")


def anchors(page: Path) -> Iterator[str]:
    """Yield the anchor of every heading: lower case, without punctuation, hyphens for spaces."""
    for heading in re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", prose(page), flags=re.M | re.S), re.M):
        yield re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if link.startswith(("https://", "http://")):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", NOW, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_files_targets_and_modules_exist(page: Path) -> None:
    text = prose(page)
    for name in FILE.findall(text):
        assert "X" in name or any(ROOT.glob(name)) or name in NEVER, name
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    named = re.findall(r"(?:`|^)make ([a-z-]+)", text, re.M)
    assert set(named) <= targets, set(named) - targets
    for module in re.findall(r"python -m ((?:bnkernels|benchmarks|tests|tools)[\w.]*)", text):
        assert find_spec(module), module


def test_names_that_things_have_now_exist() -> None:
    section = (
        (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").partition("### Moved and renamed")[2].partition("###")[0]
    )
    rows = [line.split(" | ") for line in section.splitlines() if line.startswith("| ")][2:]
    names = [name for _, now in rows for name in re.findall(r"`(bnkernels\.[\w.]+)", now)]
    assert len(names) > 15
    for name in names:
        resolve_name(name)


def test_there_are_pages() -> None:
    assert len(PAGES) > 20
    assert sum(len(re.findall(r"\]\((?!http)", prose(page))) for page in PAGES) > 100
