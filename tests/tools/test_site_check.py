"""The check of the site in Chromium finds each planted fault, and nothing on a page without."""

from __future__ import annotations

from pathlib import Path

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: make docs-check installs it")

from tools import site_check  # noqa: E402

FAULTS = {
    '<a href="nowhere.html">x</a>': "nowhere.html leads nowhere",
    '<a href="good.html#nothing">x</a>': "good.html#nothing has no such place",
    '<img src="missing.png">': "picture: ",
    "<script>console.error('planted')</script>": "console: planted",
    "<script>nothing()</script>": "error: nothing is not defined",
    '<img src="http://127.0.0.1:9/x.png">': "asks the network: http://127.0.0.1:9/x.png",
    '<div style="width: 500px">x</div>': "pixels wider than a window of 390",
    '<iframe src="gone.html"></iframe>': "gone.html leads nowhere",
}


def check(site: Path, name: str) -> list[str]:
    """Return what is wrong with a page beside ``good.html``."""
    with sync_api.sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=site_check.chromium())
        except sync_api.Error:
            pytest.skip("no Chromium is installed")
        facts, wrong = {}, []
        for path in (site / "good.html", site / name):
            facts[path], complaints = site_check.visit(browser, path, 390, site / "picture.png")
            wrong += complaints
        browser.close()
    assert (site / "picture.png").stat().st_size > 0
    return [*wrong, *site_check.dead(site, facts)]


@pytest.mark.slow
def test_every_fault_is_found_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "good.html").write_text('<h1 id="here">x</h1><a href="bad.html">x</a><a href="#here">x</a>')
    (tmp_path / "bad.html").write_text("".join(FAULTS))
    assert check(tmp_path, "good.html") == []
    found = check(tmp_path, "bad.html")
    for report in FAULTS.values():
        assert any(report in one for one in found), report
