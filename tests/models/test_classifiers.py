"""Trained classifiers through plain `optimize`, with nothing but the samples of the zoo."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fxpress
from fxpress.zoo.registry import entry
from tests.models.samples import BRIEF, build, marked

TRAINED = [
    "fashion-linear",
    "fashion-vit",
    "newsgroups-bag",
    "r8-bag",
    "r8-encoder",
    "r8-minilm",
    "section-bag",
    "section-encoder",
]
LABELS = ["acq", "crude", "earn", "grain", "interest", "money-fx", "ship", "trade"]


def said(model: Any, batches: list[Any]) -> list[int]:
    """The class that a model gives to each row."""
    calls = [batch if isinstance(batch, tuple) else (batch,) for batch in batches]
    with torch.no_grad():
        return [int(i) for call in calls for i in model(*call).argmax(-1)]


@pytest.mark.parametrize("name", marked(TRAINED))
def test_optimized_classifiers_say_the_same(name: str) -> None:
    model, batches = build(name), entry(name).calibration(limit=5)
    before = said(model, batches)
    assert len(set(before)) > 2  # it tells the samples apart
    optimized = fxpress.optimize(model, batches, config=BRIEF)
    assert optimized.report.as_dict()["sites"]
    after = said(optimized, batches)
    agreed = sum(x == y for x, y in zip(before, after, strict=True))
    assert agreed >= 0.9 * len(before)


@pytest.mark.parametrize("name", marked(["r8-encoder", "r8-minilm"]))
def test_news_of_the_sample_are_told_apart(name: str) -> None:
    labels = [LABELS[i] for i in said(build(name), entry(name).calibration())]
    expected = ["earn"] * 3 + ["acq"] * 3 + ["crude"] * 3 + ["grain"] * 3 + ["interest"] * 3
    right = sum(x == y for x, y in zip(labels, expected, strict=False))
    assert right >= 0.8 * len(expected)  # the texts are not Reuters'
