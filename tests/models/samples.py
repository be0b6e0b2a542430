"""Models of the zoo and batches for them, small enough for tests."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fxpress import zoo
from fxpress.cli_inputs import as_call
from fxpress.zoo import registry
from fxpress.zoo.pretrained import DownloadError
from fxpress.zoo.trained import SHIPPED, load_card

__all__ = ["BRIEF", "NAMES", "build", "marked", "sample"]

BRIEF = {"recover": {"steps": 40}}  # of 300: what training reaches is no matter of these tests


def _is_downloaded(name: str) -> bool:
    """Whether weights of it are neither random nor in the repository."""
    if (SHIPPED / f"{name}.json").is_file():
        builds_on: bool = load_card(name)["recipe"]["model"].get("pretrained", False)
        return builds_on
    return registry.entry(name).has_weights


def marked(names: list[str]) -> list[Any]:
    """Names as parameters of a test, those with a mark whose weights are downloaded."""
    return [
        pytest.param(name, marks=[pytest.mark.pretrained] if _is_downloaded(name) else [])
        for name in names
    ]


NAMES = marked(zoo.list_models())


def build(name: str, **sizes: Any) -> nn.Module:
    """A model of the zoo, with its weights if it has any; the test is skipped if they are away."""
    try:
        return zoo.create_model(name, pretrained=registry.entry(name).has_weights, **sizes)
    except DownloadError as error:
        pytest.skip(str(error))


def sample(name: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call on the zoo's own samples; of texts for causal models the beginning."""
    batch = registry.entry(name).calibration(None, 1)[0]
    if name == "smollm2":
        return (), {"input_ids": batch["input_ids"][:, :64], "use_cache": False}
    if name == "whisper-tiny":
        return (), batch | {"use_cache": False}
    if isinstance(batch, torch.Tensor) and not batch.is_floating_point():
        return (batch[:, :16],), {}
    return as_call(batch)
