"""The command line in this process, in a folder with a model, its data and an artifact."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fxpress.cli import main

MODEL = """
import torch
import torch.nn.functional as F
from torch import nn


class Attention(nn.Module):
    def __init__(self, width=32, heads=2):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x):
        split = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = split.unbind(0)
        scores = (q @ k.transpose(-2, -1)) * (q.shape[-1] ** -0.5)
        o = scores.softmax(-1) @ v
        return x + self.out(o.transpose(1, 2).flatten(2))


def model():
    torch.manual_seed(0)
    return nn.Sequential(Attention(), Attention(), nn.Linear(32, 4))


def score(module):
    return 1.0
"""
HALF = "prune-attention: {pruned: 0.5, block: 8}"
FACTORED = "factor-vvma: {form: vvma, block: 16, terms: 1}"


@dataclass(frozen=True)
class Done:
    """What a command left: exit code and both outputs."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Done]


def rows(count: int = 32, tokens: int = 8) -> torch.Tensor:
    """Inputs (count, tokens, 32)."""
    return torch.randn(count, tokens, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `attend.py`, `x.npy` and settings."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "attend.py").write_text(MODEL)
    (folder / "half.yaml").write_text(HALF)
    (folder / "both.yaml").write_text(f"{HALF}\n{FACTORED}")
    np.save(folder / "x.npy", rows().numpy())
    return folder


@pytest.fixture
def run(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command there."""
    monkeypatch.chdir(place)
    monkeypatch.delitem(sys.modules, "attend", raising=False)

    def run(*arguments: str) -> Done:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        out, err = capsys.readouterr()
        return Done(int(ended.value.code or 0), out, err)

    return run


OPTIMIZE = ("optimize", "--model", "attend:model", "--calib", "x.npy", "--judge", "off")


@pytest.fixture
def artifact(run: Run, place: Path) -> str:
    """The model with half of its attention pruned and all matmuls factored, saved once."""
    if not (place / "model.fxpress").exists():
        done = run(*OPTIMIZE, "--config", "both.yaml", "--out", "model.fxpress")
        assert done.code == 0, done.err
    return "model.fxpress"
