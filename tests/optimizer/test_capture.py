"""Capture: programs are the model, the model stays what it was, failures are explained."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from models import Branching, batches, stack
from torch import Tensor, nn

import fxpress
from fxpress.capture import Call, capture_calls
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


@pytest.mark.parametrize("lengths", [(48, 40), (1, 48, 40)])
def test_sizes_that_differ_between_calls_are_dynamic(lengths: tuple[int, ...]) -> None:
    model = stack(causal=True)
    calls: list[Call] = [((batches(1, length)[0],), {}) for length in lengths]
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


# What a call may take and give -------------------------------------------------------------------


@dataclass
class Pair:
    """A container that torch has never heard of."""

    x: Tensor
    bias: Tensor | None = None


class Memory:
    """An object that is no dataclass, with an object in it."""

    def __init__(self, kept: Tensor) -> None:
        self.pairs = [Pair(kept)]
        self.width = int(kept.shape[1])


class Contained(nn.Module):
    """Takes and returns objects."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(
        self, pair: Pair, *, more: dict[str, list[Tensor]], nothing: Tensor | None = None
    ) -> tuple[dict[str, Tensor], Memory, None]:
        """(B, 4) in a pair and in a list."""
        y = self.linear(pair.x) + more["inner"][0]
        if pair.bias is not None:
            y = y + pair.bias
        return {"y": y}, Memory(y * 2), None


def test_objects_go_in_and_come_out() -> None:
    model, x = Contained(), torch.randn(3, 4)
    more = {"inner": [torch.randn(4)]}
    program = fxpress.capture(model, (Pair(x),), {"more": more, "nothing": None})
    assert_equivalent(program, model, (Pair(x),), {"more": more})
    _, memory, nothing = program(Pair(x), more=more)
    assert isinstance(memory, Memory)
    assert isinstance(memory.pairs[0], Pair)
    assert memory.width == 4
    assert nothing is None


def test_objects_of_another_content_do_not_fit() -> None:
    x, more = torch.randn(3, 4), {"inner": [torch.randn(4)]}
    program = fxpress.capture(Contained(), (Pair(x),), {"more": more})
    with pytest.raises(CaptureError, match="does not fit"):
        program(Pair(x, torch.randn(4)), more=more)


def test_objects_may_have_dynamic_sizes() -> None:
    model, more = Contained(), {"inner": [torch.randn(4)]}
    calls: list[Call] = [((Pair(torch.randn(n, 4)),), {"more": more}) for n in (3, 5)]
    program = capture_model(model, calls).programs[""]
    assert_equivalent(program, model, (Pair(torch.randn(7, 4)),), {"more": more})


class Counting(nn.Module):
    """Keeps a running mean and a count, written in place, anew, and in part."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.mean: Tensor
        self.steps: Tensor
        self.rows: Tensor
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("rows", torch.zeros(2, 4))

    def forward(self, x: Tensor) -> Tensor:
        """(B, 4) -> (B, 4)."""
        y: Tensor = self.linear(x)
        self.mean.mul_(0.9).add_(y.mean(0))
        self.steps = self.steps + 1
        self.rows[0] = y[0]
        return y + self.mean


def test_buffers_are_updated_as_the_model_updates_its_own() -> None:
    model = Counting()
    program, reference, untouched = (
        fxpress.capture(model, (torch.ones(3, 4),)),
        *(copy.deepcopy(model) for _ in range(2)),
    )
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), untouched.buffers(), strict=True))
    for x in batches_of_four():
        assert torch.equal(program(x), reference(x))
    held = dict(program.graph_module.named_buffers())
    assert all(torch.equal(held[name], buffer) for name, buffer in reference.named_buffers())


def batches_of_four() -> list[Tensor]:
    return [torch.randn(3, 4) for _ in range(3)]


class Choosing(nn.Module):
    """Branches by `torch.cond`."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 4) -> (B, 4)."""
        y = self.first(x)
        chosen: Tensor = torch.cond(y.sum() > 0, self.second, torch.neg, (y,))
        return chosen


def test_a_branch_in_the_graph_is_left_to_torch() -> None:
    model, x = Choosing(), torch.randn(3, 4)
    captured = capture_model(model, [((x,), {}), ((-x,), {})])
    assert list(captured.programs) == ["first"]
    assert "cond holds a graph of its own" in captured.failures[0].reason
    body = captured.build()
    for call in (x, -x):
        assert_equivalent(body, model.eval(), (call,))


def test_a_model_without_storage_is_explained() -> None:
    with torch.device("meta"):
        model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)
    found = fxpress.explain(model, (torch.randn(2, 8, 16),))
    assert [site.recognised for site in found.attention] == [True, True]
    assert len(found.matmuls) == 8


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("need_weights", [False, True])
def test_half_precision_and_padding(dtype: torch.dtype, need_weights: bool) -> None:
    model = nn.MultiheadAttention(16, 2, batch_first=True).to(dtype).train()
    x, padding = torch.randn(2, 8, 16, dtype=dtype), torch.arange(8).expand(2, 8) > 5
    call = {"key_padding_mask": padding, "need_weights": need_weights}
    program = fxpress.capture(model, (x, x, x), call)
    assert model.training
    assert_equivalent(program, model.eval(), (x, x, x), call)


class Summed(nn.Module):
    """Sums over time in a loop, which fixes the length."""

    def forward(self, x: Tensor) -> Tensor:
        total = torch.zeros_like(x[0])
        for step in x:
            total = torch.tanh(total + step)
        return total


def test_a_length_that_export_fixes_is_captured_at_shorter_ones_too() -> None:
    calls: list[Any] = [((torch.randn(n, b, 2),), {}) for n, b in ((9, 2), (5, 3), (7, 2))]
    program = capture_calls(Summed(), calls)
    lengths = [p.placeholders[0].meta["val"].shape[0] for p in (*program.shorter, program)]
    assert lengths == [5, 6, 9]
    assert program.copy().shorter == program.shorter
    assert not capture_calls(Summed(), calls[:1]).shorter


def test_a_length_that_stays_dynamic_is_captured_once() -> None:
    model = nn.Linear(4, 2)
    calls: list[Any] = [((torch.randn(n, 4),), {}) for n in (3, 5)]
    assert not capture_calls(model, calls).shorter
