"""`fxpress::vvma_linear`: a linear map in vector-vector-matrix form.

    y_i = act(sum_t M_t z_ti + b_i),    z_ti = sum_j v_tij * x_j

x and y are cut into q and p pieces of k lanes; the weight's tile (i, j) is sum_t M_t diag(v_tij),
with r cores M_t (k, k) that all tiles share and a vector v_tij (k,) per tile and term. By linearity
the vectors are summed first and each core multiplies once per output piece: r (mn/k + mk)
multiply-adds where a dense m x n weight takes mn. With `core` (p, r, k, k) each output piece has
cores of its own.

Source: Khoury et al. 2020 (VVMA), with r terms. On CUDA a generated kernel serves small batches
(`fxpress.lowering`); elsewhere z is summed row by row or as a batched product per lane.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxpress import lowering
from fxpress.errors import LoweringError
from fxpress.ops.activations import activate, activation_gradient
from fxpress.ops.define import define
from fxpress.ops.linear_checks import operand_problem

__all__ = [
    "VvmaSite",
    "empty_vectors",
    "lay_out",
    "lay_out_cores",
    "vvma_linear",
    "vvma_reference",
]

_OPERATOR = "fxpress::vvma_linear"
_BATCHES = (1, 2, 4, 8, 16, 32)
_CACHED = 2**19  # elements that a core's cache holds beside their product


@dataclass(frozen=True)
class VvmaSite:
    """What a lowering may depend on: everything about a call but its numbers.

    Attributes:
        dtype: of x, core and vectors.
        batch: rows of x, rounded up to a power of two; 0 where there are more than 32 (or none).
        block: k, lanes of a tile.
        terms: r.
        tiles: (p, q), tiles along the output and along the input.
        features: (m, n), sizes of the output and of the input.
        shared: whether all tiles share the cores, rather than those of one output piece.
        bias: whether there is one.
        activation: its name, or None.
    """

    dtype: torch.dtype
    batch: int
    block: int
    terms: int
    tiles: tuple[int, int]
    features: tuple[int, int]
    shared: bool = True
    bias: bool = False
    activation: str | None = None

    @classmethod
    def of(
        cls,
        x: Tensor,
        core: Tensor,
        vectors: Tensor,
        bias: Tensor | None,
        activation: str | None,
        out_features: int,
    ) -> VvmaSite:
        """Describe a call on x (B, n)."""
        rows = x.shape[0]
        # Weights fix these: they never vary within one compiled program.
        terms, p, q, block = map(int, vectors.shape)
        return cls(
            dtype=x.dtype,
            # Compared, never stored: a dynamic number of rows stays dynamic within its range.
            batch=next((size for size in _BATCHES if rows <= size), 0),
            block=block,
            terms=terms,
            tiles=(p, q),
            features=(int(out_features), int(x.shape[1])),
            shared=core.dim() == 3,
            bias=bias is not None,
            activation=activation,
        )


# --- the two stages -------------------------------------------------------------------------


def lay_out_cores(core: Tensor) -> Tensor:
    """The same cores (r, k, k) with row a of all of them contiguous: one matrix (k, r k) in memory.

    So the product with all cores at once copies none.
    """
    return core.transpose(-3, -2).contiguous().transpose(-3, -2)


def empty_vectors(like: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """Room for vectors (r, p, q, k) as `lay_out` has them, of the dtype and device of a tensor."""
    order = (3, 2, 0, 1) if like.device.type == "cpu" else (0, 1, 2, 3)
    return torch.empty_permuted(shape, order, dtype=like.dtype, device=like.device)


def lay_out(core: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """The same factors in the order of memory that their device reads fastest: no copy if they are.

    On CPU lanes come first: vectors (k, q, r, p) are k matrices that a row multiplies from the left
    in one pass, and cores (k, k r) multiply what comes out as it lies. Elsewhere vectors are as
    they are, and cores as `lay_out_cores` has them. Cores of one output piece stay as they are.
    """
    if core.device.type != "cpu":
        return lay_out_cores(core), vectors
    if core.dim() == 3:
        core = core.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    return core, vectors.permute(3, 2, 0, 1).contiguous().permute(2, 3, 1, 0)


def _cut(x: Tensor, pieces: int, block: int) -> Tensor:
    """(B, n) -> (B, pieces, block), zeros at the end."""
    missing = pieces * block - x.shape[1]
    return (F.pad(x, (0, missing)) if missing else x).reshape(-1, pieces, block)


def _one_row(row: Tensor, vectors: Tensor) -> Tensor:
    """Return z (r, p, k) of one row (q, k), reading the vectors once in the order of memory.

    Few vectors: the product stays in the cache until it is summed. Many: they are an image of r p q
    pixels with k channels and the row is a depthwise filter of width and stride q, so that nothing
    is written in between and several outputs are summed at a time.
    """
    terms, p, q, block = vectors.shape
    if vectors.numel() <= _CACHED:
        return (vectors * row).sum(2)
    image = vectors.view(1, 1, terms * p * q, block).permute(0, 3, 1, 2)
    weight = row.reshape(1, q, 1, block).permute(3, 2, 0, 1)
    z = F.conv2d(image, weight, stride=(1, q), groups=block)
    return z.permute(0, 2, 3, 1).reshape(terms, p, block)


def _per_lane(x: Tensor, vectors: Tensor) -> Tensor:
    """Return z (r, B, p, k) as k products (B, q) x (q, r p).

    No vector is copied where the lanes are outermost in memory (`lay_out`).
    """
    terms, p, q, block = vectors.shape
    lanes = vectors.permute(3, 2, 0, 1)
    if lanes.is_contiguous():
        lanes = lanes.view(block, q, terms * p)
    else:  # two dimensions: a blocked copy
        lanes = vectors.reshape(-1, block).t().contiguous().view(block, terms * p, q).mT
    # A product with a row that is strided is several times slower than the copy.
    z = torch.bmm(x.permute(2, 0, 1).contiguous(), lanes)
    return z.view(block, -1, terms, p).permute(2, 1, 3, 0)


def _sums(x: Tensor, vectors: Tensor) -> Tensor:
    """Return z (r, B, p, k) of x (B, q, k), in the cheaper form."""
    plain = x.device.type == "cpu" and x.dtype == torch.float32 and vectors.is_contiguous()
    if plain and x.shape[0] == 1:
        return _one_row(x[0], vectors)[:, None]
    if plain and 2 <= x.shape[0] <= 4:
        return torch.stack([_one_row(row, vectors) for row in x], 1)
    return _per_lane(x, vectors)


def _products(z: Tensor, core: Tensor) -> Tensor:
    """Pieces (B, p, k) of the output, before bias and activation."""
    if core.dim() == 4:
        return torch.einsum("rbpc,prac->bpa", z, core)
    terms, batch, p, block = z.shape
    rows = core.permute(1, 2, 0)
    if rows.is_contiguous():  # as `lay_out` has them on CPU; z of one row is in their order
        columns = z.permute(3, 0, 1, 2).reshape(block * terms, batch * p)
        return torch.mm(rows.view(block, -1), columns).t().reshape(batch, p, block)
    y = torch.bmm(z.reshape(terms, batch * p, block), core.mT).sum(0)
    return y.view(batch, p, block)


def _linear(z: Tensor, core: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    y = _products(z, core).flatten(1)[:, :out_features]
    return y if bias is None else y + bias


# --- the operator ---------------------------------------------------------------------------


def _forward(
    x: Tensor,
    core: Tensor,
    vectors: Tensor,
    bias: Tensor | None,
    activation: str | None,
    out_features: int,
) -> Tensor:
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    chosen = None
    if lowering.registered(
        _OPERATOR, x.device.type
    ):  # describing a call costs as much as a small one
        site = VvmaSite.of(rows, core, vectors, bias, activation, out_features)
        chosen = lowering.choose(_OPERATOR, x.device.type, site)
    if chosen is not None:
        y: Tensor = chosen.run(site, rows, core, vectors, bias)
    else:
        z = _sums(_cut(rows, vectors.shape[2], vectors.shape[3]), vectors)
        y = activate(_linear(z, core, bias, out_features), activation).contiguous()
    return y.view(*x.shape[:-1], out_features)


def _backward(
    grad: Tensor,
    x: Tensor,
    core: Tensor,
    vectors: Tensor,
    bias: Tensor | None,
    activation: str | None,
    out_features: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, core, vectors and bias; z, and what the activation saw, are recomputed."""
    _, p, q, block = vectors.shape
    pieces = _cut(x.reshape(-1, x.shape[-1]), q, block)
    z = _sums(pieces, vectors)
    g = grad.reshape(-1, out_features)
    if activation is not None:
        g = activation_gradient(g, _linear(z, core, bias, out_features), activation)
    cut = _cut(g, p, block)
    m = "rac" if core.dim() == 3 else "prac"
    dz = torch.einsum(f"bpa,{m}->rbpc", cut, core)
    dcore = torch.einsum(f"bpa,rbpc->{m}", cut, z)
    dx = torch.einsum("rbpc,rpqc->bqc", dz, vectors).flatten(1)[:, : x.shape[-1]]
    dvectors = torch.einsum("rbpc,bqc->rpqc", dz, pieces)
    return (
        dx.reshape(x.shape).contiguous(),
        dcore.contiguous(),
        dvectors.contiguous(),
        g.sum(0),
    )


def _fake(
    x: Tensor, _core: Tensor, _vectors: Tensor, _bias: Any, _activation: Any, out_features: int
) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


def _backward_fake(
    _grad: Tensor,
    x: Tensor,
    core: Tensor,
    vectors: Tensor,
    _bias: Any,
    _activation: Any,
    out_features: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shapes = (x.shape, core.shape, vectors.shape, (out_features,))
    dx, dcore, dvectors, dbias = (x.new_empty(shape) for shape in shapes)
    return dx, dcore, dvectors, dbias


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    *tensors, ctx.activation, ctx.out_features = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    bias = ctx.saved_tensors[3]
    *grads, dbias = torch.ops.fxpress.vvma_linear_backward(
        grad.contiguous(), *ctx.saved_tensors, ctx.activation, ctx.out_features
    )
    return *grads, None if bias is None else dbias, None, None


define(f"{_OPERATOR}_backward", _backward, _backward_fake)
define(_OPERATOR, _forward, _fake).register_autograd(_gradients, setup_context=_save)


def vvma_reference(
    x: Tensor,
    core: Tensor,
    vectors: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    out_features: int | None = None,
) -> Tensor:
    """`vvma_linear` as two plain contractions, in the dtype of its arguments."""
    _, _, q, block = vectors.shape
    pieces = F.pad(x, (0, q * block - x.shape[-1])).unflatten(-1, (q, block))
    z = torch.einsum("...qc,rpqc->...rpc", pieces, vectors)
    y = torch.einsum(f"...rpc,{'rac' if core.dim() == 3 else 'prac'}->...pa", z, core)
    y = y.flatten(-2)[..., : _size(vectors, bias, out_features)]
    return activate(y if bias is None else y + bias, activation)


def _size(vectors: Tensor, bias: Tensor | None, out_features: int | None) -> int:
    if out_features is not None:
        return out_features
    return vectors.shape[1] * vectors.shape[3] if bias is None else bias.shape[0]


def _problem(x: Tensor, core: Tensor, vectors: Tensor, m: int) -> str:
    if vectors.dim() != 4 or core.dim() not in (3, 4) or x.dim() < 1:
        return "core is (r, k, k) or (p, r, k, k), vectors (r, p, q, k), x (..., n)"
    terms, p, q, block = vectors.shape
    if tuple(core.shape) not in ((terms, block, block), (p, terms, block, block)):
        return f"core is ({terms}, {block}, {block}), or ({p}, {terms}, {block}, {block})"
    if not (q - 1) * block < x.shape[-1] <= q * block:
        return f"x has more than {(q - 1) * block} and at most {q * block} features"
    if not (p - 1) * block < m <= p * block:
        return f"the output has more than {(p - 1) * block} and at most {p * block} features"
    return ""


def vvma_linear(
    x: Tensor,
    core: Tensor,
    vectors: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    out_features: int | None = None,
) -> Tensor:
    """Apply a weight in vector-vector-matrix form: tile (i, j) is sum_t M_t diag(v_tij).

    Args:
        x: (..., n), n at most q k and more than (q - 1) k; missing features count as zeros.
        core: M, (r, k, k), shared by all tiles, or (p, r, k, k), one set per output piece.
        vectors: v, (r, p, q, k).
        bias: (m,), or None.
        activation: None or a name in `fxpress.ops.activations.ACTIVATIONS`.
        out_features: m, at most p k and more than (p - 1) k; by default the bias's, else p k.

    Returns:
        (..., m).

    Raises:
        LoweringError: if shapes, dtypes or devices do not fit together.
    """
    m = _size(vectors, bias, out_features) if vectors.dim() == 4 else 0
    problem = _problem(x, core, vectors, m)
    if problem := problem or operand_problem(x, (core, vectors), bias, m, activation):
        shapes = ", ".join(str(tuple(t.shape)) for t in (x, core, vectors))
        raise LoweringError(f"vvma_linear: {problem}; got x, core, vectors {shapes}")
    y: Tensor = torch.ops.fxpress.vvma_linear(x, core, vectors, bias, activation, m)
    return y
