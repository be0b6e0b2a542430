"""Byte-pair tokenizers: the same for the same texts, without loss, trained once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fxpress.zoo import corpora, tokenization
from fxpress.zoo.tokenization import END, PAD

TEXTS = [f"The {x} reads the {y}." for x in ("cat", "server", "user") for y in ("file", "list")]
VOCABULARY = 280


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tokenization.train(TEXTS, VOCABULARY)


def test_the_vocabulary_is_as_large_as_asked_for(tokenizer: Any) -> None:
    assert tokenizer.get_vocab_size() == VOCABULARY
    marks = [tokenizer.token_to_id(mark) for mark in tokenization.SPECIAL]
    assert marks == [PAD, tokenization.START, END]


def test_no_text_is_lost(tokenizer: Any) -> None:
    texts = ["The cat reads the file.", "Größe: 5 €", "日本"]
    rows = tokenization.encode(tokenizer, texts)
    assert all(row[-1] == END and END not in row[:-1] for row in rows)
    assert tokenization.decode(tokenizer, tokenization.pad(rows)) == texts
    assert len(rows[0]) < 15  # what it was trained on is cut into few pieces


def test_training_is_the_same_in_another_process(tokenizer: Any) -> None:
    script = (
        "from fxpress.zoo import tokenization\n"
        f"print(tokenization.train({TEXTS!r}, {VOCABULARY}).to_str(), end='')"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    assert done.stdout.decode() == tokenizer.to_str()


def test_rows_are_padded_to_the_longest() -> None:
    assert tokenization.pad([[5, 2], [7, 8, 2]]).tolist() == [[5, 2, PAD], [7, 8, 2]]
    assert tokenization.pad([[1], [1, 1]], -100)[0, 1] == -100
    assert tokenization.pad([[1]]).dtype == torch.long


def test_a_tokenizer_is_trained_once_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def rows(corpus: str, split: str) -> list[dict[str, str]]:
        calls.append((corpus, split))
        return [{"en": text, "de": text.upper(), "other": "Ω" * 9} for text in TEXTS]

    monkeypatch.setattr(tokenization, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(corpora, "load", rows)
    tokenization.load.cache_clear()
    first = tokenization.load("made/up", ("en", "de"), VOCABULARY)
    tokenization.load.cache_clear()
    again = tokenization.load("made/up", ("en", "de"), VOCABULARY)
    tokenization.load.cache_clear()
    assert calls == [("made/up", "train")]
    assert first.to_str() == again.to_str()
    name = tokenization.file_name("made/up", ("en", "de"), VOCABULARY)
    assert (tmp_path / "tokenizers" / name).is_file()


def test_a_shipped_tokenizer_needs_no_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(corpora, "load")
    tokenization.load.cache_clear()
    shipped = tokenization.load("en-de", ("en", "de"), 4096)
    assert shipped.get_vocab_size() == 4096
    text = "Dieses Paket enthält die Dokumentation."
    (row,) = tokenization.encode(shipped, [text])
    assert len(row) <= 8
    assert tokenization.decode(shipped, torch.tensor([row])) == [text]
