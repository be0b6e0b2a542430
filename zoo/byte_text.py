"""The objective of byte language models: which byte comes next?"""

from __future__ import annotations

import gzip
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxpress.zoo.lm import BYTES, byte_windows
from fxpress.zoo.objectives import IGNORED, Batch, Task, objective, sha256_of
from fxpress.zoo.recipe import RecipeError
from fxpress.zoo.samples import DATA, read_texts

__all__ = ["count_baselines", "gzip_bits", "text", "text_baselines"]

VALID_SHARE = 10  # one part in so many of a training text chooses the best weights


def _calibration(settings: Mapping[str, Any], path: Path | None, limit: int) -> list[Tensor]:
    texts = read_texts(path or DATA / "austen" / "calibration.txt")
    return byte_windows(texts, settings["length"])[:limit]


@objective("text", reads_data=True, calibration=_calibration)
def text(train: str, test: str, length: int, data: Path | None = None) -> Task:
    """Which byte comes next? Files are relative to the zoo's own; the last tenth of train is valid.

    A user's folder holds train.txt and test.txt, or .jsonl.

    A window is `length` inputs and the targets one byte later; windows of a held-out text follow
    each other, so that each byte but the first is predicted once, from `length` bytes or less.
    """
    if data is not None:
        train, test = (_file(data, split) for split in ("train", "test"))
    whole, held_out = (_bytes(DATA / name) for name in (train, test))
    cut = len(whole) - len(whole) // VALID_SHARE
    known, valid = whole[:cut], whole[cut:]
    if min(len(known), len(valid), len(held_out)) <= length:
        raise RecipeError(f"{train} or {test} is too short for windows of {length} bytes")

    def draw(rows: int, generator: torch.Generator) -> Batch:
        starts = torch.randint(len(known) - length, (rows, 1), generator=generator)
        windows = known[starts + torch.arange(length + 1)]
        return (windows[:, :-1],), windows[:, 1:]

    return Task(
        draw,
        {"valid": _windows(valid, length), "test": _windows(held_out, length)},
        lambda targets: targets != IGNORED,
        lambda loss, accuracy: {
            "bits_per_byte": loss / math.log(2),
            "perplexity_per_byte": math.exp(loss),
            "accuracy": accuracy,
        },
        "bits_per_byte",
        text_baselines(known, held_out),
        sha256_of(whole, held_out),
    )


def _file(folder: Path, split: str) -> str:
    """The file of a split; where there is none, the name under which it is missed."""
    path = folder / f"{split}.jsonl"
    return str(path.absolute() if path.exists() else path.with_suffix(".txt").absolute())


def _bytes(path: Path) -> Tensor:
    """The paragraphs of a file as bytes (n,) of int64, a line each."""
    return torch.frombuffer(
        bytearray("\n".join(read_texts(path)).encode()), dtype=torch.uint8
    ).long()


def _windows(data: Tensor, length: int, rows: int = 64) -> list[Batch]:
    """Batches (rows, length) of inputs and targets; the end of the text is padded."""
    short = -(len(data) - 1) % length
    inputs = torch.cat([data[:-1], data.new_zeros(short)]).view(-1, length)
    targets = torch.cat([data[1:], data.new_full((short,), IGNORED)]).view(-1, length)
    return [((x,), y) for x, y in zip(inputs.split(rows), targets.split(rows), strict=True)]


def gzip_bits(text: bytes) -> float:
    """Bits per byte of gzip -9, which knows the text alone."""
    return 8 * len(gzip.compress(text, 9)) / len(text)


def text_baselines(train: Tensor, test: Tensor) -> dict[str, float]:
    """Bits per byte of gzip on the test text, and of byte counts of the training text."""
    return {
        "gzip -9": gzip_bits(bytes(test.tolist())),
        **count_baselines(train, test, BYTES),
    }


def count_baselines(train: Tensor, test: Tensor, symbols: int) -> dict[str, float]:
    """Bits per symbol of a test text (n,), by counts of a training text (m,).

    Counts are smoothed by one for each symbol; the bigram falls back to the unigram (Jelinek and
    Mercer 1980, with the weight of Witten and Bell 1991).
    """
    counts = Counter(train.tolist())
    pairs = Counter(zip(train[:-1].tolist(), train[1:].tolist(), strict=True))
    followers = Counter(first for first, _ in pairs)

    def unigram(symbol: int) -> float:
        return (counts[symbol] + 1) / (len(train) + symbols)

    def bigram(first: int, symbol: int) -> float:
        kinds, seen = followers[first], counts[first]
        alone = unigram(symbol)
        return (pairs[first, symbol] + kinds * alone) / (seen + kinds) if seen else alone

    following = list(zip(test[:-1].tolist(), test[1:].tolist(), strict=True))
    return {
        "unigram": -sum(math.log2(unigram(b)) for _, b in following) / len(following),
        "bigram": -sum(math.log2(bigram(a, b)) for a, b in following) / len(following),
    }
