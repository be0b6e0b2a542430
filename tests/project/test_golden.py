"""The `golden` fixture: equal passes, different fails with a diff, the option rewrites."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

Golden = Callable[[str, str], None]


@pytest.fixture
def folder(tmp_path: Path, golden: Golden, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that takes the place of tests/golden/."""
    monkeypatch.setitem(golden.__globals__, "GOLDEN", tmp_path)
    (tmp_path / "old.txt").write_text("a\nb\n")
    return tmp_path


def test_equal_text_passes(folder: Path, golden: Golden) -> None:
    golden("a\nb", "old.txt")


def test_different_text_fails_with_a_diff(folder: Path, golden: Golden) -> None:
    with pytest.raises(pytest.fail.Exception, match=r"(?s)-b.*\+c.*--update-golden"):
        golden("a\nc", "old.txt")


def test_missing_file_fails(folder: Path, golden: Golden) -> None:
    with pytest.raises(pytest.fail.Exception, match=r"\+a"):
        golden("a", "new.txt")
