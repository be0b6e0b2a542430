"""Sample and error inputs of `sparse_attention`: what its tests loop over, on every device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = ["AttentionSample", "attention_errors", "attention_samples"]


@dataclass(frozen=True)
class AttentionSample:
    """One call: `sparse_attention(q, k, v, compile_mask(mask, tile), **options)`."""

    name: str
    mask: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    options: dict[str, Any] = field(default_factory=dict)


def _pruned(heads: int, queries: int, keys: int, generator: torch.Generator) -> Tensor:
    """What pruning makes: a band, the first columns, some other columns, a few single cells."""
    row = torch.arange(queries)[:, None]
    column = torch.arange(keys)[None]
    masks = []
    for head in range(heads):
        mask = ((row - column).abs() < 4 + 9 * head) | (column < 2)
        mask = mask | (torch.rand(1, keys, generator=generator) < 0.05)
        masks.append(mask | (torch.rand(queries, keys, generator=generator) < 0.003))
    return torch.stack(masks)


def _blocks(heads: int, queries: int, keys: int, generator: torch.Generator) -> Tensor:
    blocks = torch.rand(heads, -(-queries // 64), -(-keys // 64), generator=generator) < 0.4
    return blocks.repeat_interleave(64, 1).repeat_interleave(64, 2)[:, :queries, :keys]


def attention_samples(dtype: torch.dtype, device: str) -> Iterator[AttentionSample]:
    """Yield small calls that together reach every branch of every implementation."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    def sample(
        name: str,
        mask: Tensor,
        key_heads: int | None = None,
        widths: tuple[int, int] = (32, 32),
        sizes: tuple[int, int] | None = None,
        **options: Any,
    ) -> AttentionSample:
        heads, rows, columns = mask.shape
        queries, keys = sizes or (rows, columns)
        shared = key_heads or heads
        q = draw(2, queries, heads, widths[0]).transpose(1, 2)
        k, v = (draw(2, shared, keys, width) for width in widths)
        return AttentionSample(name, mask.to(device), q, k, v, options)

    pruned = _pruned(2, 160, 160, generator)
    ragged = _pruned(4, 130, 201, generator)
    triangle = torch.ones(160, 160, dtype=torch.bool).tril()
    blocks = _blocks(2, 192, 256, generator)
    ones = torch.ones(2, 96, 128, dtype=torch.bool)
    holes = ragged.clone()
    holes[1, 7:90] = False
    holes[2] = False
    lonely = torch.zeros(2, 128, 96, dtype=torch.bool)
    lonely[..., 5] = True

    def padding(keys: int) -> Tensor:
        return (torch.arange(keys) < torch.tensor([keys, keys // 2])[:, None, None, None]).to(
            device
        )

    yield sample("pruned", pruned)
    yield sample("causal", pruned & triangle)
    yield sample("triangle", triangle.expand(2, -1, -1))
    yield sample("blocks", blocks)
    yield sample("everything", ones)
    yield sample("some heads whole", torch.cat([pruned, torch.ones(1, 160, 160).bool()]))
    yield sample("equal heads", ragged[:1].expand(4, -1, -1))
    yield sample("ragged", ragged, widths=(32, 64))
    yield sample("grouped heads", ragged, key_heads=2)
    yield sample("rows without keys", holes)
    yield sample("one key", lonely)
    yield sample("nothing", torch.zeros(1, 64, 64, dtype=torch.bool))
    yield sample("scale", pruned, scale=0.5)
    yield sample("negative scale", pruned, scale=-0.25)
    yield sample("padding", ragged, key_heads=1, attn_mask=padding(201))
    yield sample("padding, rows without keys", holes, attn_mask=padding(201))
    yield sample("padding, everything", ones, attn_mask=padding(128))
    cells = (torch.rand(1, 2, 160, 160, generator=generator) < 0.6).to(device)
    yield sample("mask per row", pruned, attn_mask=cells)
    yield sample("additive per key", ragged, attn_mask=draw(2, 1, 1, 201))
    yield sample("additive per row", pruned, attn_mask=draw(1, 1, 160, 160))
    yield sample("large biases", pruned, attn_mask=draw(1, 1, 160, 160) * 8 - 100)
    dropping = draw(2, 2, 160, 160).masked_fill(~cells, -torch.inf)
    yield sample("additive, dropping", pruned, attn_mask=dropping)
    yield sample("causal at run time", pruned, is_causal=True)
    yield sample("causal twice", pruned & triangle, is_causal=True, attn_mask=padding(160))
    yield sample("cache", pruned & triangle, sizes=(3, 100), is_causal=True, q_offset=97)
    yield sample("prompt", pruned & triangle, sizes=(100, 100), is_causal=True)
    yield sample("fewer keys", ragged, sizes=(130, 150))


def attention_errors() -> Iterator[tuple[str, Callable[[], tuple[Tensor, Tensor, Tensor]], Any]]:
    """Yield (part of the message, q k v, options) of calls on a (2, 64, 64) layout that refuse."""

    def tensors(
        q: tuple[int, ...] = (1, 2, 64, 8),
        k: tuple[int, ...] = (1, 2, 64, 8),
        v: tuple[int, ...] = (1, 2, 64, 8),
        dtype: torch.dtype = torch.float32,
    ) -> Callable[[], tuple[Tensor, Tensor, Tensor]]:
        return lambda: (torch.zeros(q), torch.zeros(k, dtype=dtype), torch.zeros(v))

    nothing: dict[str, Any] = {}
    yield "four dimensions", tensors(q=(2, 64, 8)), nothing
    yield "one floating dtype", tensors(dtype=torch.float64), nothing
    yield "batch sizes agree", tensors(k=(2, 2, 64, 8)), nothing
    yield "same heads and length", tensors(v=(1, 2, 63, 8)), nothing
    yield "one head width", tensors(k=(1, 2, 64, 16)), nothing
    yield "the layout's 2 heads", tensors(q=(1, 3, 64, 8)), nothing
    yield "multiple of k's", tensors(k=(1, 4, 64, 8), v=(1, 4, 64, 8)), nothing
    yield "lie inside the layout's", tensors(q=(1, 2, 65, 8)), nothing
    yield "lie inside the layout's", tensors(k=(1, 2, 65, 8), v=(1, 2, 65, 8)), nothing
    yield "lie inside the layout's", tensors(), {"q_offset": 1}
    yield "the layout is on", tensors(), {"to": "meta"}
    yield "broadcasts to", tensors(), {"attn_mask": torch.ones(3, 1, 1, 64).bool()}
    yield "bool or floating", tensors(), {"attn_mask": torch.ones(64, 64).int()}
