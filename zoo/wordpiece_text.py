"""The objective of language models over word pieces: which piece comes next?"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxpress.zoo import corpora, tokenization
from fxpress.zoo.byte_text import count_baselines, gzip_bits
from fxpress.zoo.objectives import IGNORED, Batch, Task, objective, sha256_of
from fxpress.zoo.recipe import RecipeError
from fxpress.zoo.samples import DATA, read_texts

__all__ = ["wordpiece_text"]

FIELDS = ("text",)
VALID_TOKENS = 32_768  # the beginning of the valid split: it is scored again and again
BATCH_TOKENS = 8192  # of a held-out batch
CALIBRATION_ROWS = 4
LINE = 72  # characters


@dataclass(frozen=True)
class Text:
    """A split: its tokens (n,), each document with its end, and its bytes, the ends one each."""

    ids: Tensor
    data: bytes


def _text(tokenizer: Any, texts: list[str]) -> Text:
    ids = [token for row in tokenization.encode(tokenizer, texts) for token in row]
    return Text(torch.tensor(ids), "".join(f"{text}\n" for text in texts).encode())


def _calibration(settings: Mapping[str, Any], path: Path | None, limit: int) -> list[Any]:
    """Batches of 4 windows of a file, or of the novels that come with the zoo.

    A paragraph of those is one line; it is set in lines as books are, and as the corpora are.
    """
    tokenizer = tokenization.load(settings["corpus"], FIELDS, settings["vocabulary"])
    texts = read_texts(path or DATA / "austen" / "calibration.txt")
    if path is None:
        texts = [textwrap.fill(text, LINE) for text in texts]
    ids, memory = _text(tokenizer, ["\n\n".join(texts)]).ids, settings.get("memory", 0)
    windows = ids.unfold(0, memory + settings["length"], settings["length"])
    batches = [_inputs(rows, memory) for rows in windows.split(CALIBRATION_ROWS)[:limit]]
    return [inputs[0] if len(inputs) == 1 else inputs for inputs in batches]


@objective("wordpiece-text", reads_data=True, calibration=_calibration)
def wordpiece_text(
    corpus: str, vocabulary: int, length: int, memory: int = 0, data: Path | None = None
) -> Task:
    """Which piece comes next?

    Perplexity is per piece, and so depends on the tokenizer; bits per byte do not, and compare. A
    window is `length` pieces and the targets one later; a model that remembers is also given the
    `memory` pieces before it. Windows of the test text follow each other, so that each piece but
    the first is predicted once.

    Args:
        corpus: what `corpora.load` takes, with rows of "text".
        vocabulary: pieces of the corpus' tokenizer.
        length: of a window.
        memory: pieces before it that are told, and not asked for.
        data: a folder with train, valid and test, in place of the corpus; the tokenizer stays.

    Raises:
        RecipeError: a split is too short for a window.
        CorpusError: the corpus or folder cannot be read.
    """
    tokenizer = tokenization.load(corpus, FIELDS, vocabulary)
    known, valid, test = (
        _text(tokenizer, list(corpora.load(data or corpus, split)["text"]))
        for split in corpora.SPLITS
    )
    if min(len(part.ids) for part in (known, valid, test)) <= memory + length:
        raise RecipeError(f"{data or corpus} is too short for windows of {memory + length} pieces")

    def draw(rows: int, generator: torch.Generator) -> Batch:
        starts = torch.randint(len(known.ids) - memory - length, (rows, 1), generator=generator)
        windows = known.ids[starts + torch.arange(memory + length + 1)]
        return _inputs(windows[:, :-1], memory), windows[:, memory + 1 :]

    bytes_of_piece = len(test.data) / len(test.ids)
    return Task(
        draw,
        {
            "valid": _windows(valid.ids[:VALID_TOKENS], length, memory),
            "test": _windows(test.ids, length, memory),
        },
        lambda targets: targets != IGNORED,
        lambda loss, accuracy: {
            "bits_per_byte": loss / math.log(2) / bytes_of_piece,
            "perplexity_per_token": math.exp(loss),
            "accuracy": accuracy,
        },
        "bits_per_byte",
        {
            "gzip -9": gzip_bits(test.data),
            **{
                f"{name} of tokens": bits / bytes_of_piece
                for name, bits in count_baselines(known.ids, test.ids, vocabulary).items()
            },
        },
        sha256_of(known.ids, valid.ids, test.ids),
        beside=tokenization.beside(corpus, FIELDS, vocabulary),
    )


def _inputs(windows: Tensor, memory: int) -> tuple[Tensor, ...]:
    """What a model takes of windows (B, M + N): the last N pieces, and the M before if any."""
    ids = windows[:, memory:]
    return (ids, windows[:, :memory]) if memory else (ids,)


def _windows(ids: Tensor, length: int, memory: int) -> list[Batch]:
    """Batches of windows that follow each other; the last is padded.

    Those at the beginning, which have fewer than `memory` pieces before them, are batches of their
    own.
    """
    short = -(len(ids) - 1) % length
    read = torch.cat([ids[:-1], ids.new_full((short,), tokenization.PAD)])
    targets = torch.cat([ids[1:], ids.new_full((short,), IGNORED)]).view(-1, length)
    first = -(-memory // length)  # windows with too few before them
    batches = [
        (_inputs(read[None, : (i + 1) * length], i * length), targets[i : i + 1])
        for i in range(first)
    ]
    rest = read[first * length - memory :].unfold(0, memory + length, length)
    rows = max(1, BATCH_TOKENS // length)
    pairs = zip(rest.split(rows), targets[first:].split(rows), strict=True)
    return batches + [(_inputs(windows, memory), asked) for windows, asked in pairs]
