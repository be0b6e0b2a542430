"""`fxpress kernels`: lowerings, and sources for a device that is not here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from fxpress.kernels.vvma_linear import emit, kernel_of
from fxpress.ops.vvma_linear import VvmaSite

Run = Any  # conftest.Run


def test_every_lowering_is_listed(run: Run) -> None:
    found = run("kernels", "--json").json
    names = {(low["operator"], low["name"]) for low in found}
    assert names >= {
        ("fxpress::sparse_attention", "triton-tiles"),
        ("fxpress::vvma_linear", "triton-small-batch"),
    }
    assert all("float16" in low["takes"] for low in found)
    assert all("float64" in low["declines"] for low in found)
    assert "triton-tiles" in run("kernels").out


def test_the_list_can_be_narrowed(run: Run) -> None:
    assert run("kernels", "--device", "cpu", "--json").json == []
    assert run("kernels", "--dtype", "float64", "--json").json == []
    assert "portable implementation" in run("kernels", "--device", "cpu").out


def test_a_factored_map_has_the_source_of_its_site(run: Run, tmp_path: Path) -> None:
    (tmp_path / "four.py").write_text("from torch import nn\nmodel = lambda: nn.Linear(64, 48)")
    (tmp_path / "c.yaml").write_text("factor-vvma: {form: vvma, block: 16, terms: 1}")
    np.save(tmp_path / "x.npy", np.ones((16, 64), dtype="float32"))
    out = str(tmp_path / "four.fxpress")
    data = ("--calib", str(tmp_path / "x.npy"), "--config", str(tmp_path / "c.yaml"))
    model = ("--model", f"{tmp_path / 'four.py'}:model", "--judge", "off", "--out", out)
    assert run("optimize", *model, *data).code == 0
    (low,) = run("kernels", out, "--device", "cuda", "--json").json
    site = VvmaSite(torch.float32, 8, 16, 1, tiles=(3, 4), features=(48, 64), bias=True)
    assert low["source"] == emit(kernel_of(site)).text


def test_dtype_and_site_choose_what_is_shown(run: Run, artifact: str) -> None:
    arguments = ("kernels", artifact, "--device", "cuda", "--site", "0")
    (plain,) = run(*arguments, "--json").json
    (half,) = run(*arguments, "--dtype", "bfloat16", "--json").json
    assert plain["lowering"] == half["lowering"] == "triton-tiles"
    assert "o: float32" in plain["source"]
    assert "o: bfloat16" in half["source"]
    assert "kernel" in compile(run(*arguments).out, "kernel", "exec").co_names


def test_why_a_site_has_no_kernel_is_said(run: Run, artifact: str) -> None:
    done = run("kernels", artifact, "--device", "cuda", "--site", "0.qkv")
    assert "triton-small-batch: more than 32 rows" in done.out


def test_a_model_on_cpu_has_no_generated_kernel(run: Run, artifact: str) -> None:
    assert all(low["lowering"] == "" for low in run("kernels", artifact, "--json").json)
