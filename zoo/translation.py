"""The objective of translation: the next token of a sentence, given another language's."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxpress.zoo import corpora, tokenization
from fxpress.zoo.decoding import greedy
from fxpress.zoo.objectives import IGNORED, Batch, Task, objective, sha256_of
from fxpress.zoo.samples import DATA, read_rows
from fxpress.zoo.tokenization import START

__all__ = ["bleu_chrf", "sample", "sentences", "translate", "translation"]

ROWS = 64  # sentences of a held-out batch
POOL = 8  # batches' worth of sentences that one batch of about equal lengths is taken from
CALIBRATION_ROWS = 4


@dataclass(frozen=True)
class Pairs:
    """Tokens of sentences and of their translations, each with its end."""

    source: list[list[int]]
    target: list[list[int]]

    def batch(self, rows: Sequence[int]) -> Batch:
        """The sources, the translations but for their ends; the translations."""
        source, target = ([side[row] for row in rows] for side in (self.source, self.target))
        read = tokenization.pad([[START, *row[:-1]] for row in target])
        return (tokenization.pad(source), read), tokenization.pad(target, IGNORED)

    def by_length(self, rows: Sequence[int]) -> list[int]:
        """Rows in the order of their lengths, so that neighbours need little padding."""
        return sorted(rows, key=lambda row: (len(self.target[row]), len(self.source[row])))

    def batches(self, rows: int) -> list[Batch]:
        """All of them, in the order of their lengths."""
        order = self.by_length(range(len(self.source)))
        return [self.batch(order[i : i + rows]) for i in range(0, len(order), rows)]

    def flat(self) -> Tensor:
        """All tokens in one row; ends tell texts apart."""
        return torch.tensor([token for x in (*self.source, *self.target) for token in x])


def _calibration(settings: Mapping[str, Any], path: Path | None, limit: int) -> list[Any]:
    """Batches of 4 pairs of a .jsonl file; without one, of sentences that come with the zoo.

    The longest come first: a mask of attention that is learned on them covers the others too.
    """
    source, target = settings["languages"]
    own = DATA / "sentences" / f"{source}-{target}.jsonl"
    rows = read_rows(path or own, settings["languages"])[: limit * CALIBRATION_ROWS]
    pairs = _pairs(rows, settings)
    return [inputs for inputs, _ in reversed(pairs.batches(CALIBRATION_ROWS))]


def sentences(path: Path | None = None, limit: int = 32) -> list[Any]:
    """Calibration of an untrained model: pairs in tokens of the tokenizer that ships."""
    return _calibration(
        {"corpus": "en-de", "languages": ["en", "de"], "vocabulary": 4096}, path, limit
    )


@objective("translation", reads_data=True, calibration=_calibration)
def translation(
    corpus: str,
    languages: list[str],
    vocabulary: int,
    length: int,
    sample_size: int,
    data: Path | None = None,
) -> Task:
    """Which token comes next in a translation?

    Sentences are drawn so that a batch holds such of about equal lengths. Held out are
    `sample_size` pairs of valid and of test, drawn by `sample`; BLEU and chrF are sacrebleu's, of
    greedy decoding.

    Args:
        corpus: a name that `corpora.load` takes.
        languages: from which to which: the fields of its rows.
        vocabulary: tokens of the corpus' tokenizer, which both languages share.
        length: longest sentence to train on, in tokens; held-out ones may have any.
        sample_size: held-out pairs.
        data: a folder with train.jsonl, valid.jsonl and test.jsonl, in place of the corpus; the
            tokenizer stays.
    """
    settings = {"corpus": corpus, "languages": languages, "vocabulary": vocabulary}
    where = data or corpus
    train = _pairs(corpora.load(where, "train"), settings, longest=length)
    rows = {split: sample(corpora.load(where, split), sample_size) for split in ("valid", "test")}
    held_out = {split: _pairs(of_split, settings) for split, of_split in rows.items()}
    sources, references = ([str(row[x]) for row in rows["test"]] for x in languages)

    def draw(count: int, generator: torch.Generator) -> Batch:
        pool = torch.randint(len(train.source), (count * POOL,), generator=generator)
        taken = int(torch.randint(POOL, (), generator=generator)) * count
        return train.batch(train.by_length(pool.tolist())[taken : taken + count])

    words = _tokenizer(settings)

    def decoded(model: nn.Module) -> dict[str, float]:
        encode, decode = partial(tokenization.encode, words), partial(tokenization.decode, words)
        return bleu_chrf(translate(model, sources, encode, decode), references)

    return Task(
        draw,
        {split: pairs.batches(ROWS) for split, pairs in held_out.items()},
        lambda targets: targets != IGNORED,
        lambda loss, accuracy: {"perplexity_per_token": math.exp(loss), "accuracy": accuracy},
        "bleu",
        {"copying the source": bleu_chrf(sources, references)["bleu"]},
        sha256_of(*(pairs.flat() for pairs in (train, *held_out.values()))),
        decoded,
        tokenization.beside(corpus, tuple(languages), vocabulary),
    )


def sample(rows: Any, size: int) -> list[dict[str, Any]]:
    """So many rows, or all if there are not as many: Python's `random.Random(0).sample`."""
    listed = list(rows)
    return random.Random(0).sample(listed, min(size, len(listed)))


def translate(
    model: Any,
    texts: Sequence[str],
    encode: Callable[[Sequence[str]], list[list[int]]],
    decode: Callable[[Tensor], list[str]],
) -> list[str]:
    """Greedy translations, of at most twice as many tokens as the source has and ten more.

    Args:
        model: a `decoding.Steps` that is a module and reads zeros to the right as padding.
        texts: the sources.
        encode: to tokens, each text with its end.
        decode: tokens (B, T) to texts.
    """
    device = next(model.parameters()).device
    ids = encode(texts)
    order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
    said: list[str] = []
    for i in range(0, len(order), ROWS):
        source = tokenization.pad([ids[row] for row in order[i : i + ROWS]]).to(device)
        said += decode(greedy(model, source, 2 * source.shape[1] + 10))
    return [text for _, text in sorted(zip(order, said, strict=True))]


def bleu_chrf(candidates: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """BLEU (Papineni et al. 2002) and chrF (Popović 2015) of a corpus, from 0 to 100."""
    from sacrebleu import corpus_bleu, corpus_chrf

    said, meant = list(candidates), [list(references)]
    bleu, chrf = corpus_bleu(said, meant), corpus_chrf(said, meant)
    return {"bleu": float(bleu.score), "chrf": float(chrf.score)}


def _tokenizer(settings: Mapping[str, Any]) -> Any:
    languages = tuple(settings["languages"])
    return tokenization.load(settings["corpus"], languages, settings["vocabulary"])


def _pairs(rows: Any, settings: Mapping[str, Any], longest: int | None = None) -> Pairs:
    """The tokens of rows; of those alone that have no more than `longest` on either side."""
    listed, tokenizer = list(rows), _tokenizer(settings)
    sides = [
        tokenization.encode(tokenizer, (row[language] for row in listed))
        for language in settings["languages"]
    ]
    kept = [
        (x, y)
        for x, y in zip(*sides, strict=True)
        if longest is None or max(len(x), len(y)) <= longest
    ]
    return Pairs([x for x, _ in kept], [y for _, y in kept])
