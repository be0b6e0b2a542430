"""Masks: the stated share goes, every row keeps a key, baselines have the same share."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxpress.passes.masks import live_cells, random_mask, threshold_masks, window_mask


def maps(heads: int, queries: int, keys: int, seed: int, *, causal: bool) -> torch.Tensor:
    """Random attention maps whose rows sum to one over live cells."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(heads, queries, keys, generator=generator)
    return scores.masked_fill(~live_cells(queries, keys, causal), -torch.inf).softmax(-1)


@given(
    queries=st.integers(1, 40),
    causal=st.booleans(),
    pruned=st.floats(0, 0.95),
    block=st.sampled_from([(1, 1), (4, 4), (16, 16), (8, 1)]),
    scope=st.sampled_from(["layer", "head", "global"]),
    seed=st.integers(0, 99),
)
def test_every_row_keeps_a_live_key_and_nothing_dead_is_kept(
    queries: int, causal: bool, pruned: float, block: tuple[int, int], scope: str, seed: int
) -> None:
    means = {str(i): maps(2, queries, queries, seed + i, causal=causal) for i in range(2)}
    live = {site: live_cells(queries, queries, causal) for site in means}
    masks = threshold_masks(means, live, pruned, block=block, scope=scope)
    for site, mask in masks.items():
        assert mask.any(-1).all()
        assert not (mask & ~live[site]).any()


@pytest.mark.parametrize("scope", ["layer", "head", "global"])
@pytest.mark.parametrize("causal", [False, True])
def test_the_stated_share_of_elements_goes(scope: str, causal: bool) -> None:
    mean = maps(3, 64, 64, 0, causal=causal)
    live = live_cells(64, 64, causal)
    mask = threshold_masks({"a": mean}, {"a": live}, 0.5, block=(1, 1), scope=scope)["a"]
    kept = int(mask.sum()) / (3 * int(live.sum()))
    assert 0.48 < kept < 0.53
    # What goes is the least: nothing kept by the threshold lies below anything pruned by it.
    single = threshold_masks({"a": mean}, {"a": live}, 0.5, block=(1, 1), min_keep_per_row=0)["a"]
    best = mean == mean.amax(-1, keepdim=True)
    assert mean[single & ~best].min() > mean[~single & live].max()


def test_counting_impossible_cells_prunes_fewer_live_ones() -> None:
    mean, live = maps(2, 64, 64, 0, causal=True), live_cells(64, 64, True)
    kept = {
        universe: threshold_masks({"a": mean}, {"a": live}, 0.4, block=(1, 1), universe=universe)
        for universe in ("live", "all")
    }
    assert int(kept["all"]["a"].sum()) > int(kept["live"]["a"].sum())


@given(share=st.floats(0.05, 1.0), causal=st.booleans(), size=st.integers(16, 80))
def test_window_and_random_masks_have_about_the_share(
    share: float, causal: bool, size: int
) -> None:
    live = live_cells(size, size, causal)
    for mask in (
        window_mask(live, share, block=(1, 1))[None],
        random_mask(live, 2, share, block=(1, 1)),
    ):
        assert mask.any(-1).all()
        assert not (mask & ~live).any()
        density = int(mask.sum()) / (mask.shape[0] * int(live.sum()))
        assert share - 0.1 < density < share + 6 / size + 0.1


def test_nothing_is_pruned_at_zero() -> None:
    mean, live = maps(2, 32, 32, 0, causal=True), live_cells(32, 32, True)
    assert torch.equal(threshold_masks({"a": mean}, {"a": live}, 0.0)["a"][0], live)
