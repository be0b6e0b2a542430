"""Activations that the linear operators fold into their epilogue, with their derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["ACTIVATIONS", "activate", "activation_gradient"]

aten = torch.ops.aten

_Gradient = Callable[[Tensor, Tensor], Any]
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], _Gradient]] = {
    "relu": (torch.relu, lambda grad, x: aten.threshold_backward(grad, x, 0)),
    "gelu": (F.gelu, aten.gelu_backward),
    "gelu_tanh": (
        lambda x: F.gelu(x, approximate="tanh"),
        lambda grad, x: aten.gelu_backward(grad, x, approximate="tanh"),
    ),
    "silu": (F.silu, aten.silu_backward),
    "sigmoid": (torch.sigmoid, lambda grad, x: aten.sigmoid_backward(grad, x.sigmoid())),
    "tanh": (torch.tanh, lambda grad, x: aten.tanh_backward(grad, x.tanh())),
}
"""Name -> (function of x, gradient of x from the gradient of the output and x)."""


def activate(x: Tensor, activation: str | None) -> Tensor:
    """Apply a named activation; None leaves x as it is."""
    return x if activation is None else ACTIVATIONS[activation][0](x)


def activation_gradient(grad: Tensor, x: Tensor, activation: str) -> Tensor:
    """The gradient of x, given that of `activate(x, activation)`."""
    result: Tensor = ACTIVATIONS[activation][1](grad, x)
    return result
