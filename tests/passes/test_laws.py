"""The laws of passes, over generated programs. A new pass gets them by existing.

A pass leaves a valid program; the same outputs and gradients within its exactness; nothing to do
for a second run; and the same text whenever it runs on the same program.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, note, settings
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxpress.capture import capture
from fxpress.passes import all_passes
from fxpress.program import Program
from fxpress.rewrite import Pass, PassContext, PassRecord
from fxpress.testing import BITWISE, REASSOCIATES, assert_equivalent
from fxpress.verify import verify
from tests.passes.programs import Drawn, programs

PASSES = list(all_passes().values())

# No phase that explains: it traces every line, which takes minutes where a capture takes a second.
few = settings(
    max_examples=12,
    phases=(Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
)


def each_pass(captured: Program) -> Iterator[tuple[type[Pass], Program]]:
    """Every pass with a copy of the program: one capture serves them all."""
    for kind in PASSES:
        note(kind.name)  # said where it fails
        yield kind, captured.copy()


def apply(kind: type[Pass], program: Program) -> PassRecord:
    """Run a pass with its defaults and no decisions: those that need some change nothing."""
    config = kind.config_type() if kind.config_type is not None else None
    return kind().run(program, PassContext(config=config))


@given(drawn=programs())
@few
def test_the_program_stays_valid(drawn: Drawn) -> None:
    captured = capture(*drawn.build())
    for kind, program in each_pass(captured):
        apply(kind, program)
        verify(program, kind.name, captured)


@given(drawn=programs())
@few
def test_outputs_and_gradients_are_kept(drawn: Drawn) -> None:
    model, call = drawn.build()
    captured = capture(model, call)
    for kind, program in each_pass(captured):
        apply(kind, program)
        reference: Any = model
        loosely = kind.exactness
        if kind.exactness is BITWISE:
            # Outputs bit for bit those of the capture, which itself reassociates; as do gradients.
            reference, loosely = captured, REASSOCIATES
        assert_equivalent(program, reference, call, exactness=kind.exactness)
        assert_equivalent(gradients_of(program, model), Gradients(model), call, exactness=loosely)


@given(drawn=programs())
@few
def test_a_second_run_changes_nothing(drawn: Drawn) -> None:
    for kind, program in each_pass(capture(*drawn.build())):
        apply(kind, program)
        once = str(program)
        assert not apply(kind, program).rewrites
        assert str(program) == once


@given(drawn=programs())
@few
def test_two_runs_give_the_same_text(drawn: Drawn) -> None:
    model, call = drawn.build()
    first, second = each_pass(capture(model, call)), each_pass(capture(model, call))
    for (kind, program), (_, other) in zip(first, second, strict=True):
        did, again = apply(kind, program), apply(kind, other)
        assert str(program) == str(other)
        assert (did.rewrites, _reasons(did)) == (again.rewrites, _reasons(again))


def _reasons(record: PassRecord) -> list[str]:
    return [decline.reason for decline in record.declined]


class Gradients(nn.Module):
    """The gradients of a model's parameters, as the output of a module."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *call: Any) -> list[Tensor]:
        return _gradients(self.model, list(self.model.parameters()), call)


def _gradients(function: Callable[..., Any], of: Sequence[Tensor], call: Any) -> list[Tensor]:
    with torch.enable_grad():
        loss = sum(out.square().sum() for out in pytree.tree_leaves(function(*call)))
        return list(torch.autograd.grad(loss, of, materialize_grads=True))


def gradients_of(program: Program, model: nn.Module) -> Callable[..., list[Tensor]]:
    """Gradients of a program, in the places of the model's parameters that share the storage."""
    ours = list(program.graph_module.parameters())

    def run(*call: Any) -> list[Tensor]:
        totals = {p.untyped_storage().data_ptr(): torch.zeros_like(p) for p in model.parameters()}
        for parameter, gradient in zip(ours, _gradients(program, ours, call), strict=True):
            total = totals[parameter.untyped_storage().data_ptr()]
            layout = parameter.shape, parameter.stride(), parameter.storage_offset()
            total.as_strided(*layout).add_(gradient)
        return [totals[p.untyped_storage().data_ptr()] for p in model.parameters()]

    return run
