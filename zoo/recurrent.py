"""LSTM, GRU and RNN baselines: torch's own layers, called as `fxpress.zoo.RUM` is."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from fxpress.zoo.rum import State

__all__ = ["GRU", "LSTM", "RNN"]


class LSTM(nn.Module):
    """`torch.nn.LSTM`: Hochreiter and Schmidhuber 1997; the state is (h, c), each (L, B, H).

    Args:
        input_size: I, width of the input.
        hidden_size: H, width of the state.
        num_layers: L.
        batch_first: inputs and outputs are (B, T, ·), not (T, B, ·).
        **kwargs: what else the layer of torch takes.
    """

    layer_type: ClassVar[type[Any]] = nn.LSTM

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        batch_first: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.layer = self.layer_type(
            input_size, hidden_size, num_layers, batch_first=batch_first, **kwargs
        )

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Outputs and last state for inputs (T, B, I), or (B, T, I) with `batch_first`."""
        y, (h, c) = self.layer(x, state)
        return y, (h, c)


class GRU(LSTM):
    """`torch.nn.GRU`: Cho et al. 2014, arXiv 1406.1078; the state is (h,), h (L, B, H)."""

    layer_type: ClassVar[type[Any]] = nn.GRU

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Outputs and last state for inputs (T, B, I), or (B, T, I) with `batch_first`."""
        y, h = self.layer(x, None if state is None else state[0])
        return y, (h,)


class RNN(GRU):
    """`torch.nn.RNN`: Elman 1990; the state is (h,), h (L, B, H)."""

    layer_type = nn.RNN
