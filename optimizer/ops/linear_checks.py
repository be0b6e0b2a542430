"""What every factored linear asks of its operands."""

from __future__ import annotations

from torch import Tensor

from fxpress.ops.activations import ACTIVATIONS

__all__ = ["operand_problem"]


def operand_problem(
    x: Tensor, factors: tuple[Tensor, ...], bias: Tensor | None, m: int, activation: str | None
) -> str:
    """What is wrong with dtypes, devices, bias or activation of a call with m outputs; else ""."""
    tensors = [x, *factors, *([] if bias is None else [bias])]
    if not x.is_floating_point() or len({t.dtype for t in tensors}) > 1:
        return f"all have one floating dtype, not {', '.join(str(t.dtype) for t in tensors)}"
    if len({t.device for t in tensors}) > 1:
        return f"all are on one device, not {', '.join(str(t.device) for t in tensors)}"
    if bias is not None and tuple(bias.shape) != (m,):
        return f"bias is ({m},)"
    if activation is not None and activation not in ACTIVATIONS:
        return f"activation is None or one of {', '.join(ACTIVATIONS)}, not {activation!r}"
    return ""
