"""`fxpress bisect` finds the rewrite that a check was made to fail on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

Run = Any  # conftest.Run

SCRIPT = """
from attend import model
from torch import randn
import torch

options = {{"config": {{"prune-attention": {{"pruned": 0.5, "block": 8}}}}}}

def calib_data():
    torch.manual_seed(0)
    return [randn(2, 8, 32) for _ in range(4)]

def check(optimized):
    graph = str(optimized.captured.snapshot())
    {body}
"""


@pytest.fixture
def script(place: Path, request: pytest.FixtureRequest) -> str:
    """A script whose check has the body that the test states."""
    path = place / f"{request.node.name.partition('[')[0]}.py"
    path.write_text(SCRIPT.format(body=request.param))
    return str(path)


@pytest.mark.parametrize(
    "script", ["return graph.count('fxpress.sparse_attention') < 2"], indirect=True
)
def test_the_second_mask_is_found(run: Run, script: str) -> None:
    done = run("bisect", script, "--json")
    assert done.code == 0
    culprit = done.json["culprit"]
    assert (culprit["pass"], culprit["site"]) == ("prune-attention", "1")
    assert done.json["rewrites"] == culprit["number"] == 4  # attention is fused twice before
    assert culprit["diff"].count("+%sparse_attention") == 1
    assert "4 rewrites: bad" in done.err


@pytest.mark.parametrize("script", ["return 'scaled_dot_product' not in graph"], indirect=True)
def test_nothing_is_found_where_only_a_part_of_the_rewrites_is_bad(run: Run, script: str) -> None:
    done = run("bisect", script)  # all attention is pruned in the end: nothing dense is left
    assert done.code == 1
    assert "the check passes with all 4 rewrites" in done.out


@pytest.mark.parametrize(
    "script", ["assert graph.count('aten.softmax') == 2; return True"], indirect=True
)
def test_an_exact_rewrite_is_found_by_a_check_that_raises(run: Run, script: str) -> None:
    done = run("bisect", script)
    assert done.code == 0
    assert done.out.startswith("rewrite 1 of 4 breaks it: fuse-attention")
    assert "-%softmax" in done.out
    assert "AssertionError" in done.err


@pytest.mark.parametrize("script", ["return False"], indirect=True)
def test_a_check_that_fails_on_the_model_itself(run: Run, script: str) -> None:
    done = run("bisect", script)
    assert done.code == 1
    assert "fails before any rewrite" in done.out
