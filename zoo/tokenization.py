"""Subword tokenizers: byte-level BPE (Sennrich et al. 2016; Radford et al. 2019), by `tokenizers`.

Any text can be said in its tokens, since every byte is one of them, and the same texts give the
same tokenizer. Tokens 0, 1, 2 are padding, beginning and end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from fxpress.environment import cache_folder
from fxpress.zoo.samples import DATA

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["BEGIN", "END", "PAD", "SPECIAL", "load", "named", "train"]

SPECIAL = ("<pad>", "<s>", "</s>")
PAD, BEGIN, END = range(3)
SHIPPED = DATA / "tokenizers"


def train(texts: Iterable[str], size: int) -> Tokenizer:
    """A tokenizer of at most `size` tokens, learned from texts; it adds no special token itself."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.encode_special_tokens = True  # text that looks like one is text
    return tokenizer


def load(path: Path) -> Tokenizer:
    """A tokenizer that was saved, by its `save(path)`."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.encode_special_tokens = True
    return tokenizer


def named(name: str, size: int, texts: Callable[[], Iterable[str]]) -> Tokenizer:
    """The tokenizer of that many tokens for a corpus: shipped, or in the cache, or trained now.

    Args:
        name: of the corpus.
        size: number of tokens.
        texts: gives what to train it on.
    """
    stem = f"{name.replace('/', '-').replace(':', '-')}-{size}"
    if (shipped := SHIPPED / f"{stem}.json").is_file():
        return load(shipped)
    cached = cache_folder() / "tokenizers"
    cached.mkdir(exist_ok=True)
    path = cached / f"{stem}.json"
    with FileLock(cached / f"{stem}.lock"):
        if not path.is_file():
            partial = path.with_suffix(".partial")
            train(texts(), size).save(str(partial))
            partial.replace(path)
    return load(path)
