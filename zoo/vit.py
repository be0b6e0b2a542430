"""Classifiers of small images: a Vision Transformer, and a linear one to compare it with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fxpress.zoo.fashion_mnist import SIDE
from fxpress.zoo.image_classification import images
from fxpress.zoo.pretrained import no_pretrained
from fxpress.zoo.registry import model
from fxpress.zoo.seq2seq_transformer import EncoderBlock

__all__ = ["LinearClassifier", "VisionTransformer"]


class VisionTransformer(nn.Module):
    """Patches, a pre-norm Transformer encoder over them, the mean of its states, a linear head.

    After Dosovitskiy et al. 2021, with the mean in the place of a class token (Beyer et al. 2022).

    Args:
        classes: C.
        side: of the square images, in pixels, a multiple of `patch`.
        patch: side of a patch, in pixels.
        width: d, a multiple of `heads`.
        layers: number of blocks.
        heads: attention heads.
        dropout: in training, of embeddings and of what a block adds.

    Raises:
        ValueError: `width` is no multiple of `heads`, or `side` none of `patch`.
    """

    def __init__(
        self,
        classes: int = 10,
        side: int = SIDE,
        patch: int = 7,
        width: int = 64,
        layers: int = 2,
        heads: int = 4,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is no multiple of {heads} heads")
        if side % patch:
            raise ValueError(f"side {side} is no multiple of a patch of {patch}")
        self.patches = nn.Conv2d(1, width, patch, stride=patch)
        self.positions = nn.Parameter(torch.randn((side // patch) ** 2, width) * width**-0.5)
        self.blocks = nn.ModuleList(
            EncoderBlock(width, heads, 4 * width, dropout) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, C) of images (B, 1, side, side)."""
        x = self.dropout(self.patches(x).flatten(2).transpose(1, 2) + self.positions)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x).mean(1))
        return logits


class LinearClassifier(nn.Module):
    """Multinomial logistic regression on pixels.

    Args:
        classes: C.
        side: of the square images, in pixels.
    """

    def __init__(self, classes: int = 10, side: int = SIDE) -> None:
        super().__init__()
        self.head = nn.Linear(side * side, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, C) of images (B, 1, side, side)."""
        logits: Tensor = self.head(x.flatten(1))
        return logits


@model(
    "vit",
    description="a small Vision Transformer for gray images, untrained",
    license="none",
    source="Dosovitskiy et al. 2021, arXiv 2010.11929",
    calibration=images,
    has_weights=False,
)
def vit(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """`VisionTransformer(**kwargs)`."""
    if pretrained:
        raise no_pretrained("vit")
    return VisionTransformer(**kwargs).eval()


@model(
    "image-linear",
    description="logistic regression on pixels, untrained",
    license="none",
    source="Cox 1958",
    calibration=images,
    has_weights=False,
)
def image_linear(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """`LinearClassifier(**kwargs)`."""
    if pretrained:
        raise no_pretrained("image-linear")
    return LinearClassifier(**kwargs).eval()
