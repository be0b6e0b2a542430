"""What the tests of artifacts share: saved models, and the means of somebody who alters them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path += [str(Path(__file__).parent), str(Path(__file__).parent.parent / "optimizer")]

import altered
from models import batches, stack

import fxpress


@pytest.fixture(scope="session")
def optimized() -> fxpress.OptimizedModule:
    """Two pruned layers of attention."""
    config = {"prune-attention": {"pruned": 0.5, "block": 16}}
    return fxpress.optimize(stack(2).eval(), batches(), judge="off", config=config)


@pytest.fixture(params=["folder", "zip"])
def saved(
    request: pytest.FixtureRequest, optimized: fxpress.OptimizedModule, tmp_path: Path
) -> altered.Altered:
    """Its artifact, to be altered."""
    name = "model.zip" if request.param == "zip" else "model.fxpress"
    return altered.Altered(optimized.save(tmp_path / name))
