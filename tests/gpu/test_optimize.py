"""`optimize` of models that live on a CUDA device: each rewrite, what is saved, what is kept."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxpress
from fxpress.testing import APPROXIMATES, BITWISE, Exactness, assert_equivalent

pytestmark = pytest.mark.gpu

FORMS: list[dict[str, Any]] = [
    {"block": 64, "terms": 1},
    {"block": 32, "terms": 2, "share": "row", "moment": "full"},
    {"rank": 64, "moment": "full"},
]


class Wide(nn.Module):
    """x (B, 512) -> (B, 1024), with a hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(512, 2048)
        self.down = nn.Linear(2048, 1024)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(F.gelu(self.up(x)))
        return y


class Attends(nn.Module):
    """x (B, N, 128) -> the same, by two heads that look back."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(128, 384)
        self.out = nn.Linear(128, 128)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 64)).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        z: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return z


def same(got: Tensor, want: Tensor, exactness: Exactness) -> None:
    """Compare what a device and the CPU answered."""
    assert_equivalent(lambda: got, lambda: want.to(got.device), (), exactness=exactness)


def on_device(module: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return module.to("cuda", dtype).eval()


def batches(*shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(shape, device="cuda", dtype=dtype) for _ in range(6)]


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_factored_maps_are_what_the_same_job_gives_on_a_cpu(form: dict[str, Any]) -> None:
    model, calls = on_device(Wide()), batches(4, 512)
    before = copy.deepcopy(model.state_dict())
    options: dict[str, Any] = {"config": {"factor-vvma": form}, "judge": "off", "progress": False}
    made = fxpress.optimize(model, calls, **options)
    assert len(made.passes["factor-vvma"].ledger) == 2
    assert all(p.device.type == "cuda" for p in made.parameters())
    assert unchanged(model, before)
    again = fxpress.optimize(model.cpu(), [x.cpu() for x in calls], **options)
    same(made(calls[0]), again(calls[0].cpu()), APPROXIMATES(1e-3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_measured_job_decides_and_recovers(dtype: torch.dtype) -> None:
    model, calls = on_device(Wide(), dtype), batches(4, 512, dtype=dtype)
    before = copy.deepcopy(model.state_dict())
    config = {"recover": {"steps": 20, "seconds": 5.0}}
    made = fxpress.optimize(model, calls, max_divergence=0.5, config=config, progress=False)
    assert unchanged(model, before)
    assert made(calls[0]).isfinite().all()
    assert made(calls[0]).dtype == dtype


def test_an_artefact_of_a_device_gives_what_was_saved(tmp_path: Path) -> None:
    model, calls = on_device(Wide(), torch.bfloat16), batches(2, 512, dtype=torch.bfloat16)
    config = {"factor-vvma": {"block": 64, "terms": 4}}
    made = fxpress.optimize(model, calls, config=config, judge="off", progress=False)
    made.save(tmp_path / "wide")
    loaded = fxpress.load(tmp_path / "wide")
    same(loaded.to("cuda")(calls[0]), made(calls[0]), BITWISE)


def test_a_pruned_model_keeps_its_reference() -> None:
    model, calls = on_device(Attends()), batches(2, 256, 128)
    config = {"prune-attention": {"pruned": 0.5, "block": 16}}
    made = fxpress.optimize(model, calls, config=config, judge="off", progress=False)
    assert list(made.passes["prune-attention"].ledger)
    got = made(calls[0])
    same(got, made.cpu()(calls[0].cpu()), APPROXIMATES(1e-4))
