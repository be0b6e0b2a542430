"""Activation-weighted truncated singular value decomposition of a trained weight.

    W ~ U D,    U (m, r), D (r, n),    least tr((W - U D) H (W - U D)')

With H the second moment of the inputs, U is the leading eigenvectors of W H W' (m, m), and the best
D on an orthonormal U is U' W whatever H is: H is never inverted, so it may be singular. Where m > n
the same space is found from the n x n side. H = 1 gives the plain truncated decomposition (Eckart &
Young 1936); weighting by H is as in ASVD and SVD-LLM.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fxpress.errors import PlanError
from fxpress.passes.vvma_fit import moment_matrix

__all__ = ["LowRankFit", "fit_low_rank"]


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


def _root(moment: Tensor | None, weight: Tensor) -> Tensor:
    """W H^1/2."""
    if moment is None:
        return weight
    if moment.dim() == 1:
        return weight * moment.sqrt()
    values, vectors = torch.linalg.eigh(moment)
    root: Tensor = vectors * values.clamp_min(0).sqrt()  # up to a rotation
    return weight @ root


def _range(matrix: Tensor, rank: int) -> Tensor:
    """Orthonormal basis (m, rank) of the leading left singular vectors, signs fixed."""
    m, n = matrix.shape
    if m <= n:
        basis = torch.linalg.eigh(matrix @ matrix.mT).eigenvectors[:, m - rank :].flip(-1)
    else:
        right = torch.linalg.eigh(matrix.mT @ matrix).eigenvectors[:, n - rank :].flip(-1)
        basis = torch.linalg.qr(matrix @ right).Q
    largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))
    return torch.where(largest < 0, -basis, basis)


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
    wide = weight.detach().double()
    root = _root(moment_matrix(second_moment, weight.shape[1]), wide)
    up = _range(root, rank)
    total = float(root.square().sum())
    lost = float((root - up @ (up.mT @ root)).square().sum())
    error = math.sqrt(lost / total) if total else 0.0
    down = up.mT @ wide
    return LowRankFit(down.to(weight.dtype).contiguous(), up.to(weight.dtype).contiguous(), error)
