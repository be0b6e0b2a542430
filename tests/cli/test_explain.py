"""`explain`: modelled time, shares and gains; the page."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fxpress
from fxpress.cost import dense_work, hardware_of

Run = Any  # conftest.Run


def test_the_verb_prints_table_and_json(run: Run) -> None:
    arguments = ("explain", "--model", "attend:model", "--calib", "x.npy")
    text, facts = run(*arguments).out, run(*arguments, "--json").json
    assert "attention 2 of 2 recognised" in text
    assert facts["assumptions"] in text
    assert [site["kind"] for site in facts["attention"]] == ["self", "self"]


def test_a_matmul_costs_what_the_cost_model_says() -> None:
    found = fxpress.explain(nn.Linear(64, 48), (torch.randn(8, 64),))
    (site,) = found.matmuls
    assert site.ms == hardware_of(torch.device("cpu")).ms(dense_work((48, 64), 8, 4), torch.float32)
    assert site.share == 1.0


def test_shares_add_up_with_what_is_no_site() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Conv1d(8, 8, 3), nn.LayerNorm(62))
    found = fxpress.explain(model, (torch.randn(2, 8, 64),))
    (region,) = found.graphs
    assert math.isclose(sum(region.ms.values()), found.modelled_ms)
    assert 0.0 < found.matmuls[0].share < 1.0


def test_only_wide_matmuls_gain() -> None:
    model = nn.Sequential(nn.Linear(2048, 2048), nn.Linear(2048, 64), nn.Linear(64, 4))
    wide, _, narrow = fxpress.explain(model, (torch.randn(1, 2048),)).matmuls
    assert wide.gain > 1.2
    assert narrow.gain == 1.0
    assert narrow.reason.startswith("too narrow")


def test_views_are_free_and_products_are_not() -> None:
    class Product(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x.view(64, 64).t() @ x.view(64, 64)).reshape(-1)

    (region,) = fxpress.explain(Product(), (torch.randn(4096),)).graphs
    ms = {str(node.target): cost for node, cost in region.ms.items()}
    assert ms["aten.view.default"] == ms["aten.t.default"] == 0.0
    assert ms["aten.matmul.default"] > 0.0


def test_a_recurrence_costs_a_product_per_step() -> None:
    model = nn.LSTM(32, 32, batch_first=True)
    short, long = (fxpress.explain(model, (torch.randn(4, n, 32),)) for n in (8, 16))
    assert short.recurrences[0].kind == "lstm"
    assert math.isclose(long.recurrences[0].ms, 2 * short.recurrences[0].ms, rel_tol=0.1)


def test_the_page_draws_modules_without_scripts(run: Run, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    arguments = ("explain", "--model", "attend:model", "--calib", "x.npy", "--html", str(page))
    assert run(*arguments).code == 0
    text = page.read_text()
    assert text.count("<details") == text.count("</details>") == 8  # root, 2 x (qkv, out), head
    assert "scaled_dot_product_attention" in text
    assert "<script" not in text
    assert "src=" not in text
