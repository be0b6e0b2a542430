"""Corpora: built once, whole or not at all; user's folders; what is missing is said."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fxpress.zoo import corpora
from fxpress.zoo.corpora import Corpus, CorpusError, Row, Splits, load, split_of
from fxpress.zoo.pretrained import DownloadError

ROWS: dict[str, list[Row]] = {
    split: [{"text": f"{split} {i}", "label": i} for i in range(3)] for split in corpora.SPLITS
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setattr(corpora, "cache_folder", lambda: tmp_path)
    return tmp_path


def offer(monkeypatch: pytest.MonkeyPatch, build: object) -> list[Path]:
    """Make `build` the one corpus, "made"; the folders it was called with."""
    calls: list[Path] = []

    def counted(downloads: Path) -> Splits:
        calls.append(downloads)
        found: Splits = build(downloads) if callable(build) else ROWS
        return found

    made = {"made": Corpus("made", "-", "-", counted)}
    monkeypatch.setattr(corpora, "corpora", lambda: made)
    return calls


def test_a_corpus_is_built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = offer(monkeypatch, ROWS)
    for split, rows in ROWS.items():
        assert list(load("made", split)) == rows
    assert len(calls) == 1
    assert not calls[0].exists()  # what was downloaded is gone


def test_rows_can_be_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, ROWS)
    stream = load("made", "test", streaming=True)
    assert not hasattr(stream, "__len__")
    assert list(stream) == ROWS["test"]


def test_corpora_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = offer(monkeypatch, ROWS)
    assert list(load("made+made", "test")) == [*ROWS["test"], *ROWS["test"]]
    assert list(load("made+made", "test", streaming=True)) == [*ROWS["test"], *ROWS["test"]]
    assert len(calls) == 1


def test_what_fails_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half() -> Iterator[Row]:
        yield ROWS["valid"][0]
        raise DownloadError("the line is cut")

    offer(monkeypatch, lambda _: {**ROWS, "valid": half()})
    with pytest.raises(CorpusError, match="made cannot be built here: the line is cut"):
        load("made", "train")
    assert [p.name for p in (cache / "corpora").iterdir()] == ["made.lock"]
    calls = offer(monkeypatch, ROWS)
    assert list(load("made", "valid")) == ROWS["valid"]
    assert len(calls) == 1


def test_a_folder_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("one\ntwo\n")
    (tmp_path / "test.csv").write_text("text,label\nthree,3\n")
    assert list(load(tmp_path, "train")) == [{"text": "one"}, {"text": "two"}]
    assert list(load(tmp_path, "test")) == [{"text": "three", "label": 3}]
    with pytest.raises(CorpusError, match=r"has no file for 'valid': valid with one of \.jsonl"):
        load(tmp_path, "valid")
    (tmp_path / "valid.jsonl").write_text("{")
    with pytest.raises(CorpusError, match="cannot be read"):
        load(tmp_path, "valid")


def test_an_unknown_name_offers_the_nearest() -> None:
    with pytest.raises(CorpusError, match="did you mean 'debian-summaries'"):
        load("debian-sumaries", "train")


def test_a_document_stays_in_its_split() -> None:
    names = [split_of(str(i)) for i in range(10_000)]
    assert names == [split_of(str(i)) for i in range(10_000)]
    assert 450 < names.count("test") < 550
    assert 450 < names.count("valid") < 550
