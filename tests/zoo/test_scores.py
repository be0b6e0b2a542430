"""How models that were trained elsewhere are scored, with models that need no download."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxpress.zoo import bergamot, corpora, minilm, registry, smollm2

SCORED = {name: e.score for name, e in registry.entries().items() if e.score is not None}


def test_results_are_of_the_scores_as_they_are_now() -> None:
    path = Path(__file__).parents[2] / "benchmarks" / "results" / "pretrained.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    assert {name: (x["task"], x["data"], x["headline"]) for name, x in found.items()} == {
        name: (score.task, score.data, score.headline) for name, score in SCORED.items()
    }
    assert all(x["headline"] in x["scores"] for x in found.values())


def test_a_model_of_a_language_is_scored_by_its_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sure of one token in two: a bit each, of two bytes."""
    monkeypatch.setattr(smollm2, "windows", lambda _: torch.tensor([[0, 1, 0], [1, 1, 0]]))
    words = SimpleNamespace(decode=lambda ids: "é" * len(ids))
    monkeypatch.setattr(smollm2, "tokenizer", lambda: words)

    def model(input_ids: Tensor) -> Any:
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 2))

    found = smollm2.SCORE.measure(model)
    assert found == pytest.approx({"bits_per_byte": 0.5, "perplexity_per_token": 2})
    assert 2 < smollm2.SCORE.baselines()["gzip -9"] < 4


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"summary": "red fish", "text": "a fish that is red"},
        {"summary": "bird", "text": "it has wings"},
    ]
    monkeypatch.setattr(corpora, "load", lambda *_: rows)


@pytest.mark.usefixtures("packages")
def test_an_encoder_of_sentences_is_asked_to_search(monkeypatch: pytest.MonkeyPatch) -> None:
    about = {"a fish that is red": 0, "red fish": 0, "bird": 1, "it has wings": 1}

    def vectors(_model: Any, texts: list[str]) -> Tensor:
        return F.one_hot(torch.tensor([about[text] for text in texts])).float()

    monkeypatch.setattr(minilm, "_vectors", vectors)
    right = {"recall_at_1": 1, "mean_reciprocal_rank": 1}
    assert minilm.SCORE.measure(None) == right
    assert set(minilm.SCORE.baselines()) == {"BM25"}


def test_a_translator_is_compared_with_the_source(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"en": "the same words in both", "pt": "the same words in both"}]
    monkeypatch.setattr(corpora, "load", lambda *_: rows)
    monkeypatch.setattr(bergamot, "translate", lambda _m, texts, *_: texts)
    found = bergamot.SCORE.measure(torch.nn.Identity())
    assert found["bleu"] == bergamot.SCORE.baselines()["copying the source"]
    assert found == pytest.approx({"bleu": 100, "chrf": 100})
