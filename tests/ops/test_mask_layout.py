"""Compiled masks: exact inversion, honest counts, exchange with other forms, refusals."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxpress.errors import PlanError
from fxpress.ops.mask_layout import LayoutSpec, MaskLayout, compile_mask


def draw_mask(heads: int, queries: int, keys: int, density: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(heads, queries, keys, generator=generator) < density
    mask[:, :, : keys // 3] &= torch.rand(heads, queries, 1, generator=generator) < 0.7
    mask[-1] = mask[0]
    return mask


masks = st.builds(
    draw_mask,
    st.integers(1, 4),
    st.integers(1, 150),
    st.integers(1, 150),
    st.sampled_from([0.0, 0.01, 0.2, 0.9, 1.0]),
    st.integers(0, 99),
)


def rebuild_tiles(layout: MaskLayout) -> Tensor:
    """Read the tile lists back, cell by cell, apart from the bits that come first."""
    facts, rest = layout.facts, list(layout.tensors[3 if layout.facts.empty else 2 :])
    heads, queries, keys = facts.shape
    rows, width = facts.tile
    tiles = -(-queries // rows)
    dense = torch.zeros(heads, tiles, rows, keys + width, dtype=torch.bool)
    jobs = rest.pop(0).tolist()
    assert sorted((head, tile) for head, tile, *_ in jobs) == [*product(range(heads), range(tiles))]
    indices = rest.pop(0) if facts.full else torch.empty(0)
    columns, words = rest or (torch.empty(0), torch.empty(0))
    shifts = torch.arange(32, dtype=torch.int32)
    for head, tile, full_first, full_last, packed_first, packed_last in jobs:
        cells = dense[head, tile]
        for full in indices[full_first:full_last].tolist():
            cells[:, full * width : (full + 1) * width] = True
        for t in range(packed_first, packed_last):
            row, slot = (words[t].T[:, :, None] >> shifts & 1).bool().flatten(1).nonzero().T
            assert not cells[row, columns[t, slot]].any(), "a cell is computed twice"
            cells[row, columns[t, slot]] = True
    return dense.view(heads, tiles * rows, keys + width)[:, :queries, :keys]


@given(masks, st.sampled_from([None, (32, 32), (64, 64), (128, 128)]))
@settings(max_examples=40)
def test_tiles_hold_every_kept_cell_once(mask: Tensor, tile: tuple[int, int] | None) -> None:
    layout = compile_mask(mask, tile, device="cpu", form="tiles")
    assert torch.equal(layout.to_dense(), mask)
    assert torch.equal(rebuild_tiles(layout), mask)


@given(masks)
@settings(max_examples=40)
def test_buckets_invert_and_count(mask: Tensor) -> None:
    layout = compile_mask(mask, device="cpu")
    assert torch.equal(layout.to_dense(), mask)
    assert layout.live_density == pytest.approx(mask.float().mean().item(), abs=1e-6)
    assert layout.tile_density >= layout.live_density
    assert LayoutSpec.parse(layout.spec) == layout.facts
    assert str(layout.facts) == layout.spec


def test_tile_density_counts_tiles() -> None:
    mask = torch.zeros(2, 128, 256, dtype=torch.bool)
    mask[0, :64, 64:128] = True  # one full tile
    mask[0, 64:, 3] = mask[0, 64:, 200] = True  # two columns, packed into one tile
    mask[1, 70, 9] = True  # one cell, one tile
    layout = compile_mask(mask, (64, 64), device="cpu", form="tiles")
    assert layout.tile_density == 3 * 64 * 64 / mask.numel()
    assert layout.live_density == (64 * 64 + 2 * 64 + 1) / mask.numel()


def test_packed_columns_cost_their_density() -> None:
    mask = torch.zeros(3, 512, 512, dtype=torch.bool)
    mask[:, :, ::8] = True
    assert compile_mask(mask, device="cpu").tile_density == 1 / 8


def test_universe_is_the_base_of_the_density() -> None:
    causal = torch.ones(64, 64, dtype=torch.bool).tril()
    mask = (causal & (torch.rand(64, 64) < 0.5)).expand(2, -1, -1)
    layout = compile_mask(mask, device="cpu", universe=causal)
    kept = mask.sum() / (2 * causal.sum())
    assert layout.live_density == pytest.approx(kept.item())
    assert layout.density(causal.expand(2, -1, -1)) == layout.live_density
    assert layout.density(torch.ones_like(mask)) == pytest.approx(mask.float().mean().item())


def test_equal_heads_share_storage() -> None:
    mask = torch.rand(1, 128, 128) < 0.1
    one = compile_mask(mask, device="cpu", form="tiles")
    eight = compile_mask(mask.expand(8, -1, -1), device="cpu", form="tiles")
    assert eight.facts.unique == 1
    grown = [(a.numel(), b.numel()) for a, b in zip(one.tensors, eight.tensors, strict=True)]
    assert [a for a, b in grown if a != b] == [1, one.tensors[2].numel()]  # head map and jobs


def test_longest_tiles_come_first() -> None:
    mask = torch.ones(1, 256, 256, dtype=torch.bool).tril()
    jobs = compile_mask(mask, (64, 64), device="cpu", form="tiles").tensors[2]
    assert jobs[:, 1].tolist() == [3, 2, 1, 0]


def test_jobs_of_about_one_length_stay_with_their_head() -> None:
    mask = torch.rand(3, 512, 512) < 0.3
    jobs = compile_mask(mask, (64, 64), device="cpu", form="tiles").tensors[2]
    assert jobs[:, 0].tolist() == sorted(jobs[:, 0].tolist())


def test_a_layout_made_for_another_device_is_recompiled() -> None:
    mask = torch.rand(2, 64, 64) < 0.3
    tiles = compile_mask(mask, device="cpu", form="tiles", universe=torch.ones(64, 64).bool())
    moved = tiles.to("cpu")
    assert (tiles.facts.form, moved.facts.form) == ("tiles", "buckets")
    assert torch.equal(moved.to_dense(), mask)
    assert moved.facts.possible == tiles.facts.possible


def test_large_masks_compile_in_seconds() -> None:
    mask = (torch.rand(4, 2048, 1) < 0.9) & (torch.rand(4, 1, 2048) < 0.1)
    assert torch.equal(compile_mask(mask, device="cpu", form="tiles").to_dense(), mask)


def exchanges() -> dict[str, Callable[[MaskLayout], MaskLayout]]:
    return {
        "spans": lambda m: MaskLayout.from_spans(m.spans(), *m.shape[1:], device="cpu"),
        "bsr": lambda m: MaskLayout.from_bsr(m.to_bsr((16, 8)), device="cpu"),
        "block mask": lambda m: MaskLayout.from_block_mask(
            m.to_block_mask(), m.shape[0], device="cpu"
        ),
    }


@pytest.mark.filterwarnings("ignore:Sparse BSR:UserWarning")
@pytest.mark.parametrize("name", list(exchanges()))
def test_exchange_forms_round_trip(name: str) -> None:
    mask = draw_mask(3, 144, 272, 0.1, seed=3)
    layout = compile_mask(mask, device="cpu")
    assert torch.equal(exchanges()[name](layout).to_dense(), mask)


def test_block_mask_of_a_batch_is_refused() -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    def keep(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query >= key + batch

    block_mask = create_block_mask(keep, 2, None, 128, 128, device="cpu")
    with pytest.raises(PlanError, match="batch size 1"):
        MaskLayout.from_block_mask(block_mask, heads=2, device="cpu")


@pytest.mark.parametrize(
    ("mask", "options", "message"),
    [
        (torch.ones(4, 4), {}, "a mask is bool"),
        (torch.ones(4, dtype=torch.bool), {}, "a mask is bool"),
        (torch.ones(2, 0, 4, dtype=torch.bool), {}, "not empty"),
        (torch.ones(4, 4, dtype=torch.bool), {"tile": (0, 8)}, "at least 1"),
        (
            torch.ones(4, 4, dtype=torch.bool),
            {"tile": (48, 64), "form": "tiles"},
            "rows and columns are 32",
        ),
        (torch.ones(4, 4, dtype=torch.bool), {"universe": torch.ones(4, 5).bool()}, "universe"),
        (torch.ones(4, 4, dtype=torch.bool), {"form": "rows"}, "no form 'rows'"),
    ],
)
def test_refusals(mask: Tensor, options: dict[str, object], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        compile_mask(mask, device="cpu", **options)  # type: ignore[arg-type]


def test_a_text_that_is_no_spec_is_refused() -> None:
    with pytest.raises(PlanError, match="describes no mask layout"):
        LayoutSpec.parse("tiles;1x2")
