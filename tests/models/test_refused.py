"""Real trained models: too narrow for many terms, which the cost model says with its arithmetic."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fxpress
from fxpress import zoo
from fxpress.testing import assert_equivalent
from fxpress.zoo import registry, smollm2
from fxpress.zoo.pretrained import DownloadError
from fxpress.zoo.samples import DATA, read_texts

pytestmark = pytest.mark.pretrained


def trained(name: str) -> tuple[Any, dict[str, Any]]:
    """A pretrained model and a batch."""
    try:
        model = zoo.create_model(name, pretrained=True)
    except DownloadError as error:
        pytest.skip(str(error))
    if name == "smollm2":
        texts = read_texts(DATA / "austen" / "calibration.txt")
        return model, {"input_ids": smollm2.windows(texts, 256)[:1], "use_cache": False}
    return model, registry.entry(name).calibration(None, 1)[0]


@pytest.mark.parametrize("name", ["minilm", "smollm2", "whisper-tiny-encoder"])
def test_half_the_terms_are_refused_by_cost(name: str) -> None:
    model, batch = trained(name)
    config = {"factor-vvma": {"block": 32, "terms": 16}, "prune-attention": False}
    o = fxpress.optimize(model, [batch], config=config, judge="modelled")
    sites = [s for s in o.report.as_dict()["sites"] if s["pass"] == "factor-vvma"]
    assert len(sites) > 20
    for site in sites:
        assert site["status"] == "declined", site
        assert "r(mn/k + mk) = " in site["reason"]
        assert "multiply-adds against mn = " in site["reason"]
    assert "not cheaper: vvma, 32 x 32 tiles, 16 terms" in str(o.report)
    with torch.no_grad():
        assert_equivalent(o, model, (), batch)
