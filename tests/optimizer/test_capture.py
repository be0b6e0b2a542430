"""Capture: programs are the model, the model stays what it was, failures are explained."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import Branching, batches, stack
from torch import Tensor, nn

import fxpress
from fxpress.capture import Call
from fxpress.errors import CaptureError
from fxpress.regions import capture_model
from fxpress.testing import BITWISE, assert_equivalent


class Clamp(torch.autograd.Function):
    """Clamps, with a straight-through gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clamp(-1, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


class StraightThrough(nn.Module):
    """A model with a backward of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 4) -> (B, 4)."""
        return Clamp.apply(self.linear(x))  # type: ignore[no-any-return, no-untyped-call]


class Stopped(nn.Module):
    """A part of the graph is under `torch.no_grad`."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.live = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 4) -> (B, 4)."""
        with torch.no_grad():
            y = self.frozen(x)
        out: Tensor = y + self.live(x)
        return out


def test_a_program_computes_what_the_model_does() -> None:
    model, x = stack(), batches(1)[0]
    program = fxpress.capture(model, (x,))
    assert_equivalent(program.graph_module, model.eval(), (x,), exactness=BITWISE)
    assert "aten.scaled_dot_product_attention" in str(program)
    assert str(program).count("aten.linear") == 5


def test_capture_leaves_flags_and_tensors_alone() -> None:
    model = nn.Sequential(stack(), nn.Dropout(0.5)).train()
    model[0].eval()
    before = copy.deepcopy(model.state_dict())
    fxpress.capture(model, (batches(1)[0],))
    assert model.training
    assert not model[0].training
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_parameters_share_storage_until_a_gradient_arrives() -> None:
    model, x = stack(), batches(1)[0]
    program = fxpress.capture(model, (x,))
    own, original = program.graph_module.get_parameter("2.weight"), model.get_parameter("2.weight")
    assert own.data_ptr() == original.data_ptr()
    program.graph_module(x).sum().backward()
    assert own.data_ptr() != original.data_ptr()
    assert original.grad is None


def test_no_grad_blocks_stay_without_gradient() -> None:
    program = fxpress.capture(Stopped(), (torch.randn(2, 4),))
    program.graph_module(torch.randn(2, 4)).sum().backward()
    assert program.graph_module.get_parameter("frozen.weight").grad is None
    assert program.graph_module.get_parameter("live.weight").grad is not None


def test_a_backward_of_its_own_is_refused_not_wrong() -> None:
    model, x = StraightThrough(), torch.randn(3, 4)
    body = capture_model(model, [((x,), {})]).build()
    assert_equivalent(body, model, (x,))
    with pytest.raises(CaptureError, match="gradients would be wrong"):
        body(x).sum().backward()


def test_sizes_that_differ_between_calls_are_dynamic() -> None:
    model = stack(causal=True)
    calls: list[Call] = [((x,), {}) for x in (batches(1, 48)[0], batches(1, 40)[0])]
    body = capture_model(model, calls).build(fallback=False)
    for tokens in (48, 40, 17):
        assert_equivalent(body, model.eval(), (batches(1, tokens)[0],))


def test_a_call_that_does_not_fit_goes_to_the_original_once_warned() -> None:
    model = stack()
    body = capture_model(model, [((batches(1)[0],), {})]).build()
    other = batches(1, 20)[0]
    with pytest.warns(UserWarning, match="runs the original module"):
        first = body(other)
    assert torch.equal(first, body(other))


def test_data_dependent_python_is_captured_in_regions() -> None:
    model = Branching()
    captured = capture_model(model, [((x,), {}) for x in batches(2)])
    assert set(captured.programs) == {"first", "second"}
    assert "models.py" in captured.failures[0].reason
    body = captured.build()
    assert set(body.state_dict()) == set(model.state_dict())
    assert_equivalent(body, model.eval(), (batches(1)[0],))


def test_what_cannot_be_captured_says_why_and_where() -> None:
    with pytest.raises(CaptureError, match=r"models\.py:\d+"):
        fxpress.capture(Branching(), (batches(1)[0],))


def test_arguments_that_do_not_fit_are_refused() -> None:
    with pytest.raises(CaptureError, match="cannot be called like this"):
        fxpress.capture(stack(), (batches(1)[0],), {"nonsense": 1})
