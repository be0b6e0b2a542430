"""CUDA kernels of `fxpress::vvma_linear` for small batches, generated per site.

    y_i = act(sum_t M_t z_ti + b_i),    z_ti = sum_j v_tij * x_j

At small batch the call is as fast as x and vectors are read, most of it from the L2 cache, and a
launch costs as much as reading 3 MB. Few terms and little to read again: one kernel, a program per
output piece and a few rows, keeps z on chip. Otherwise a kernel stores z, a program per piece, term
and a few rows, so that all multiprocessors read, and the library's matrix product multiplies by all
cores at once.

A program sums one tile of input pieces, rows, terms and lanes. Input pieces come first and lanes
last: so that x, which has no terms, and vectors, which have no rows, are read in one layout, and
nothing moves between threads but sums. From compute capability 9.0 on
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

# Prefetches all that follows an address into the L2 cache, by the threads that are first. It has a
# result because all that is computed has one.
_PREFETCH = (
    "{{ .reg .pred first; .reg .u32 thread; mov.u32 thread, %tid.x; "
    "setp.lt.u32 first, thread, {threads}; "
    "@first cp.async.bulk.prefetch.L2.global [$1], {bytes}; mov.u32 $0, 0; }}"
)
_TILE = 8192  # elements of one operand that a program of one row holds at a time
_WRITTEN_OUT = 2**14  # bytes of a row up to which the loop over it is, so that reads overlap
_REREAD = 2**26  # bytes that one kernel may read from the L2 cache, row by row
_FILLS = 256  # programs from which on long ones hide each other's waiting

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
        group: terms at a time, one in "sums".
        rows: rows of x that a program serves.
        width: input tiles read at a time.
        overlap: whether the launch overlaps with the kernel before it.
        fetch_cores: whether cores are prefetched too, where launches overlap.
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
    fetch_cores: bool = True
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
    calls = -(-site.batch // one.rows)
    if not site.shared:
        return one
    short = q * k <= 4096 if site.batch == 1 else one.rows * r * q * k <= 2**16
    few = r <= 2 or (r <= 4 and (short or (site.batch > 1 and calls * p >= _FILLS)))
    read = calls * r * p * (q + k) * k * site.dtype.itemsize
    if few and k <= 128 and read <= _REREAD:
        return one
    return sums_of(site, overlap=overlap)


def _width(site: VvmaSite, lanes: int) -> int:
    """Input pieces of a tile of so many lanes."""
    return max(1, min(_power_of_two(site.tiles[1]), lanes // site.block))


def whole_of(site: VvmaSite, *, overlap: bool = False) -> VvmaKernel:
    """One kernel that serves a site, with the options that were fastest on an H100."""
    (p, q), k, r, size = site.tiles, site.block, site.terms, site.dtype.itemsize
    long, small = q * k, k <= 64 and size < 4
    # Registers hold four cores of 64 lanes at 2 bytes.
    group, warps = _group(r, 4 if small else 1), _warps(k * k, 64)
    rows, lanes = 4 if site.batch > 16 else 2, 256 * warps
    if site.batch == 1:
        if r <= 2 or long > 4096:
            lanes, group = _TILE, _group(r, 2 if r > 2 else 1)
            held = group * k * max(_width(site, lanes), k)
            warps = _warps(held, 32 if r <= 2 or size == 4 else 64)
    elif r == 1 and small:
        programs = site.batch * p
        rows = 1 if programs <= 1024 else 2 if programs <= 2048 else 4
        lanes, warps = (2048, 2) if programs <= 512 and long <= 2048 else (1024 // rows, 1)
    elif group == 4:
        rows = min(4 if long > 4096 and site.batch <= 16 else 8, _power_of_two(site.batch))
        lanes, warps = 256 if rows == 8 else 512, 4 if rows > 2 else 2
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
        group=group,
        rows=min(rows, _power_of_two(site.batch)),
        width=_width(site, lanes),
        overlap=overlap,
        # Cores that all programs read are soon in the cache: many prefetches are in the way.
        fetch_cores=not site.shared or (site.batch == 1 and r == 1),
        warps=warps,
    )


def sums_of(site: VvmaSite, *, overlap: bool = False) -> VvmaKernel:
    """The kernel of the first of two stages, with the options that were fastest on an H100."""
    (p, q), batch = site.tiles, site.batch
    if batch == 1:  # an early launch took from the reads of the kernel before
        rows, lanes, warps, overlap = 1, 4096 if q * site.block <= 4096 else 2048, 1, False
    elif batch > 16:
        rows, lanes, warps = 4, 256, 1
    elif site.terms * p <= 256:
        rows, lanes, warps = 2, 1024, 1
    else:
        rows, lanes, warps = (4, 512, 1) if q * site.block <= 4096 else (8, 256, 1)
    return replace(
        whole_of(site, overlap=overlap),
        stage="sums",
        group=1,
        rows=min(rows, _power_of_two(batch)),
        width=_width(site, lanes),
        warps=warps,
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
    for at, elements in weights.items():
        asm = _PREFETCH.format(threads=s.group, bytes=elements * size)
        lines += [
            f"weights = ({at}).to(tl.int64)",
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


def _flat(s: VvmaKernel) -> bool:
    """Whether a program sums one term of one row: its tile has input pieces and lanes alone."""
    return s.rows == 1 and s.group == 1


def _axes(s: VvmaKernel) -> str:
    """Names of the axes of the tile: input pieces j, rows b, terms t, lanes c."""
    return "jc" if _flat(s) else "jbtc" if s.group > 1 else "jbc"


def _along(s: VvmaKernel, name: str) -> str:
    """The index that lays a vector along an axis of the tile."""
    return f"{name}[{', '.join(':' if axis == name else 'None' for axis in _axes(s))}]"


def _sums(s: VvmaKernel, v_at: str) -> list[str]:
    """Lines that make z, (lanes), (rows, lanes) or (rows, terms, lanes)."""
    q, n = s.tiles[1], s.features[1]
    once = q <= s.width
    offset = "" if once else f" + start * {s.block}"
    j = _along(s, "j") if once else f"start + {_along(s, 'j')}"
    padded = -(-q // s.width) * s.width * s.block
    v = _load(f"{v_at}{offset}", [f"{j} < {q}"] if q % s.width else [])
    x = _load(f"x_at{offset}", [f"at{offset} < {n}"] if n < padded else [])
    # Measured: x first is up to a sixth faster, except where a program has many rows of it.
    product = f"{x} * {v}" if s.rows < 8 else f"{v} * {x}"
    if once:
        return [f"z = tl.sum({product}, 0)"]
    sizes = {"j": s.width, "b": s.rows, "t": s.group, "c": s.block}
    shape = ", ".join(str(sizes[axis]) for axis in _axes(s))
    # Written out in a loop over terms, reads of x move out of it: more than registers hold.
    alone = s.stage == "sums" or s.group == s.terms
    short = q * s.block * getattr(torch, s.dtype).itemsize <= _WRITTEN_OUT
    loop = "tl.static_range" if alone and short else "range"
    return [
        f"z = tl.zeros(({shape}), tl.float32)",
        f"for start in {loop}(0, {q}, {s.width}):",
        f"    z += {product}",
        "z = tl.sum(z, 0)",
    ]


def _tile(s: VvmaKernel) -> list[str]:
    """Where the tile is in x, which row or rows it has."""
    b, terms = "tl.program_id(1)", [f"t = tl.arange(0, {s.group})"] * (s.group > 1)
    if not _flat(s):
        # Past the last row a program repeats it: the same results are stored twice.
        b = f"tl.minimum({b} * {s.rows} + tl.arange(0, {s.rows}), batch - 1)"
    return [
        f"b = {b}",
        f"j = tl.arange(0, {s.width})",
        *terms,
        f"c = tl.arange(0, {s.block})",
        f"at = {_along(s, 'j')} * {s.block} + {_along(s, 'c')}",
        f"x_at = X + {'b' if _flat(s) else _along(s, 'b')} * x_row + at",
    ]


def _multiply(s: VvmaKernel, step: str) -> list[str]:
    """Lines that add the terms of a step to y, (lanes) or (rows, lanes)."""
    core, v_at = f"m_at{step and ' + step * core_term'}", f"v_at{step}"
    if _flat(s):
        return [f"m = {_load(core, [])}", *_sums(s, v_at), "y += tl.sum(m * z[None, :], 1)"]
    terms = f".reshape({s.rows}, {s.group * s.block})" if s.group > 1 else ""
    exact = ', input_precision="tf32x3"' if s.dtype == "float32" else ""
    return [
        *_sums(s, v_at),
        f"z = z.to(tl.{s.dtype}){terms}",
        f"y = tl.dot(z, tl.load({core}).T, y{exact})",
    ]


def _whole(s: VvmaKernel) -> list[str]:
    (p, q), k, (m, _n), r = s.tiles, s.block, s.features, s.terms
    piece, many = q * k, s.group > 1
    first = "CORE" if s.shared else "CORE + i * core_piece"
    v_at, lanes, of_core = f"VECTORS + i * {piece}", [], "c"
    if many:
        v_at, of_core = (
            f"{v_at} + {_along(s, 't')} * {p * piece}",
            f"(tc // {k} * core_term + tc % {k})",
        )
        lanes = [f"tc = tl.arange(0, {s.group * k})"]
    term = _multiply(s, f" + step * {p * piece}" if s.group < r else "")
    if s.group < r:
        # One stage: the terms of a step are as much as registers hold.
        steps = f"range(0, {r})" if _flat(s) else f"tl.range(0, {r}, {s.group}, num_stages=1)"
        term = [f"for step in {steps}:", *_indent(term)]
    guards = [f"i * {k} + a < {m}"] if m < p * k else []
    prefetched = {f"VECTORS + i * {piece}{f' + t * {p * piece}' * many}": piece}
    if s.fetch_cores:
        prefetched[f"{first}{' + t * core_term' * many}"] = k * k
    return [
        f"# One program: one output piece of {'one row' if _flat(s) else 'some rows'}.",
        "i = tl.program_id(0)",
        *_tile(s),
        f"a = tl.arange(0, {k})",
        *lanes,
        f"v_at = {v_at} + at",
        f"m_at = {first} + a[:, None] * core_row + {of_core}[None, :]",
        *_wait(s, prefetched),
        f"y = tl.zeros({(k,) if _flat(s) else (s.rows, k)}, tl.float32)",
        *term,
        *_bias(s, f"i * {k} + a"),
        *_finish(s, "y"),
        _store(s, f"Y + {_row(s)} * {m} + i * {k} + a", "y", guards),
    ]


def _row(s: VvmaKernel) -> str:
    return "b" if _flat(s) else "b[:, None]"


def _sums_alone(s: VvmaKernel) -> list[str]:
    (p, q), k, r = s.tiles, s.block, s.terms
    return [
        f"# One program: one term of one output piece of {'one row' if _flat(s) else 'some rows'}.",
        "ti = tl.program_id(0)",
        *_tile(s),
        f"v_at = VECTORS + ti * {q * k} + at",
        *_wait(s, {f"VECTORS + ti * {q * k}": q * k}),
        *_sums(s, "v_at"),
        f"z_at = Z + (ti % {p} * {r} + ti // {p}) * {k} + c",
        _store(s, f"z_at + {_row(s)} * {p * r * k}", "z", []),
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
    pieces = s.tiles[0] * (s.terms if s.stage == "sums" else 1)
    return (pieces, -(-batch // s.rows))


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
