"""What an optimized module holds of the original, and what becomes of calls it was not made for."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from models import Branching, batches, stack
from torch import nn

import fxpress
from fxpress.errors import CaptureError, PlanError

HALF = {"prune-attention": {"pruned": 0.5, "block": 16}}


def optimized(model: nn.Module, **options: Any) -> fxpress.OptimizedModule:
    """The model with pruned attention."""
    return fxpress.optimize(model, batches(), judge="off", config=HALF, **options)


def test_the_original_can_be_let_go() -> None:
    model = stack()
    model.config = {"width": 32}  # type: ignore[assignment]
    held = [weakref.ref(part) for part in (*model.modules(), *model.parameters())]
    o = optimized(model, keep_original=False)
    expected = o(batches(1)[0])
    del model
    gc.collect()
    assert not [ref() for ref in held if ref() is not None]
    assert torch.equal(o(batches(1)[0]), expected)
    assert o.original is None
    assert o.config == {"width": 32}
    with pytest.raises(CaptureError, match="does not fit the captured one"):
        o(batches(1, 20)[0])
    with pytest.raises(PlanError, match="keep_original=True"):
        o.without("prune-attention")


def test_captured_regions_can_be_let_go() -> None:
    model = Branching()
    held = [weakref.ref(module) for module in (model, *model.first.modules(), model.second)]
    o = optimized(model, keep_original=False)
    expected = o(batches(1)[0])
    del model
    gc.collect()
    assert not [ref() for ref in held if ref() is not None]
    assert torch.equal(o(batches(1)[0]), expected)
    assert o.scale == 3.0


@pytest.mark.parametrize("keep", [True, "cpu"])
def test_on_cpu_a_copy_on_the_cpu_is_the_original_itself(keep: Any) -> None:
    model, other = stack().eval(), batches(1, 20)[0]
    o = optimized(model, keep_original=keep)
    assert o.original is model
    with pytest.warns(UserWarning, match="runs the original module"):
        assert torch.equal(o(other), model(other))
    assert torch.equal(o.without("prune-attention")(batches(1)[0]), model(batches(1)[0]))
