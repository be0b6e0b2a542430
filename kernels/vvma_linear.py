"""CUDA kernels of `fxpress::vvma_linear` for small batches, generated per site.

    y_i = act(sum_t M_t z_ti + b_i),    z_ti = sum_j v_tij * x_j

At small batch the call is as fast as its vectors are read, and a launch costs as much as reading
3 MB. Few terms: one kernel, a program per output piece (and group of rows), keeps z on chip. Many
terms: one kernel stores z, a program per piece and term, so that all multiprocessors read; a second
one multiplies by the cores on tensor cores.

Each row is a tile of its own, unrolled in the text: rows, vectors and core then have one layout,
and nothing moves between threads but the two sums. From compute capability 9.0 on a kernel is
launched while the one before it still runs (programmatic dependent launch): until it has to wait
for that one's results, it only prefetches its weights into the L2 cache, which is safe even if they
are being written.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fxpress.kernels.source import KernelSource
from fxpress.lowering import Lowering, register
from fxpress.ops.vvma_linear import VvmaSite
from fxpress.rewrite import Decline

__all__ = ["VvmaKernel", "emit", "kernels_of", "launch", "parameters"]

_DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
_LINE = 128  # bytes of a cache line

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
        stage: "whole", "sums" (x and vectors to z) or "products" (z and core to y).
        dtype: "float32", "float16" or "bfloat16", of every tensor.
        block: k, a power of two from 16 to 256.
        terms: r.
        tiles: (p, q).
        features: (m, n).
        shared: whether the cores are shared by all output pieces.
        bias: whether there is one.
        activation: its name, or None.
        rows: rows of x that a program serves; of z in "products".
        width: input tiles read at a time; output columns of a program in "products".
        overlap: whether the launch overlaps with the kernel before it.
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
    rows: int = 1
    width: int = 64
    overlap: bool = False
    warps: int = 4
    stages: int = 3


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


def kernels_of(site: VvmaSite, *, overlap: bool = False) -> tuple[VvmaKernel, ...]:
    """The kernels that serve a site, in the order of their launches."""
    p, q = site.tiles
    rows = 1 if site.batch == 1 else 2 if site.batch <= 8 else 4
    width = min(_power_of_two(q), 8192 // site.block, 16384 // (site.block * rows))
    one = VvmaKernel(
        stage="whole",
        dtype=_DTYPES[site.dtype],
        block=site.block,
        terms=site.terms,
        tiles=site.tiles,
        features=site.features,
        shared=site.shared,
        bias=site.bias,
        activation=site.activation,
        rows=rows,
        width=width,
        overlap=overlap,
        # Sums that are carried from step to step take registers for each row.
        warps=8 if max(width * (rows if q > width else 1), site.block) * site.block > 4096 else 4,
    )
    if not site.shared or (site.terms <= 2 and site.block <= 128):
        return (one,)
    columns = 16 if p * max(site.batch, 1) <= 512 else 32
    return (
        replace(one, stage="sums", bias=False, activation=None),
        replace(one, stage="products", rows=16, width=min(columns, site.block), warps=4),
    )


# --- source ---------------------------------------------------------------------------------


def parameters(s: VvmaKernel) -> list[str]:
    """Names of the kernel's parameters; tensors in capitals."""
    tensors = {
        "whole": ["X", "CORE", "VECTORS"],
        "sums": ["X", "VECTORS"],
        "products": ["Z", "CORE"],
    }[s.stage]
    tensors = tensors + ["BIAS"] * s.bias + ["Z" if s.stage == "sums" else "Y"]
    return [*tensors, "batch", *(["x_row"] if s.stage != "products" else [])]


def _header(s: VvmaKernel) -> str:
    does = {
        "whole": "y = act(sum_t M_t (sum_j v_tij * x_j) + b)",
        "sums": "z_ti = sum_j v_tij * x_j",
        "products": "y_i = act(sum_t M_t z_ti + b_i)",
    }[s.stage]
    (m, n), (p, q) = s.features, s.tiles
    facts = [does, f"n = {n} in {q} pieces, m = {m} in {p} pieces of {s.block} lanes: {s.dtype}"]
    facts += [f"{s.terms} terms"] * (s.terms > 1)
    facts += ["each output piece has cores of its own"] * (not s.shared)
    facts += [f"{s.rows} rows a program"]
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


def _wait(s: VvmaKernel, weights: str) -> list[str]:
    """Let the next kernel start, prefetch a piece of vectors, wait for the kernel before."""
    if not s.overlap:
        return []
    size = torch.finfo(getattr(torch, s.dtype)).bits // 8
    lines = max(1, s.tiles[1] * s.block * size // _LINE)
    asm = '"prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l"'
    line = f"tl.minimum(tl.arange(0, {_power_of_two(lines)}), {lines - 1}) * {_LINE // size}"
    prefetch = [
        f"line = {weights} + {line}",
        f"tl.inline_asm_elementwise({asm}, [line.to(tl.int64)], tl.int32, False, 1)",
    ]
    return [
        "cuda.gdc_launch_dependents()",
        *(prefetch if weights else []),
        "cuda.gdc_wait()",
    ]


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


def _inputs(s: VvmaKernel) -> list[str]:
    """Where the program's rows of x are."""
    lines = [
        f"b = tl.program_id(0) * {s.rows}" if s.rows > 1 else "b = tl.program_id(0)",
        f"j = tl.arange(0, {s.width})",
        f"c = tl.arange(0, {s.block})",
        f"at = j[:, None] * {s.block} + c[None, :]",
    ]
    for row in range(s.rows):
        # Rows past the last repeat it: they are computed and not stored.
        index = f"tl.minimum(b + {row}, batch - 1)" if s.rows > 1 else "b"
        lines.append(f"x_at_{row} = X + {index} * x_row + at")
    return lines


def _sums(s: VvmaKernel) -> list[str]:
    """z_0, z_1, ... of the program's rows under the vectors at v_at."""
    q, n = s.tiles[1], s.features[1]
    once = q <= s.width
    offset = "" if once else f" + start * {s.block}"
    j = "j[:, None]" if once else "(start + j[:, None])"
    v_guard = [f"{j} < {q}"] if q % s.width else []
    x_guard = [f"at{offset} < {n}"] if n < q * s.block else v_guard
    body = [f"v = {_load(f'v_at{offset}', v_guard)}"]
    if once:
        return body + [f"z_{row} = tl.sum(v * x_{row}, 0)" for row in range(s.rows)]
    loads = [_load(f"x_at_{row}{offset}", x_guard) for row in range(s.rows)]
    body += [f"sum_{row} += v * {load}" for row, load in enumerate(loads)]
    zeros = f"tl.zeros(({s.width}, {s.block}), tl.float32)"
    return [
        *(f"sum_{row} = {zeros}" for row in range(s.rows)),
        f"for start in range(0, {q}, {s.width}):",
        *_indent(body),
        *(f"z_{row} = tl.sum(sum_{row}, 0)" for row in range(s.rows)),
    ]


def _rows_of_x(s: VvmaKernel) -> list[str]:
    """Read x once, where a program reads all input tiles at a time."""
    q, n = s.tiles[1], s.features[1]
    if q > s.width:
        return []
    guard = [f"at < {n}"] if n < s.width * s.block else []
    return [f"x_{row} = {_load(f'x_at_{row}', guard)}" for row in range(s.rows)]


def _store(s: VvmaKernel, row: int, at: str, value: str, guards: list[str]) -> str:
    guards = guards + ([f"b + {row} < batch"] if s.rows > 1 else [])
    mask = " & ".join(f"({g})" for g in guards) if len(guards) > 1 else "".join(guards)
    dtype = f"tl.{s.dtype}"
    return f"tl.store({at}, {value}.to({dtype}){f', mask={mask}' if mask else ''})"


def _whole(s: VvmaKernel) -> list[str]:
    (p, q), k, (m, _n) = s.tiles, s.block, s.features
    piece = q * k
    term = [
        f"m = tl.load(core_at + t * {k * k}).to(tl.float32)",
        f"v_at = VECTORS + (t * {p} + i) * {piece} + at",
        *_sums(s),
        *(f"y_{row} += tl.sum(m * z_{row}[None, :], 1)" for row in range(s.rows)),
    ]
    core = "CORE + " if s.shared else f"CORE + i * {s.terms * k * k} + "
    lines = [
        "# One program: one output piece, of some rows.",
        "i = tl.program_id(1)",
        *_inputs(s),
        f"a = tl.arange(0, {k})",
        f"core_at = {core}a[:, None] * {k} + c[None, :]",
        *_wait(s, f"VECTORS + i * {piece}"),
        *_rows_of_x(s),
    ]
    lines += [f"y_{row} = tl.zeros(({k},), tl.float32)" for row in range(s.rows)]
    lines += [f"for t in range({s.terms}):", *_indent(term)]
    lines += _bias(s, f"i * {k} + a")
    guards = [f"i * {k} + a < {m}"] if m < p * k else []
    for row in range(s.rows):
        lines += _finish(s, f"y_{row}")
        at = f"Y + (b + {row}) * {m} + i * {k} + a"
        lines.append(_store(s, row, at, f"y_{row}", guards))
    return lines


def _sums_alone(s: VvmaKernel) -> list[str]:
    (p, q), k = s.tiles, s.block
    lines = [
        "# One program: one term of one output piece, of some rows.",
        "ti = tl.program_id(1)",
        *_inputs(s),
        *_wait(s, f"VECTORS + ti * {q * k}"),
        *_rows_of_x(s),
        f"v_at = VECTORS + ti * {q * k} + at",
        *_sums(s),
    ]
    for row in range(s.rows):
        at = f"Z + (((b + {row}) * {p} + ti % {p}) * {s.terms} + ti // {p}) * {k} + c"
        lines.append(_store(s, row, at, f"z_{row}", []))
    return lines


def _products(s: VvmaKernel) -> list[str]:
    (p, _q), k, (m, _n) = s.tiles, s.block, s.features
    precise = ', input_precision="ieee"' if s.dtype == "float32" else ""
    guards = ["row[:, None] < pieces"]
    guards += [f"column < {m}"] if m < p * k else []
    mask = " & ".join(f"({g})" for g in guards) if len(guards) > 1 else guards[0]
    return [
        "# One program: some columns of some output pieces, whatever row they belong to.",
        f"pieces = batch * {p}",
        f"row = tl.program_id(0) * {s.rows} + tl.arange(0, {s.rows})",
        f"a = tl.program_id(1) * {s.width} + tl.arange(0, {s.width})",
        f"c = tl.arange(0, {k})",
        f"z_at = Z + tl.minimum(row, pieces - 1)[:, None] * {s.terms * k} + c[None, :]",
        f"core_at = CORE + a[None, :] * {k} + c[:, None]",
        f"y = tl.zeros(({s.rows}, {s.width}), tl.float32)",
        *_wait(s, ""),
        f"for t in range({s.terms}):",
        f"    z = tl.load(z_at + t * {k})",
        f"    y = tl.dot(z, tl.load(core_at + t * {k * k}), y{precise})",
        f"column = row[:, None] % {p} * {k} + a[None, :]",
        *_bias(s, "column"),
        *_finish(s, "y"),
        f"tl.store(Y + row[:, None] // {p} * {m} + column, y.to(tl.{s.dtype}), mask={mask})",
    ]


def emit(s: VvmaKernel) -> KernelSource:
    """Generate the source of one kernel: a pure function of its spec."""
    body = {"whole": _whole, "sums": _sums_alone, "products": _products}[s.stage](s)
    indented = "\n".join(_indent(body))
    kernel = f"@triton.jit\ndef kernel({', '.join(parameters(s))}):\n{indented}\n"
    text = f"{_header(s)}\n\n{kernel}"
    return KernelSource(f"vvma_linear_{s.stage}", text, s.warps, s.stages)


# --- launch ---------------------------------------------------------------------------------


def _grid(s: VvmaKernel, batch: int) -> tuple[int, int]:
    p = s.tiles[0]
    if s.stage == "products":
        return (-(-batch * p // s.rows), s.block // s.width)
    return (-(-batch // s.rows), p if s.stage == "whole" else p * s.terms)


def launch(
    kernels: Sequence[tuple[Any, VvmaKernel]],
    x: Tensor,
    core: Tensor,
    vectors: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """Run kernels, those that `emit` loads or what wraps them, on x (B, n)."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    batch = x.shape[0]
    tensors = {"X": x, "CORE": core.contiguous(), "VECTORS": vectors.contiguous(), "BIAS": bias}
    for function, s in kernels:
        out = x.new_empty(
            (batch, s.tiles[0], s.terms, s.block) if s.stage == "sums" else (batch, s.features[0])
        )
        tensors["Z" if s.stage == "sums" else "Y"] = out
        numbers = {"batch": batch, "x_row": x.stride(0)}
        options = {"launch_pdl": True} if s.overlap else {}
        function[_grid(s, batch)](
            *((tensors | numbers)[name] for name in parameters(s)),
            num_warps=s.warps,
            num_stages=s.stages,
            **options,
        )
    return out


def _overlaps(x: Tensor) -> bool:
    """Whether launches may overlap: on Hopper or later, and launched from here.

    Compilers that launch for us know nothing of it.
    """
    from torch._library.triton import is_wrap_triton_enabled

    return not is_wrap_triton_enabled() and torch.cuda.get_device_capability(x.device) >= (9, 0)


@functools.cache
def _loaded(site: VvmaSite, overlap: bool) -> tuple[tuple[Any, VvmaKernel], ...]:
    return tuple((emit(s).load().kernel, s) for s in kernels_of(site, overlap=overlap))


def _run(site: VvmaSite, x: Tensor, core: Tensor, vectors: Tensor, bias: Tensor | None) -> Tensor:
    kernels = [(torch.library.wrap_triton(k), s) for k, s in _loaded(site, _overlaps(x))]
    return launch(kernels, x, core, vectors, bias)


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
        source=lambda site: "\n\n".join(emit(s).text for s in kernels_of(site)),
    )
)
