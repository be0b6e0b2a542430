"""`fxpress::low_rank_linear`: a linear map through a narrow waist.

    y = act(U (D x) + b),    D (rank, n), U (m, rank)

Two dense products, rank (m + n) multiply-adds: the alternative to `vvma_linear` at equal bytes, and
the better one on weights that were not trained for that form. PyTorch's own products serve it
everywhere.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxpress.errors import LoweringError
from fxpress.ops.activations import activate, activation_gradient
from fxpress.ops.define import define
from fxpress.ops.linear_checks import operand_problem

__all__ = ["low_rank_linear", "low_rank_reference"]

_OPERATOR = "fxpress::low_rank_linear"


def low_rank_reference(
    x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """`low_rank_linear` in plain PyTorch, in the dtype of its arguments."""
    return activate(F.linear(F.linear(x, down), up, bias), activation)


def _forward(
    x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None, activation: str | None
) -> Tensor:
    return low_rank_reference(x, down, up, bias, activation).contiguous()


def _backward(
    grad: Tensor, x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None, activation: str | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, g = x.reshape(-1, x.shape[-1]), grad.reshape(-1, up.shape[0])
    waist = rows @ down.mT
    if activation is not None:
        g = activation_gradient(g, F.linear(waist, up, bias), activation)
    dwaist = g @ up
    return (dwaist @ down).view(x.shape), dwaist.mT @ rows, g.mT @ waist, g.sum(0)


def _fake(x: Tensor, _down: Tensor, up: Tensor, *_rest: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], up.shape[0])


def _backward_fake(
    _grad: Tensor, x: Tensor, down: Tensor, up: Tensor, *_rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shapes = (x.shape, down.shape, up.shape, (up.shape[0],))
    dx, ddown, dup, dbias = (x.new_empty(shape) for shape in shapes)
    return dx, ddown, dup, dbias


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    *tensors, ctx.activation = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    bias = ctx.saved_tensors[3]
    *grads, dbias = torch.ops.fxpress.low_rank_linear_backward(
        grad.contiguous(), *ctx.saved_tensors, ctx.activation
    )
    return *grads, None if bias is None else dbias, None


define(f"{_OPERATOR}_backward", _backward, _backward_fake)
define(_OPERATOR, _forward, _fake).register_autograd(_gradients, setup_context=_save)


def _problem(x: Tensor, down: Tensor, up: Tensor) -> str:
    if x.dim() < 1 or down.dim() != 2 or up.dim() != 2:
        return "x is (..., n), down (rank, n), up (m, rank)"
    if x.shape[-1] != down.shape[1] or down.shape[0] != up.shape[1]:
        return "down takes the features of x, and up those of down"
    return ""


def low_rank_linear(
    x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """Apply the weight `up @ down` without forming it.

    Args:
        x: (..., n).
        down: (rank, n).
        up: (m, rank).
        bias: (m,), or None.
        activation: None or a name in `fxpress.ops.activations.ACTIVATIONS`.

    Returns:
        (..., m).

    Raises:
        LoweringError: if shapes, dtypes or devices do not fit together.
    """
    problem = _problem(x, down, up)
    if problem := problem or operand_problem(x, (down, up), bias, up.shape[0], activation):
        shapes = ", ".join(str(tuple(t.shape)) for t in (x, down, up))
        raise LoweringError(f"low_rank_linear: {problem}; got x, down, up {shapes}")
    y: Tensor = torch.ops.fxpress.low_rank_linear(x, down, up, bias, activation)
    return y
