"""The rotation against its formula, its properties, and its degenerate cases."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from fxpress.testing import assert_equivalent
from fxpress.zoo import rotation

DTYPES = st.sampled_from([torch.float32, torch.float64])
WIDTHS = st.integers(2, 24)
SEEDS = st.integers(0, 2**31)


def vectors(count: int, width: int, seed: int, dtype: torch.dtype) -> list[Tensor]:
    """So many stacks (3, width) of vectors."""
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(count, 3, width, generator=generator, dtype=dtype))


def drawn(count: int, width: int, seed: int, dtype: torch.dtype) -> list[Tensor]:
    """`vectors` of which no first two are nearly antiparallel: R is ill-conditioned there."""
    a, b, *rest = vectors(count, width, seed, dtype)
    assume(bool((torch.cosine_similarity(a, b, dim=-1) > -0.9).all()))
    return [a, b, *rest]


def explicit(a: Tensor, b: Tensor, x: Tensor) -> Tensor:
    """The matrix of METHODS in the square-root-free form, times x."""
    a, b = a / a.norm(dim=-1, keepdim=True), b / b.norm(dim=-1, keepdim=True)
    outer = [p[..., :, None] * q[..., None, :] for p, q in ((b, a), (a, b), (a, a), (b, b))]
    ba, ab, aa, bb = outer
    c = (a * b).sum(-1)[..., None, None]
    eye = torch.eye(a.shape[-1], dtype=a.dtype)
    R = eye + ba - ab + (c * (ba + ab) - aa - bb) / (1 + c)
    turned: Tensor = R @ x[..., None]
    return turned[..., 0]


def matrix(a: Tensor, b: Tensor) -> Tensor:
    """R(a, b) for single vectors: its columns are the turned axes."""
    return rotation(a, b, torch.eye(len(a), dtype=a.dtype)).T


@given(WIDTHS, SEEDS, DTYPES)
def test_equals_the_formula(width: int, seed: int, dtype: torch.dtype) -> None:
    assert_equivalent(rotation, explicit, drawn(3, width, seed, dtype))


@given(WIDTHS, SEEDS, DTYPES)
def test_is_orthogonal_with_determinant_one(width: int, seed: int, dtype: torch.dtype) -> None:
    a, b = (v[0] for v in drawn(2, width, seed, dtype))

    def gram(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        R = matrix(a, b)
        return R @ R.T, torch.linalg.det(R)

    def identity(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return torch.eye(width, dtype=a.dtype), torch.ones((), dtype=a.dtype)

    assert_equivalent(gram, identity, (a, b))


@given(WIDTHS, SEEDS, DTYPES)
def test_takes_a_onto_b(width: int, seed: int, dtype: torch.dtype) -> None:
    assert_equivalent(
        lambda a, b: rotation(a, b, a),
        lambda a, b: b / b.norm(dim=-1, keepdim=True) * a.norm(dim=-1, keepdim=True),
        drawn(2, width, seed, dtype),
    )


@given(st.integers(3, 24), SEEDS, DTYPES)
def test_leaves_the_complement_alone(width: int, seed: int, dtype: torch.dtype) -> None:
    def beside(a: Tensor, b: Tensor, x: Tensor) -> Tensor:
        basis: Tensor = torch.linalg.qr(torch.stack([a, b], -1)).Q
        return x - (basis @ basis.mT @ x[..., None]).squeeze(-1)

    assert_equivalent(
        lambda a, b, x: rotation(a, b, beside(a, b, x)), beside, drawn(3, width, seed, dtype)
    )


@given(WIDTHS, SEEDS, DTYPES)
def test_the_transpose_turns_back(width: int, seed: int, dtype: torch.dtype) -> None:
    assert_equivalent(
        lambda a, b, x: rotation(b, a, rotation(a, b, x)),
        lambda a, b, x: x,
        drawn(3, width, seed, dtype),
    )


@given(WIDTHS, SEEDS, DTYPES, st.sampled_from([1.0, 2.5, 1e-3, 1e5]))
def test_parallel_vectors_give_the_identity(
    width: int, seed: int, dtype: torch.dtype, scale: float
) -> None:
    assert_equivalent(
        lambda a, x: rotation(a, scale * a, x),
        lambda a, x: x,
        drawn(2, width, seed, dtype),
    )


@pytest.mark.parametrize("zeros", [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0)])
def test_zero_vectors_give_the_identity(zeros: tuple[float, float]) -> None:
    a, b, x = vectors(3, 7, 0, torch.float32)
    assert_equivalent(
        lambda a, b, x: rotation(zeros[0] * a, zeros[1] * b, x), lambda a, b, x: x, (a, b, x)
    )


AXES = [torch.eye(width)[i] for width in (2, 3, 5) for i in range(width)]
DIRECTIONS = [*AXES, torch.tensor([0.3, -1.0, 2.0, 0.1])]


@pytest.mark.parametrize("a", DIRECTIONS, ids=lambda a: str(a.tolist()))
@pytest.mark.parametrize("distance", [0.0, 1e-9, 1e-4])
def test_antiparallel_vectors_give_a_proper_rotation(a: Tensor, distance: float) -> None:
    """Half a turn, not a reflection; near it the map stays orthogonal."""
    a = a.double()
    b = -a + distance * torch.linspace(-1, 2, len(a), dtype=a.dtype)
    assert_equivalent(
        lambda a, b: matrix(a, b) @ matrix(a, b).T,
        lambda a, b: torch.eye(len(a), dtype=a.dtype),
        (a, b),
    )
    assert torch.linalg.det(matrix(a, b)) > 0
    if not distance:
        assert_equivalent(lambda a, b: rotation(a, b, a), lambda a, b: b, (a, b))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale_b", [-1.0, -2.0, 0.0, 1.0, 3.0])
@pytest.mark.parametrize("scale_a", [0.0, 1.0])
def test_gradients_are_finite_everywhere(
    dtype: torch.dtype, scale_a: float, scale_b: float
) -> None:
    v, x = (t[0] for t in vectors(2, 6, 1, dtype))
    inputs = [(t.detach()).requires_grad_() for t in (scale_a * v, scale_b * v, x)]
    out = rotation(*inputs)
    assert out.isfinite().all()
    for gradient in torch.autograd.grad(out.square().sum() + out.sum(), inputs):
        assert gradient.isfinite().all()


def test_gradient_is_right() -> None:
    inputs = [v.requires_grad_() for v in vectors(3, 5, 0, torch.float64)]
    assert torch.autograd.gradcheck(rotation, inputs)


def test_leading_axes_broadcast() -> None:
    a, b, x = vectors(3, 6, 0, torch.float32)
    turned = rotation(a[:, None], b[:, None], x[None])
    assert turned.shape == (3, 3, 6)
    assert_equivalent(
        lambda a, b, x: rotation(a[:, None], b[:, None], x[None])[1, 2],
        lambda a, b, x: rotation(a[1], b[1], x[2]),
        (a, b, x),
    )
