"""Sparse attention, forward, beside dense kernels and FlexAttention. Run by `benchmarks/run.py`.

Two families of static masks, bfloat16: random 128 x 128 blocks, and masks as pruning makes them (a
band, the first columns and scattered columns, different in each head). They are drawn, not learned:
what a learned mask gains is measured with the model it was learned for.

`ideal` is what no kernel of this kind gets below: the dense non-causal time of cuDNN times the
density, and for block masks at least reading q, k, v and writing o once.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fxpress.kernels import AttentionKernel
from fxpress.kernels.sparse_attention import emit, launch
from fxpress.ops import (
    AttentionSite,
    LayoutSpec,
    MaskLayout,
    compile_mask,
    layout_tiles,
    reference,
    sparse_attention,
)
from fxpress.testing import assert_equivalent

BLOCK = 128
COPY_RATE = 3.0e9  # bytes per millisecond that an H100 copies at
TILES = ((128, 64), (64, 64), (128, 32), (128, 128))
OPTIONS = ((4, 2), (4, 3), (8, 2), (8, 3))  # (warps, stages)
DTYPE = torch.bfloat16

Call = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """One row of the tables.

    Attributes:
        family: "blocks" or "pruned".
        shape: (B, H, N, D).
        density: the parameter that the mask is drawn with.
        goal: milliseconds to reach.
        causal: whether the mask is causal.
    """

    family: str
    shape: tuple[int, int, int, int]
    density: float
    goal: float
    causal: bool = False


CASES = (
    Case("blocks", (8, 16, 1024, 64), 0.1, 0.033),
    Case("blocks", (4, 16, 4096, 64), 0.1, 0.095),
    Case("blocks", (4, 16, 4096, 64), 0.5, 0.35),
    Case("blocks", (1, 16, 16384, 64), 0.1, 0.29),
    Case("blocks", (1, 16, 16384, 128), 0.1, 0.44),
    Case("pruned", (8, 16, 1024, 64), 0.1, 0.034, causal=True),
    Case("pruned", (4, 16, 4096, 64), 0.1, 0.085, causal=True),
    Case("pruned", (4, 16, 4096, 64), 0.1, 0.140),
    Case("pruned", (4, 16, 4096, 64), 0.3, 0.180, causal=True),
    Case("pruned", (1, 16, 8192, 128), 0.1, 0.120, causal=True),
)


# --- masks ----------------------------------------------------------------------------------


def block_masks() -> dict[Case, Tensor]:
    """Draw the kept blocks (H, N / 128, N / 128) of all block cases from one seed."""
    generator = torch.Generator().manual_seed(0)
    cases = {(case.shape, case.density): case for case in CASES if case.family == "blocks"}
    drawn = {}
    for shape in dict.fromkeys(shape for shape, _ in cases):
        for density in (0.5, 0.1):
            count = shape[2] // BLOCK
            kept = torch.rand(shape[1], count, count, generator=generator) < density
            kept.diagonal(dim1=1, dim2=2).fill_(True)
            if (shape, density) in cases:
                drawn[cases[shape, density]] = kept
    return drawn


def pruned_mask(heads: int, size: int, density: float, causal: bool) -> Tensor:
    """Draw a mask like those that pruning makes, (H, N, N)."""
    generator = torch.Generator().manual_seed(1)
    row, column = torch.arange(size)[:, None], torch.arange(size)[None]
    masks = []
    for _ in range(heads):
        width = int(size * density * (0.3 + 0.9 * torch.rand(1, generator=generator).item()))
        mask = ((row - column).abs() < width) | (column < 4)
        scattered = torch.randperm(size, generator=generator)[: int(size * density * 0.3)]
        mask[:, scattered] = True
        if causal:
            mask &= row >= column
        masks.append(mask | (row == column))
    return torch.stack(masks)


def widen(blocks: Tensor) -> Tensor:
    """Blocks (H, n, n) -> cells (H, 128 n, 128 n)."""
    return blocks.repeat_interleave(BLOCK, 1).repeat_interleave(BLOCK, 2)


# --- timing ---------------------------------------------------------------------------------


def captured(call: Call) -> torch.cuda.CUDAGraph:
    """Record one call as a CUDA graph, so that the host's share is not measured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def measure(call: Call, milliseconds: int = 100) -> dict[str, float]:
    """Time a call: median and quintiles in ms, the L2 cache flushed before each run."""
    from triton.testing import do_bench

    graph = captured(call)
    quantiles = [0.5, 0.2, 0.8]
    median, low, high = do_bench(graph.replay, warmup=20, rep=milliseconds, quantiles=quantiles)
    return {"median": median, "q20": low, "q80": high}


def attempt(call: Call) -> dict[str, Any]:
    """Time a peer, or say why it does not run."""
    try:
        return measure(call)
    except Exception as error:  # noqa: BLE001 - a peer's failure is a result
        return {"error": f"{type(error).__name__}: {error}"[:300]}
    finally:
        torch.cuda.empty_cache()


# --- peers ----------------------------------------------------------------------------------


def dense_peers(q: Tensor, k: Tensor, v: Tensor) -> Iterator[tuple[str, Call]]:
    """Yield dense attention, whole and causal."""
    backends = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}

    def attend(backend: SDPBackend, causal: bool) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    for name, backend in backends.items():
        yield f"{name} dense", functools.partial(attend, backend, False)
        yield f"{name} causal", functools.partial(attend, backend, True)


def flex_blocks(blocks: Tensor) -> Any:
    """FlexAttention's form of whole blocks: no cell is tested."""
    from torch.nn.attention.flex_attention import BlockMask

    blocks = blocks.cuda()
    count = blocks.sum(-1, dtype=torch.int32)[None]
    index = torch.argsort(blocks.int(), dim=-1, descending=True, stable=True).int()[None]
    partial = torch.zeros_like(count), torch.zeros_like(index)
    return BlockMask.from_kv_blocks(*partial, count, index, BLOCK_SIZE=BLOCK)


def flex_cells(mask: Tensor, block: int) -> Any:
    """FlexAttention's form of a mask of single cells."""
    from torch.nn.attention.flex_attention import create_block_mask

    heads, queries, keys = mask.shape
    dense = mask.cuda()

    def keep(_batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return dense[head, query, key]

    return create_block_mask(keep, 1, heads, queries, keys, device="cuda", BLOCK_SIZE=block)


def flex_peers(
    case: Case, blocks: Tensor | None, mask: Tensor, tensors: tuple[Tensor, Tensor, Tensor]
) -> Iterator[tuple[str, Call]]:
    """Yield FlexAttention with the same mask, and with the mask rounded out to whole blocks."""
    from torch.nn.attention.flex_attention import flex_attention

    torch.compiler.reset()
    flex = torch.compile(flex_attention, dynamic=False)

    def deferred(make: Callable[[], Any], **options: Any) -> Call:
        made: list[Any] = []

        def call() -> Any:
            if not made:
                made.append(make())
            return flex(*tensors, block_mask=made[0], **options)

        return call

    if blocks is not None:
        yield "flex, same blocks", deferred(lambda: flex_blocks(blocks))
        return
    count = case.shape[2] // BLOCK
    occupied = mask.view(-1, count, BLOCK, count, BLOCK).any(4).any(2)
    yield "flex, rounded out to blocks", deferred(lambda: flex_blocks(occupied))
    if mask.numel() <= 16 * 4096**2:
        yield "flex, blocks of 128", deferred(lambda: flex_cells(mask, 128))
        small = {"kernel_options": {"BLOCK_M": 64, "BLOCK_N": 64}}
        yield "flex, blocks of 64", deferred(lambda: flex_cells(mask, 64), **small)


# --- ours -----------------------------------------------------------------------------------


def recut(layout: MaskLayout, tile: tuple[int, int]) -> MaskLayout:
    """Return a layout with another tile, without packing the mask again."""
    bits, heads = (tensor.cpu().numpy() for tensor in layout.tensors[:2])
    facts, lists = layout_tiles.build(layout.facts, bits, heads, tile)
    common = layout.tensors[: 3 if facts.empty else 2]
    return MaskLayout(str(facts), (*common, *(part.cuda() for part in lists)))


def kernel_call(
    layout: MaskLayout, tensors: tuple[Tensor, Tensor, Tensor], warps: int, stages: int
) -> Call:
    """Return a call of one kernel."""
    scale = tensors[0].shape[-1] ** -0.5
    site = AttentionSite.of(*tensors, layout.facts, scale=scale)
    spec = replace(AttentionKernel.of(site), warps=warps, stages=stages)
    kernel, lists = emit(spec).load().kernel, list(layout.tensors)
    return lambda: launch(kernel, spec, layout.facts, tensors, lists, None, scale)


def trials(
    layout: MaskLayout, tensors: tuple[Tensor, Tensor, Tensor], deadline: float
) -> list[dict[str, Any]]:
    """Time every tile and launch option, fastest first, until the deadline."""
    found = []
    for tile in TILES:
        cut = recut(layout, tile)
        for warps, stages in OPTIONS:
            if time.monotonic() > deadline:
                break
            trial = {"tile": tile, "warps": warps, "stages": stages, "cells": cut.facts.computed}
            try:
                trial |= measure(kernel_call(cut, tensors, warps, stages), 30)
            except Exception as error:  # noqa: BLE001 - such as too much shared memory
                trial["error"] = f"{type(error).__name__}: {error}"[:200]
            found.append(trial)
    return sorted(found, key=lambda trial: trial.get("median", float("inf")))


def check(layout: MaskLayout, tensors: tuple[Tensor, Tensor, Tensor], mask: Tensor) -> None:
    """Compare the first and the last head of the last batch element with the reference."""
    out = sparse_attention(*tensors, layout)
    for head in (0, mask.shape[0] - 1):
        part = [x[-1:, head : head + 1] for x in tensors]
        got = out[-1:, head : head + 1]
        args = (*part, mask[head : head + 1].cuda())
        assert_equivalent(lambda *_, result=got: result, reference, args)


def describe(facts: LayoutSpec, tensors: tuple[Tensor, Tensor, Tensor]) -> dict[str, Any]:
    """Say what the operator runs by itself."""
    site = AttentionSite.of(*tensors, facts, scale=1.0)
    spec = AttentionKernel.of(site)
    chosen = {"tile": facts.tile, "warps": spec.warps, "stages": spec.stages}
    return chosen | {"source": emit(spec).digest, "cells": facts.computed}


def run_case(case: Case, blocks: Tensor | None, deadline: float) -> dict[str, Any]:
    """Check and time one row."""
    batch, heads, size, width = case.shape
    mask = pruned_mask(heads, size, case.density, case.causal) if blocks is None else widen(blocks)
    torch.manual_seed(0)
    q, k, v = (torch.randn(case.shape, device="cuda", dtype=DTYPE) for _ in range(3))
    layout = compile_mask(mask, device="cuda")
    check(layout, (q, k, v), mask)
    density = layout.facts.kept / mask.numel()
    ours = describe(layout.facts, (q, k, v)) | measure(lambda: sparse_attention(q, k, v, layout))
    peers = {name: attempt(call) for name, call in dense_peers(q, k, v)}
    tried = trials(layout, (q, k, v), deadline)
    for name, call in flex_peers(case, blocks, mask, (q, k, v)):
        late = time.monotonic() > deadline
        peers[name] = {"error": "no time left"} if late else attempt(call)
    ideal = peers["cudnn dense"].get("median", float("nan")) * density
    if blocks is not None:
        ideal = max(ideal, 4 * batch * heads * size * width * DTYPE.itemsize / COPY_RATE)
    return {
        "family": case.family,
        "shape": case.shape,
        "causal": case.causal,
        "density": density,
        "tile_density": layout.tile_density,
        "ideal": ideal,
        "goal": case.goal,
        "ours": ours,
        "best": tried[0] if tried else None,
        "trials": tried,
        "peers": peers,
    }


def rows(seconds: float) -> Iterator[dict[str, Any]]:
    """Yield the rows; each gets its share of the seconds that are left."""
    end = time.monotonic() + seconds
    drawn = block_masks()
    for index, case in enumerate(CASES):
        now = time.monotonic()
        deadline = now + (end - now) / (len(CASES) - index)
        yield run_case(case, drawn.get(case), deadline)
        torch.cuda.empty_cache()


def summary(row: dict[str, Any]) -> list[str]:
    """Return the cells of one line of the printed table."""
    flex = [
        peer["median"] for name, peer in row["peers"].items() if "flex" in name and "median" in peer
    ]
    cudnn = row["peers"]["cudnn causal" if row["causal"] else "cudnn dense"].get("median")
    best = (row["best"] or {}).get("median")
    figures = [row["ours"]["median"], best, cudnn, min(flex, default=None)]
    cells = ["-" if figure is None else f"{figure:.4f}" for figure in figures]
    size = "x".join(map(str, row["shape"])) + " causal" * row["causal"]
    limits = [f"{row['ideal']:.4f}", f"{row['goal']:.3f}"]
    return [row["family"], size, f"{row['density']:.3f}", *cells, *limits]


HEADINGS = ["mask", "B x H x N x D", "density", "ours", "tuned", "cuDNN", "flex", "ideal", "goal"]
