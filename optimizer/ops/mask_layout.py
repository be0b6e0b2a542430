"""Static attention masks, compiled once into the lists that sparse kernels walk.

`compile_mask` turns a bool mask, True where a query may see a key, into a `MaskLayout`: a short
plain string (`.spec`, every size a kernel needs) and a tuple of flat tensors (`.tensors`, which
become buffers of a module). Two forms share the class:

- *tiles* (CUDA, `layout_tiles.py`): per head and tile of query rows, the key tiles that are kept
  whole, and every other kept column packed densely with one bit per cell;
- *buckets* (elsewhere, `layout_buckets.py`): per head and tile of query rows, the packed columns,
  grouped by their number so that one batched call serves a bucket.

Both begin with the mask itself at one bit a cell, which serves whatever a form does not cover.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fxpress.errors import PlanError

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

__all__ = ["Bucket", "LayoutSpec", "MaskLayout", "compile_mask", "unpack_bits"]

Bits = NDArray[np.uint8]


@dataclass(frozen=True)
class Bucket:
    """Pairs (head, tile of query rows) that keep about the same number of columns.

    Attributes:
        rows: query rows of a tile.
        pairs: how many pairs the bucket holds, heads with equal masks counted each.
        columns: key columns of every pair, padded to the largest.
        mask: "none"; "columns" where only padding is dropped; "cells" where single cells are;
            "causal" where a whole head keeps exactly its lower triangle.
        gathered: False where a pair keeps all columns in order.
        natural: True where the bucket holds every pair of its tile height, in order.
        shared: True where several pairs use one list of columns.
        head: the head of all its pairs, where they keep all its columns: nothing is gathered then.
    """

    rows: int
    pairs: int
    columns: int
    mask: str = "none"
    gathered: bool = True
    natural: bool = False
    shared: bool = False
    head: int | None = None

    def __str__(self) -> str:
        words = [f"{self.rows}x{self.pairs}x{self.columns}", self.mask]
        words += [flag for flag in ("gathered", "natural", "shared") if getattr(self, flag)]
        return ":".join(words + [f"head={self.head}"] * (self.head is not None))

    @classmethod
    def parse(cls, text: str) -> Bucket:
        """Read what `str` wrote."""
        sizes, mask, *flags = text.split(":")
        rows, pairs, columns = map(int, sizes.split("x"))
        known = {flag: flag in flags for flag in ("gathered", "natural", "shared")}
        heads = [int(flag.removeprefix("head=")) for flag in flags if flag.startswith("head=")]
        return cls(rows, pairs, columns, mask, **known, head=heads[0] if heads else None)


@dataclass(frozen=True)
class LayoutSpec:
    """All plain facts of a layout; its text travels through graphs as one string argument.

    Attributes:
        form: "tiles" or "buckets".
        shape: (H, Nq, Nk).
        tile: (query rows, key columns) of a tile; the columns are 0 in buckets.
        unique: different head masks.
        kept: cells kept, over all heads.
        possible: cells that the density is a share of.
        computed: cells that the tiles or buckets cover.
        causal: no kept cell has its key after its query.
        empty: some query row keeps no key.
        full: some key tile is kept whole (tiles form).
        packed: some column is packed (tiles form).
        buckets: the buckets (buckets form).
    """

    form: str
    shape: tuple[int, int, int]
    tile: tuple[int, int]
    unique: int
    kept: int
    possible: int
    computed: int
    causal: bool = False
    empty: bool = False
    full: bool = False
    packed: bool = False
    buckets: tuple[Bucket, ...] = ()

    def __str__(self) -> str:
        flags = [flag for flag in ("causal", "empty", "full", "packed") if getattr(self, flag)]
        fields = [
            self.form,
            "x".join(map(str, self.shape)),
            "x".join(map(str, self.tile)),
            f"{self.unique},{self.kept},{self.possible},{self.computed}",
            ",".join(flags),
            ",".join(map(str, self.buckets)),
        ]
        return ";".join(fields)

    @staticmethod
    @functools.lru_cache(maxsize=4096)
    def parse(text: str) -> LayoutSpec:
        """Read what `str` wrote.

        Raises:
            PlanError: if the text is no layout.
        """
        try:
            form, shape, tile, counts, flags, buckets = text.split(";")
            heads, queries, keys = map(int, shape.split("x"))
            rows, columns = map(int, tile.split("x"))
            unique, kept, possible, computed = map(int, counts.split(","))
            known = flags.split(",")
            return LayoutSpec(
                form=form,
                shape=(heads, queries, keys),
                tile=(rows, columns),
                unique=unique,
                kept=kept,
                possible=possible,
                computed=computed,
                causal="causal" in known,
                empty="empty" in known,
                full="full" in known,
                packed="packed" in known,
                buckets=tuple(Bucket.parse(part) for part in buckets.split(",") if part),
            )
        except (ValueError, TypeError) as error:
            raise PlanError(f"{text!r} describes no mask layout: {error}") from error


@dataclass(frozen=True, eq=False)
class MaskLayout:
    """A compiled static mask. Made by `compile_mask`.

    Attributes:
        spec: every plain fact, as the string that the operator takes.
        tensors: flat tensors, in the order that the operator takes them.
    """

    spec: str
    tensors: tuple[Tensor, ...]

    @property
    def facts(self) -> LayoutSpec:
        """The parsed spec."""
        return LayoutSpec.parse(self.spec)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Heads, query rows, key columns."""
        return self.facts.shape

    @property
    def tile(self) -> tuple[int, int]:
        """Query rows and key columns of a tile (columns 0 where they are packed to any number)."""
        return self.facts.tile

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.tensors[0].device

    @property
    def live_density(self) -> float:
        """Kept cells as a share of the universe given to `compile_mask` (of all cells without)."""
        return self.facts.kept / max(self.facts.possible, 1)

    @property
    def tile_density(self) -> float:
        """Computed cells, padding included, as a share of all H * Nq * Nk."""
        heads, queries, keys = self.shape
        return self.facts.computed / (heads * queries * keys)

    def density(self, universe: Tensor) -> float:
        """Kept cells as a share of `universe`, bool (Nq, Nk) or (H, Nq, Nk)."""
        return self.facts.kept / max(_count(universe, self.shape), 1)

    def to_dense(self) -> Tensor:
        """Return the bool mask (H, Nq, Nk) that this was compiled from."""
        bits, heads = self.tensors[:2]
        return unpack_bits(bits, self.shape[2])[heads]

    def to(self, device: torch.device | str) -> MaskLayout:
        """Return the layout on `device`, compiled anew where that device wants the other form."""
        device = torch.device(device)
        if _form(device) == self.facts.form:
            return replace(self, tensors=tuple(tensor.to(device) for tensor in self.tensors))
        fresh = compile_mask(self.to_dense(), device=device)
        facts = replace(fresh.facts, possible=self.facts.possible)
        return replace(fresh, spec=str(facts))

    def spans(self) -> list[list[tuple[int, int, int]]]:
        """Per head, the runs of kept cells as (query row, first key, key after the last)."""
        edges = torch.diff(torch.nn.functional.pad(self.to_dense().cpu().to(torch.int8), (1, 1)))
        first, last = (edges == 1).nonzero(), (edges == -1).nonzero()
        runs: list[list[tuple[int, int, int]]] = [[] for _ in range(self.shape[0])]
        for (head, row, start), (_, _, stop) in zip(first.tolist(), last.tolist(), strict=True):
            runs[head].append((row, start, stop))
        return runs

    @classmethod
    def from_spans(
        cls,
        spans: Sequence[Sequence[tuple[int, int, int]]],
        queries: int,
        keys: int,
        device: torch.device | str = "cuda",
    ) -> MaskLayout:
        """Compile what `spans` returns."""
        edges = torch.zeros(len(spans), queries, keys + 1, dtype=torch.int32)
        for head, runs in enumerate(spans):
            for row, start, stop in runs:
                edges[head, row, start] += 1
                edges[head, row, stop] -= 1
        return compile_mask(edges.cumsum(-1)[..., :-1] > 0, device=device)

    def to_bsr(self, block: tuple[int, int]) -> list[Tensor]:
        """Return one sparse BSR matrix (Nq, Nk) of uint8 per head; blocks must divide the sizes."""
        dense = self.to_dense().to(torch.uint8)
        return [head.to_sparse_bsr(block) for head in dense]

    @classmethod
    def from_bsr(cls, heads: Sequence[Tensor], device: torch.device | str = "cuda") -> MaskLayout:
        """Compile the nonzero cells of one BSR (or any sparse or dense) matrix per head."""
        return compile_mask(torch.stack([head.to_dense() != 0 for head in heads]), device=device)

    def to_block_mask(self, block: int = 128) -> BlockMask:
        """Return FlexAttention's form of the mask, on this layout's device."""
        from torch.nn.attention.flex_attention import create_block_mask

        heads, queries, keys = self.shape
        dense = self.to_dense()

        def keep(_batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return dense[head, query, key]

        return create_block_mask(
            keep, None, heads, queries, keys, device=str(self.device), BLOCK_SIZE=block
        )

    @classmethod
    def from_block_mask(
        cls, block_mask: BlockMask, heads: int, device: torch.device | str = "cuda"
    ) -> MaskLayout:
        """Compile a FlexAttention mask that does not depend on the batch.

        Raises:
            PlanError: if the mask differs between batch elements.
        """
        from torch.nn.attention.flex_attention import create_mask

        if block_mask.shape[0] != 1:
            raise PlanError(f"a static mask has batch size 1, not {block_mask.shape[0]}")
        queries, keys = block_mask.seq_lengths
        where = str(block_mask.kv_num_blocks.device)
        dense = create_mask(block_mask.mask_mod, 1, heads, queries, keys, device=where)[0]
        blocks = block_mask.to_dense()[0].bool().expand(heads, -1, -1)
        rows, columns = block_mask.BLOCK_SIZE
        wide = blocks.repeat_interleave(rows, 1).repeat_interleave(columns, 2)
        return compile_mask(dense & wide[:, :queries, :keys], device=device)


def unpack_bits(bits: Tensor, columns: int) -> Tensor:
    """Bytes (..., W), least significant bit first -> bool (..., columns)."""
    shifts = torch.arange(8, device=bits.device, dtype=torch.uint8)
    cells = (bits.unsqueeze(-1) >> shifts) & 1
    return cells.flatten(-2)[..., :columns].bool()


def _form(device: torch.device) -> str:
    return "tiles" if device.type == "cuda" else "buckets"


def _count(universe: Tensor, shape: tuple[int, int, int]) -> int:
    if universe.dtype != torch.bool or universe.shape not in (shape, shape[1:]):
        raise PlanError(
            f"the universe is {universe.dtype} {tuple(universe.shape)}: "
            f"it must be bool of shape {shape} or {shape[1:]}"
        )
    repeats = shape[0] if universe.dim() == 2 else 1
    return int(universe.count_nonzero()) * repeats


def _checked(mask: Tensor, tile: tuple[int, int] | None) -> Tensor:
    if mask.dtype != torch.bool or mask.dim() not in (2, 3) or 0 in mask.shape:
        raise PlanError(
            f"a mask is bool (H, Nq, Nk) or (Nq, Nk), True = kept, and not empty; "
            f"got {mask.dtype} {tuple(mask.shape)}"
        )
    if tile is not None and min(tile) < 1:
        raise PlanError(f"tile is (query rows, key columns), both at least 1; got {tile!r}")
    return mask.detach().reshape(-1, *mask.shape[-2:]).cpu()


def _pack(mask: Tensor) -> tuple[Bits, NDArray[np.int64]]:
    """Bool (H, Nq, Nk) -> bits of the U different head masks (U, Nq, W), and head -> mask (H,)."""
    packed = np.packbits(mask.numpy(), axis=-1, bitorder="little")
    known: dict[bytes, int] = {}
    heads = np.array([known.setdefault(head.tobytes(), len(known)) for head in packed])
    firsts = [int(np.argmax(heads == index)) for index in range(len(known))]
    return np.ascontiguousarray(packed[firsts]), heads


def _is_causal(bits: Bits) -> bool:
    queries, width = bits.shape[1:]
    after = ~np.tri(queries, width * 8, dtype=bool)
    return not (bits & np.packbits(after, axis=-1, bitorder="little")).any()


def compile_mask(
    mask: Tensor,
    tile: tuple[int, int] | None = None,
    device: torch.device | str = "cuda",
    *,
    universe: Tensor | None = None,
    form: str | None = None,
    head_dim: int = 64,
) -> MaskLayout:
    """Compile a static attention mask for one device.

    Args:
        mask: bool (H, Nq, Nk) or (Nq, Nk) for one mask of one head; True = kept. Any sizes.
        tile: (query rows, key columns) to use; chosen by a cost model when None. On CUDA both
            are 32, 64 or 128; elsewhere only the rows count.
        device: where the layout will be used; its type decides the form.
        universe: bool cells that could be kept at all (causally possible, not padding), the base
            of `live_density`; all cells when None.
        form: "tiles" or "buckets", instead of what suits the device (to inspect, or to compile
            where the device is not).
        head_dim: D of the attention that it is for; only the choice of the tile minds.

    Raises:
        PlanError: if mask, tile or universe has the wrong dtype or shape, or there is no such form.
    """
    from fxpress.ops import layout_buckets, layout_tiles

    builders: dict[str, Any] = {"tiles": layout_tiles.build, "buckets": layout_buckets.build}
    form = form or _form(torch.device(device))
    if form not in builders:
        raise PlanError(f"there is no form {form!r}: it is 'tiles' or 'buckets'")
    dense, device = _checked(mask, tile), torch.device(device)
    shape = (dense.shape[0], dense.shape[1], dense.shape[2])
    bits, heads = _pack(dense)
    rows_kept = bits.any(-1)
    common = [torch.from_numpy(bits), torch.from_numpy(heads)]
    if not rows_kept.all():
        common.append(torch.from_numpy(~rows_kept))
    facts = LayoutSpec(
        form=form,
        shape=shape,
        tile=tile or (0, 0),
        unique=len(bits),
        kept=int(dense.count_nonzero()),
        possible=dense.numel() if universe is None else _count(universe, shape),
        computed=0,
        causal=_is_causal(bits),
        empty=not rows_kept.all(),
    )
    facts, tensors = builders[form](facts, bits, heads, tile, head_dim)
    return MaskLayout(str(facts), tuple(tensor.to(device) for tensor in [*common, *tensors]))
