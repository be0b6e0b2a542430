"""Byte-pair tokenizers (Sennrich et al. 2016): trained on a corpus once, found again by name.

They work on bytes, so that no text is unknown. A text becomes its tokens and `END`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor

from fxpress.environment import cache_folder
from fxpress.zoo import corpora

__all__ = ["END", "PAD", "START", "decode", "encode", "file_name", "load", "pad", "train"]

PAD, START, END = range(3)
SPECIAL = ["<pad>", "<s>", "</s>"]
SHIPPED = Path(__file__).parent / "trained"
SUFFIX = ".tokenizer"  # JSON, as the library writes it; the cards beside it are the .json


def train(texts: Iterable[str], vocabulary: int) -> Any:
    """A `tokenizers.Tokenizer` of so many tokens; the same one for the same texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {SPECIAL[END]}", special_tokens=[(SPECIAL[END], END)]
    )
    return tokenizer


@cache
def load(corpus: str, fields: tuple[str, ...], vocabulary: int) -> Any:
    """The tokenizer of the train split of a corpus: the one that ships, or else trained once.

    Args:
        corpus: a name that `corpora.load` takes.
        fields: the texts of a row; their tokens are shared.
        vocabulary: number of tokens, of which 259 are bytes and marks.

    Raises:
        CorpusError: it does not ship, and the corpus is not to be had.
    """
    name = file_name(corpus, fields, vocabulary)
    if (SHIPPED / name).is_file():
        return _read(SHIPPED / name)
    folder = cache_folder() / "tokenizers"
    folder.mkdir(exist_ok=True)
    with FileLock(folder / f"{name}.lock"):
        if not (folder / name).is_file():
            rows = corpora.load(corpus, "train")
            made = train((row[field] for row in rows for field in fields), vocabulary)
            made.save(str(folder / f"{name}.partial"), pretty=False)
            (folder / f"{name}.partial").replace(folder / name)
    return _read(folder / name)


def _read(path: Path) -> Any:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.encode_special_tokens = True  # a text that holds a mark's name is text
    return tokenizer


def file_name(corpus: str, fields: tuple[str, ...], vocabulary: int) -> str:
    """The file of a tokenizer, of what `load` takes."""
    name = f"{corpus}-{'-'.join(fields)}-{vocabulary}"
    return name.replace(":", "-").replace("/", "-") + SUFFIX


def beside(corpus: str, fields: tuple[str, ...], vocabulary: int) -> dict[str, str]:
    """The tokenizer, of what `load` takes, as a file to write beside weights."""
    return {file_name(corpus, fields, vocabulary): load(corpus, fields, vocabulary).to_str()}


def encode(tokenizer: Any, texts: Iterable[str]) -> list[list[int]]:
    """The tokens of each text, `END` the last."""
    return [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]


def decode(tokenizer: Any, ids: Tensor) -> list[str]:
    """The texts of rows of tokens (B, T), without their marks."""
    return [str(text).strip() for text in tokenizer.decode_batch(ids.tolist())]


def pad(rows: Sequence[Sequence[int]], value: int = PAD) -> Tensor:
    """Rows of tokens as (B, N) of int64, `value` where one has ended."""
    length = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (length - len(row))] for row in rows])
