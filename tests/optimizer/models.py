"""Small models that the tests of the core share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Self-attention with a residual, x (B, N, width)."""

    def __init__(self, width: int = 32, heads: int = 2, *, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, width) -> (B, N, width)."""
        batch, tokens, width = x.shape
        split = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = split.permute(2, 0, 3, 1, 4).unbind(0)
        o = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        mixed: Tensor = self.out(o.transpose(1, 2).reshape(batch, tokens, width))
        return x + mixed


def stack(layers: int = 2, *, causal: bool = False, seed: int = 0) -> nn.Module:
    """Some attention layers with a linear head, the same for the same seed."""
    torch.manual_seed(seed)
    blocks = [Attention(causal=causal) for _ in range(layers)]
    return nn.Sequential(*blocks, nn.Linear(32, 4))


def batches(count: int = 6, tokens: int = 48, seed: int = 1) -> list[Tensor]:
    """Random inputs (2, tokens, 32)."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, tokens, 32, generator=generator) for _ in range(count)]


class Branching(nn.Module):
    """Attention on both sides of a branch on data, which cannot be captured as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.first = stack(1)
        self.scale = 3.0
        self.second = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, 32) -> (B, N, 4)."""
        y = self.first(x)
        if float(y.sum()) > 0:
            y = y * self.scale
        out: Tensor = self.second(y)
        return out
