"""Static attention masks: from mean attention maps and from patterns, at a stated sparsity.

All functions are pure. A mask is bool (H, Nq, Nk), True = kept. `live` is the universe of cells
that attention could use at all (causally possible, not padding), bool (Nq, Nk).

Source: Rugina et al. 2020 (arXiv 2012.02030): one percentile threshold over the mean attention
map, prune where A <= tau; the mask is applied before the softmax, so that survivors renormalize.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "live_cells",
    "pool_blocks",
    "random_mask",
    "threshold_masks",
    "unpool",
    "window_mask",
]

Block = tuple[int, int]
"""Rows and columns of the blocks that are kept or pruned together; (1, 1): single elements."""


def live_cells(queries: int, keys: int, causal: bool) -> Tensor:
    """Cells that attention can use: all, or those with key <= query, aligned at the first row."""
    cells = torch.ones(queries, keys, dtype=torch.bool)
    return cells.tril() if causal else cells


def pool_blocks(values: Tensor, block: Block) -> Tensor:
    """Sums of (..., Nq, Nk) over blocks; the ragged ends count as zeros."""
    rows, columns = block
    padded = F.pad(values, (0, -values.shape[-1] % columns, 0, -values.shape[-2] % rows))
    split = padded.unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows))
    total: Tensor = split.sum((-3, -1))
    return total


def unpool(blocks: Tensor, block: Block, shape: tuple[int, int]) -> Tensor:
    """Blocks (..., nq, nk) repeated to cells (..., Nq, Nk)."""
    wide = blocks.repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)
    return wide[..., : shape[0], : shape[1]]


def threshold_masks(
    means: Mapping[str, Tensor],
    live: Mapping[str, Tensor],
    pruned: float,
    *,
    block: Block = (16, 16),
    scope: str = "layer",
    universe: str = "live",
    survive: str = "mean",
    min_keep_per_row: int = 1,
) -> dict[str, Tensor]:
    """Attention Pruning's masks: everything at or below a percentile of mean attention goes.

    Args:
        means: per site, the mean attention map (H, Nq, Nk).
        live: per site, the cells that attention can use (Nq, Nk).
        pruned: share of the universe's blocks to prune, in [0, 1).
        block: granularity.
        scope: what shares a threshold: `"head"`, `"layer"` (all heads of a site), `"global"`.
        universe: whether the percentile is taken over `"live"` cells or `"all"` (the authors'
            counting, in which causally impossible cells count as pruned).
        survive: a block survives by its `"mean"` or if `"any"` of its cells survives.
        min_keep_per_row: keys that every row keeps, its best ones, where it has so many.
    """
    scores = {site: _block_scores(means[site], live[site], block, survive) for site in means}
    possible = {site: pool_blocks(live[site].float(), block) > 0 for site in means}
    counted = {
        site: scores[site].masked_fill(~possible[site], -math.inf if universe == "live" else 0.0)
        for site in means
    }
    thresholds = _thresholds(counted, pruned, scope)
    masks = {}
    for site, score in scores.items():
        kept = (counted[site] > thresholds[site]) & possible[site]
        kept = _keep_best(kept, score.masked_fill(~possible[site], -math.inf))
        cells = unpool(kept, block, means[site].shape[-2:]) & live[site]  # type: ignore[arg-type]
        masks[site] = _keep_rows(cells, means[site], live[site], min_keep_per_row)
    return masks


def _block_scores(mean: Tensor, live: Tensor, block: Block, survive: str) -> Tensor:
    if block == (1, 1):
        return mean
    if survive == "any":
        rows, columns = block
        padded = F.pad(mean * live, (0, -mean.shape[-1] % columns, 0, -mean.shape[-2] % rows))
        return F.max_pool2d(padded[:, None], block)[:, 0]
    count = pool_blocks(live.to(mean.dtype), block).clamp_min(1)
    return pool_blocks(mean * live, block) / count


def _thresholds(counted: Mapping[str, Tensor], pruned: float, scope: str) -> dict[str, Tensor]:
    """Per site, tau broadcastable over (H, nq, nk): at least `pruned` of what counts is <= tau."""
    if scope == "global":
        tau = _percentile(torch.cat([c.flatten() for c in counted.values()]), pruned)
        return dict.fromkeys(counted, tau)
    if scope == "layer":
        return {site: _percentile(c.flatten(), pruned) for site, c in counted.items()}
    return {
        site: torch.stack([_percentile(head.flatten(), pruned) for head in c])[:, None, None]
        for site, c in counted.items()
    }


def _percentile(values: Tensor, share: float) -> Tensor:
    """The smallest value with at least `share` of the finite values at or below it."""
    ordered = values[values > -math.inf].sort().values
    count = math.ceil(share * ordered.numel() - 1e-9)
    return ordered[count - 1] if count > 0 else values.new_tensor(-math.inf)


def _keep_best(kept: Tensor, score: Tensor) -> Tensor:
    """Rows of blocks that would lose everything keep their best block."""
    best = torch.zeros_like(kept).scatter_(-1, score.argmax(-1, keepdim=True), True)
    return torch.where(kept.any(-1, keepdim=True), kept, best & (score > -math.inf))


def _keep_rows(mask: Tensor, mean: Tensor, live: Tensor, minimum: int) -> Tensor:
    """Every row keeps at least its `minimum` best live keys (all of them, where it has fewer)."""
    short = mask.sum(-1) < minimum
    if not short.any():
        return mask
    score = mean.masked_fill(~live, -math.inf)
    top = score.topk(min(minimum, mean.shape[-1]), -1)
    best = torch.zeros_like(mask).scatter_(-1, top.indices, top.values > -math.inf)
    return torch.where(short[..., None], mask | best, mask)


def window_mask(live: Tensor, share: float, *, sinks: int = 4, block: Block = (16, 16)) -> Tensor:
    """A window around the diagonal and the first `sinks` keys, of about `share` of the live cells.

    Baseline and candidate: a learned mask that loses to it at equal tiles is a defect.
    """
    queries, keys = live.shape
    blocks = (-(-queries // block[0]), -(-keys // block[1]))
    rows = torch.arange(blocks[0])[:, None] * block[0] / max(queries, 1)
    columns = torch.arange(blocks[1])[None] * block[1] / max(keys, 1)
    distance = unpool((rows - columns).abs()[None], block, (queries, keys))[0]
    first = (torch.arange(keys) < sinks)[None] & live
    # The first keys come first; then whole rings of equal distance, symmetric in blocks.
    ordered = distance.masked_fill(~live, math.inf).masked_fill(first, -1.0).flatten().sort().values
    count = max(1, round(share * int(live.sum())))
    near = (distance <= ordered[count - 1]) & live
    own = distance == distance.masked_fill(~live, math.inf).amin(-1, keepdim=True)
    return near | first | (own & live)


def random_mask(
    live: Tensor, heads: int, share: float, *, seed: int = 0, block: Block = (16, 16)
) -> Tensor:
    """Random blocks (H, Nq, Nk) of about `share` of the live ones; every row keeps a key."""
    generator = torch.Generator().manual_seed(seed)
    possible = pool_blocks(live.float(), block) > 0
    score = torch.rand(heads, *possible.shape, generator=generator)
    score = score.masked_fill(~possible, -math.inf)
    tau = _percentile(score.flatten(), 1 - share)
    kept = _keep_best((score > tau) & possible, score)
    cells = unpool(kept, block, (live.shape[0], live.shape[1])) & live
    return _keep_rows(cells, torch.rand(cells.shape, generator=generator), live, 1)
