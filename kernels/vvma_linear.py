"""CUDA kernels of `fxpress::vvma_linear` for small batches, generated per site.

    y_i = act(sum_t M_t z_ti + b_i),    z_ti = sum_j v_tij * x_j

At small batch the call is as fast as its vectors are read, and a launch costs as much as reading
3 MB. Few terms and little to read again for each row: one kernel, a program per output piece and
row, keeps z on chip. Otherwise a kernel stores z, a program per piece and term, so that all
multiprocessors read, and the library's matrix product multiplies by all cores at once.

A program asks for all it reads at once and sums what terms or pieces it has as one tile: x, vectors
and core have one layout, and nothing moves between threads but sums. From compute capability 9.0 on
a kernel is launched while the one before it still runs (programmatic dependent launch): until it
has to wait for that one's results, it only prefetches its weights into the L2 cache, which is safe
even if they are being written.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxpress.kernels.source import KernelSource
from fxpress.lowering import Lowering, register
from fxpress.ops.activations import activate
from fxpress.ops.vvma_linear import VvmaSite
from fxpress.rewrite import Decline

__all__ = [
    "VvmaKernel",
    "emit",
    "kernel_of",
    "launch",
    "parameters",
    "sums_of",
    "whole_of",
]

_DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
_LINE = 128  # bytes of a cache line

# Prefetches into the L2 cache: all that follows an address, by the threads that are first, or the
# line of each address. They have a result because all that is computed has one.
_BULK = (
    "{{ .reg .pred first; .reg .u32 thread; mov.u32 thread, %tid.x; "
    "setp.lt.u32 first, thread, {threads}; "
    "@first cp.async.bulk.prefetch.L2.global [$1], {bytes}; mov.u32 $0, 0; }}"
)
_EACH = "prefetch.global.L2 [$1]; mov.u32 $0, 0;"
_TILE = 8192  # elements of one operand that a program sums at a time
_REREAD = 2**25  # bytes that one kernel may read from the L2 cache, row by row

_ACTIVATIONS = {
    "relu": "tl.maximum({y}, 0.0)",
    "gelu": "0.5 * {y} * (1.0 + tl.erf({y} * 0.7071067811865476))",
    # 1 + tanh(u) = 2 sigmoid(2 u)
    "gelu_tanh": "{y} * tl.sigmoid(1.5957691216057308 * ({y} + 0.044715 * {y} * {y} * {y}))",
    "silu": "{y} * tl.sigmoid({y})",
    "sigmoid": "tl.sigmoid({y})",
    "tanh": "2.0 * tl.sigmoid(2.0 * {y}) - 1.0",
}


@dataclass(frozen=True)
class VvmaKernel:
    """Everything that the source of a kernel depends on.

    Attributes:
        stage: "whole", or "sums" (x and vectors to z) alone.
        dtype: "float32", "float16" or "bfloat16", of every tensor.
        block: k, a power of two from 16 to 256.
        terms: r.
        tiles: (p, q).
        features: (m, n).
        shared: whether the cores are shared by all output pieces.
        bias: whether there is one.
        activation: its name, or None.
        group: terms at a time; in "sums" output pieces of a program, counted over all terms.
        rows: rows of x that a program serves, one in "whole".
        width: input tiles read at a time.
        overlap: whether the launch overlaps with the kernel before it.
        prefetch: what an overlapping launch does meanwhile: "bulk", "lines" or "none".
        warps: warps of a program.
        stages: stages of the software pipeline.
    """

    stage: str
    dtype: str
    block: int
    terms: int
    tiles: tuple[int, int]
    features: tuple[int, int]
    shared: bool = True
    bias: bool = False
    activation: str | None = None
    group: int = 1
    rows: int = 1
    width: int = 64
    overlap: bool = False
    prefetch: str = "bulk"
    warps: int = 4
    stages: int = 3


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _group(size: int, most: int) -> int:
    """The largest power of two up to `most` that divides `size`."""
    return min(size & -size, 1 << max(most, 1).bit_length() - 1)


def _warps(elements: int, each: int) -> int:
    """Warps whose threads hold `each` elements of a tile."""
    return min(max(elements // (32 * each), 2), 8)


def kernel_of(site: VvmaSite, *, overlap: bool = False) -> VvmaKernel:
    """The kernel that serves a site, or the first of its two stages."""
    (p, q), k, r = site.tiles, site.block, site.terms
    one = whole_of(site, overlap=overlap)
    read = site.batch * r * p * (q + k) * k * site.dtype.itemsize
    few = r <= 2 or (r <= 4 and site.batch == 1)
    if not site.shared or (few and k <= 128 and read <= _REREAD):
        return one
    return sums_of(one, site.batch)


def whole_of(site: VvmaSite, *, overlap: bool = False) -> VvmaKernel:
    """One kernel that serves a site."""
    q, k, r = site.tiles[1], site.block, site.terms
    width = min(_power_of_two(q), _TILE // k)
    if site.batch > 1 or r > 2:
        # More programs at a time hide what each waits for: 32 pieces for the terms of a row, or 16.
        most = 16 if site.batch > 1 else 32 if q * k <= _TILE // 2 else width
        width = min(width, most)
    terms = _group(r, 2 if r > 2 else 1)
    narrow = site.dtype == torch.float32 or (site.batch == 1 and r <= 2)
    return VvmaKernel(
        stage="whole",
        dtype=_DTYPES[site.dtype],
        block=k,
        terms=r,
        tiles=site.tiles,
        features=site.features,
        shared=site.shared,
        bias=site.bias,
        activation=site.activation,
        group=terms,
        width=width,
        overlap=overlap,
        warps=_warps(terms * max(width, k) * k, 32 if narrow else 64),
    )


def sums_of(one: VvmaKernel, batch: int) -> VvmaKernel:
    """The kernel of the first stage of what `one` does: what was fastest on an H100."""
    (p, q), k, r = one.tiles, one.block, one.terms
    few = batch == 1 and q <= 64
    width = min(_power_of_two(q), 16 if few else _TILE // 2 // k)
    rows = 1 if batch == 1 else 2 if r * p < 1024 else 8
    return replace(
        one,
        stage="sums",
        group=1,
        rows=rows,
        width=width,
        warps=4 if batch == 1 and not few else 2,
    )


# --- source ---------------------------------------------------------------------------------


def parameters(s: VvmaKernel) -> list[str]:
    """Names of the kernel's parameters; tensors in capitals."""
    if s.stage == "sums":
        return ["X", "VECTORS", "Z", "batch", "x_row"]
    cores = ["core_term", "core_row"] + ["core_piece"] * (not s.shared)
    return ["X", "CORE", "VECTORS", *["BIAS"] * s.bias, "Y", "batch", "x_row", *cores]


def _header(s: VvmaKernel) -> str:
    does = "z_ti = sum_j v_tij * x_j"
    if s.stage == "whole":
        does = "y = act(sum_t M_t (sum_j v_tij * x_j) + b)"
    (m, n), (p, q) = s.features, s.tiles
    facts = [does, f"n = {n} in {q} pieces, m = {m} in {p} pieces of {s.block} lanes: {s.dtype}"]
    facts += [f"{s.terms} terms"] * (s.terms > 1)
    facts += ["each output piece has cores of its own"] * (not s.shared)
    facts += [f"{s.group} terms at a time"] * (s.group > 1 and s.stage != "sums")
    facts += [f"{s.rows} rows a program"] * (s.rows > 1)
    listed = "\n".join(f"- {fact}" for fact in facts)
    overlap = "from triton.language.extra import cuda\n" * s.overlap
    return f'''"""fxpress::vvma_linear, generated by fxpress.kernels.vvma_linear.

{listed}
"""

import triton
import triton.language as tl
{overlap}'''


def _indent(lines: Sequence[str]) -> list[str]:
    return [f"    {line}" for line in lines]


def _wait(s: VvmaKernel, weights: dict[str, int]) -> list[str]:
    """Let the next kernel start, prefetch weights, wait for the kernel before.

    `weights` are addresses, with the number of elements to prefetch from each.
    """
    if not s.overlap:
        return []
    size = getattr(torch, s.dtype).itemsize
    lines = ["cuda.gdc_launch_dependents()"]
    for at, elements in weights.items() if s.prefetch != "none" else ():
        if s.prefetch == "bulk":
            asm, to = _BULK.format(threads=s.group, bytes=elements * size), at
        else:
            count = max(1, elements * size // _LINE)
            line = f"tl.arange(0, {_power_of_two(count)})"
            if count & (count - 1):
                line = f"tl.minimum({line}, {count - 1})"
            asm, to = _EACH, f"{at} + {line} * {_LINE // size}"
        lines += [
            f"weights = ({to}).to(tl.int64)",
            f'tl.inline_asm_elementwise("{asm}", "=r,l", [weights], tl.int32, False, 1)',
        ]
    return [*lines, "cuda.gdc_wait()"]


def _load(at: str, guards: list[str]) -> str:
    if not guards:
        return f"tl.load({at}).to(tl.float32)"
    guard = guards[0] if len(guards) == 1 else " & ".join(f"({g})" for g in guards)
    return f"tl.load({at}, mask={guard}, other=0.0).to(tl.float32)"


def _finish(s: VvmaKernel, y: str) -> list[str]:
    """Bias and activation, in float32."""
    lines = [f"{y} += bias"] * s.bias
    if s.activation is not None:
        lines.append(f"{y} = {_ACTIVATIONS[s.activation].format(y=y)}")
    return lines


def _bias(s: VvmaKernel, at: str) -> list[str]:
    m, p = s.features[0], s.tiles[0]
    guards = [f"{at} < {m}"] if m < p * s.block else []
    return [f"bias = {_load(f'BIAS + {at}', guards)}"] * s.bias


def _sums(s: VvmaKernel, v_at: str) -> tuple[list[str], list[str]]:
    """Lines that read what all rows share, if it fits in registers, and lines that make z."""
    q, n = s.tiles[1], s.features[1]
    once = q <= s.width
    offset = "" if once else f" + start * {s.block}"
    j = "j[:, None]" if once else "start + j[:, None]"
    padded = -(-q // s.width) * s.width * s.block
    v = _load(f"{v_at}{offset}", [f"{j} < {q}"] if q % s.width else [])
    x = _load(f"x_at{offset}", [f"at{offset} < {n}"] if n < padded else [])
    axis = 1 if s.group > 1 else 0
    if once:
        return [f"v = {v}"], [f"x = {x}", f"z = tl.sum(v * x, {axis})"]
    shape = [s.group] * (s.group > 1) + [s.width, s.block]
    return [], [
        f"z = tl.zeros({tuple(shape)}, tl.float32)",
        f"for start in range(0, {q}, {s.width}):",
        f"    z += {v} * {x}",
        f"z = tl.sum(z, {axis})",
    ]


def _tile(s: VvmaKernel) -> list[str]:
    """Lanes c of input pieces j; in front of them an axis of terms, or of output pieces."""
    axis = [f"t = tl.arange(0, {s.group})[:, None, None]"] if s.group > 1 else []
    return [
        f"j = tl.arange(0, {s.width})",
        f"c = tl.arange(0, {s.block})",
        *axis,
        f"at = j[:, None] * {s.block} + c[None, :]",
    ]


def _whole(s: VvmaKernel) -> list[str]:
    (p, q), k, (m, _n), r = s.tiles, s.block, s.features, s.terms
    piece, many, steps = q * k, s.group > 1, s.group < r
    core = "CORE" if s.shared else "CORE + i * core_piece"
    v_at, m_at = f"VECTORS + i * {piece}", core
    if many:
        v_at, m_at = f"{v_at} + t * {p * piece}", f"{m_at} + t * core_term"
    shared, sums = _sums(s, f"v_at + step * {p * piece}" if steps else "v_at")
    term = [
        f"m = tl.load(m_at{' + step * core_term' if steps else ''}).to(tl.float32)",
        *shared,
        *sums,
        "y += tl.sum(tl.sum(m * z[:, None, :], 2), 0)"
        if many
        else "y += tl.sum(m * z[None, :], 1)",
    ]
    guards = [f"i * {k} + a < {m}"] if m < p * k else []
    return [
        "# One program: one output piece of one row.",
        "b = tl.program_id(0)",
        "i = tl.program_id(1)",
        *_tile(s),
        f"a = tl.arange(0, {k})",
        "x_at = X + b * x_row + at",
        f"v_at = {v_at} + at",
        f"m_at = {m_at} + a[:, None] * core_row + c[None, :]",
        *_wait(s, {v_at: piece, m_at: k * k}),
        f"y = tl.zeros(({k},), tl.float32)",
        *([f"for step in range(0, {r}, {s.group}):", *_indent(term)] if steps else term),
        *_bias(s, f"i * {k} + a"),
        *_finish(s, "y"),
        _store(s, f"Y + b * {m} + i * {k} + a", "y", guards),
    ]


def _sums_alone(s: VvmaKernel) -> list[str]:
    (p, q), k, r, many = s.tiles, s.block, s.terms, s.group > 1
    shared, sums = _sums(s, "v_at")
    lines = [
        "# One program: some output pieces, counted over all terms, of some rows.",
        f"first = tl.program_id(0) * {s.group}",
        *_tile(s),
        f"v_at = VECTORS + first * {q * k} + {f't * {q * k} + ' * many}at",
        f"ti = first + tl.arange(0, {s.group})[:, None]" if many else "ti = first",
        f"z_at = Z + (ti % {p} * {r} + ti // {p}) * {k} + {'c[None, :]' if many else 'c'}",
        *_wait(s, {f"VECTORS + first * {q * k}": s.group * q * k}),
        *shared,
    ]
    row = ["x_at = X + b * x_row + at", *sums, _store(s, f"z_at + b * {p * r * k}", "z", [])]
    if s.rows == 1:
        return [*lines, "b = tl.program_id(1)", *row]
    return [
        *lines,
        f"start_row = tl.program_id(1) * {s.rows}",
        f"for b in range(start_row, tl.minimum(start_row + {s.rows}, batch)):",
        *_indent(row),
    ]


def _store(s: VvmaKernel, at: str, value: str, guards: list[str]) -> str:
    mask = " & ".join(f"({g})" for g in guards) if len(guards) > 1 else "".join(guards)
    return f"tl.store({at}, {value}.to(tl.{s.dtype}){f', mask={mask}' if mask else ''})"


def emit(s: VvmaKernel) -> KernelSource:
    """Generate the source of one kernel: a pure function of its spec."""
    body = _whole(s) if s.stage == "whole" else _sums_alone(s)
    indented = "\n".join(_indent(body))
    kernel = f"@triton.jit\ndef kernel({', '.join(parameters(s))}):\n{indented}\n"
    text = f"{_header(s)}\n\n{kernel}"
    return KernelSource(f"vvma_linear_{s.stage}", text, s.warps, s.stages)


# --- launch ---------------------------------------------------------------------------------


def _grid(s: VvmaKernel, batch: int) -> tuple[int, int]:
    p = s.tiles[0]
    if s.stage == "sums":
        return (p * s.terms // s.group, -(-batch // s.rows))
    return (batch, p)


def launch(
    function: Any, s: VvmaKernel, x: Tensor, core: Tensor, vectors: Tensor, bias: Tensor | None
) -> Tensor:
    """Run the kernel that `emit(s)` loads, or what wraps it, and what is left: y of x (B, n)."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    batch = x.shape[0]
    core = core if core.stride(-1) == 1 else core.contiguous()
    whole = s.stage == "whole"
    out = x.new_empty((batch, s.features[0]) if whole else (batch, s.tiles[0], s.terms, s.block))
    tensors = {"X": x, "CORE": core, "VECTORS": vectors.contiguous(), "BIAS": bias}
    numbers = {"batch": batch, "x_row": x.stride(0), "core_piece": core.stride(0)}
    numbers |= {"core_term": core.stride(-3), "core_row": core.stride(-2)}
    arguments: dict[str, Any] = {**tensors, "Y": out, "Z": out, **numbers}
    function[_grid(s, batch)](
        *(arguments[name] for name in parameters(s)),
        num_warps=s.warps,
        num_stages=s.stages,
        **({"launch_pdl": True} if s.overlap else {}),
    )
    return out if whole else _multiply_by_cores(s, out, core, bias)


def _multiply_by_cores(s: VvmaKernel, z: Tensor, core: Tensor, bias: Tensor | None) -> Tensor:
    """The second stage, y (B, m) of z (B, p, r, k): one product with all cores.

    It copies none where row a of all of them is contiguous (`lay_out_cores`).
    """
    rows = core.transpose(0, 1).reshape(s.block, s.terms * s.block)
    y = F.linear(z.view(-1, s.terms * s.block), rows).view(z.shape[0], -1)[:, : s.features[0]]
    return activate(y if bias is None else y + bias, s.activation).contiguous()


def _overlaps(x: Tensor) -> bool:
    """Whether launches may overlap: on Hopper or later, and launched from here.

    Compilers that launch for us know nothing of it.
    """
    from torch._library.triton import is_wrap_triton_enabled

    return not is_wrap_triton_enabled() and torch.cuda.get_device_capability(x.device) >= (9, 0)


@functools.cache
def _loaded(site: VvmaSite, overlap: bool) -> tuple[Any, VvmaKernel]:
    s = kernel_of(site, overlap=overlap)
    return emit(s).load().kernel, s


def _run(site: VvmaSite, x: Tensor, core: Tensor, vectors: Tensor, bias: Tensor | None) -> Tensor:
    function, s = _loaded(site, _overlaps(x))
    return launch(torch.library.wrap_triton(function), s, x, core, vectors, bias)


def _accepts(site: VvmaSite) -> Decline | None:
    if site.dtype not in _DTYPES:
        return Decline(f"tensors are {site.dtype}: float32, float16 or bfloat16 is needed")
    if site.block not in (16, 32, 64, 128, 256):
        return Decline(f"tiles of {site.block} lanes: a power of two from 16 to 256 is needed")
    if site.block > 128 and not site.shared:
        return Decline(f"own cores of {site.block} lanes do not fit in registers")
    if site.batch == 0:
        return Decline("more than 32 rows: sums over tiles use no tensor core, and no longer pay")
    return None


def _cost(site: VvmaSite) -> float:
    p, q = site.tiles
    return float(site.batch * site.terms * p * site.block * (q + site.block))


register(
    Lowering(
        operator="fxpress::vvma_linear",
        name="triton-small-batch",
        device_type="cuda",
        accepts=_accepts,
        cost=_cost,
        run=_run,
        source=lambda site: emit(kernel_of(site)).text,
    )
)
