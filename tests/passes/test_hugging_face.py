"""Attention of many architectures, `sdpa` and `eager`: all of it is recognized, or the reason said.

How many there are is counted in an eager run, which knows nothing of graphs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import fxpress
from fxpress.capture import Call, capture, capture_calls
from fxpress.passes.fuse_attention import FuseAttention
from fxpress.passes.normalize_linear import NormalizeLinear
from fxpress.passes.sites import attention_sites
from fxpress.program import Program
from fxpress.rewrite import PassContext
from fxpress.testing import assert_equivalent
from fxpress.verify import verify
from tests.passes.architectures import ARCHITECTURES, Architecture, tokens
from tests.passes.attention_count import AttentionCount
from tests.turns import seconds_in_turns


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


def test_attention_of_a_model_that_looks_at_its_data_is_found_in_regions() -> None:
    local = Architecture("Longformer", "Model", tokens, {"attention_window": 4})
    model = local.build("eager")
    with AttentionCount() as count, torch.no_grad():
        model(**tokens())
    found = fxpress.explain(model, kwargs=tokens())
    assert {region["path"] for region in found.regions if region["captured"] == "yes"} >= {
        "encoder.layer.0",
        "encoder.layer.1",
    }
    assert len(found.attention) == count.total == 2
    assert all("changed between softmax" in site.reason for site in found.attention)
    assert "attention 0 of 2 recognised" in str(found)


@pytest.mark.timing
def test_time_is_linear_in_depth() -> None:
    def canonicalize(program: Program) -> None:
        for kind in (FuseAttention, NormalizeLinear):
            kind().run(program, PassContext())

    seconds = seconds_in_turns({depth: _llama(depth) for depth in (24, 48)}, canonicalize)
    assert seconds[48] < 10
    assert seconds[48] <= 2.2 * seconds[24]


def _llama(depth: int) -> Program:
    architecture = replace(ARCHITECTURES["Llama"], sizes={"num_hidden_layers": depth})
    return capture(architecture.build("eager"), kwargs=architecture.call())
