"""`fxpress::pack_padded` and `fxpress::pad_packed`: between padded sequences and their packed rows.

They are torch's own, with shapes that tracing can tell: as many rows as the lengths sum up to, at
most as many steps as the padded sequences have. Torch's say nothing of either.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxpress.ops.define import define

__all__ = ["PACK", "PAD"]

aten = torch.ops.aten


def _pack(x: Tensor, lengths: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:
    data, sizes = aten._pack_padded_sequence.default(x, lengths, batch_first)
    return data, sizes


def _pack_fake(x: Tensor, lengths: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:
    context = torch.library.get_ctx()
    rows, steps = context.new_dynamic_size(), context.new_dynamic_size()
    torch._check(steps <= x.shape[1 if batch_first else 0])
    return x.new_empty(rows, *x.shape[2:]), lengths.new_empty(steps)


def _pack_save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, _lengths, ctx.batch_first = inputs
    ctx.shape = x.shape
    ctx.save_for_backward(output[1])


def _pack_gradient(ctx: Any, grad: Tensor, _sizes: Any) -> tuple[Any, ...]:
    (sizes,) = ctx.saved_tensors
    shape, first = ctx.shape, ctx.batch_first
    return aten._pack_padded_sequence_backward.default(grad, shape, sizes, first), None, None


def _pad(
    data: Tensor, sizes: Tensor, batch_first: bool, value: float, steps: int
) -> tuple[Tensor, Tensor]:
    padded, lengths = aten._pad_packed_sequence.default(data, sizes, batch_first, value, steps)
    return padded.contiguous(), lengths


def _pad_fake(
    data: Tensor, sizes: Tensor, batch_first: bool, _value: float, steps: Any
) -> tuple[Tensor, Tensor]:
    batch = torch.library.get_ctx().new_dynamic_size()
    shape = (batch, steps) if batch_first else (steps, batch)
    return data.new_empty(*shape, *data.shape[1:]), sizes.new_empty(batch)


def _pad_save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.batch_first = inputs[2]
    ctx.save_for_backward(output[1])


def _pad_gradient(ctx: Any, grad: Tensor, _lengths: Any) -> tuple[Any, ...]:
    (lengths,) = ctx.saved_tensors
    data, _ = aten._pack_padded_sequence.default(grad, lengths, ctx.batch_first)
    return data, None, None, None, None


define("fxpress::pack_padded", _pack, _pack_fake).register_autograd(
    _pack_gradient, setup_context=_pack_save
)
define("fxpress::pad_packed", _pad, _pad_fake).register_autograd(
    _pad_gradient, setup_context=_pad_save
)
PACK = torch.ops.fxpress.pack_padded.default
PAD = torch.ops.fxpress.pad_packed.default
