"""`hoist-products`: products leave a loop where they can; it is said why the others stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch import Tensor, nn

import fxpress
from fxpress.capture import capture, capture_calls
from fxpress.ops.recurrence import Cell as Step
from fxpress.passes.hoist_products import HoistProducts
from fxpress.passes.normalize_linear import NormalizeLinear
from fxpress.passes.roll_recurrence import RECURRENCE, RollRecurrence
from fxpress.passes.sites import linear_sites
from fxpress.program import Program
from fxpress.rewrite import PassContext, PassRecord
from fxpress.testing import assert_equivalent
from fxpress.verify import verify
from tests.passes.test_laws import Gradients, gradients_of
from tests.passes.test_roll_recurrence import (
    OPS,
    B,
    D,
    Drawn,
    Loop,
    T,
    backwards,
    every_other,
    few,
    forwards,
    narrow,
)

LINEAR = torch.ops.aten.linear.default


def hoisted(program: Program) -> PassRecord:
    """Rolled, and the products taken out."""
    NormalizeLinear().run(program, PassContext())
    RollRecurrence().run(program, PassContext())
    before = program.copy()
    record = HoistProducts().run(program, PassContext())
    verify(program, "hoist-products", before)
    again = program.copy()
    assert not HoistProducts().run(again, PassContext()).rewrites
    assert str(again) == str(program)
    return record


def products(program: Program) -> tuple[int, int]:
    """Products of all steps at once, and of every step."""
    calls = [Step.read(node.args[5]).graph for node in program.calls(RECURRENCE)]  # type: ignore[arg-type]
    inside = sum(n.target is LINEAR for graph in calls for n in graph.nodes)
    return len(list(program.calls(LINEAR))), inside


@pytest.mark.parametrize("step", [forwards, backwards, every_other, narrow])
def test_products_of_the_input_are_done_at_once(step: Any, assert_same_gradients: Any) -> None:
    model, x = Loop(step), torch.randn(B, T, D)
    program = capture(model, (x,))
    record = hoisted(program)
    assert products(program) == (1, 1)
    assert [rewrite.detail for rewrite in record.rewrites] == [{"before": 1, "behind": 0}]
    (decline,) = record.declined
    assert decline.reason.endswith("in the step of a loop reads its state: one product a step")
    assert __file__.replace("hoist_products", "roll_recurrence") in decline.source
    assert [site.shape for site in linear_sites(program)] == [(2 * D, D)]
    assert_equivalent(program, model, (x,))
    assert_same_gradients(program.graph_module, model, (x,), None)


class Tagger(nn.Module):
    """Words are embedded, read by a loop, and each state is projected to logits within it."""

    def __init__(self, dim: int, last: bool) -> None:
        super().__init__()
        self.embedding, self.project = nn.Embedding(7, D), nn.Linear(D, 9)
        self.cell, self.dim, self.last = Loop(forwards).cell, dim, last

    def forward(self, tokens: Tensor) -> Any:
        h = self.embedding.weight.new_zeros(len(tokens), D)
        outputs = []
        for token in tokens.unbind(1):
            h = self.cell(self.embedding(token), h)
            outputs.append(self.project(h))
        joined = torch.stack(outputs, self.dim)
        return (joined, outputs[-1], h) if self.last else joined


@pytest.mark.parametrize(("dim", "last"), [(0, False), (1, True)])
def test_products_that_are_collected_are_done_at_once(
    dim: int, last: bool, assert_same_gradients: Any
) -> None:
    model, tokens = Tagger(dim, last), torch.randint(7, (B, T))
    program = capture(model, (tokens,))
    record = hoisted(program)
    assert record.rewrites[0].detail == {"before": 0, "behind": 1}
    assert products(program) == (2 if last else 1, 2)  # the last step's by itself, as it was
    reasons = [decline.reason for decline in record.declined]
    assert any("reads %embedding, which every step computes for itself" in r for r in reasons)
    assert_equivalent(program, model, (tokens,))
    assert_same_gradients(program.graph_module, model, (tokens,), None)


def test_what_is_joined_along_its_features_stays() -> None:
    model, tokens = Tagger(2, False), torch.randint(7, (B, T))
    program = capture(model, (tokens,))
    record = hoisted(program)
    assert not record.rewrites
    assert products(program) == (0, 3)
    assert_equivalent(program, model, (tokens,))


class Feedback(nn.Module):
    """What a step puts out is what the next one reads."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        h, outputs = torch.zeros_like(x[0]), []
        for t in range(len(x)):
            h = self.project(torch.tanh(h + x[t]))
            outputs.append(h)
        return torch.stack(outputs)


@pytest.mark.parametrize("cell", [None, nn.LSTMCell, nn.GRUCell])
def test_what_the_next_step_reads_stays(cell: Any) -> None:
    class Cells(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = cell(D, D)

        def forward(self, x: Tensor) -> Tensor:
            state, outputs = None, []
            for t in range(len(x)):
                state = self.cell(x[t], state)
                outputs.append(state[0] if isinstance(state, tuple) else state)
            return torch.stack(outputs)

    model = Feedback() if cell is None else Cells()
    program = capture(model, (torch.randn(T, B, D),))
    record = hoisted(program)
    assert not record.rewrites
    assert ["reads its state" in decline.reason for decline in record.declined] == [True]


def test_a_dynamic_length(assert_same_gradients: Any) -> None:
    model = Loop(backwards)
    calls: list[Any] = [((torch.randn(2 + n % 2, n, D),), {}) for n in (5, 8)]
    program = capture_calls(model.eval(), calls)
    assert hoisted(program).rewrites
    for batch, length in ((2, 5), (4, 7), (3, 8)):
        x = torch.randn(batch, length, D)
        assert_equivalent(program, model, (x,))
        assert_same_gradients(program.graph_module, model, (x,), None)


@given(
    st.lists(OPS, min_size=2, max_size=6), st.integers(1, 2), st.integers(0, 1), st.integers(4, 7)
)
@few
def test_drawn_cells(ops: Any, states: int, how: int, steps: int) -> None:
    torch.manual_seed(steps)
    model, x = Drawn(ops, states, how), torch.randn(steps, B, D)
    program = capture(model, (x,))
    # Where no step reads the state, one may be taken to begin behind its slice: that is handed on.
    reasons = [decline.reason for decline in hoisted(program).declined]
    assert products(program)[1] == sum("reads its state" in reason for reason in reasons)
    assert_equivalent(program, model, (x,))
    assert_equivalent(gradients_of(program, model), Gradients(model), (x,))


def test_a_run_factors_what_left_the_loop_and_explain_lists_what_stayed(tmp_path: Path) -> None:
    model = Loop(forwards).eval()
    calls = [torch.randn(B, n, D) for n in (4, 6, 5, 5)]
    optimized = fxpress.optimize(
        model, calls, config={"factor-vvma": {"rank": 2}, "recover": False}, judge="off"
    )
    assert [r.site for r in optimized.passes["factor-vvma"].rewrites] == ["cell.of_input"]
    loaded = fxpress.load(optimized.save(tmp_path / "m"))
    for x in calls:
        assert torch.equal(loaded(x)[0], optimized(x)[0])
    matmuls = fxpress.explain(model, (calls[1],)).matmuls
    assert sorted((s.recognised, s.kind) for s in matmuls) == [(False, "linear"), (True, "linear")]
    assert F.mse_loss(optimized(calls[0])[0], model(calls[0])[0]) > 0
