"""Real trained models, pruned as the configuration says: equal to the masked reference."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor, fx, nn

import fxpress
from fxpress import zoo
from fxpress.ops.sparse_attention import reference
from fxpress.testing import assert_equivalent
from fxpress.zoo import registry
from fxpress.zoo.pretrained import DownloadError

pytestmark = pytest.mark.pretrained

SITES = {"minilm": 6, "whisper-tiny-encoder": 4, "smollm2": 30}
BATCHES = {"minilm": 4, "whisper-tiny-encoder": 2, "smollm2": 2}


def trained(name: str) -> tuple[nn.Module, list[dict[str, Any]]]:
    """A pretrained model with calibration batches; skips only where it cannot be fetched."""
    try:
        model = zoo.create_model(name, pretrained=True)
    except DownloadError as error:
        pytest.skip(str(error))
    batches = registry.entry(name).calibration(None, BATCHES[name])
    if name == "smollm2":
        batches = [batch | {"use_cache": False} for batch in batches]
    return model, batches


class Masked(nn.Module):
    """A program whose attention is dense, under given static masks, in plain torch."""

    def __init__(self, model: nn.Module, batch: dict[str, Any], masks: dict[str, Tensor]) -> None:
        super().__init__()
        # Exactly canonicalized, so that every site is one operator.
        off = {"prune-attention": False}
        captured = fxpress.optimize(model, [batch], judge="off", config=off).captured
        program = captured.programs[""]
        self.graph_module = _with_masks(program.copy(), masks)

    def forward(self, **inputs: Any) -> Any:
        """Run the program."""
        return self.graph_module(**inputs)


def _with_masks(program: fxpress.Program, masks: dict[str, Tensor]) -> fx.GraphModule:
    from fxpress.passes.sites import attention_sites

    for site in attention_sites(program):
        mask, scale = masks[site.name], site.scale

        def dense(
            q: Tensor,
            k: Tensor,
            v: Tensor,
            padding: Tensor | None,
            mask: Tensor = mask,
            scale: float = scale,
        ) -> Tensor:
            return reference(q, k, v, mask, padding, scale=scale)

        padding = site.padding if site.is_causal else site.mask
        with program.graph.inserting_before(site.node):
            new = program.graph.call_function(dense, (site.q, site.k, site.v, padding))
        site.node.replace_all_uses_with(new)
        program.graph.erase_node(site.node)
    program.graph_module.recompile()
    return program.graph_module


@pytest.mark.parametrize("name", ["minilm", "whisper-tiny-encoder"])
@pytest.mark.parametrize("pruned", [0.5, 0.8])
def test_pruned_blocks_equal_the_masked_reference(name: str, pruned: float) -> None:
    model, batches = trained(name)
    config = {"prune-attention": {"pruned": pruned, "block": 16}}
    o = fxpress.optimize(model, batches, judge="off", config=config)
    record = o.passes["prune-attention"]
    assert len(record.rewrites) == SITES[name]
    for layout in record.masks.values():
        assert 1 - pruned - 0.1 < layout.live_density < 1 - pruned + 0.1
    masks = {site: layout.to_dense() for site, layout in record.masks.items()}
    assert_equivalent(o, Masked(model, batches[0], masks), (), batches[0])


@pytest.mark.parametrize("name", sorted(SITES))
def test_every_attention_is_recognised(name: str) -> None:
    model, batches = trained(name)
    found = fxpress.explain(model, (), batches[0])
    assert len(found.attention) == SITES[name]
    assert all(site.recognised for site in found.attention)
    kinds = {site.kind for site in found.attention}
    assert kinds == ({"causal"} if name == "smollm2" else {"self"})
