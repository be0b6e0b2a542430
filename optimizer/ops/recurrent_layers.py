"""`fxpress::lstm`, `gru`, `rnn_tanh`, `rnn_relu`: torch's recurrent layers, of any length.

    fxpress::lstm(x, (h, c), weights, ...)  =  aten::lstm(x, (h, c), weights, ...)

Export runs torch's own operators step by step to learn the shapes of their outputs, and fixes the
length by that. These say the shapes at once, and are otherwise torch's, arguments and all: each is
a composite operator that calls the one of its name, on every device and under autograd. Those that
end in `_packed` are for packed sequences: data (rows, I) and the batch size of every step.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn.utils.rnn import PackedSequence

from fxpress.ops.packed_sequences import PACK, PAD

__all__ = ["LAYERS", "PACKED", "opaque_layers"]

_MODES = ("lstm", "gru", "rnn_tanh", "rnn_relu")
_OPTIONS = "Tensor[] params, bool has_biases, int num_layers, float dropout, bool train"


def _outputs(x: Tensor, states: Sequence[Tensor], last: Sequence[Any]) -> tuple[Tensor, ...]:
    """Outputs without contents; `last` are the options from `bidirectional` on."""
    width = states[0].shape[-1] * (2 if last[0] else 1)
    after = tuple(state.new_empty(state.shape) for state in states)
    if last[1:] == (True,):  # batch first: memory stays in the order of time
        return x.new_empty(x.shape[1], x.shape[0], width).transpose(0, 1), *after
    return x.new_empty(*x.shape[:-1], width), *after


def _layer(mode: str) -> Callable[..., Any]:
    torch_operator = getattr(torch.ops.aten, mode)

    def run(x: Tensor, hx: Any, params: Sequence[Tensor], *options: Any) -> Any:
        if isinstance(x, FakeTensor):
            states = [hx] if isinstance(hx, Tensor) else hx
            return _outputs(x, states, options[4:])
        return torch_operator.input(x, hx, params, *options)

    return run


def _packed(mode: str) -> Callable[..., Any]:
    torch_operator = getattr(torch.ops.aten, mode)

    def run(data: Tensor, sizes: Tensor, hx: Any, params: Sequence[Tensor], *options: Any) -> Any:
        if isinstance(data, FakeTensor):
            states = [hx] if isinstance(hx, Tensor) else hx
            return _outputs(data, states, options[4:])
        return torch_operator.data(data, sizes, hx, params, *options)

    return run


_library = torch.library.Library("fxpress", "FRAGMENT")
for _mode in _MODES:
    _state = "Tensor[] hx" if _mode == "lstm" else "Tensor hx"
    _returns = "(Tensor, Tensor, Tensor)" if _mode == "lstm" else "(Tensor, Tensor)"
    _tail = f"{_state}, {_OPTIONS}, bool bidirectional"
    for _name, _schema, _body in (
        (_mode, f"(Tensor input, {_tail}, bool batch_first)", _layer),
        (f"{_mode}_packed", f"(Tensor data, Tensor batch_sizes, {_tail})", _packed),
    ):
        _library.define(f"{_name}{_schema} -> {_returns}", tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(_name, _body(_mode), "CompositeImplicitAutograd")

LAYERS = {mode: getattr(torch.ops.fxpress, mode).default for mode in _MODES}
"""The operators by their names in torch."""
PACKED = {mode: getattr(torch.ops.fxpress, f"{mode}_packed").default for mode in _MODES}
"""Those for packed sequences."""


@contextlib.contextmanager
def opaque_layers() -> Iterator[None]:
    """Let `nn.LSTM`, `nn.GRU` and `nn.RNN` call these operators, which export keeps whole."""
    checks = {kind: kind.check_forward_args for kind in (nn.RNNBase, nn.LSTM)}
    forwards = {kind: kind.forward for kind in (nn.LSTM, nn.GRU, nn.RNN)}
    for kind, check in checks.items():
        _exchange(kind, "check_forward_args", _checked(check))
    for kind, forward in forwards.items():
        _exchange(kind, "forward", _with_state(forward))
    calls = {mode: _called(mode) for mode in _MODES}
    calls |= {"_pack_padded_sequence": PACK, "_pad_packed_sequence": PAD}
    for name, call in calls.items():
        setattr(torch._VF, name, call)
    try:
        yield
    finally:
        for kind, check in checks.items():
            _exchange(kind, "check_forward_args", check)
        for kind, forward in forwards.items():
            _exchange(kind, "forward", forward)
        for name in calls:
            delattr(torch._VF, name)


def _exchange(kind: type, name: str, function: Any) -> None:
    setattr(kind, name, function)


def _called(mode: str) -> Callable[..., Any]:
    """What a layer of torch calls: with the batch sizes in second place for packed sequences."""

    def call(x: Tensor, second: Any, third: Any, *rest: Any) -> Any:
        packed = isinstance(second if mode == "lstm" else third, Tensor)
        return (PACKED if packed else LAYERS)[mode](x, second, third, *rest)

    return call


def _checked(check: Callable[..., None]) -> Callable[..., None]:
    """The check of a call, less that of the batch of a packed sequence: it is data in tracing."""

    def checked(layer: Any, x: Tensor, hidden: Any, batch_sizes: Tensor | None) -> None:
        if batch_sizes is None:
            check(layer, x, hidden, batch_sizes)

    return checked


def _with_state(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A layer that makes its first state for a packed sequence without reading data."""

    @functools.wraps(forward)
    def run(layer: Any, input: Any, hx: Any = None) -> Any:  # noqa: A002  (as torch calls it)
        if isinstance(input, PackedSequence) and hx is None:
            batch = _batch(input)
            directions = (2 if layer.bidirectional else 1) * layer.num_layers
            h = input.data.new_zeros(directions, batch, layer.proj_size or layer.hidden_size)
            c = input.data.new_zeros(directions, batch, layer.hidden_size)
            hx = (h, c) if isinstance(layer, nn.LSTM) else h
        return forward(layer, input, hx)

    return run


def _batch(packed: PackedSequence) -> Any:
    if packed.sorted_indices is not None:
        return packed.sorted_indices.shape[0]
    return packed.batch_sizes[0].item()
