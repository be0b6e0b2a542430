"""Sparse attention on one GPU, forward, bf16: our kernel, PyTorch's, FlexAttention, and the ideal.

Two kinds of mask: random 128 x 128 blocks, and element masks as pruning makes them (per head a
band, the first columns, scattered columns). Masks are drawn, not learned: they measure kernels.

Ideal: the time of cuDNN's dense non-causal kernel times the density (of tiles for blocks, of
elements otherwise), and at least what it takes to move q, k, v and o once.
"""

from __future__ import annotations

import itertools
import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from sampling import attempt, described
from torch import Tensor

from fxpress.kernels import MaskLayout, compile_mask
from fxpress.kernels.sparse_attention import AttentionKernel, emit, launch
from fxpress.ops import AttentionSite, layout_tiles, reference
from fxpress.ops.mask_layout import unpack_bits

__all__ = ["measure"]

Prepared = Future[MaskLayout]

BYTES_PER_MS = 3.0e9
TILES = ((64, 64), (64, 32), (128, 64), (128, 32), (128, 128), (64, 128))
OPTIONS = ((4, 3), (4, 2), (8, 3), (4, 4))


@dataclass(frozen=True)
class Row:
    """One line of the tables, with the times in ms that the project set out from and to reach."""

    kind: str
    batch: int
    heads: int
    length: int
    width: int
    causal: bool
    density: float
    prototype: float
    target: float


ROWS = (
    Row("blocks", 8, 16, 1024, 64, False, 0.1, 0.0458, 0.033),
    Row("blocks", 4, 16, 4096, 64, False, 0.1, 0.122, 0.095),
    Row("blocks", 4, 16, 4096, 64, False, 0.5, 0.390, 0.35),
    Row("elements", 8, 16, 1024, 64, True, 0.1, 0.046, 0.034),
    Row("elements", 4, 16, 4096, 64, True, 0.1, 0.127, 0.085),
    Row("elements", 4, 16, 4096, 64, False, 0.1, 0.185, 0.140),
    Row("elements", 4, 16, 4096, 64, True, 0.3, 0.212, 0.180),
    Row("elements", 1, 16, 8192, 128, True, 0.1, 0.179, 0.120),
    Row("blocks", 1, 16, 16384, 64, False, 0.1, 0.334, 0.29),
    Row("blocks", 1, 16, 16384, 128, False, 0.1, 0.553, 0.44),
)


def draw_blocks(row: Row) -> Tensor:
    """Random 128 x 128 blocks and the diagonal, per head: (H, N / 128, N / 128) on CPU."""
    generator = torch.Generator().manual_seed(1)
    count = row.length // 128
    blocks = torch.rand(row.heads, count, count, generator=generator) < row.density
    return blocks | torch.eye(count, dtype=torch.bool)


def draw_elements(row: Row, device: str) -> Tensor:
    """A band, four first columns and scattered columns, per head: (H, N, N)."""
    generator = torch.Generator().manual_seed(1)
    at = torch.arange(row.length, device=device)
    i, j = at[:, None], at[None]
    masks = []
    for _ in range(row.heads):
        share = 0.3 + 0.9 * torch.rand(1, generator=generator).item()
        mask = ((i - j).abs() < int(row.length * row.density * share)) | (j < 4)
        scattered = torch.randperm(row.length, generator=generator)
        mask[:, scattered.to(device)[: int(row.length * row.density * 0.3)]] = True
        masks.append((mask & (i >= j) if row.causal else mask) | (i == j))
    return torch.stack(masks)


def draw(row: Row, device: str = "cpu") -> Tensor:
    """The element mask (H, N, N) of a row, bool."""
    if row.kind == "elements":
        return draw_elements(row, device)
    return draw_blocks(row).to(device).repeat_interleave(128, 1).repeat_interleave(128, 2)


# --- timing ---------------------------------------------------------------------------------


def timed(function: Callable[[], Any], repetitions: int = 100) -> dict[str, Any]:
    """Median and quantiles in ms, the L2 cache flushed before each call."""
    from triton.testing import do_bench

    samples = do_bench(function, warmup=25, rep=repetitions, return_mode="all")
    return described(samples, "ms")


# --- peers ----------------------------------------------------------------------------------


def dense_peers(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Any]:
    """PyTorch's fused kernels, dense, and causal too where the mask is."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backends = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
    results = {}
    for (name, backend), causal in itertools.product(backends.items(), (False, True)):
        call = partial(F.scaled_dot_product_attention, q, k, v, is_causal=causal)
        with sdpa_kernel(backend):
            results[name + "_causal" * causal] = attempt(partial(timed, call))
    return results


def block_mask(layout: MaskLayout, device: torch.device, block: int, keep: Any) -> Any:
    """FlexAttention's mask of the tiles of a layout; `create_block_mask` compiles for seconds."""
    from torch.nn.attention.flex_attention import BlockMask

    heads, queries, keys = layout.shape
    shape = (1, heads, queries // block, keys // block)
    kept = torch.empty(shape, dtype=torch.int32, device=device)
    bits, index = (tensor.to(device) for tensor in layout.tensors[:2])
    for head in range(heads):
        cells = unpack_bits(bits[index[head]], keys).view(shape[2], block, shape[3], block)
        kept[0, head] = cells.sum((1, 3), dtype=torch.int32)
    full = kept == block * block

    def listed(which: Tensor) -> tuple[Tensor, Tensor]:
        order = which.int().argsort(dim=-1, descending=True, stable=True)
        return which.sum(-1, dtype=torch.int32), order.int()

    tiles = (*listed((kept > 0) & ~full), *listed(full))
    return BlockMask.from_kv_blocks(*tiles, block, keep, (queries, keys))


def flex_peers(row: Row, layout: MaskLayout, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Any]:
    """FlexAttention, given the same blocks; element masks as bytes and as bits, at two sizes."""
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.reset()  # else shapes turn dynamic, and slower
    flex = torch.compile(flex_attention, dynamic=False)
    packed, heads = layout.tensors[:2]
    bits = packed[heads]
    cells = draw_blocks(row).to(q.device) if row.kind == "blocks" else draw(row, str(q.device))

    def by_block(_b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return cells[h, i // 128, j // 128]

    def by_byte(_b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return cells[h, i, j]

    def by_bit(_b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (bits[h, i, j // 8] >> (j % 8)) & 1 != 0

    def run(keep: Any, block: int) -> dict[str, Any]:
        options: Any = {"BLOCK_M": 64, "BLOCK_N": 64} if block == 64 else None
        mask = block_mask(layout, q.device, block, keep)
        call = partial(flex, q, k, v, block_mask=mask, kernel_options=options)
        return timed(call) | {"block_density": 1 - mask.sparsity() / 100}

    if row.kind == "blocks":
        return {"flex_128": attempt(partial(run, by_block, 128))}
    ways = {"flex_128": (by_byte, 128), "flex_64": (by_byte, 64), "flex_128_bits": (by_bit, 128)}
    return {name: attempt(partial(run, *way)) for name, way in ways.items()}


# --- ours -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Candidate:
    """A layout and the launch options of its kernel."""

    layout: MaskLayout
    kernel: AttentionKernel

    @classmethod
    def of(cls, layout: MaskLayout, q: Tensor, k: Tensor, v: Tensor) -> Candidate:
        """With the options that the table gives."""
        return cls(layout, AttentionKernel.of(AttentionSite.of(q, k, v, layout.facts)))

    def runner(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Callable[[], Tensor]:
        """A call that launches the kernel and does little else."""
        function = emit(self.kernel).load().kernel
        tensors = list(self.layout.tensors)
        facts = self.layout.facts
        return partial(launch, function, self.kernel, facts, (q, k, v), tensors, None, scale)

    def describe(self) -> dict[str, Any]:
        """What distinguishes it."""
        facts = self.layout.facts
        return {
            "tile": facts.tile,
            "full": facts.full,
            "packed": facts.packed,
            "warps": self.kernel.warps,
            "stages": self.kernel.stages,
            "tile_density": self.layout.tile_density,
            "source": emit(self.kernel).digest[:16],
        }


def layouts(mask: Tensor) -> Iterator[MaskLayout]:
    """Every tile size, with full tiles apart and with all columns packed."""
    seen = set()
    for tile, price in itertools.product(TILES, (0.0, 1e12)):
        costs = replace(layout_tiles.COSTS, second_loop=price)
        with mock.patch.object(layout_tiles, "COSTS", costs):
            layout = compile_mask(mask, tile)
        if layout.spec not in seen:
            seen.add(layout.spec)
            yield layout


def tune(
    mask: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, deadline: float
) -> list[dict[str, Any]]:
    """Time candidates until the deadline, fastest first in the result."""
    results: list[dict[str, Any]] = []
    for layout in layouts(mask):
        for warps, stages in OPTIONS:
            if time.monotonic() > deadline:
                return sorted(results, key=lambda r: float(r.get("ms", 1e9)))
            plain = Candidate.of(layout, q, k, v)
            tuned = replace(plain, kernel=replace(plain.kernel, warps=warps, stages=stages))
            run = tuned.runner(q, k, v, scale)
            result = attempt(partial(timed, run, 40))
            results.append(tuned.describe() | result)
    return sorted(results, key=lambda r: float(r.get("ms", 1e9)))


def error_against_reference(out: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> float:
    """Relative RMS error of one batch element, two heads, rows throughout."""
    heads = slice(0, 2)
    rows = torch.arange(0, q.shape[2], max(1, q.shape[2] // 1024), device=q.device)
    kept = mask[heads][:, rows]
    want = reference(q[:1, heads, rows], k[:1, heads], v[:1, heads], kept).float()
    got = out[:1, heads, rows].float()
    return float((got - want).square().mean().sqrt() / want.square().mean().sqrt())


def prepare(row: Row) -> MaskLayout:
    """The layout of a row's mask: work of the CPU, in another process while the GPU measures."""
    return compile_mask(draw(row), device="cpu", form="tiles", head_dim=row.width)


def measure_row(row: Row, prepared: Prepared, deadline: float, *, tuning: bool) -> dict[str, Any]:
    """All figures of one line."""
    torch.manual_seed(0)
    shape = (row.batch, row.heads, row.length, row.width)
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    scale = row.width**-0.5
    layout = prepared.result().to("cuda")
    default = Candidate.of(layout, q, k, v)
    run = default.runner(q, k, v, scale)
    error = error_against_reference(run(), q, k, v, draw(row, "cuda"))
    if error > 0.02:
        raise AssertionError(f"{row}: relative error {error:.3g} against the reference")
    peers = dense_peers(q, k, v)
    ours = timed(run, 200) | default.describe() | {"relative_error": error}
    peers |= flex_peers(row, layout, q, k, v)
    density = layout.tile_density if row.kind == "blocks" else layout.live_density
    traffic = 4 * q.numel() * q.element_size() / BYTES_PER_MS
    dense = peers["cudnn"].get("ms") or peers["flash"]["ms"]
    result = {
        "live_density": layout.live_density,
        "ideal_ms": max(dense * density, traffic),
        "ours": ours,
        "peers": peers,
    }
    if tuning:
        result["tuned"] = tune(draw(row), q, k, v, scale, deadline)
    return result


def measure(seconds: float, *, tuning: bool = False) -> dict[str, Any]:
    """Measure all rows within about `seconds`; what no time was left for is named."""
    end = time.monotonic() + seconds
    done: list[dict[str, Any]] = []
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(4, mp_context=spawn) as pool:
        prepared = [pool.submit(prepare, row) for row in ROWS]
        for index, row in enumerate(ROWS):
            left = end - time.monotonic()
            if left < 0:
                pool.shutdown(cancel_futures=True)
                break
            share = time.monotonic() + left / (len(ROWS) - index)
            # Popped, since those of long sequences are large.
            result = attempt(partial(measure_row, row, prepared.pop(0), share, tuning=tuning))
            done.append(result | {"row": row.__dict__})
            print(summary(done[-1]), flush=True)
            torch.cuda.empty_cache()
    return {"rows": done, "not_measured": [row.__dict__ for row in ROWS[len(done) :]]}


def summary(result: dict[str, Any]) -> str:
    """One line for a person."""
    row = result["row"]
    shape = "{batch},{heads},{length},{width}".format(**row)
    if "error" in result:
        return f"{row['kind']} {shape}: {result['error']}"
    ours, peers = result["ours"], result["peers"]
    causal = " causal" * row["causal"]
    flex = min((p["ms"] for n, p in peers.items() if "flex" in n and "ms" in p), default=None)
    best = min(peers[n].get("ms", 1e9) for n in peers if "flex" not in n and "causal" in n)
    line = (
        f"{row['kind']:8} {shape:16}{causal:7} kept {result['live_density']:.3f} tiles "
        f"{ours['tile_density']:.3f} {ours['tile']} | ours {ours['ms']:.4f} reach "
        f"{row['target']:.4f} ideal {result['ideal_ms']:.4f} causal dense {best:.4f} flex {flex}"
    )
    for tuned in result.get("tuned", [])[:3]:
        keys = ("ms", "tile", "full", "packed", "warps", "stages", "tile_density")
        line += "\n    " + " ".join(f"{k}={tuned.get(k)}" for k in keys)
    return line
