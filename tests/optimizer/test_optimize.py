"""`optimize` from end to end on small models: equal where nothing changed, true where it did."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from models import Branching, batches, stack
from torch import nn

import fxpress
from fxpress.ops.sparse_attention import reference
from fxpress.testing import assert_equivalent

HALF = {"prune-attention": {"pruned": 0.5, "block": 16}}


def masked(model: nn.Module, masks: dict[str, torch.Tensor]) -> nn.Module:
    """The model with dense attention under the masks of its sites, by plain torch."""
    program = fxpress.capture(model, (batches(1)[0],))
    graph = program.graph
    for index, node in enumerate(
        program.calls(torch.ops.aten.scaled_dot_product_attention.default)
    ):
        mask = list(masks.values())[index]

        def dense(
            q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor = mask
        ) -> torch.Tensor:
            return reference(q, k, v, mask)

        with graph.inserting_before(node):
            new = graph.call_function(dense, node.args[:3])
        node.replace_all_uses_with(new)
        graph.erase_node(node)
    program.graph_module.recompile()
    return program.graph_module


@pytest.mark.parametrize("causal", [False, True])
def test_pruned_attention_is_the_masked_reference(causal: bool) -> None:
    model = stack(causal=causal).eval()
    o = fxpress.optimize(model, batches(), judge="off", config=HALF)
    record = o.passes["prune-attention"]
    assert len(record.rewrites) == len(record.masks) == 2
    assert str(record.after).count("fxpress.sparse_attention") == 2
    masks = {site: layout.to_dense() for site, layout in record.masks.items()}
    for mask in masks.values():
        assert mask.any(-1).all()
    assert_equivalent(o, masked(model, masks), (batches(1)[0],))


def test_the_original_is_bit_for_bit_what_it_was() -> None:
    model = stack().train()
    before, flags = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    o = fxpress.optimize(model, batches(), judge="off", config=HALF)
    optimizer = torch.optim.SGD(o.parameters(), 0.1)
    o(batches(1)[0]).square().sum().backward()
    optimizer.step()
    o.double()
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None and p.dtype == torch.float32 for p in model.parameters())
    assert flags == [m.training for m in model.modules()]
    assert o.original is model


def test_with_nothing_to_gain_nothing_is_changed_and_it_says_so() -> None:
    model = stack().eval()
    o = fxpress.optimize(model, batches(), max_divergence=0.0)
    assert "nothing was changed" in str(o.report)
    assert not o.report.as_dict()["changed"]
    assert_equivalent(o, model, (batches(1)[0],))
    rolled = o.passes["prune-attention"].rolled_back
    assert rolled
    assert rolled[0].figures["least_drop"] > 0


def test_a_plan_is_applied_again_without_data(tmp_path: Path) -> None:
    model, x = stack(causal=True).eval(), batches(1)[0]
    o = fxpress.optimize(model, batches(), judge="off", config=HALF)
    text = o.plan.to_json()
    for plan in (
        fxpress.Plan.from_json(text),
        fxpress.Plan.load(o.plan.save(tmp_path / "plan")),
    ):
        again = fxpress.optimize(model, None, plan=plan)
        assert torch.equal(again(x), o(x))
        assert again.plan.to_json() == text


def test_the_same_run_gives_the_same_plan() -> None:
    plans = [
        fxpress.optimize(stack(), batches(), judge="modelled", max_divergence=0.5).plan.to_json()
        for _ in range(2)
    ]
    assert plans[0] == plans[1]


def test_without_a_pass_the_rest_stands() -> None:
    model, x = stack().eval(), batches(1)[0]
    o = fxpress.optimize(model, batches(), judge="off", config=HALF)
    assert not torch.equal(o(x), model(x))
    assert_equivalent(o.without("prune-attention"), model, (x,))


def test_mean_attention_counts_every_row_once() -> None:
    o = fxpress.optimize(stack(), batches(), judge="off", config=HALF)
    for mean in o.passes["prune-attention"].mean_attention.values():
        assert mean.shape == (2, 48, 48)
        assert_equivalent(lambda m=mean: m.sum(-1), lambda: torch.ones(2, 48), ())


def test_the_order_of_batches_changes_no_bit() -> None:
    maps = [
        fxpress.optimize(stack(), data, validation_data=batches(1), judge="off", config=HALF)
        .passes["prune-attention"]
        .mean_attention
        for data in (batches(), batches()[::-1])
    ]
    assert all(torch.equal(maps[0][site], maps[1][site]) for site in maps[0])


def test_overrides_by_module_pattern() -> None:
    config = HALF | {"0*": {"enable": False}, "[1-9].*": {"enable": True}}
    o = fxpress.optimize(stack(), batches(), judge="off", config=config)
    record = o.passes["prune-attention"]
    assert [r.site for r in record.rewrites] == ["1"]
    assert "left out by the configuration" in [d.reason for d in record.declined]


def test_a_model_with_python_in_it_is_optimized_in_regions() -> None:
    model = Branching().eval()
    o = fxpress.optimize(model, batches(), judge="off", config=HALF)
    assert len(o.passes["prune-attention"].rewrites) == 1
    captured = {r["path"]: r["captured"] for r in o.report.as_dict()["regions"]}
    assert captured == {"first": "yes", "second": "yes", "": "no"}
    assert o.scale == 3.0


def test_the_report_is_json_and_a_page(tmp_path: Path) -> None:
    o = fxpress.optimize(stack(), batches(), judge="off", config=HALF)
    facts = json.loads(o.report.to_json())
    keys = {"schema", "device", "torch", "baseline", "passes", "sites", "quality", "latency_ms"}
    assert keys | {"parameters", "regions"} <= set(facts)
    site = facts["sites"][0]
    assert abs(site["pruned"] + site["live_density"] - 1) < 1e-9
    page = o.report.to_html(tmp_path / "report.html").read_text()
    assert page.count("data:image/png") == 2
    assert "prune-attention" in page


def test_divergence_and_score_are_different_budgets() -> None:
    model = stack().eval()
    o = fxpress.optimize(
        model, batches(), validation_fn=lambda m: 1.0, max_drop=0.1, judge="modelled"
    )
    assert o.report.as_dict()["quality"]["metric"] == "validation_fn score"


def test_explain_lists_every_site() -> None:
    found = fxpress.explain(stack(causal=True), (batches(1)[0],))
    assert [s.kind for s in found.attention] == ["causal", "causal"]
    assert all(s.recognised and s.gain > 1 for s in found.attention)
    assert len(found.matmuls) == 5
    assert "attention 2 of 2 recognised" in str(found)


def test_in_place_redirects_the_model_itself() -> None:
    model, x = stack().eval(), batches(1)[0]
    o = fxpress.optimize_(model, batches(), judge="off", config=HALF)
    assert torch.equal(model(x), o(x))
