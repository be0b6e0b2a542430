"""Planned passes on a small model: the graph before and after each, and the order of all passes."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxpress
from fxpress.passes import all_passes
from fxpress.pipeline import resolve_order
from fxpress.planning import PlannedPass

PLANNED = [kind.name for kind in all_passes().values() if issubclass(kind, PlannedPass)]
STATED: dict[str, Any] = {
    "prune-attention": {"pruned": 0.5, "block": 4, "mask": "window"},
    "factor-vvma": {"form": "vvma", "block": 8, "terms": 1},
}


class Block(nn.Module):
    """Causal attention of one head, written out, and a product behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.k, self.out = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 8, 16) -> the same."""
        scores = x @ self.k(x).mT / 4
        future = torch.ones(8, 8, dtype=torch.bool).triu(1)
        mixed = F.softmax(scores.masked_fill(future, -torch.inf), -1) @ x
        out: Tensor = self.out(mixed)
        return out


@pytest.mark.parametrize("name", PLANNED)
def test_graph(name: str, golden: Callable[[str, str], None]) -> None:
    others = {other: False for other in PLANNED if other != name}
    config = others | {name: STATED[name]}
    data = [torch.randn(2, 8, 16) for _ in range(3)]
    record = fxpress.optimize(Block(), data, judge="off", config=config).passes[name]
    assert record.rewrites
    text = f"before:\n{record.before}\n\nafter:\n{record.after}"
    golden(text, f"passes/{name.replace('-', '_')}.txt")


def test_the_order_of_passes(golden: Callable[[str, str], None]) -> None:
    lines = []
    for kind in resolve_order(all_passes().values()):
        lines.append(f"{kind.phase}: {kind.name}")
        lines += [f"    after {name}: {why}" for name, why in kind.after.items()]
    golden("\n".join(lines), "pass_order.txt")


def test_decisions_are_plain_data() -> None:
    data = [torch.randn(2, 8, 16) for _ in range(3)]
    o = fxpress.optimize(Block(), data, judge="off", config=STATED)
    text = o.plan.to_json()
    assert set(json.loads(text)["decisions"]) == set(PLANNED)
    assert fxpress.Plan.from_json(text).to_json() == text
