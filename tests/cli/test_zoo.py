"""`fxpress zoo` and `fxpress passes`: lists."""

from __future__ import annotations

from typing import Any

from fxpress import zoo

Run = Any  # conftest.Run


def test_the_zoo_is_listed_by_pattern(run: Run) -> None:
    assert [entry["name"] for entry in run("zoo", "list", "--json").json] == zoo.list_models()
    text = run("zoo", "list", "r*-lm").out
    assert [line.split()[0] for line in text.splitlines()] == ["model", "rnn-lm", "rum-lm"]


def test_a_model_of_the_zoo_is_shown(run: Run) -> None:
    facts = run("zoo", "show", "rum-lm", "--json").json
    assert facts["pretrained"] is False
    assert facts["source"] in run("zoo", "show", "rum-lm").out


def test_passes_are_listed_in_order_with_their_settings(run: Run) -> None:
    found = run("passes", "--json").json
    names = [entry["name"] for entry in found]
    assert names.index("fuse-attention") < names.index("prune-attention")
    assert "pruned" in found[names.index("prune-attention")]["settings"]
    assert "prune-attention after fuse-attention: " in run("passes").out
