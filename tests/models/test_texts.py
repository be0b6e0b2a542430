"""Trained language models and summarizers through plain `optimize`, with the zoo's own samples."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fxpress
from fxpress.cli_inputs import as_call
from fxpress.testing import APPROXIMATES, assert_equivalent
from fxpress.zoo import summaries, tokenization
from fxpress.zoo.registry import entry
from fxpress.zoo.samples import DATA, read_rows
from tests.models.samples import BRIEF, build

ATTENTION = {
    "prose-transformer": {"causal"},
    "prose-xl": {"causal", "cross"},  # what is earlier, and the window with its memory
    "summary-lstm": set(),  # its scores are no product of q and k
    "summary-rum": set(),
}
BUDGET = 0.05  # of the outputs' root mean square; `optimize` states its own in the report


@pytest.mark.parametrize("name", ATTENTION)
def test_optimized_models_say_nearly_the_same(name: str) -> None:
    # They lie in the order of their lengths: the one held out is neither longest nor shortest.
    longest, held_out, shortest = entry(name).calibration(limit=3)
    model = build(name)
    o = fxpress.optimize(model, [longest, shortest], config=BRIEF)
    report = o.report.as_dict()
    assert report["sites"]
    args, kwargs = as_call(held_out)
    assert_equivalent(o, model, args, kwargs, exactness=APPROXIMATES(BUDGET))
    kinds = {site["kind"] for site in report["sites"]}
    assert kinds & {"self", "causal", "cross"} == ATTENTION[name]


@pytest.mark.parametrize("name", ["summary-lstm", "summary-rum"])
def test_summaries_of_the_sample_are_about_it(name: str) -> None:
    model: Any = build(name)
    rows = read_rows(DATA / "summaries" / "descriptions.jsonl", summaries.FIELDS)
    tokenizer = tokenization.load("debian-summaries", summaries.FIELDS, 4096)
    sources = tokenization.encode(tokenizer, (row["text"] for row in rows))
    said = tokenization.decode(
        tokenizer, tokenization.pad(summaries.summarize(model, sources, limit=24))
    )
    meant = [row["summary"] for row in rows]
    mixed = [*said[1:], said[0]]  # what it says of another text
    assert summaries.rouge(said, meant)["rouge_1"] > 2 * summaries.rouge(mixed, meant)["rouge_1"]


def test_memory_helps_the_trained_model() -> None:
    model: Any = build("prose-xl")
    losses = {True: 0.0, False: 0.0}
    for ids, earlier in entry("prose-xl").calibration(limit=4):
        for remembers in losses:
            with torch.no_grad():
                logits = model(ids, earlier if remembers else None)
            losses[remembers] += torch.nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
            ).item()
    assert losses[True] < losses[False]
