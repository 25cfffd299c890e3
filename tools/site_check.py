"""Look at every page of the site in Chromium, at the width of a desk and of a phone: ``python -m tools.site_check``.

Reported are links and anchors that lead nowhere, pictures that do not load, errors on the console, requests to anything
but files, and pages wider than their window. The search has to find something, and the step-through to react. Addresses
on the network are not asked for. Needs Playwright and a Chromium: Debian's, one named by BNKERNELS_CHROMIUM, or
Playwright's own.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

from playwright.sync_api import Browser, Page, sync_playwright

WIDTHS = {"desk": 1280, "phone": 390}
HEIGHT = 1400
FACTS = """() => ({
    links: [...document.querySelectorAll("a[href]")].map(a => a.href),
    ids: [...document.querySelectorAll("[id], a[name]")].map(e => e.id || e.name),
    broken: [...document.images].filter(i => !(i.complete && i.naturalWidth)).map(i => i.src),
    frames: [...document.querySelectorAll("iframe")].map(f => f.src),
    wide: document.scrollingElement.scrollWidth - document.scrollingElement.clientWidth,
})"""
PICTURES = (
    """() => Promise.all([...document.images].map(i => { i.loading = "eager"; return i.decode().catch(() => {}); }))"""
)


def chromium() -> str | None:
    """Return the path of a Chromium on this machine, or None for Playwright's own."""
    names = "chromium", "chromium-browser", "google-chrome"
    return os.environ.get("BNKERNELS_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)


def visit(browser: Browser, path: Path, width: int, picture: Path) -> tuple[dict, list[str]]:
    """Open a page; return what is on it, and what is wrong with it alone."""
    page = browser.new_page(viewport={"width": width, "height": HEIGHT})
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(f"console: {message.text}") if message.type == "error" else None)
    page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
    page.on("requestfailed", lambda request: wrong.append(f"not loaded: {request.url}"))
    page.on("request", lambda request: wrong.extend(outside(request.url)))
    page.goto(path.as_uri())
    page.evaluate(PICTURES)
    found = page.evaluate(FACTS)
    wrong += [f"picture: {source}" for source in found["broken"]]
    if found["wide"] > 0:
        wrong.append(f"{found['wide']} pixels wider than a window of {width}")
    page.screenshot(path=picture)
    page.close()
    return found, wrong


def outside(url: str) -> list[str]:
    """Return a complaint about an address that is no file of the site."""
    return [] if urlsplit(url).scheme in ("file", "data", "blob") else [f"asks the network: {url}"]


def dead(site: Path, facts: dict[Path, dict]) -> Iterator[str]:
    """Yield every link within the site whose file, or whose anchor, is not there."""
    for path, found in facts.items():
        for link in sorted({*found["links"], *found["frames"]}):
            address, anchor = urldefrag(link)
            if urlsplit(address).scheme != "file":
                continue
            target = Path(unquote(urlsplit(address).path))
            if not target.is_file():
                yield f"{path.relative_to(site)}: {link} leads nowhere"
            elif anchor and target in facts and unquote(anchor) not in facts[target]["ids"]:
                yield f"{path.relative_to(site)}: {link} has no such place"


def start_and_search(page: Page, site: Path) -> Iterator[str]:
    """Come from the root to the first page, and look for a word that is on many pages."""
    page.goto((site / "index.html").as_uri())
    page.wait_for_url("**/docs/index.html")
    page.goto((site / "search.html").as_uri() + "?q=cooperative")
    page.wait_for_timeout(3000)
    if page.locator("#search-results li").count() < 3:
        yield "search.html: finds nothing"


def step_through(page: Page, site: Path) -> Iterator[str]:
    """Move the sliders of the step-through and press its buttons."""
    page.on("pageerror", lambda error: errors.append(f"step_through.html: {error}"))
    errors: list[str] = []
    page.goto((site / "docs" / "pictures" / "step_through.html").as_uri())
    before = page.inner_text("body")
    for name in ("N", "C", "cost"):
        for value in range(int(page.get_attribute(f"#{name}", "max") or 0) + 1):
            page.locator(f"#{name}").fill(str(value))
    for button in ("first", "next", "play"):
        page.click(f"#{button}")
    page.wait_for_timeout(300)
    if page.inner_text("body") == before:
        errors.append("step_through.html: does not react")
    yield from errors


def main(site: Path, pictures: Path) -> int:
    """Check a site; write a picture of every page; return how much is wrong."""
    ours = [path for path in sorted(site.rglob("*.html")) if path.name != "webpack-macros.html"]
    pages = [path for path in ours if path != site / "index.html"]  # it leads to the first page
    pictures.mkdir(parents=True, exist_ok=True)
    facts: dict[Path, dict] = {}
    wrong: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--allow-file-access-from-files"])
        for path in pages:
            name = path.relative_to(site).with_suffix("").as_posix()
            for kind, width in WIDTHS.items():
                picture = pictures / f"{name.replace('/', '-')}-{kind}.png"
                facts[path], complaints = visit(browser, path, width, picture)
                wrong += [f"{name}, {kind}: {complaint}" for complaint in complaints]
        wrong += [*start_and_search(browser.new_page(), site), *step_through(browser.new_page(), site)]
        browser.close()
    wrong += dead(site, facts)
    links = sum(len(found["links"]) for found in facts.values())
    print(*wrong, f"{len(pages)} pages at {len(WIDTHS)} widths, {links} links: {len(wrong)} wrong", sep="\n")
    return len(wrong)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m tools.site_check SITE PICTURES")
    sys.exit(min(1, main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]))))
