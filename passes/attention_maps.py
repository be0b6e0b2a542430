"""Observers of attention at work: mean maps, and what each key column is worth to a tile of rows.

Sums of the mean maps are int64 fixed point: batch order and sharding change no bit. Padded cells
are excluded, and every cell has its own count.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fxpress.errors import CalibrationError
from fxpress.passes.masks import Block, pool_blocks, unpool
from fxpress.passes.sites import AttentionSite

__all__ = ["AttentionCall", "MeanAttention", "attention_calls"]

_FRACTION_BITS = 22  # of the fixed point: errors below 2.4e-7 of a probability


@dataclass(frozen=True)
class AttentionCall:
    """One batch element of one attention call, heads expanded.

    Attributes:
        p: probabilities (H, Nq, Nk), 0 in rows without a key.
        v: values (H, Nk, Dv).
        valid_queries: bool (Nq,), False for padding.
        valid_keys: bool (Nk,), False for padding.
    """

    p: Tensor
    v: Tensor
    valid_queries: Tensor
    valid_keys: Tensor


def attention_calls(site: AttentionSite, inputs: Mapping[str, Any]) -> list[AttentionCall]:
    """What an attention node computed, one batch element at a time.

    Args:
        site: the attention.
        inputs: values of the node's inputs by node name.

    Raises:
        CalibrationError: padding on the left, which shifts positions against a static mask.
    """
    q, k, v = (inputs[node.name].float() for node in (site.q, site.k, site.v))
    mask_node = _mask_argument(site.node)
    mask = inputs[mask_node.name] if mask_node is not None else None
    return [_one(site, q[b], k[b], v[b], _element(mask, b)) for b in range(q.shape[0])]


def _mask_argument(node: fx.Node) -> fx.Node | None:
    mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
    return mask if isinstance(mask, fx.Node) else None


def _element(mask: Tensor | None, index: int) -> Tensor | None:
    """The mask of one batch element, (1 or H, 1 or Nq, 1 or Nk)."""
    if mask is None or mask.ndim < 4:
        return mask
    return mask[index if mask.shape[0] > 1 else 0]


def _one(
    site: AttentionSite, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
) -> AttentionCall:
    group = q.shape[0] // k.shape[0]
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    queries, keys = q.shape[1], k.shape[1]
    # Whole maps are large: every step over one is taken only where it changes something.
    scores = (q * site.scale) @ k.transpose(-1, -2)
    causal = torch.ones(queries, keys, dtype=torch.bool, device=q.device)
    if site.is_causal:
        causal = causal.tril()
        scores = scores.masked_fill_(~causal, -torch.inf)
    if mask is None:
        whole = causal.new_ones(keys)
        return AttentionCall(scores.softmax(-1), v, whole.new_ones(queries), whole)
    is_open = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    scores = scores.masked_fill(~is_open, -torch.inf) if is_open is mask else scores + mask.float()
    valid = _valid_keys(is_open, causal)
    _refuse_left_padding(valid, site)
    reachable = (scores > torch.finfo(torch.float32).min / 2).any(-1, keepdim=True)
    p = torch.where(reachable, scores.softmax(-1), 0.0)
    own = valid if queries == keys and site.kind != "cross" else valid.new_ones(queries)
    return AttentionCall(p, v, own, valid)


def _valid_keys(allowed: Tensor, causal: Tensor) -> Tensor:
    """A key that no row may see, though causality would let some, is padding."""
    whole = torch.broadcast_to(allowed, (*allowed.shape[:-2], *causal.shape)) & causal
    return whole.flatten(0, -2).any(0)


def _refuse_left_padding(valid: Tensor, site: AttentionSite) -> None:
    if not bool(valid[0]) and bool(valid.any()):
        raise CalibrationError(
            f"{site.name}: calibration batches are padded on the left, which shifts positions "
            "against a static mask; pad on the right"
        )


@dataclass
class MeanAttention:
    """Mean attention map of a site over the calibration set (arXiv 2012.02030, section 3).

    A[h, i, j] = sum over batches and elements of p[h, i, j] valid[i] valid[j] / count[i, j].

    Attributes:
        site: the attention.
        pool: cells that are summed together while the maps are computed, (1, 1) for none.
    """

    site: AttentionSite
    pool: Block = (1, 1)
    _sums: Tensor = field(default_factory=lambda: torch.zeros(0, 0, 0, dtype=torch.int64))
    _counts: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.int64))
    _shape: tuple[int, int] = (0, 0)

    @property
    def node(self) -> fx.Node:
        """The attention node."""
        return self.site.node

    def observe(self, inputs: Mapping[str, Any], _output: Any) -> None:
        """Add one call."""
        for call in attention_calls(self.site, inputs):
            valid = call.valid_queries[:, None] & call.valid_keys[None]
            fixed = (call.p * valid).mul(1 << _FRACTION_BITS).round().to(torch.int64)
            self._grow(fixed.shape[0], fixed.shape[1], fixed.shape[2])
            sums = pool_blocks(fixed, self.pool).cpu()
            counts = pool_blocks(valid.to(torch.int64), self.pool).cpu()
            self._sums[:, : sums.shape[1], : sums.shape[2]] += sums
            self._counts[: counts.shape[0], : counts.shape[1]] += counts

    def _grow(self, heads: int, queries: int, keys: int) -> None:
        """Make room for the longest call so far."""
        self._shape = (max(self._shape[0], queries), max(self._shape[1], keys))
        rows, columns = (-(-n // b) for n, b in zip(self._shape, self.pool, strict=True))
        missing = (rows - self._sums.shape[1], columns - self._sums.shape[2])
        if not self._sums.shape[0]:
            self._sums = self._sums.new_zeros(heads, 0, 0)
        if missing != (0, 0):
            pad = (0, missing[1], 0, missing[0])
            self._sums, self._counts = F.pad(self._sums, pad), F.pad(self._counts, pad)

    @property
    def shape(self) -> tuple[int, int]:
        """(Nq, Nk) of the longest call."""
        return self._shape

    def mean(self) -> Tensor:
        """The map (H, Nq, Nk) in fp32; a pooled one is repeated over its blocks."""
        scaled = self._sums.double() / (1 << _FRACTION_BITS)
        mean = (scaled / self._counts.clamp_min(1)).float()
        return mean if self.pool == (1, 1) else unpool(mean, self.pool, self._shape)
