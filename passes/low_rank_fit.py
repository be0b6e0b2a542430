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
from fxpress.passes.vvma_fit import all_finite, moment_matrix

__all__ = ["LowRankFit", "fit_low_rank"]

_AT_ONCE = 256  # rows of a weight that are held in float64


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
        wide = part.to(torch.float64, copy=True)
        yield wide if root is None else wide.mul_(root) if root.dim() == 1 else wide @ root


def _leading(gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The largest eigenvalues (rank,) and their eigenvectors (n, rank), signs fixed.

    The eigenvectors are written over the matrix, which saves a copy of it.
    """
    values, every = gram.new_empty(len(gram)), gram.mT  # in columns, as LAPACK works in place
    torch.linalg.eigh(every, out=(values, every))
    values, vectors = values[-rank:].flip(0), every[:, -rank:].flip(1)
    least, most = vectors.aminmax(dim=0)
    return values, vectors.mul_(torch.where(-least > most, -1.0, 1.0))


def _gram(weight: Tensor, root: Tensor | None) -> Tensor:
    """A A' (m, m) or, where m > n, A'A (n, n) of A = W H^1/2."""
    m, n = weight.shape
    gram = weight.new_zeros(min(m, n), min(m, n), dtype=torch.float64)
    if m > n:
        for rows in _rows(weight, root):
            gram.addmm_(rows.mT, rows)
        return gram
    for mine, rows in zip(gram.split(_AT_ONCE), _rows(weight, root), strict=True):
        for part, others in zip(mine.split(_AT_ONCE, 1), _rows(weight, root), strict=True):
            part.copy_(rows @ others.mT)
    return gram


def _basis(weight: Tensor, root: Tensor | None, rank: int) -> tuple[float, Tensor]:
    """Leading singular vectors of A = W H^1/2, and before them the share of squares that they lose.

    The left ones, (m, rank), or where m > n what W takes to them: H^1/2 V / s, (n, rank).
    """
    m, n = weight.shape
    gram = _gram(weight, root)
    total = float(gram.diagonal().sum())
    values, vectors = _leading(gram, rank)
    lost = max(1 - float(values.sum()) / total, 0.0) if total else 0.0
    if m > n:
        # What is left of smaller values is rounding: such directions are not in A.
        present = values > torch.finfo(values.dtype).eps * n * values[0]
        vectors *= torch.where(present, values.clamp_min(0).rsqrt(), 0.0)
        if root is not None:
            vectors = vectors.mul_(root[:, None]) if root.dim() == 1 else root @ vectors
    return lost, vectors


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
    if weight.dim() != 2 or not weight.numel() or not all_finite(weight):
        raise PlanError("fit_low_rank: the weight is (m, n), not empty, floating and finite")
    if not 1 <= rank <= min(weight.shape):
        raise PlanError(f"fit_low_rank: rank is between 1 and {min(weight.shape)}, not {rank}")
    weight = weight.detach()
    root = _root(moment_matrix(second_moment, weight))
    m, n = weight.shape
    # What stays is allocated first: what comes above it is given back to the system as a whole.
    up, down = weight.new_empty(m, rank), weight.new_empty(rank, n)
    lost, basis = _basis(weight, root, rank)
    for part, d, u in zip(
        basis.split(_AT_ONCE, 1), down.split(_AT_ONCE), up.split(_AT_ONCE, 1), strict=True
    ):
        exact = torch.zeros_like(d, dtype=torch.float64)
        left = part.split(_AT_ONCE) if m <= n else (w @ part for w in _rows(weight, None))
        for rows, mine, w in zip(left, u.split(_AT_ONCE), _rows(weight, None), strict=True):
            mine.copy_(rows)
            exact.addmm_(rows.mT, w)
        d.copy_(exact)
    return LowRankFit(down, up, math.sqrt(lost))
