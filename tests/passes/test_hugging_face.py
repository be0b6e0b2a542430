"""Attention of many architectures, `sdpa` and `eager`: all of it is recognized, or the reason said.

How many there are is counted in an eager run, which knows nothing of graphs.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fxpress.capture import Call, capture, capture_calls
from fxpress.passes.fuse_attention import FuseAttention
from fxpress.passes.sites import attention_sites
from fxpress.program import Program
from fxpress.rewrite import PassContext
from fxpress.testing import assert_equivalent
from fxpress.verify import verify
from tests.passes.architectures import ARCHITECTURES, Architecture
from tests.passes.attention_count import AttentionCount


def fused(program: Program) -> tuple[int, list[str]]:
    """Attention that was brought to its canonical form, and the reasons for the rest."""
    before = program.copy()
    record = FuseAttention().run(program, PassContext())
    verify(program, "fuse-attention", before)
    return len(attention_sites(program)), [decline.reason for decline in record.declined]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_attention_is_recognized_or_declined_for_a_reason(name: str) -> None:
    architecture = ARCHITECTURES[name]
    call = architecture.call()
    for attention in architecture.attentions():
        model = architecture.build(attention)
        with AttentionCount() as count, torch.no_grad():
            model(**call)
        program = capture(model, kwargs=call)
        recognized, declined = fused(program)
        assert count.total
        assert recognized + len(declined) == count.total
        assert declined == [architecture.declined] * len(declined)
        assert bool(declined) == bool(architecture.declined)
        assert_equivalent(program, model, (), call)


def test_there_are_enough_of_them() -> None:
    assert len(ARCHITECTURES) >= 40
    assert sum(bool(a.declined) for a in ARCHITECTURES.values()) <= 1


def longer(call: dict[str, Any]) -> dict[str, Any]:
    """The same call on sequences one third as long again."""
    return {
        name: torch.cat([value, value[:, -3:]], 1) if isinstance(value, torch.Tensor) else value
        for name, value in call.items()
    }


@pytest.mark.parametrize(
    "name", ["Bert", "DistilBert", "MPNet", "Llama", "Qwen2", "GPT2", "OPT", "T5"]
)
def test_sizes_stay_dynamic(name: str) -> None:
    architecture: Architecture = ARCHITECTURES[name]
    model, call = architecture.build("eager"), architecture.call()
    calls: list[Call] = [((), call), ((), longer(call))]
    program = capture_calls(model, calls)
    with AttentionCount() as count, torch.no_grad():
        model(**call)
    recognized, declined = fused(program)
    assert (recognized, declined) == (count.total, [])
    assert_equivalent(program, model, (), longer(longer(call)))
