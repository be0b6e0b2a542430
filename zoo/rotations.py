"""The rotation that takes one direction to another (Dangovski et al. 2019, arXiv 1710.09537)."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["rotation", "unit"]


def rotation(a: Tensor, b: Tensor, x: Tensor) -> Tensor:
    """R(a, b) x: turn x in the plane of a and b by the angle that takes a onto b.

        R = I + b̂âᵀ − âb̂ᵀ + (c(b̂âᵀ + âb̂ᵀ) − ââᵀ − b̂b̂ᵀ)/(1 + c),    c = â·b̂
          = H(â + b̂) H(â),    H(s) = I − 2ssᵀ/|s|²

    The second line is the one computed: it is orthogonal whatever rounding does to â + b̂. R is
    the identity for parallel vectors and where a or b is zero. For antiparallel ones, which leave
    the plane open, it is half a turn in the plane of a and a coordinate axis. Values and gradients
    are finite everywhere.

    Args:
        a: direction turned from, (..., H).
        b: direction turned to, (..., H).
        x: vectors to turn, (..., H); the leading axes of all three broadcast.

    Returns:
        The turned vectors, (..., H).
    """
    a, b = unit(a), unit(b)
    s = a + b
    # Below the root of the machine precision the direction of â + b̂ is noise.
    antiparallel = _dot(s, s) < torch.finfo(s.dtype).eps
    s = torch.where(antiparallel, _perpendicular(a), s)
    s = s * _dot(a, a)  # 1, or 0 to keep x where a is zero; b = 0 gives H(â) H(â), the identity
    return _reflect(s, x - 2 * _dot(a, x) * a)


def unit(x: Tensor) -> Tensor:
    """The unit vector x / |x| over the last axis; zero, with zero gradient, where x is zero."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    zero = norm <= max(1e-12, torch.finfo(x.dtype).tiny)
    return torch.where(zero, 0.0, x / torch.where(zero, 1.0, norm))


def _reflect(s: Tensor, x: Tensor) -> Tensor:
    """H(s) x; H(0) is the identity."""
    return x - 2 * _dot(s, x) / _dot(s, s).clamp_min(torch.finfo(s.dtype).tiny) * s


def _perpendicular(a: Tensor) -> Tensor:
    """A vector perpendicular to the unit vector a: the first axis, or the second, made so."""
    axis = a[..., :1].abs() > 0.7  # 0, or 1 where a lies along axis 0
    e = (torch.arange(a.shape[-1], device=a.device) == axis).to(a.dtype)
    return e - _dot(e, a) * a


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(-1, keepdim=True)
