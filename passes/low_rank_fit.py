"""Activation-weighted truncated singular value decomposition of a trained weight.

    W ~ U D,    U (m, r), D (r, n),    least tr((W - U D) H (W - U D)')

With H the second moment of the inputs, U is the leading eigenvectors of W H W' (m, m), and the best
D on an orthonormal U is U' W whatever H is: H is never inverted, so it may be singular. Where m > n
they are found from the n x n side, as A V / s with A = W H^1/2 and A'A = V s^2 V'. H = 1 gives the
plain truncated decomposition (Eckart & Young 1936); weighting by H is as in ASVD and SVD-LLM.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fxpress.errors import PlanError
from fxpress.passes.vvma_fit import moment_matrix

__all__ = ["LowRankFit", "fit_low_rank"]

_AT_ONCE = 512  # rows of a weight that are held in float64


@dataclass(frozen=True)
class LowRankFit:
    """A fitted weight.

    Attributes:
        down: D, (rank, n).
        up: U, (m, rank).
        relative_error: RMS error over RMS of the weight or, with a second moment, of the outputs
            that it predicts.
    """

    down: Tensor
    up: Tensor
    relative_error: float

    def to_dense(self) -> Tensor:
        """The weight (m, n) that the factors stand for."""
        return self.up @ self.down


def _root(moment: Tensor | None) -> Tensor | None:
    """H^1/2, (n,) or, up to a rotation, (n, n)."""
    if moment is None:
        return None
    if moment.dim() == 1:
        return moment.sqrt()
    values, vectors = torch.linalg.eigh(moment)
    root: Tensor = vectors * values.clamp_min(0).sqrt()
    return root


def _rows(weight: Tensor, root: Tensor | None) -> Iterator[Tensor]:
    """Yield W H^1/2 in float64, some rows at a time: a copy of the whole is large."""
    for part in weight.split(_AT_ONCE):
        wide = part.double()
        yield wide if root is None else wide * root if root.dim() == 1 else wide @ root


def _leading(gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The largest eigenvalues (rank,) and their eigenvectors (n, rank), signs fixed."""
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values[-rank:].flip(0), vectors[:, -rank:].flip(1)
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return values, torch.where(largest < 0, -vectors, vectors)


def _bases(weight: Tensor, root: Tensor | None, rank: int) -> tuple[float, Iterator[Tensor]]:
    """The leading left singular vectors of W H^1/2 by the rows of `_rows`: (m, rank) in all.

    Before them the share of the squares that they leave out.
    """
    m, n = weight.shape
    if m <= n:
        gram = torch.cat([_times_all(rows, weight, root) for rows in _rows(weight, root)])
    else:
        gram = weight.new_zeros(n, n, dtype=torch.float64)
        for rows in _rows(weight, root):
            gram.addmm_(rows.mT, rows)
    total = float(gram.diagonal().sum())
    values, vectors = _leading(gram, rank)
    lost = max(1 - float(values.sum()) / total, 0.0) if total else 0.0
    if m <= n:
        return lost, iter(vectors.split(_AT_ONCE))
    # What is left of smaller values is rounding: such directions are not in W H^1/2.
    present = values > torch.finfo(values.dtype).eps * n * values[0]
    vectors *= torch.where(present, values.clamp_min(0).rsqrt(), 0.0)
    return lost, (rows @ vectors for rows in _rows(weight, root))


def _times_all(rows: Tensor, weight: Tensor, root: Tensor | None) -> Tensor:
    return torch.cat([rows @ others.mT for others in _rows(weight, root)], 1)


def fit_low_rank(weight: Tensor, rank: int, second_moment: Tensor | None = None) -> LowRankFit:
    """Fit a weight as the product of two narrow ones; deterministic, in float64 inside.

    Args:
        weight: (m, n).
        rank: r, from 1 to min(m, n); the fit is exact there.
        second_moment: of the inputs: mean of x^2 (n,), or mean of x x' (n, n).

    Returns:
        Factors for `fxpress.ops.low_rank_linear`, in the dtype of the weight.

    Raises:
        PlanError: if the arguments do not fit together, or are not finite.
    """
    if weight.dim() != 2 or not weight.is_floating_point() or not weight.isfinite().all():
        raise PlanError("fit_low_rank: the weight is (m, n), floating and finite")
    if not 1 <= rank <= min(weight.shape):
        raise PlanError(f"fit_low_rank: rank is between 1 and {min(weight.shape)}, not {rank}")
    weight = weight.detach()
    root = _root(moment_matrix(second_moment, weight.shape[1]))
    up = weight.new_empty(weight.shape[0], rank)
    down = weight.new_zeros(rank, weight.shape[1], dtype=torch.float64)
    lost, bases = _bases(weight, root, rank)
    for basis, mine, plain in zip(bases, *(w.split(_AT_ONCE) for w in (up, weight)), strict=True):
        mine.copy_(basis)
        down.addmm_(basis.mT, plain.double())
    return LowRankFit(down.to(weight.dtype), up, math.sqrt(lost))
