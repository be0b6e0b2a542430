"""Settings of `prune-attention`, read by the pass and by what chooses its masks."""

from __future__ import annotations

from dataclasses import dataclass

from fxpress.errors import PlanError
from fxpress.passes.masks import Block

__all__ = ["PruneAttentionConfig"]

_CHOICES = {
    "scope": ("layer", "head", "global"),
    "universe": ("live", "all"),
    "granularity": ("block", "element", "column"),
    "survive": ("mean", "any"),
    "mask": ("learned", "window", "random"),
}


@dataclass(frozen=True)
class PruneAttentionConfig:
    """Settings.

    Attributes:
        pruned: share of the universe to prune, in [0, 1); None: as far as the budget allows.
        mask: `"learned"` from mean attention, or the baselines `"window"` and `"random"`.
        scope: what shares a threshold: `"layer"`, `"head"` or `"global"`.
        universe: percentile over `"live"` cells or over `"all"` (the paper's own counting).
        granularity: `"block"` (block x block), `"element"`, or `"column"` (one column of `rows`).
        block: side of a block.
        rows: query rows of a tile for columns.
        survive: a block survives by its `"mean"` or if `"any"` cell survives.
        min_keep_per_row: keys that every row keeps.
        sinks: first keys that the window keeps.
        unit: neighboring columns chosen together when `pruned` is None; None: 1 on CPU, 16 on CUDA.
        seed: of random masks.
    """

    pruned: float | None = None
    mask: str = "learned"
    scope: str = "layer"
    universe: str = "live"
    granularity: str = "block"
    block: int = 16
    rows: int = 128
    survive: str = "mean"
    min_keep_per_row: int = 1
    sinks: int = 4
    unit: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise PlanError(
                    f"prune-attention: {name} is {getattr(self, name)!r}: give one of {allowed}"
                )
        pruned = self.pruned
        if pruned is not None and not 0 <= pruned < 1:
            raise PlanError(f"prune-attention: pruned is {pruned!r}: give a share in [0, 1)")
        for name in ("block", "rows", "min_keep_per_row"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise PlanError(f"prune-attention: {name} is {value!r}: give a whole number >= 1")

    @property
    def cells(self) -> Block:
        """Rows and columns that are kept or pruned together."""
        if self.granularity == "element":
            return (1, 1)
        return (self.block, self.block) if self.granularity == "block" else (self.rows, 1)
