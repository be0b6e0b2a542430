"""The baselines: torch's layers behind RUM's call convention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fxpress.testing import BITWISE, assert_equivalent
from fxpress.zoo import GRU, LSTM, RNN

LAYERS: list[tuple[Any, Any, int]] = [(LSTM, nn.LSTM, 2), (GRU, nn.GRU, 1), (RNN, nn.RNN, 1)]


@pytest.mark.parametrize(("ours", "theirs", "parts"), LAYERS)
@pytest.mark.parametrize("batch_first", [False, True])
def test_computes_what_torch_does(ours: Any, theirs: Any, parts: int, batch_first: bool) -> None:
    layer = ours(4, 5, 2, batch_first=batch_first)
    reference = theirs(4, 5, 2, batch_first=batch_first)
    reference.load_state_dict(layer.layer.state_dict())
    x = torch.randn(3, 6, 4)
    _, state = layer(x)
    assert isinstance(state, tuple)
    assert [tuple(s.shape) for s in state] == [(2, 3 if batch_first else 6, 5)] * parts
    assert_equivalent(layer, reference, (x,), exactness=BITWISE)


@pytest.mark.parametrize(("ours", "theirs", "parts"), LAYERS)
def test_two_halves_make_the_whole(ours: Any, theirs: Any, parts: int) -> None:
    layer = ours(4, 5, 2)

    def halves(x: torch.Tensor) -> Any:
        y, state = layer(x[:4])
        z, state = layer(x[4:], state)
        return torch.cat([y, z]), state

    assert_equivalent(halves, layer, (torch.randn(7, 3, 4),))


# torch's recurrent layers keep their weights in a plain list as well, which export remarks on.
@pytest.mark.filterwarnings("ignore:The tensor attributes .* were assigned during export")
@pytest.mark.parametrize(("ours", "theirs", "parts"), LAYERS)
def test_exports(ours: Any, theirs: Any, parts: int) -> None:
    layer, x = ours(4, 5).eval(), torch.randn(6, 3, 4)
    exported = torch.export.export(layer, (x,), strict=False).module()
    assert_equivalent(exported, layer, (x,))


def test_other_options_reach_the_layer() -> None:
    relu = RNN(3, 4, nonlinearity="relu")
    assert relu.layer.nonlinearity == "relu"
