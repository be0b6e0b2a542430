"""G2P: spelling to phonemes, a pretrained GRU sequence-to-sequence model (Park and Kim 2019).

Encoder and decoder are one GRU of width 256 each; 29 letters and marks, 74 phonemes and marks (with
stress). The words that it is scored on come from the dictionary that it was trained on: its score
says whether it is the same model, not how well it does on new words.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fxpress.zoo import corpora, tokenization
from fxpress.zoo.corpora import Row
from fxpress.zoo.decoding import State, greedy
from fxpress.zoo.pretrained import Package, load_fetched, require
from fxpress.zoo.registry import Score, model
from fxpress.zoo.samples import DATA, read_rows
from fxpress.zoo.translation import sample

__all__ = ["G2P", "error_rates", "pronounce", "spell"]

PACKAGE = Package(
    "g2p-en==2.1.0",
    r"/checkpoint20\.npz$",
    "checkpoint20.npz",
    "b8af35e4596d8dd5836dfd3fe9b2ba4f97b9c311efe8879544cbcfcbd566d8c6",
)
LETTERS = ["<pad>", "<unk>", "</s>", *"abcdefghijklmnopqrstuvwxyz"]
PHONEMES = """
<pad> <unk> <s> </s>
AA0 AA1 AA2 AE0 AE1 AE2 AH0 AH1 AH2 AO0 AO1 AO2 AW0 AW1 AW2 AY0 AY1 AY2 B CH D DH EH0 EH1 EH2
ER0 ER1 ER2 EY0 EY1 EY2 F G HH IH0 IH1 IH2 IY0 IY1 IY2 JH K L M N NG OW0 OW1 OW2 OY0 OY1 OY2
P R S SH T TH UH0 UH1 UH2 UW UW0 UW1 UW2 V W Y Z ZH
""".split()  # noqa: SIM905
PAD, UNKNOWN = 0, 1
ROWS, LIMIT = 8, 20  # words of a batch; most phonemes of a word
SAMPLE_SIZE = 500  # words of the test split


class G2P(nn.Module):
    """Letters to phonemes.

    Args:
        width: of embeddings and states.
    """

    start, end = PHONEMES.index("<s>"), PHONEMES.index("</s>")

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.encoder_embedding = nn.Embedding(len(LETTERS), width)
        self.encoder = nn.GRU(width, width, batch_first=True)
        self.decoder_embedding = nn.Embedding(len(PHONEMES), width)
        self.decoder = nn.GRU(width, width, batch_first=True)
        self.output = nn.Linear(width, len(PHONEMES))

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Logits (B, T, 74) of the phoneme after each of `target` (B, T), its first the start.

        `source` (B, N) holds letters, their end, and padding to the right.
        """
        (h,) = self.encode(source)
        y, _ = self.decoder(self.decoder_embedding(target), h[None])
        logits: Tensor = self.output(y)
        return logits

    def encode(self, source: Tensor) -> State:
        """The decoder's first state (B, width): the encoder's at the end of each word."""
        y, _ = self.encoder(self.encoder_embedding(source))
        last = (source != PAD).sum(1)[:, None, None] - 1
        return (y.gather(1, last.expand(-1, 1, y.shape[-1]))[:, 0],)

    def step(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """Logits (B, 74) of what follows the phonemes `tokens` (B,), and the state after them."""
        y, h = self.decoder(self.decoder_embedding(tokens[:, None]), state[0][None].contiguous())
        return self.output(y[:, 0]), (h[0],)


def spell(words: Sequence[str]) -> Tensor:
    """The letters of each word and its end, (B, N), padded; those not a to z are unknown."""
    ids = {letter: i for i, letter in enumerate(LETTERS)}
    rows = [[ids.get(x, UNKNOWN) for x in word.lower()] + [ids["</s>"]] for word in words]
    return tokenization.pad(rows, PAD)


def pronounce(model: G2P, words: Sequence[str]) -> list[list[str]]:
    """The phonemes of each word, by greedy decoding; at most 20."""
    said = greedy(model, spell(words), LIMIT)
    return [[PHONEMES[i] for i in row if i != model.end] for row in said.tolist()]


def error_rates(said: Sequence[Sequence[str]], meant: Sequence[Sequence[str]]) -> dict[str, float]:
    """Phoneme error rate, as jiwer has it for words, and the share of words that are right.

    Args:
        said: phonemes of each word.
        meant: its pronunciations, each a string with spaces between phonemes; the one with the
            fewest changes counts.
    """
    require("jiwer")
    import jiwer

    changes, phonemes, right = 0, 0, 0
    for sounds, pronunciations in zip(said, meant, strict=True):
        found = [jiwer.process_words(m, " ".join(sounds)) for m in pronunciations]
        nearest = min(found, key=_changes)
        changes += _changes(nearest)
        phonemes += nearest.hits + nearest.substitutions + nearest.deletions
        right += not _changes(nearest)
    return {"phoneme_error_rate": changes / phonemes, "words_right": right / len(meant)}


def _changes(measured: Any) -> int:
    return int(measured.substitutions + measured.deletions + measured.insertions)


def _measure(model: Any) -> dict[str, float]:
    """Of words of the dictionary's test split, drawn by `translation.sample`."""
    rows = sample(corpora.load("cmudict", "test"), SAMPLE_SIZE)
    said = pronounce(model, [row["word"] for row in rows])
    return error_rates(said, [row["sounds"] for row in rows])


SCORE = Score(
    "spelling to phonemes",
    f"{SAMPLE_SIZE} words of CMU's dictionary",
    "phoneme_error_rate",
    _measure,
)


# The weights --------------------------------------------------------------------------------------


def _convert(raw: Path, out: Path) -> None:
    """The gates of the NumPy checkpoint are in torch's order; only the names change."""
    with np.load(raw / PACKAGE.weights, allow_pickle=False) as arrays:
        found = {name: torch.tensor(arrays[name]) for name in arrays.files}
    state = {"output.weight": found["fc_w"], "output.bias": found["fc_b"]}
    for ours, theirs in (("encoder", "enc"), ("decoder", "dec")):
        state[f"{ours}_embedding.weight"] = found[f"{theirs}_emb"]
        for kind, part in product(("weight", "bias"), ("ih", "hh")):
            state[f"{ours}.{kind}_{part}_l0"] = found[f"{theirs}_{kind[0]}_{part}"]
    save_file(state, out / "model.safetensors")


def _calibration(path: Path | None = None, limit: int = 32) -> list[tuple[Tensor, Tensor]]:
    """Batches of 8 words of a .jsonl file with "word" and "sounds", phonemes with spaces."""
    rows = read_rows(path or DATA / "pronunciations" / "calibration.jsonl", ("word", "sounds"))
    return [_batch(rows[i : i + ROWS]) for i in range(0, len(rows), ROWS)][:limit]


def _batch(rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    """Letters, and the phonemes that the decoder reads."""
    ids = {phoneme: i for i, phoneme in enumerate(PHONEMES)}
    read = [[G2P.start, *(ids.get(x, UNKNOWN) for x in row["sounds"].split())] for row in rows]
    return spell([row["word"] for row in rows]), tokenization.pad(read, PAD)


@model(
    "g2p",
    description="spelling to phonemes (English), a GRU encoder-decoder of 0.8 M parameters",
    license="Apache-2.0",
    source=f"Park and Kim 2019; PyPI package {PACKAGE.requirement}",
    calibration=_calibration,
    score=SCORE,
)
def g2p(pretrained: bool = False, **sizes: Any) -> nn.Module:
    """`G2P(**sizes)`, small without trained weights."""
    if not pretrained:
        return G2P(**{"width": 32} | sizes).eval()
    return load_fetched(G2P, PACKAGE, _convert, sizes)
