"""The objective of summarization: the next piece of a summary, given the text; scored by ROUGE."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxpress.zoo import corpora, tokenization
from fxpress.zoo.decoding import beam_search, greedy
from fxpress.zoo.objectives import IGNORED, Batch, Task, objective, sha256_of
from fxpress.zoo.samples import DATA, read_rows
from fxpress.zoo.tokenization import END
from fxpress.zoo.translation import Pairs, sample

__all__ = ["descriptions", "lead", "rouge", "summaries", "summarize"]

FIELDS = ("text", "summary")
ROWS = 64  # texts of a held-out batch
POOL = 8  # batches' worth of texts that one batch of about equal lengths is taken from
CALIBRATION_ROWS = 4
DEBIAN = {"corpus": "debian-summaries", "vocabulary": 4096, "source": 96, "target": 24}


def _calibration(settings: Mapping[str, Any], path: Path | None, limit: int) -> list[Any]:
    """Batches of 4 rows of a .jsonl file; without one, of descriptions that come with the zoo."""
    own = DATA / "summaries" / "descriptions.jsonl"
    rows = read_rows(path or own, FIELDS)[: limit * CALIBRATION_ROWS]
    batches = _pairs(rows, settings).batches(CALIBRATION_ROWS)
    return [inputs for inputs, _ in reversed(batches)]


def descriptions(path: Path | None = None, limit: int = 32) -> list[Any]:
    """Calibration of an untrained model: rows in pieces of the tokenizer that ships."""
    return _calibration(DEBIAN, path, limit)


@objective("summaries", reads_data=True, calibration=_calibration)
def summaries(
    corpus: str,
    vocabulary: int,
    source: int,
    target: int,
    sample_size: int,
    beam: int = 1,
    data: Path | None = None,
) -> Task:
    """Which piece comes next in a summary?

    Texts are cut after `source` pieces, summaries after `target`. Held out are `sample_size` rows
    of valid and of test, drawn by `translation.sample`. ROUGE (Lin 2004) is F1 by rouge-score,
    without stemming, of what the model says by itself against the whole summary.

    Args:
        corpus: what `corpora.load` takes, with rows of "text" and "summary".
        vocabulary: pieces of the corpus' tokenizer.
        source: most pieces of a text.
        target: most pieces of a summary.
        sample_size: held-out rows.
        beam: sequences kept while decoding; 1: greedy.
        data: a folder with train, valid and test, in place of the corpus; the tokenizer stays.

    Raises:
        CorpusError: the corpus or folder cannot be read.
    """
    settings = {"corpus": corpus, "vocabulary": vocabulary, "source": source, "target": target}
    where = data or corpus
    train = _pairs(corpora.load(where, "train"), settings)
    rows = {split: sample(corpora.load(where, split), sample_size) for split in ("valid", "test")}
    held_out = {split: _pairs(of_split, settings) for split, of_split in rows.items()}
    texts, meant = ([str(row[field]) for row in rows["test"]] for field in FIELDS)

    def draw(count: int, generator: torch.Generator) -> Batch:
        pool = torch.randint(len(train.source), (count * POOL,), generator=generator).tolist()
        order = sorted(pool, key=lambda row: len(train.source[row]))
        taken = int(torch.randint(POOL, (), generator=generator)) * count
        return train.batch(order[taken : taken + count])

    def decoded(model: nn.Module) -> dict[str, float]:
        said = summarize(model, held_out["test"].source, target, beam)
        return rouge(tokenization.decode(_tokenizer(settings), tokenization.pad(said)), meant)

    return Task(
        draw,
        {split: pairs.batches(ROWS) for split, pairs in held_out.items()},
        lambda targets: targets != IGNORED,
        lambda loss, accuracy: {
            "loss": loss,
            "perplexity_per_token": math.exp(loss),
            "accuracy": accuracy,
        },
        "rouge_1",
        {"lead sentence": rouge([lead(text) for text in texts], meant)["rouge_1"]},
        sha256_of(*(pairs.flat() for pairs in (train, *held_out.values()))),
        decoded,
        tokenization.beside(corpus, FIELDS, vocabulary),
    )


def summarize(
    model: Any, sources: Sequence[Sequence[int]], limit: int, beam: int = 1
) -> list[list[int]]:
    """What a model says of texts, in pieces.

    Args:
        model: a `decoding.Steps` that is a module and reads zeros to the right as padding.
        sources: pieces of each text.
        limit: most pieces of a summary.
        beam: sequences kept; 1: greedy.
    """
    device = next(model.parameters()).device
    search = greedy if beam == 1 else partial(beam_search, width=beam)
    order = sorted(range(len(sources)), key=lambda row: len(sources[row]))
    said: list[list[int]] = [[] for _ in sources]
    for i in range(0, len(order), ROWS):
        rows = order[i : i + ROWS]
        source = tokenization.pad([sources[row] for row in rows]).to(device)
        for row, ids in zip(rows, search(model, source, limit).tolist(), strict=True):
            said[row] = ids
    return said


def lead(text: str) -> str:
    """The first sentence."""
    return re.split(r"(?<=[.!?])\s", text)[0]


def rouge(candidates: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Means of ROUGE-1, ROUGE-2 and ROUGE-L, each F1."""
    from rouge_score.rouge_scorer import RougeScorer

    names = {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL"}
    scorer = RougeScorer(list(names.values()))
    scores = [scorer.score(r, c) for r, c in zip(references, candidates, strict=True)]
    return {name: sum(s[key].fmeasure for s in scores) / len(scores) for name, key in names.items()}


def _tokenizer(settings: Mapping[str, Any]) -> Any:
    return tokenization.load(settings["corpus"], FIELDS, settings["vocabulary"])


def _pairs(rows: Any, settings: Mapping[str, Any]) -> Pairs:
    """The pieces of rows, each side cut to its length; the end is always there."""
    listed, tokenizer = list(rows), _tokenizer(settings)
    texts, meant = (
        [
            [*ids[: settings[side] - 1], END] if len(ids) > settings[side] else ids
            for ids in tokenization.encode(tokenizer, (row[field] for row in listed))
        ]
        for field, side in zip(FIELDS, ("source", "target"), strict=True)
    )
    return Pairs(texts, meant)
