"""Tokenizers: the same from the same texts, and able to say any text."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fxpress.zoo import tokenization
from fxpress.zoo.samples import DATA, read_texts

SIZE = 400
SCRIPT = """
from fxpress.zoo import tokenization
from fxpress.zoo.samples import DATA, read_texts
texts = read_texts(DATA / "austen" / "calibration.txt")
print(tokenization.train(texts, 400).to_str(), end="")
"""


def texts() -> list[str]:
    return read_texts(DATA / "austen" / "calibration.txt")


def test_another_process_learns_the_same() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, check=True)
    assert done.stdout.decode() == tokenization.train(texts(), SIZE).to_str()


def test_any_text_comes_back() -> None:
    tokenizer = tokenization.train(texts(), SIZE)
    assert tokenizer.get_vocab_size() == SIZE
    for text in ("Emma Woodhouse, handsome, clever", "Übermaß → 3 €", "tab\tand\nline", "a </s> b"):
        assert tokenizer.decode(tokenizer.encode(text).ids).strip() == text
    assert [tokenizer.token_to_id(t) for t in tokenization.SPECIAL] == [0, 1, 2]
    frequent = tokenizer.encode("the and her")
    assert frequent.ids == [tokenizer.token_to_id(x) for x in ("Ġthe", "Ġand", "Ġher")]


def test_named_is_trained_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenization, "cache_folder", lambda: tmp_path)
    calls = []

    def read() -> list[str]:
        calls.append(1)
        return texts()

    first, again = (tokenization.named("hub:a/b", SIZE, read) for _ in range(2))
    assert first.to_str() == again.to_str()
    assert len(calls) == 1
    assert [p.name for p in (tmp_path / "tokenizers").glob("*.json")] == ["hub-a-b-400.json"]
