"""`fxpress inspect`: what an artifact tells, and what a model shows pass by pass."""

from __future__ import annotations

from typing import Any

Run = Any  # conftest.Run


def test_an_artifact_tells_what_its_passes_did(run: Run, artifact: str) -> None:
    done = run("inspect", artifact)
    assert done.code == 0
    assert "fuse-attention: 2 fuse-softmax" in done.out
    assert "prune-attention: 2 prune-attention" in done.out
    assert "factor-vvma: 5 factor-vvma" in done.out


def test_masks_are_drawn(run: Run, artifact: str) -> None:
    (entry,) = run("inspect", artifact, "--pass", "prune-attention", "--masks", "--json").json[
        "passes"
    ]
    mask = entry["masks"]["0"]
    assert mask["shape"] == [2, 8, 8]
    assert [len(row) for row in mask["drawing"]] == [8] * 8
    assert "|" + mask["drawing"][0] + "|" in run("inspect", artifact, "--masks").out


def test_the_ledger_has_a_row_per_site(run: Run, artifact: str) -> None:
    done = run("inspect", artifact, "--pass", "factor-vvma", "--ledger")
    assert [line.split()[0] for line in done.out.splitlines()[1:7]] == [
        "site",
        "0.qkv",
        "0.out",
        "1.qkv",
        "1.out",
        "2",
    ]


def test_an_artifact_holds_the_final_graph_only(run: Run, artifact: str) -> None:
    final = run("inspect", artifact, "--graph", "after").out
    assert "fxpress.sparse_attention" in final
    assert "fxpress.vvma_linear" in final
    for view in (("--graph", "before"), ("--graph", "diff"), ("--graph", "after", "--pass", "x")):
        assert run("inspect", artifact, *view).code == 2
    assert "give --model too" in run("inspect", artifact, "--graph", "diff").err


def test_a_model_shows_every_pass_under_the_plan_of_its_artifact(run: Run, artifact: str) -> None:
    arguments = ("inspect", artifact, "--model", "attend:model")
    graphs = run(*arguments, "--graph", "diff", "--json").json["graphs"]
    assert "+%scaled_dot_product_attention" in graphs["fuse-attention"]
    assert "-%scaled_dot_product_attention" in graphs["prune-attention"]
    assert "+%vvma_linear" in graphs["factor-vvma"]
    before = run(*arguments, "--graph", "before", "--pass", "fuse-attention").out
    assert "aten.softmax" in before


def test_a_model_alone_shows_the_exact_passes(run: Run) -> None:
    arguments = ("inspect", "--model", "attend:model", "--calib", "x.npy")
    after = run(*arguments, "--graph", "after", "--pass", "prune-attention").out
    assert "aten.scaled_dot_product_attention" in after
    assert "judge='off' applies what the configuration states" in after


def test_settings_are_applied_to_a_model(run: Run) -> None:
    arguments = ("inspect", "--model", "attend:model", "--calib", "x.npy", "--config", "half.yaml")
    (entry,) = run(*arguments, "--pass", "prune-attention", "--json").json["passes"]
    assert entry["counts"] == {"prune-attention": 2}


def test_kernels_are_those_of_the_device_asked_for(run: Run, artifact: str) -> None:
    here = run("inspect", artifact, "--kernels", "--json").json["kernels"]
    assert {low["lowering"] for low in here} == {""}
    there = run("inspect", artifact, "--kernels", "--device", "cuda", "--pass", "prune-attention")
    assert there.out.count("by triton-tiles") == 2
    assert "@triton.jit" in there.out
