"""The wide model: factored maps are applied, measured as faster, and what they lose is told."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fxpress
from fxpress import zoo
from fxpress.zoo.pretrained import PretrainedError
from fxpress.zoo.registry import entry


@pytest.mark.timing
@pytest.mark.parametrize("terms", [1, 4])
def test_factored_maps_are_applied_and_faster(terms: int) -> None:
    config = {"factor-vvma": {"block": 64, "terms": terms}}
    data = entry("wide").calibration(None, 4)
    # Random weights are far from the form: nearly all of the output is lost, as allowed here.
    o = fxpress.optimize(zoo.create_model("wide"), data, config=config, max_divergence=2.0)
    facts = o.report.as_dict()
    sites = {site["site"]: site for site in facts["sites"] if site["pass"] == "factor-vvma"}
    blocks = {f"blocks.{layer}.{part}" for layer in (0, 1) for part in ("up", "down")}
    assert sites.keys() == blocks | {"head"}
    for site in sites.values():
        assert site["status"] == "rewritten", site
        assert site["ms_after"] < site["ms_before"]
    assert facts["latency_ms"]["after"] < facts["latency_ms"]["before"]
    assert facts["parameters"]["after"] < facts["parameters"]["before"]
    assert 0 < facts["quality"]["drop"] < facts["quality"]["budget"]
    assert f"relative RMS of outputs: 0 -> {facts['quality']['after']:.4g}" in str(o.report)


def test_there_are_no_weights_and_no_texts(tmp_path: Path) -> None:
    with pytest.raises(PretrainedError, match="wide has no trained weights"):
        zoo.create_model("wide", pretrained=True)
    with pytest.raises(PretrainedError, match="wide takes no file"):
        entry("wide").calibration(tmp_path / "texts.txt")


def test_calibration_fits_the_model() -> None:
    first, second = entry("wide").calibration(limit=2)
    assert not torch.equal(first, second)
    assert zoo.create_model("wide", layers=1, hidden=8, vocabulary=5)(first).shape == (1, 5)
