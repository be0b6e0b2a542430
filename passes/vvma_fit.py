"""Closed-form fit of a trained weight in vector-vector-matrix form.

    W_ij ~ sum_t M_t diag(v_tij)    tiles (i, j) of k x k, r terms

Lane c of a tile is its column c. Column c of all tiles, stacked, is a matrix A_c (tiles x k), and
the form says that A_c has rank r: its rows are sum_t v_tij[c] M_t[:, c]. So the best fit is k
independent truncated singular value decompositions, exact at r = k. Only right singular vectors are
needed, from the k x k Gram matrix A_c' A_c: the core is orthonormal, and the best vectors on it are
A_c M. What squaring loses, singular values below 1e-8 of the largest, is below the rounding of the
weight.

The error that counts is that of the outputs, tr((W - W') H (W - W')'), with H the second moment of
the inputs. Within a lane any H keeps the form: with H_cc (q x q) the moment between the inputs
(j, c) and (j', c), the Gram matrix becomes sum_i A_ci H_cc A_ci', and the vectors stay A_c M.
Moments between lanes do not keep it. With a full H the lanes are therefore fitted one after
another, each to what is exactly its best target given the error of the others,
W_c + (sum over other lanes of E_d H_dc) H_cc^-1: block coordinate descent, each step the closed
form, so that no sweep after the first raises the error.

Sources: VVMA is Khoury et al. 2020; the fit is derived here, and passing errors on to later inputs
is as in OBQ and GPTQ (Frantar et al. 2022).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fxpress.errors import PlanError
from fxpress.ops.vvma_linear import empty_vectors, lay_out

__all__ = ["VvmaFit", "all_finite", "fit_vvma", "moment_matrix"]

_LANES_AT_ONCE = 2  # bounds what is held in float64
_ROWS_AT_ONCE = 256  # likewise, of the weight
_DAMPING = 1e-4  # of the mean diagonal: lanes that calibration hardly moved stay invertible


@dataclass(frozen=True)
class VvmaFit:
    """A fitted weight.

    Attributes:
        core: M, (r, k, k), or (p, r, k, k) with share="row".
        vectors: v, (r, p, q, k).
        out_features: m, rows of the weight (of all weights together with share="layer").
        in_features: n.
        relative_error: RMS error over RMS of the weight or, with a second moment, of the outputs
            that it predicts.
    """

    core: Tensor
    vectors: Tensor
    out_features: int
    in_features: int
    relative_error: float

    def to_dense(self) -> Tensor:
        """The weight (m, n) that the factors stand for."""
        core = "rac" if self.core.dim() == 3 else "prac"
        tiles = torch.einsum(f"{core},rpqc->paqc", self.core, self.vectors)
        return tiles.flatten(2).flatten(0, 1)[: self.out_features, : self.in_features]


# --- arguments ------------------------------------------------------------------------------


def _one_weight(weight: Tensor | Sequence[Tensor], share: str) -> Tensor:
    """Stack the weights of a layer: with one input, a core for all is a core for the stack."""
    if isinstance(weight, Tensor):
        weights = [weight]
    elif share == "layer":
        weights = list(weight)
    else:
        raise PlanError(f'fit_vvma: several weights need share="layer", not {share!r}')
    if not weights or any(w.dim() != 2 or not w.numel() for w in weights):
        raise PlanError("fit_vvma: a weight is (m, n), not empty")
    if len({w.shape[1] for w in weights}) > 1:
        widths = ", ".join(str(w.shape[1]) for w in weights)
        raise PlanError(f"fit_vvma: weights of a layer take one input, not {widths} features")
    stacked = (torch.cat(weights) if len(weights) > 1 else weights[0]).detach()
    if not all_finite(stacked):
        raise PlanError("fit_vvma: the weight is floating and finite")
    return stacked


def all_finite(weight: Tensor) -> bool:
    """Whether a weight is floating and has no NaN or Inf."""
    # The extremes carry any, and take no copy of the weight to find.
    return weight.is_floating_point() and bool(torch.stack(weight.aminmax()).isfinite().all())


def moment_matrix(second_moment: Tensor | None, weight: Tensor) -> Tensor | None:
    """Check a second moment (n,) or (n, n) of the inputs of a weight (m, n).

    Returns:
        The moment in float64, symmetric, on the device of the weight.

    Raises:
        PlanError: if it has another shape, is not finite, or has negative entries on its diagonal.
    """
    if second_moment is None:
        return None
    features = weight.shape[1]
    moment = second_moment.detach().to(weight.device, torch.float64)
    if tuple(moment.shape) not in ((features,), (features, features)):
        shape = tuple(moment.shape)
        raise PlanError(f"second_moment is ({features},) or ({features}, {features}), not {shape}")
    diagonal = moment if moment.dim() == 1 else moment.diagonal()
    if not moment.isfinite().all() or (diagonal < 0).any():
        raise PlanError("second_moment is finite, with no negative entry on its diagonal")
    return moment if moment.dim() == 1 else (moment + moment.mT) / 2


# --- fit ------------------------------------------------------------------------------------


def _subspace(gram: Tensor, terms: int) -> Tensor:
    """Leading eigenvectors (..., k, r) of Gram matrices, each with its largest entry positive."""
    vectors = torch.linalg.eigh(gram).eigenvectors.flip(-1)[..., :terms]
    largest = vectors.gather(-2, vectors.abs().argmax(-2, keepdim=True))
    return torch.where(largest < 0, -vectors, vectors)


def _lanes(matrix: Tensor, block: int) -> Tensor:
    """(p k, q k) -> (k, p, k, q): the columns of each lane, by output piece."""
    rows, columns = matrix.shape
    return matrix.view(rows // block, block, columns // block, block).permute(3, 0, 1, 2)


def _gram(weighted: Tensor, lane: Tensor, rowwise: bool) -> Tensor:
    """Sum weighted lane' over input tiles, and over output pieces unless each has its core."""
    gram = weighted @ lane.mT
    return gram if rowwise else gram.sum(-3, keepdim=True)


def _separate(lanes: Tensor, weights: Tensor, vectors: Tensor, rowwise: bool) -> Tensor:
    """Fit lanes (k, p, k, q), each by itself, under weights (k, q).

    Returns cores (k, p or 1, k, r); fills vectors (k, p, r, q), which in float64 would be large.
    """
    cores = []
    for part, weight, room in zip(
        *(t.split(_LANES_AT_ONCE) for t in (lanes, weights, vectors)), strict=True
    ):
        wide = part.double()
        core = _subspace(_gram(wide * weight[:, None, None], wide, rowwise), vectors.shape[2])
        cores.append(core)
        room.copy_(core.mT @ wide)
    return torch.cat(cores)


def _in_turn(
    weight: Tensor, moment: Tensor, block: int, terms: int, rowwise: bool, sweeps: int
) -> tuple[Tensor, Tensor]:
    """Fit lanes one after another, each to its best target given the error of the others."""
    fitted = weight.double()
    error = torch.zeros_like(fitted)
    moment = moment + _DAMPING * moment.diagonal().mean().clamp_min(1e-30) * torch.eye(
        len(moment), dtype=moment.dtype, device=moment.device
    )
    cores: list[Tensor] = [error] * block
    vectors: list[Tensor] = [error] * block
    for _ in range(sweeps):
        for lane in range(block):
            columns = slice(lane, None, block)
            own = moment[columns, columns]
            pull = torch.linalg.solve(own, (error @ moment[:, columns]).mT).mT
            target = (fitted[:, columns] + pull).view(-1, block, own.shape[0])
            core = _subspace(_gram(target @ own, target, rowwise), terms)
            cores[lane], vectors[lane] = core, core.mT @ target
            fitted[:, columns] = (core @ vectors[lane]).flatten(0, 1)
            error[:, columns] = weight[:, columns] - fitted[:, columns]
    return torch.stack(cores), torch.stack(vectors)


def _energy(matrix: Tensor, moment: Tensor | None) -> float:
    """tr(E H E')."""
    if moment is None:
        return float(matrix.square().sum())
    weighted = matrix * moment if moment.dim() == 1 else matrix @ moment
    return float(weighted.mul_(matrix).sum())


def _relative_error(weight: Tensor, fit: VvmaFit, moment: Tensor | None) -> float:
    """RMS error over RMS, some output pieces at a time: float64 copies of a weight are large."""
    block = fit.vectors.shape[-1]
    pieces = max(_ROWS_AT_ONCE // block, 1)
    lost = total = 0.0
    for first in range(0, fit.vectors.shape[1], pieces):
        these = slice(first, first + pieces)
        rows = weight[first * block : (first + pieces) * block].double()
        core = fit.core if fit.core.dim() == 3 else fit.core[these]
        part = VvmaFit(core, fit.vectors[:, these], len(rows), fit.in_features, 0.0)
        total += _energy(rows, moment)
        lost += _energy(rows - part.to_dense().double(), moment)
    return math.sqrt(max(lost, 0.0) / total) if total else 0.0


def fit_vvma(
    weight: Tensor | Sequence[Tensor],
    block: int = 32,
    terms: int = 1,
    share: str = "matrix",
    second_moment: Tensor | None = None,
    sweeps: int = 8,
) -> VvmaFit:
    """Fit a weight in vector-vector-matrix form; deterministic, in float64 inside.

    Args:
        weight: (m, n), padded with zeros where `block` divides neither; with share="layer" also
            several with equal n, which are stacked along m.
        block: k, size of a tile.
        terms: r, from 1 to block; the fit is exact at block.
        share: which tiles share a core: "matrix", all; "layer", all of several weights; "row",
            those of one output piece.
        second_moment: of the inputs: mean of x^2 (n,), exact; or mean of x x' (n, n), exact within
            lanes and refined across them (see the module).
        sweeps: over the lanes with a full second moment, m n^2 multiply-adds each.

    Returns:
        Factors for `fxpress.ops.vvma_linear`, in the dtype of the weight and laid out for its
        device.

    Raises:
        PlanError: if the arguments do not fit together, or are not finite.
    """
    if share not in ("matrix", "layer", "row"):
        raise PlanError(f'fit_vvma: share is "matrix", "layer" or "row", not {share!r}')
    if not 1 <= terms <= block:
        raise PlanError(f"fit_vvma: terms is between 1 and block = {block}, not {terms}")
    if sweeps < 1:
        raise PlanError(f"fit_vvma: sweeps is at least 1, not {sweeps}")
    dense = _one_weight(weight, share)
    m, n = dense.shape
    moment = moment_matrix(second_moment, dense)
    missing = (0, -n % block, 0, -m % block)
    padded = F.pad(dense, missing) if any(missing) else dense
    rowwise = share == "row"
    vectors = empty_vectors(dense, (terms, len(padded) // block, padded.shape[1] // block, block))
    by_lane = vectors.permute(3, 1, 0, 2)  # (k, p, r, q)
    if moment is None or moment.dim() == 1:
        flat = dense.new_ones(n, dtype=torch.float64) if moment is None else moment
        weights = F.pad(flat, (0, -n % block)).view(-1, block).mT
        core = _separate(_lanes(padded, block), weights, by_lane, rowwise)
    else:
        full = F.pad(moment, (0, -n % block, 0, -n % block))
        core, fitted = _in_turn(padded, full, block, terms, rowwise, sweeps)
        by_lane.copy_(fitted)
    core = core.permute(1, 3, 2, 0).to(dense.dtype).contiguous()  # (p or 1, r, a, k)
    core, vectors = lay_out(core if rowwise else core[0], vectors)
    fit = VvmaFit(core, vectors, m, n, 0.0)
    return replace(fit, relative_error=_relative_error(dense, fit, moment))
