"""`roll-recurrence`: loops over time become one node, and compute and train what they did."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, settings
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fxpress
from fxpress import zoo
from fxpress.capture import capture, capture_calls
from fxpress.errors import ArtifactError, CaptureError
from fxpress.ops.recurrence import Cell as Step
from fxpress.passes.normalize_linear import NormalizeLinear
from fxpress.passes.roll_recurrence import RECURRENCE, RollRecurrence
from fxpress.program import Program
from fxpress.rewrite import PassContext, PassRecord
from fxpress.testing import assert_equivalent
from fxpress.verify import verify
from tests.turns import seconds_in_turns

B, D, T = 2, 4, 5

pytestmark = pytest.mark.filterwarnings("ignore:.*weights are not part of single contiguous")


def rolled(model: nn.Module, *args: Any) -> tuple[Program, PassRecord]:
    """The program of a call, with its loops rolled and verified."""
    torch.manual_seed(0)
    program = capture(model.eval(), args)
    before = program.copy()
    record = RollRecurrence().run(program, PassContext())
    verify(program, "roll-recurrence", before)
    return program, record


def steps_of(program: Program) -> list[int]:
    """The number of steps of every recurrence of a graph."""
    return [node.args[4] for node in program.calls(RECURRENCE)]  # type: ignore[misc]


class Cell(nn.Module):
    """A cell of several operators: h <- tanh(W x + U h) * gate + h."""

    def __init__(self, width: int = D) -> None:
        super().__init__()
        self.of_input = nn.Linear(width, 2 * width)
        self.of_state = nn.Linear(width, 2 * width, bias=False)

    def forward(self, x: Tensor, h: Tensor) -> Any:
        new, gate = (self.of_input(x) + self.of_state(h)).chunk(2, -1)
        return torch.tanh(new) * torch.sigmoid(gate) + h


class Loop(nn.Module):
    """A loop over time whose body is given: `step(model, t, x, h) -> h`."""

    def __init__(self, step: Callable[..., Tensor]) -> None:
        super().__init__()
        self.cell, self.step = Cell(), step
        self.first = nn.Parameter(torch.randn(D))
        self.kept: list[Tensor] = []

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h, outputs = self.first.expand(x.shape[0], D), []
        for t in range(x.shape[1]):
            h = self.step(self, t, x, h)
            outputs.append(h)
        return torch.stack(outputs, 1), h


def forwards(model: Loop, t: int, x: Tensor, h: Tensor) -> Any:
    return model.cell(x[:, t], h)


def backwards(model: Loop, t: int, x: Tensor, h: Tensor) -> Any:
    return model.cell(x[:, x.shape[1] - 1 - t], h)


def every_other(model: Loop, t: int, x: Tensor, h: Tensor) -> Any:
    return model.cell(x[:, t], h) + x[:, x.shape[1] - 1 - t]


def narrow(model: Loop, t: int, x: Tensor, h: Tensor) -> Any:
    return model.cell(x[:, t : t + 1], h[:, None])[:, 0]


def unbound(model: Loop, t: int, x: Tensor, h: Tensor) -> Any:
    return model.cell(x.unbind(1)[t], h)


def narrowed(model: Loop, t: int, x: Tensor, h: Tensor) -> Any:
    return model.cell(x.narrow(1, t, 1).squeeze(1), h)


def transposed(model: Loop, t: int, x: Tensor, h: Tensor) -> Any:
    return torch.tanh(x[:, t] @ model.cell.of_input.weight[:D].t() + h)


STEPS = [forwards, backwards, every_other, narrow, narrowed, unbound, transposed]


@pytest.mark.parametrize("step", STEPS)
def test_a_loop_becomes_one_node(step: Any, assert_same_gradients: Any) -> None:
    model, x = Loop(step), torch.randn(B, T, D)
    program, record = rolled(model, x)
    assert steps_of(program) == [T]
    assert record.counts() == {"roll-loop": 1}
    assert record.rewrites[0].detail["steps"] == T
    assert "fixed" in record.rewrites[0].detail["length"]
    assert not record.declined
    assert_equivalent(program, model, (x,), exactness=RollRecurrence.exactness)
    assert_same_gradients(program.graph_module, model, (x,), None)


class Collecting(nn.Module):
    """A loop over time whose outputs are put together by what is given: `collect(steps, x)`."""

    def __init__(self, collect: Callable[..., Tensor]) -> None:
        super().__init__()
        self.cell, self.collect = nn.GRUCell(D, D), collect

    def forward(self, x: Tensor) -> Tensor:
        def steps(order: Any) -> Any:
            h = x.new_zeros(x.shape[0], D)
            for t in order:
                h = self.cell(x[:, t], h)
                yield t, h

        return self.collect(steps, x)


def written(steps: Any, x: Tensor) -> Tensor:
    out = torch.empty(x.shape)
    for t, h in steps(range(T)):
        out[:, t] = h
    return out


def written_back_in_time(steps: Any, x: Tensor) -> Tensor:
    out = torch.zeros(T, B, D)
    for t, h in steps(reversed(range(T))):
        out[t, :, :] = h
    return out.transpose(0, 1) + x


def written_by_slices(steps: Any, x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for t, h in steps(range(T)):
        out[:, t : t + 1] = h.unsqueeze(1)
    return out


def grown(steps: Any, x: Tensor) -> Tensor:
    out = x[:, :0]
    for _, h in steps(range(T)):
        out = torch.cat([out, h.unsqueeze(1)], dim=1)
    return out


def grown_at_the_front(steps: Any, x: Tensor) -> Tensor:
    out = torch.tensor([])
    for _, h in steps(reversed(range(T))):
        out = torch.cat((h.unsqueeze(1), out), 1)
    return out


HOW = [written, written_back_in_time, written_by_slices, grown, grown_at_the_front]


@pytest.mark.parametrize("collect", HOW)
def test_outputs_put_together_by_pieces(collect: Any, assert_same_gradients: Any) -> None:
    model, x = Collecting(collect), torch.randn(B, T, D)
    program, record = rolled(model, x)
    assert steps_of(program) == [T]
    assert not record.declined
    assert_equivalent(program, model, (x,), exactness=RollRecurrence.exactness)
    assert_same_gradients(program.graph_module, model, (x,), None)


class WrittenTwice(nn.Module):
    """What is written twice, never, or read in between stays what it is."""

    def forward(self, x: Tensor) -> Any:
        """(B, T, D) -> ..."""
        twice, some = torch.empty(2, D), torch.ones(3, D)
        twice[0], twice[1] = x[0, 0], x[0, 1]
        before = twice[0] * 2
        twice[0] = x[1, 0]
        some[1] = x[0, 2]
        some[-1] = 0.5
        return twice, before, some, some[1] + some[0]


def test_the_last_that_is_written_counts() -> None:
    model, x = WrittenTwice(), torch.randn(B, T, D)
    assert_equivalent(capture(model, (x,)), model, (x,), exactness=RollRecurrence.exactness)


class ByParameters(nn.Module):
    """A cell of products with parameters: h <- tanh(x W + h U)."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.u = (nn.Parameter(torch.randn(D, D)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        h, outputs = torch.zeros(x.shape[0], D), []
        for t in range(x.shape[1]):
            h = torch.tanh(x[:, t] @ self.w + h @ self.u)
            outputs.append(h)
        return torch.stack(outputs, 1)


def test_weights_made_for_every_step_are_one() -> None:
    model, x = ByParameters().eval(), torch.randn(B, T, D)
    program = capture(model, (x,))
    NormalizeLinear().run(program, PassContext())
    assert RollRecurrence().run(program, PassContext()).counts() == {"roll-loop": 1}
    assert_equivalent(program, model, (x,))


class ThereAndBack(nn.Module):
    """Two loops, one back in time: where one ends and the other begins is no step of either."""

    def __init__(self) -> None:
        super().__init__()
        self.there, self.back = nn.GRUCell(D, D), nn.RNNCell(D, D)

    def forward(self, x: Tensor) -> Tensor:
        out = []
        for cell, order in ((self.there, range(T)), (self.back, reversed(range(T)))):
            h, outputs = x.new_zeros(x.shape[0], D), []
            for t in order:
                h = cell(x[:, t], h)
                outputs.append(h)
            out.append(torch.stack(outputs, 1))
        return torch.cat(out, -1)


def test_what_lies_between_two_loops_is_no_near_miss() -> None:
    program, record = rolled(ThereAndBack(), torch.randn(B, T, D))
    assert steps_of(program) == [T, T]
    assert not record.declined


class EagerRecurrence(nn.Module):
    """A cell of torch in a loop of Python, forwards or backwards."""

    def __init__(self, cell: Any, reverse: bool = False, layers: int = 1) -> None:
        super().__init__()
        self.cells = nn.ModuleList(cell(D, D) for _ in range(layers))
        self.reverse = reverse

    def forward(self, x: Tensor) -> Tensor:
        order = range(len(x))[:: -1 if self.reverse else 1]
        states: list[Any] = [None] * len(self.cells)
        outputs = [x[0]] * len(x)
        for t in order:
            y = x[t]
            for layer, cell in enumerate(self.cells):
                states[layer] = cell(y, states[layer])
                y = states[layer][0] if isinstance(states[layer], tuple) else states[layer]
            outputs[t] = y
        return torch.stack(outputs)


@pytest.mark.parametrize(("layers", "reverse"), [(1, True), (3, False)])
@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell, nn.RNNCell, None])
def test_cells_of_torch(cell: Any, layers: int, reverse: bool, assert_same_gradients: Any) -> None:
    def additive(*_sizes: int) -> nn.Module:
        return Additive()

    model, x = EagerRecurrence(cell or additive, reverse, layers), torch.randn(8, B, D)
    program, _ = rolled(model, x)
    # A state made in the shape of what the first step computed is made by that step alone.
    assert steps_of(program) == [7 if cell is None and layers > 1 else 8]
    assert_equivalent(program, model, (x,), exactness=RollRecurrence.exactness)
    assert_same_gradients(program.graph_module, model, (x,), None)


class Additive(Cell):
    """A cell that is given no state at the first step."""

    def forward(self, x: Tensor, h: Tensor | None) -> Any:
        return super().forward(x, torch.zeros_like(x) if h is None else h)


@pytest.mark.parametrize("lambda_", [0, 1])
def test_rotational_units(lambda_: int, assert_same_gradients: Any) -> None:
    model = zoo.RUM(3, D, 2, lambda_, eta=1.0, batch_first=bool(lambda_))
    x = torch.randn(T, B, 3).transpose(0, lambda_)
    program, _ = rolled(model, x)
    assert steps_of(program) == [T, T]
    assert_equivalent(program, model, (x,), exactness=RollRecurrence.exactness)
    assert_same_gradients(program.graph_module, model, (x,), None)


def now_and_then(model: Loop, t: int, x: Tensor, h: Tensor) -> Any:
    h = model.cell(x[:, t], h)
    return h.relu() if t % 6 == 5 else h


def test_what_is_done_every_so_many_steps_parts_the_loop(assert_same_gradients: Any) -> None:
    model, x = Loop(now_and_then), torch.randn(B, 16, D)
    program, record = rolled(model, x)
    assert steps_of(program) == [6, 6, 4]
    assert any("bodies differ at step 5" in d.reason for d in record.declined)
    assert_equivalent(program, model, (x,), exactness=RollRecurrence.exactness)
    assert_same_gradients(program.graph_module, model, (x,), None)


class Bidirectional(nn.Module):
    """Two loops whose outputs are joined step by step, and layers of them, over lists."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        widths = [D] + [2 * D] * (layers - 1)
        self.there = nn.ModuleList(nn.LSTMCell(width, D) for width in widths)
        self.back = nn.ModuleList(nn.LSTMCell(width, D) for width in widths)

    def forward(self, x: Tensor) -> Tensor:
        ys = list(x.unbind(1))
        for there, back in zip(self.there, self.back, strict=True):
            forwards = self._run(there, ys)
            backwards = self._run(back, ys[::-1])[::-1]
            ys = [torch.cat(pair, -1) for pair in zip(forwards, backwards, strict=True)]
        return torch.stack(ys, 1)

    def _run(self, cell: nn.Module, xs: list[Tensor]) -> list[Tensor]:
        h = c = xs[0].new_zeros(len(xs[0]), D)
        outputs = []
        for x in xs:
            h, c = cell(x, (h, c))
            outputs.append(h)
        return outputs


@pytest.mark.parametrize("layers", [1, 2])
def test_bidirectional_layers(layers: int, assert_same_gradients: Any) -> None:
    model, x = Bidirectional(layers), torch.randn(B, T, D)
    program, _ = rolled(model, x)
    assert steps_of(program) == [T] * (3 * layers)  # there, back, and the pairs
    assert_equivalent(program, model, (x,), exactness=RollRecurrence.exactness)
    assert_same_gradients(program.graph_module, model, (x,), None)


def two_back(model: Loop, t: int, x: Tensor, h: Tensor) -> Any:
    """Reads the state of two steps before, which it keeps by itself."""
    model.kept = [h, h] if t == 0 else [model.kept[1], h]
    return model.cell(x[:, t], h) + model.kept[0]


def test_a_state_of_two_steps_before(assert_same_gradients: Any) -> None:
    model, x = Loop(two_back), torch.randn(B, 8, D)
    program, _ = rolled(model, x)
    assert steps_of(program)[0] >= 6
    assert_equivalent(program, model, (x,), exactness=RollRecurrence.exactness)


def counts(model: Loop, t: int, x: Tensor, h: Tensor) -> Any:
    """A number that counts, up and down, and a row of a table that is looked up by it."""
    position = F.embedding(torch.tensor(t), model.cell.of_input.weight)
    return model.cell(x[:, t] / (t + 2), h) * (9 - t) + position


@pytest.mark.parametrize("steps", [2, 3, 6])
def test_what_counts_the_steps(steps: int, assert_same_gradients: Any) -> None:
    model, x = Loop(counts), torch.randn(B, steps, D)
    program, record = rolled(model, x)
    assert steps_of(program) == [steps]
    assert not record.declined
    assert_equivalent(program, model, (x,), exactness=RollRecurrence.exactness)
    assert_same_gradients(program.graph_module, model, (x,), None)


class Windows(nn.Module):
    """A loop whose steps read windows of several positions, apart or overlapping."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.cell, self.width, self.stride = Cell(), width, stride

    def forward(self, x: Tensor) -> Tensor:
        h, outputs = x[:, 0], []
        starts = range(0, x.shape[1] - self.width + 1, abs(self.stride))
        for start in list(starts)[:: 1 if self.stride > 0 else -1]:
            h = self.cell(x[:, start : start + self.width].flatten(1)[:, :D], h)
            outputs.append(h)
        return torch.stack(outputs, 1)


@pytest.mark.parametrize(("width", "stride"), [(2, 2), (3, 1), (2, -3)])
@pytest.mark.parametrize("length", [7, 11])
def test_windows_of_several_positions(
    width: int, stride: int, length: int, assert_same_gradients: Any
) -> None:
    model, x = Windows(width, stride), torch.randn(B, length, D)
    program, _ = rolled(model, x)
    if (width, stride, length) == (2, -3, 7):
        assert not steps_of(program)  # two windows, and something between them
    else:
        assert steps_of(program) == [(length - width) // abs(stride) + 1]
    assert_equivalent(program, model, (x,), exactness=RollRecurrence.exactness)
    assert_same_gradients(program.graph_module, model, (x,), None)


def test_windows_of_a_dynamic_length() -> None:
    model = Windows(3, 1)
    program, _ = of_lengths(model, (torch.randn(B, 5, D),), (torch.randn(B, 8, D),))
    for length in (5, 7, 8):
        x = torch.randn(B, length, D)
        assert_equivalent(program, model, (x,), exactness=RollRecurrence.exactness)


@pytest.mark.parametrize("step", [forwards, backwards, every_other, narrow, unbound])
def test_a_loop_of_two_steps(step: Any) -> None:
    model, x = Loop(step), torch.randn(B, 2, D)
    program, _ = rolled(model, x)
    assert steps_of(program) == [2]
    assert_equivalent(program, model, (x,), exactness=RollRecurrence.exactness)


def test_two_neighbors_of_many_are_no_loop() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = Cell()

        def forward(self, x: Tensor) -> Any:
            return self.cell(x[:, 1], self.cell(x[:, 0], x[:, 2]))

    program, record = rolled(Two(), torch.randn(B, T, D))
    assert not record.rewrites
    assert not steps_of(program)


# Near misses -------------------------------------------------------------------------------------


@torch.library.custom_op("fxpress_test::own_step", mutates_args=())
def own_step(x: Tensor) -> Tensor:
    """An operator of a user, that no list knows."""
    return x.tanh()


@own_step.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def calls_its_own(model: Loop, t: int, x: Tensor, h: Tensor) -> Any:
    return model.cell(own_step(x[:, t]), h)


def differs(model: Loop, t: int, x: Tensor, h: Tensor) -> Any:
    return model.cell(x[:, t].relu() if t == 2 else x[:, t], h)


def powers(model: Loop, t: int, x: Tensor, h: Tensor) -> Any:
    return model.cell(x[:, t], h) ** (t + 1)


def doubles(model: Loop, t: int, x: Tensor, h: Tensor) -> Any:
    return model.cell(x[:, t], h) * 2**t


def spread(model: Loop, t: int, x: Tensor, h: Tensor) -> Any:
    return model.cell(x[:, t], h) + model.cell.of_input.weight[t : t + 3 : 2].sum(0)


def filled(model: Loop, t: int, x: Tensor, h: Tensor) -> Any:
    return model.cell(x[:, t], h) * torch.full((D,), float(t))


def attends(model: Loop, t: int, x: Tensor, h: Tensor) -> Any:
    q = model.cell(x[:, t], h).view(B, 1, 2, D // 2)
    return F.scaled_dot_product_attention(q, q, q).reshape(B, D)


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        (differs, "bodies differ at step 2: %relu calls aten.relu.default"),
        (powers, "computes with 2, which counts the steps"),
        (doubles, "has 4, which does not follow the steps"),
        (spread, "reads its tensor by windows that differ"),
        (filled, "reads %full_1, where the step before reads %full"),
        (attends, "a step holds attention, which is left to other passes"),
        (calls_its_own, "a step holds what a recurrence cannot: 'fxpress_test.own_step.default'"),
    ],
)
def test_steps_that_differ_are_declined(step: Any, reason: str) -> None:
    model, x = Loop(step), torch.randn(B, T, D)
    program, record = rolled(model, x)
    assert not steps_of(program)
    assert any(reason in decline.reason for decline in record.declined), record.declined
    assert all(__file__ in decline.source for decline in record.declined)
    assert_equivalent(program, model, (x,), exactness=RollRecurrence.exactness)


def test_layers_after_each_other_are_no_loop() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(D, D)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(6):
                x = torch.relu(self.layer(x))
            return x

    program, record = rolled(Shared(), torch.randn(B, D))
    assert not steps_of(program)
    assert not record.rewrites
    assert not record.declined


# Generated cells ---------------------------------------------------------------------------------

UNARY: list[Any] = [torch.tanh, torch.sigmoid, torch.relu, torch.neg, lambda v: v * 0.5]
BINARY: list[Any] = [
    torch.add,
    lambda a, b: torch.tanh(a * b),
    torch.sub,
    torch.maximum,
    lambda a, _b: a,
]


class Drawn(nn.Module):
    """A loop with a drawn body: each operator reads values before it; some are handed on."""

    def __init__(self, ops: list[tuple[int, int, int]], states: int, how: int) -> None:
        super().__init__()
        self.ops, self.states, self.how = ops, states, how
        self.weight = nn.Parameter(torch.randn(D, D) / D)
        self.start = nn.Parameter(torch.randn(states, B, D))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        state, outputs = list(self.start.unbind(0)), []
        for t in range(len(x)):
            values = [x[t] @ self.weight, *state]
            for kind, left, right in self.ops:
                a, b = values[left % len(values)], values[right % len(values)]
                made = UNARY[kind](a) if kind < len(UNARY) else BINARY[kind - len(UNARY)](a, b)
                values.append(made)
            state = values[-self.states :]
            outputs.append(state[0] + values[0])
        joined = torch.stack(outputs, 1) if self.how else torch.cat(outputs, 0)
        return joined, *state, outputs[len(x) // 2]


OPS = st.tuples(st.integers(0, len(UNARY) + len(BINARY) - 1), st.integers(0, 9), st.integers(0, 9))
few = settings(
    max_examples=12,
    deadline=None,
    phases=(Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
)


@given(
    st.lists(OPS, min_size=2, max_size=6), st.integers(1, 2), st.integers(0, 1), st.integers(4, 9)
)
@few
def test_drawn_cells(
    assert_same_gradients: Any, ops: Any, states: int, how: int, steps: int
) -> None:
    torch.manual_seed(steps)
    model, x = Drawn(ops, states, how), torch.randn(steps, B, D)
    program, _ = rolled(model, x)
    again = str(program)
    assert not RollRecurrence().run(program, PassContext()).rewrites
    assert str(program) == again
    assert sum(steps_of(program)) >= steps - 2
    assert_equivalent(program, model, (x,), exactness=RollRecurrence.exactness)
    assert_same_gradients(program.graph_module, model, (x,), None)


# Time --------------------------------------------------------------------------------------------


@pytest.mark.timing
def test_512_steps_take_seconds_and_twice_the_steps_twice_the_time() -> None:
    def roll(program: Program) -> None:
        RollRecurrence().run(program, PassContext())
        assert steps_of(program) in ([256], [512])

    programs = {n: capture(Loop(forwards), (torch.randn(B, n, D),)) for n in (256, 512)}
    seconds = seconds_in_turns(programs, roll, rounds=3)
    assert seconds[512] < 5
    assert seconds[512] < 3 * seconds[256]


# Lengths -----------------------------------------------------------------------------------------


def of_lengths(model: nn.Module, *calls: Any) -> tuple[Program, PassRecord]:
    """The program of calls that differ in length, with its loops rolled and verified."""
    program = capture_calls(model.eval(), [(call, {}) for call in calls])
    before = program.copy()
    record = RollRecurrence().run(program, PassContext())
    verify(program, "roll-recurrence", before)
    assert not program.shorter
    return program, record


@pytest.mark.parametrize(("step", "least"), [(every_other, 5), (counts, 2)])
def test_captures_of_several_lengths_become_one_of_dynamic_length(
    step: Any, least: int, assert_same_gradients: Any
) -> None:
    model = Loop(step)
    program, record = of_lengths(model, (torch.randn(3, least, D),), (torch.randn(2, 8, D),))
    assert record.rewrites[0].detail["length"] == f"dynamic: {least} to 8, as captured"
    for batch, length in ((2, least), (3, 7), (4, 8)):
        x = torch.randn(batch, length, D)
        assert_equivalent(program, model, (x,), exactness=RollRecurrence.exactness)
        assert_same_gradients(program.graph_module, model, (x,), None)
    for length in (least - 1, 9):  # what the loop does there was not seen
        with pytest.raises(CaptureError, match="captured with shape"):
            program(torch.randn(2, length, D))


@pytest.mark.parametrize("layers", [1, 2])
def test_loops_over_the_outputs_of_loops_take_every_length(layers: int) -> None:
    model = Bidirectional(layers)
    program, _ = of_lengths(model, (torch.randn(B, 4, D),), (torch.randn(B, 8, D),))
    for length in range(4, 9):
        x = torch.randn(B, length, D)
        assert_equivalent(program, model, (x,), exactness=RollRecurrence.exactness)


def test_two_neighboring_lengths_are_enough() -> None:
    model = Loop(narrow)
    program, record = of_lengths(model, (torch.randn(B, 5, D),), (torch.randn(B, 6, D),))
    assert "dynamic: 5 to 6" in record.rewrites[0].detail["length"]
    for length in (5, 6):
        x = torch.randn(B, length, D)
        assert_equivalent(program, model, (x,), exactness=RollRecurrence.exactness)


def mean_of_steps(model: Loop, t: int, x: Tensor, h: Tensor) -> Any:
    return model.cell(x[:, t], h) / x.shape[1]


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        (now_and_then, "the length is fixed: captures of other lengths have"),
        (
            mean_of_steps,
            "the length is fixed: captured at 4 and 9, recurrence computes with another cell",
        ),
    ],
)
def test_what_depends_on_the_length_keeps_it_fixed(step: Any, reason: str) -> None:
    model, longest = Loop(step), torch.randn(B, 9, D)
    program, record = of_lengths(model, (torch.randn(B, 4, D),), (longest,))
    assert any(reason in decline.reason for decline in record.declined), record.declined
    assert all("fixed" in rewrite.detail["length"] for rewrite in record.rewrites)
    assert_equivalent(program, model, (longest,), exactness=RollRecurrence.exactness)


# Layers of torch ---------------------------------------------------------------------------------


class Layer(nn.Module):
    """A recurrent layer of torch, over padded sequences or over packed ones."""

    def __init__(self, kind: Any, packed: str = "", **options: Any) -> None:
        super().__init__()
        self.layer, self.packed = kind(D, D, **options), packed

    def forward(self, x: Tensor, lengths: Tensor) -> Any:
        if not self.packed:
            return self.layer(x)
        first = self.layer.batch_first
        ordered = self.packed == "sorted"
        y, state = self.layer(pack_padded_sequence(x, lengths, first, enforce_sorted=ordered))
        total = x.shape[1 if first else 0] if self.packed == "total" else None
        return pad_packed_sequence(y, first, total_length=total), state


def batch_of(length: int, batch: int, first: bool) -> tuple[Tensor, Tensor]:
    """Padded sequences and their lengths, the longest first."""
    x = torch.randn(batch, length, D)
    lengths = torch.arange(length, length - batch, -1).clamp(min=1)
    return (x if first else x.transpose(0, 1).contiguous()), lengths


@pytest.mark.parametrize("packed", ["", "sorted", "total"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (nn.LSTM, {"batch_first": True}),
        (nn.LSTM, {"num_layers": 2, "bidirectional": True, "proj_size": 2}),
        (nn.GRU, {"num_layers": 2, "batch_first": True, "bias": False}),
        (nn.RNN, {"bidirectional": True, "batch_first": True}),
        (nn.RNN, {"nonlinearity": "relu"}),
    ],
)
def test_layers_of_torch_take_every_length(
    kind: Any, options: dict[str, Any], packed: str, assert_same_gradients: Any
) -> None:
    model = Layer(kind, packed, **options)
    first = bool(options.get("batch_first"))
    calls = [batch_of(length, batch, first) for length, batch in ((5, 3), (7, 2))]
    program, record = of_lengths(model, *calls)
    assert not record.rewrites
    assert not record.declined
    for call in (*calls, batch_of(11, 4, first)):
        assert_equivalent(program, model, call, exactness=RollRecurrence.exactness)
        assert_same_gradients(program.graph_module, model, call, None)


def test_a_packed_layer_is_saved_and_explained(tmp_path: Path) -> None:
    model = Layer(nn.GRU, "total", batch_first=True)
    calls = [batch_of(length, 3, True) for length in (5, 7, 6, 5)]
    optimized = fxpress.optimize(model, calls, judge="off")
    optimized.save(tmp_path / "model.fxpress")
    loaded = fxpress.load(tmp_path / "model.fxpress")
    assert_equivalent(loaded, model, batch_of(8, 3, True), exactness=RollRecurrence.exactness)
    (site,) = fxpress.explain(model, calls[0]).recurrences
    assert (site.kind, site.recognised) == ("packed gru", True)
    assert site.ms > 0


# The whole way -----------------------------------------------------------------------------------


def test_optimize_explain_and_the_artifact(tmp_path: Path) -> None:
    model = EagerRecurrence(nn.GRUCell)
    calls = [torch.randn(length, B, D) for length in (4, 6, 7, 5)]
    optimized = fxpress.optimize(model, calls, judge="off")
    record = optimized.passes["roll-recurrence"]
    assert record.counts() == {"roll-loop": 1}
    assert "dynamic: 4 to 7" in record.rewrites[0].detail["length"]
    (rewrite,) = record.as_dict()["rewrites"]
    assert rewrite["steps"] == 7
    optimized.save(tmp_path / "model.fxpress")
    loaded = fxpress.load(tmp_path / "model.fxpress")
    (site,) = fxpress.explain(model, (calls[0],)).recurrences
    assert (site.kind, site.recognised) == ("loop", True)
    assert site.ms > 0
    for x in calls:
        assert_equivalent(optimized, model, (x,), exactness=RollRecurrence.exactness)
        assert_equivalent(loaded, model, (x,), exactness=RollRecurrence.exactness)


def test_a_cell_may_call_only_what_an_artifact_may() -> None:
    program, _ = rolled(Loop(forwards), torch.randn(B, T, D))
    (node,) = program.calls(RECURRENCE)
    text = node.args[5]
    assert isinstance(text, str)
    assert Step.read(text).text() == text
    writes = text.replace("aten.tanh.default", "aten.tanh_.default")
    loads = text.replace("aten.tanh.default", "torch.load")
    for damaged in (writes, loads, text[:-1], "{}", text.replace('"x0"', '"y0"', 1)):
        with pytest.raises(ArtifactError):
            Step.read(damaged)


def test_graph(golden: Callable[[str, str], None]) -> None:
    program, _ = rolled(Loop(every_other), torch.randn(B, T, D))
    golden(str(program), "roll_recurrence.txt")
