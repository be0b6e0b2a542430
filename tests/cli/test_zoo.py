"""`fxpress zoo` and `fxpress passes`: lists."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from fxpress import zoo
from fxpress.zoo import trained

Run = Any  # conftest.Run


def test_the_zoo_is_listed_by_pattern(run: Run) -> None:
    assert [entry["name"] for entry in run("zoo", "list", "--json").json] == zoo.list_models()
    text = run("zoo", "list", "r*-lm").out
    assert [line.split()[0] for line in text.splitlines()] == ["model", "rnn-lm", "rum-lm"]


def test_a_model_of_the_zoo_is_shown(run: Run) -> None:
    facts = run("zoo", "show", "rum-lm", "--json").json
    assert facts["pretrained"] is False
    assert facts["source"] in run("zoo", "show", "rum-lm").out


def test_a_trained_model_is_shown_with_its_scores(run: Run) -> None:
    facts = run("zoo", "show", "recall-rum", "--json").json
    card = trained.load_card("recall-rum")
    assert facts["pretrained"] is True
    assert (facts["scores"], facts["baselines"]) == (card["scores"], card["baselines"])
    lines = run("zoo", "show", "recall-rum").out.splitlines()
    assert f"accuracy  {card['scores']['accuracy']:.4f}" in [re.sub("  +", "  ", x) for x in lines]
    assert "(guessing)" in "\n".join(lines)


def test_optimize_of_the_zoo_is_optimize(run: Run, tmp_path: Path) -> None:
    options = ["--judge", "off", "--batches", "4", "--json"]
    out, page, plan = (tmp_path / name for name in ("m.fxpress", "page.html", "plan"))
    files = ["--out", str(out), "--report", str(page), "--save-plan", str(plan)]
    found = run("zoo", "optimize", "transformer-lm", *options, *files).json
    general = run("optimize", "--model", "zoo:transformer-lm", *options).json
    assert found["model"] == general["model"] == "TransformerLM"
    assert found["parameters"] == general["parameters"]
    assert out.exists()
    assert plan.is_dir()
    assert "TransformerLM" in page.read_text(encoding="utf-8")


def test_an_unknown_model_is_not_optimized(run: Run) -> None:
    done = run("zoo", "optimize", "trasnformer-lm")
    assert done.code == 2
    assert "did you mean 'transformer-lm'" in done.err


def test_passes_are_listed_in_order_with_their_settings(run: Run) -> None:
    found = run("passes", "--json").json
    names = [entry["name"] for entry in found]
    assert names.index("fuse-attention") < names.index("prune-attention")
    assert "pruned" in found[names.index("prune-attention")]["settings"]
    assert "prune-attention after fuse-attention: " in run("passes").out
