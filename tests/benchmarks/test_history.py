"""The history of speed: every version of the results counts once, and ratios are of one run."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks import history


def document(commit: str, ours: float, theirs: float) -> dict[str, Any]:
    """Return the results of a run."""
    common = {"op": "batch_norm", "direction": "forward", "shape": "64x20", "dtype": "float32", "status": "ok"}
    rows = [common | {"provider": "bnkernels", "hot_us_median": ours}]
    rivals = {"PyTorch eager, out=": theirs, "PyTorch eager": 2 * theirs}
    rows += [common | {"provider": name, "hot_us_median": time} for name, time in rivals.items()]
    rows.append(common | {"provider": "bnkernels", "hot_us_median": 1e9, "threads": 2})
    return {"device": "a processor", "date": "2026-01-01", "commit": commit, "rows": rows}


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Return a repository with two versions of the results, and a commit between that left them alone."""
    path = tmp_path / "benchmarks" / "results" / "processor" / "ops.json"
    path.parent.mkdir(parents=True)

    def git(*arguments: str) -> None:
        named = "-c", "user.name=nobody", "-c", "user.email=nobody@example.org"
        subprocess.run(["git", "-C", tmp_path, *named, *arguments], check=True, capture_output=True)

    git("init", "--quiet")
    for content in (document("aaa", 2, 4), None, document("bbb", 1, 4)):
        if content is None:
            (tmp_path / "other").touch()
        else:
            path.write_text(json.dumps(content), encoding="utf-8")
        git("add", "--all")
        git("commit", "--quiet", "--message", "results")
    return tmp_path


def test_every_version_is_a_point(repository: Path) -> None:
    found = history.curves(history.versions(repository))
    assert found == {
        "a processor": {("batch_norm", "forward", "64x20"): [("2026-01-01\naaa", 0.5), ("2026-01-01\nbbb", 0.25)]}
    }
    pytest.importorskip("matplotlib")
    assert history.draw(found).startswith(b"\x89PNG")


def test_a_run_without_the_rival_is_no_point() -> None:
    alone = document("aaa", 2, 4)
    alone["rows"] = [row for row in alone["rows"] if row["provider"] == "bnkernels"]
    assert history.curves([alone]) == {}


def test_a_history_without_results_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "versions", lambda: [])
    with pytest.raises(SystemExit, match="has no results of ops beside PyTorch: clone all of it"):
        history.main([])
