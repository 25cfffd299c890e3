"""The table of features counts names of tests, and a feature without any is one that does not exist."""

from __future__ import annotations

import pytest

from tests import features


def test_a_feature_without_a_test_fails(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["tests/test_a.py::test_folds[1]", "tests/test_a.py::test_folds[2]", "tests/test_b.py::test_other"]
    monkeypatch.setattr(features, "collect", lambda: names)
    monkeypatch.setattr(
        features, "FEATURES", [features.Feature("folding", r"test_a\.py"), features.Feature("new", "x1")]
    )
    assert features.main() == 1
    folding, new, last = capsys.readouterr().out.splitlines()
    assert folding.split() == ["folding", "2", "tests"]
    assert new.endswith("not there yet")
    assert last == "1 of 2 features"
    features.FEATURES.pop()
    assert features.main() == 0
