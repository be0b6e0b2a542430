"""A wide feed-forward network with a vocabulary projection, at batch 1: where factored maps pay.

Residual blocks x + W_2 gelu(W_1 norm(x)) of width 2,048, and a projection to the vocabulary. Every
map is far wider than a tile of the vector-vector-matrix form (Khoury et al. 2020), so that its
cores cost little beside what it saves; the pretrained models of the zoo are too narrow for that.
Weights are random: the model shows speed, and what a form loses on weights not trained for it.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxpress.zoo.pretrained import PretrainedError
from fxpress.zoo.registry import model

__all__ = ["Wide"]

WIDTH, HIDDEN, LAYERS, VOCABULARY = 2048, 4096, 2, 8192


class _Block(nn.Module):
    """x (B, width) -> (B, width)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Add what the feed-forward part makes of x."""
        y: Tensor = x + self.down(F.gelu(self.up(self.norm(x))))
        return y


class Wide(nn.Module):
    """States (B, width) -> scores of the next token (B, vocabulary)."""

    def __init__(
        self,
        width: int = WIDTH,
        hidden: int = HIDDEN,
        layers: int = LAYERS,
        vocabulary: int = VOCABULARY,
    ) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(_Block(width, hidden) for _ in range(layers)))
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of one vector of each row."""
        scores: Tensor = self.head(self.blocks(x))
        return scores


def _calibration(path: Path | None = None, limit: int = 32) -> list[Tensor]:
    """Random states (1, width), as many as asked for: the model has no data of its own.

    Raises:
        PretrainedError: a file is given, which no tokenizer of the model could read.
    """
    if path is not None:
        raise PretrainedError("wide takes no file: it has no tokenizer, and runs on random states")
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, WIDTH, generator=generator) for _ in range(limit)]


@model(
    "wide",
    description="residual feed-forward blocks of width 2,048 and a vocabulary projection, batch 1",
    license="Apache-2.0",
    source="fxpress; random weights",
    calibration=_calibration,
    has_weights=False,
)
def wide(pretrained: bool = False, **sizes: int) -> nn.Module:
    """Build it with random weights; `sizes` are the arguments of `Wide`."""
    if pretrained:
        raise PretrainedError("wide has no trained weights: leave out pretrained=True")
    return Wide(**sizes).eval()
