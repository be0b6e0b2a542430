"""The CUDA kernel of `fxpress::sparse_attention`, generated per site.

    o_i = sum_j p_ij v_j,    p_ij = exp2(s_ij - m_i) / l_i,    s_ij = scale * log2(e) * q_i . k_j

One program computes one tile of BM query rows of one head: it walks the full key tiles, then the
packed ones (`fxpress.ops.layout_tiles`), keeping the running maximum m and sum l of each row
(Milakov & Gimelshein 2018; Dao et al. 2022). The text holds only what its site needs.

Bits are loaded as words along the columns, one or two a row, since a thread of a tensor-core tile
holds few rows and many columns. The scale is folded into the exponent's multiply-add. float32 takes
three TF32 products (`tf32x3`): tensor cores, at nearly float32's own accuracy, where plain TF32
keeps ten bits and `ieee` uses no tensor core.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fxpress.kernels.source import KernelSource
from fxpress.lowering import Lowering, register
from fxpress.ops.mask_layout import LayoutSpec
from fxpress.ops.masked_attention import least
from fxpress.ops.sparse_attention import AttentionSite
from fxpress.rewrite import Decline

__all__ = ["AttentionKernel", "emit", "launch", "parameters"]

_DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
_WORD = 32
_SHARED_BYTES = 227 * 1024  # of a program, from compute capability 9.0 on


@dataclass(frozen=True)
class AttentionKernel:
    """Everything that the source of a kernel depends on.

    Attributes:
        dtype: "float32", "float16" or "bfloat16", of q, k, v and o.
        head_dim: D of q and k.
        value_dim: Dv of v.
        rows: BM, query rows of a tile.
        columns: BN, key columns of a tile.
        group: query heads per key head.
        full: whether there are full tiles.
        packed: whether there are packed tiles.
        mask: dtype of the run-time mask, or "none".
        mask_per_row: whether it differs between query rows.
        causal: whether causality is tested.
        ragged: whether the last tile of queries is not whole.
        short: whether tiles past the last query are skipped.
        clipped: whether keys past the last are tested for.
        empty: whether a row may keep no key, as rows past the end do.
        warps: warps of a program.
        stages: stages of the software pipeline.
    """

    dtype: str
    head_dim: int
    value_dim: int
    rows: int
    columns: int
    group: int = 1
    full: bool = True
    packed: bool = True
    mask: str = "none"
    mask_per_row: bool = False
    causal: bool = False
    ragged: bool = False
    short: bool = False
    clipped: bool = False
    empty: bool = False
    warps: int = 4
    stages: int = 3

    @classmethod
    def of(cls, site: AttentionSite) -> AttentionKernel:
        """Return the kernel that serves a site."""
        facts = site.facts
        rows, columns = facts.tile
        ragged = site.short or facts.shape[1] % rows > 0
        run_time = site.mask != "none" or site.causal or site.clipped
        kernel = cls(
            dtype=_DTYPES[site.dtype],
            head_dim=site.head_dim,
            value_dim=site.value_dim,
            rows=rows,
            columns=columns,
            group=site.group,
            full=facts.full,
            packed=facts.packed,
            mask=site.mask,
            mask_per_row=site.mask_per_row,
            causal=site.causal,
            ragged=ragged,
            short=site.short,
            clipped=site.clipped,
            empty=facts.empty or ragged or run_time,
        )
        return kernel.with_options()

    def with_options(self) -> AttentionKernel:
        """Return the same with warps and stages: what was fastest on an H100 in `--tune` runs."""
        wide = max(self.head_dim, self.value_dim) > 64
        tall = self.rows >= 128
        if self.dtype == "float32":
            return replace(self, warps=8 if tall else 4, stages=1 if wide else 2)
        if wide:
            # Two stages spill least, but packed columns take registers of their own.
            warps, stages = ((8, 3) if self.packed else (4, 2)) if tall else (4, 3)
        else:
            warps, stages = 4, 2 if self.packed and self.columns >= 64 else 3
        return replace(self, warps=warps, stages=stages)

    @property
    def shared_bytes(self) -> int:
        """Shared memory that the compiled kernel takes, from above.

        It holds q, a tile of k and v per stage, and of a mask that differs between rows. float32
        adds the halves that its products are split into.
        """
        width = _power_of_two(max(self.head_dim, self.value_dim))
        q, kv = self.rows * width, 2 * self.columns * width
        mask = 4 * self.stages * self.rows * self.columns * self.mask_per_row
        if self.dtype == "float32":
            return 6 * (q + kv) + 4 * (self.stages - 1) * kv + mask + 9216
        return 2 * (q + self.stages * kv) + mask + 9216

    @property
    def biased(self) -> bool:
        """Whether something is added to the scores, so that they are scaled first."""
        return self.mask not in ("none", "bool")


# --- source ---------------------------------------------------------------------------------


def _power_of_two(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())


def _header(s: AttentionKernel) -> str:
    facts = [f"q, k (D = {s.head_dim}), v (Dv = {s.value_dim}), o: {s.dtype}"]
    facts.append(f"tiles of {s.rows} query rows by {s.columns} key columns")
    if s.group > 1:
        facts.append(f"{s.group} query heads per key head")
    if s.mask != "none":
        where = "differs between rows" if s.mask_per_row else "the same for every row"
        facts.append(f"run-time mask: {s.mask}, {where}")
    facts += ["causality tested"] * s.causal + ["fewer keys than the layout's"] * s.clipped
    listed = "\n".join(f"- {fact}" for fact in facts)
    return f'''"""fxpress::sparse_attention, generated by fxpress.kernels.sparse_attention.

{listed}
"""

import triton
import triton.language as tl
'''


def _guard(conditions: list[str]) -> str:
    return conditions[0] if len(conditions) == 1 else " & ".join(f"({c})" for c in conditions)


def _accumulate(s: AttentionKernel) -> str:
    """The online softmax, shared by both loops."""
    peak, weight = "tl.max(scores, 1)", "scores - peak[:, None]"
    if not s.biased:
        peak, weight = f"{peak} * scale", "scores * scale - peak[:, None]"
    precise = ', input_precision="tf32x3"' if s.dtype == "float32" else ""
    return f'''
@triton.jit
def accumulate(scores, v, m, l, acc, scale):
    """Fold one tile of scores and values into the running maximum, sum and result of each row."""
    peak = tl.maximum(m, {peak})
    weights = tl.exp2({weight})
    shrink = tl.exp2(m - peak)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None]{precise})
    return peak, l * shrink + tl.sum(weights, 1), acc
'''


def parameters(s: AttentionKernel) -> list[str]:
    """Names of the kernel's parameters; tensors in capitals."""
    names = ["Q", "K", "V", "O", "JOBS"]
    names += ["FULL_TILE"] * s.full
    names += ["COLUMN", "WORD"] * s.packed
    names += ["MASK"] * (s.mask != "none")
    names += ["batch", "queries", "keys", "scale"]
    names += [f"{x}_{axis}" for x in "qkvo" for axis in ("batch", "head", "row")]
    names += [f"mask_{axis}" for axis in ("batch", "head", "row", "key")] * (s.mask != "none")
    return names


def _prologue(s: AttentionKernel) -> list[str]:
    """Find the program's tile and load its queries."""
    width, value = _power_of_two(s.head_dim), _power_of_two(s.value_dim)
    key_head = f"head // {s.group}" if s.group > 1 else "head"
    lines = [
        "# One program: one tile of query rows of one head; long ones start first.",
        "job = JOBS + tl.program_id(0) // batch * 6",
        "b = (tl.program_id(0) % batch).to(tl.int64)",
        "head = tl.load(job).to(tl.int64)",
        "tile = tl.load(job + 1)",
    ]
    if s.short:
        lines += [f"if tile * {s.rows} >= queries:", "    return"]
    lines += [
        "scale = tl.full((), scale, tl.float32)",  # compilers may pass it in float64
        f"r = tl.arange(0, {s.rows})",
        f"n = tl.arange(0, {s.columns})",
        f"d = tl.arange(0, {width})",
    ]
    lines += [f"e = tl.arange(0, {value})"] * (_value_index(s) == "e")
    lines += [
        f"row = tile * {s.rows} + r",
        "q_at = Q + b * q_batch + head * q_head + row[:, None] * q_row + d[None, :]",
        f"k_at = K + b * k_batch + {key_head} * k_head + d[:, None]",
        f"v_at = V + b * v_batch + {key_head} * v_head + {_value_index(s)}[None, :]",
    ]
    lines += ["mask_at = MASK + b * mask_batch + head * mask_head"] * (s.mask != "none")
    guards = ["row[:, None] < queries"] * s.ragged + _width_guard("d[None, :]", s.head_dim)
    lines += [
        f"q = {_load('q_at', guards)}",
        # Finite, so that exp2 of a difference is never NaN; far below any score.
        f"m = tl.full(({s.rows},), -3e38, tl.float32)",
        f"l = tl.zeros(({s.rows},), tl.float32)",
        f"acc = tl.zeros(({s.rows}, {value}), tl.float32)",
    ]
    return lines


def _value_index(s: AttentionKernel) -> str:
    """Name of the index along Dv."""
    return "d" if _power_of_two(s.head_dim) == _power_of_two(s.value_dim) else "e"


def _width_guard(index: str, width: int) -> list[str]:
    return [] if _power_of_two(width) == width else [f"{index} < {width}"]


def _load(pointer: str, guards: list[str]) -> str:
    if not guards:
        return f"tl.load({pointer})"
    return f"tl.load({pointer}, mask={_guard(guards)}, other=0.0)"


def _bits(s: AttentionKernel) -> list[str]:
    """Load the words of a packed tile: bit j % 32 of a row's word j // 32 is its column j."""
    count = s.columns // _WORD
    at = [f"WORD + (t * {count} + {i}) * {s.rows} + r" for i in range(count)]
    lines = [f"word_{i} = tl.load({pointer})[:, None]" for i, pointer in enumerate(at)]
    word = f"word_{count - 1}"
    for i in reversed(range(count - 1)):
        word = f"tl.where(n[None, :] < {(i + 1) * _WORD}, word_{i}, {word})"
    lines.append(f"word = {word}")
    return lines


def _extra(s: AttentionKernel) -> str:
    """Load the run-time mask's part of a tile."""
    at, guards = "mask_at + column[None, :] * mask_key", ["present[None, :]"] * s.clipped
    if s.mask_per_row:
        at += " + row[:, None] * mask_row"
        guards += ["row[:, None] < queries"] * s.ragged
    # Half-precision biases are scaled in float32: a number does not widen the tensor it multiplies.
    wide = ".to(tl.float32)" * (s.mask in ("float16", "bfloat16"))
    return f"extra = {_load(at, guards)}{wide}"


def _tests(s: AttentionKernel, packed: bool) -> list[str]:
    """Which cells of a tile are kept."""
    tests = ["(word & bit[None, :]) != 0"] * packed + ["present[None, :]"] * s.clipped
    tests += ["column[None, :] <= row[:, None]"] * s.causal
    if s.biased:
        tests.append(f"extra > {least(getattr(torch, s.mask))!r}")
    elif s.mask == "bool":
        tests.append("extra != 0")
    return tests


def _columns(s: AttentionKernel, packed: bool, tile: str) -> str:
    """Key columns of a tile of one of the lists."""
    if packed:
        return f"tl.load(COLUMN + {tile} * {s.columns} + n)"
    return f"tl.load(FULL_TILE + {tile}) * {s.columns} + n"


def _body(s: AttentionKernel, packed: bool) -> list[str]:
    """One tile of keys."""
    k_guard = ["present[None, :]"] * s.clipped + _width_guard("d[:, None]", s.head_dim)
    v_guard = ["present[:, None]"] * s.clipped
    v_guard += _width_guard(f"{_value_index(s)}[None, :]", s.value_dim)
    precise = ', input_precision="tf32x3"' if s.dtype == "float32" else ""
    tests = _tests(s, packed)
    return [
        "column = following",
        f"following = {_columns(s, packed, '(t + 1)')}",
        *(["present = column < keys"] * s.clipped),
        *(_bits(s) if packed else []),
        *([_extra(s)] if s.mask != "none" else []),
        f"k = {_load('k_at + column[None, :] * k_row', k_guard)}",
        f"scores = tl.dot(q, k{precise})",
        *([f"scores = scores * scale + extra * {math.log2(math.e)!r}"] if s.biased else []),
        *[f"kept = {'kept & (' * bool(i)}{test}{')' * bool(i)}" for i, test in enumerate(tests)],
        *(['scores = tl.where(kept, scores, float("-inf"))'] if tests else []),
        f"v = {_load('v_at + column[:, None] * v_row', v_guard)}",
        "m, l, acc = accumulate(scores, v, m, l, acc, scale)",
    ]


def _loop(s: AttentionKernel, packed: bool) -> list[str]:
    """Walk one list. Columns are read a step ahead, so that keys can be loaded several ahead."""
    first, last = ("job + 4", "job + 5") if packed else ("job + 2", "job + 3")
    if packed:
        head = ["# Packed tiles: a bit says whether a row keeps a column."]
        head.append(f"bit = 1 << (n % {_WORD})")
    else:
        head = ["# Full tiles: every row keeps every column."]
    head += [
        f"start = tl.load({first})",
        f"following = {_columns(s, packed, 'start')}",
        f"for t in range(start, tl.load({last})):",
    ]
    return head + [f"    {line}" for line in _body(s, packed)]


def _epilogue(s: AttentionKernel) -> list[str]:
    total = "tl.where(l == 0, 1.0, l)" if s.empty else "l"
    index = f"{_value_index(s)}[None, :]"
    guards = ["row[:, None] < queries"] * s.ragged + _width_guard(index, s.value_dim)
    mask = f", mask={_guard(guards)}" if guards else ""
    return [
        f"o_at = O + b * o_batch + head * o_head + row[:, None] * o_row + {index}",
        f"tl.store(o_at, (acc / {total}[:, None]).to(O.dtype.element_ty){mask})",
    ]


def emit(s: AttentionKernel) -> KernelSource:
    """Generate the source of one kernel: a pure function of its spec."""
    body = _prologue(s)
    body += _loop(s, packed=False) if s.full else []
    body += _loop(s, packed=True) if s.packed else []
    body += _epilogue(s)
    indented = "\n".join(f"    {line}" for line in body)
    signature = ",\n".join(f"    {name}" for name in parameters(s))
    kernel = f"\n@triton.jit\ndef kernel(\n{signature},\n):\n{indented}\n"
    text = _header(s) + "\n" + _accumulate(s) + "\n" + kernel
    return KernelSource("sparse_attention", text, s.warps, s.stages)


# --- launch ---------------------------------------------------------------------------------


def _rows_dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def launch(
    kernel: Any,
    s: AttentionKernel,
    facts: LayoutSpec,
    tensors: tuple[Tensor, Tensor, Tensor],
    layout: list[Tensor],
    attn_mask: Tensor | None,
    scale: float,
) -> Tensor:
    """Run `kernel`, the one that `emit(s)` loads or what wraps it, on q, k and v."""
    q, k, v = (_rows_dense(x) for x in tensors)
    batch, heads, queries, _ = q.shape
    lists = layout[3 if facts.empty else 2 :]
    out = q.new_empty(batch, queries, heads, v.shape[3]).transpose(1, 2)
    mask: list[Any] = []
    strides = [stride for x in (q, k, v, out) for stride in x.stride()[:3]]
    if attn_mask is not None:
        full = attn_mask.expand(batch, heads, attn_mask.shape[2], k.shape[2])
        mask = [full.view(torch.uint8) if full.dtype == torch.bool else full]
        strides += full.stride()
    kernel[(lists[0].shape[0] * batch,)](
        *(q, k, v, out, *lists, *mask),
        *(batch, queries, k.shape[2], scale * math.log2(math.e)),
        *strides,
        num_warps=s.warps,
        num_stages=s.stages,
    )
    return out


def _run(
    site: AttentionSite,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: list[Tensor],
    attn_mask: Tensor | None,
    scale: float,
) -> Tensor:
    s = AttentionKernel.of(site)
    kernel = torch.library.wrap_triton(emit(s).load().kernel)
    return launch(kernel, s, site.facts, (q, k, v), layout, attn_mask, scale)


def _accepts(site: AttentionSite) -> Decline | None:
    if site.facts.form != "tiles":
        return Decline("the layout has buckets: compile it for CUDA")
    if site.dtype not in _DTYPES:
        return Decline(f"q, k and v are {site.dtype}: float32, float16 or bfloat16 is needed")
    needed = AttentionKernel.of(site).shared_bytes
    if needed > _SHARED_BYTES:
        return Decline(f"tiles {site.facts.tile} need {needed} bytes of shared memory: use smaller")
    if not site.positive:
        return Decline("the scale is not above 0")
    if site.shifted:
        return Decline("the first query is not the layout's first row (a growing cache)")
    return None


def _cost(site: AttentionSite) -> float:
    return float(site.facts.computed * (site.head_dim + site.value_dim))


register(
    Lowering(
        operator="fxpress::sparse_attention",
        name="triton-tiles",
        device_type="cuda",
        accepts=_accepts,
        cost=_cost,
        run=_run,
        source=lambda site: emit(AttentionKernel.of(site)).text,
    )
)
