"""Word pieces: each target once, with what was before it; bytes and pieces are counted alike."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fxpress.zoo import corpora, objectives, recipe, tokenization, trained
from fxpress.zoo.objectives import IGNORED, Task
from fxpress.zoo.recipe import RecipeError
from fxpress.zoo.samples import DATA, read_texts

PROSE = read_texts(DATA / "austen" / "calibration.txt")
SPLITS = {"train": PROSE[:100], "valid": PROSE[100:120], "test": PROSE[120:130]}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Texts of one's own, which is also where the tokenizer of the corpus "novels" is from."""
    monkeypatch.setenv("FXPRESS_CACHE", str(tmp_path / "cache"))
    for split, texts in SPLITS.items():
        lines = [json.dumps({"text": text}) for text in texts]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    load = corpora.load
    monkeypatch.setattr(
        corpora, "load", lambda s, split: load(tmp_path if s == "novels" else s, split)
    )
    tokenization.load.cache_clear()
    return tmp_path


def task(**settings: Any) -> Task:
    data = {"corpus": "novels", "vocabulary": 400, "length": 16} | settings
    fields = vars(recipe.load("austen-transformer"))
    plan = recipe.parse("r", {**fields, "task": "wordpiece-text", "data": data})
    return objectives.task_of(plan)


def pieces(split: str) -> Tensor:
    tokenizer = tokenization.load("novels", ("text",), 400)
    rows = tokenization.encode(tokenizer, SPLITS[split])
    return torch.tensor([token for row in rows for token in row])


@pytest.mark.parametrize("memory", [0, 8, 16, 40])
def test_windows_predict_each_piece_once(memory: int) -> None:
    ids, at = pieces("test"), 1
    for inputs, targets in task(memory=memory).splits["test"]:
        for row, asked in enumerate(targets):
            n = int((asked != IGNORED).sum())
            assert torch.equal(asked[:n], ids[at : at + n])
            assert torch.equal(inputs[0][row, :n], ids[at - 1 : at - 1 + n])
            if len(inputs) > 1:
                before = ids[max(0, at - 1 - memory) : at - 1]
                assert torch.equal(inputs[1][row], before)
            at += n
    assert at == len(ids)


@pytest.mark.parametrize("memory", [0, 8])
def test_what_is_drawn_is_a_piece_of_the_training_text(memory: int) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, targets = task(memory=memory).draw(50, generator)
    whole = torch.cat([*inputs[1:], inputs[0], targets[:, -1:]], 1)
    assert whole.shape == (50, memory + 17)
    assert torch.equal(whole[:, memory + 1 :], targets)
    known = {tuple(w) for w in pieces("train").unfold(0, memory + 17, 1).tolist()}
    assert {tuple(w) for w in whole.tolist()} <= known


def test_perplexity_and_bits_per_byte_say_the_same() -> None:
    metrics = task().metrics(math.log(8), 0.5)
    assert math.isclose(metrics["perplexity_per_token"], 8)
    size = sum(len(text.encode()) + 1 for text in SPLITS["test"])
    assert math.isclose(metrics["bits_per_byte"] * size, 3 * len(pieces("test")))


def test_baselines_are_in_bits_per_byte() -> None:
    found = task().baselines
    assert found["bigram of tokens"] < found["unigram of tokens"] < 8
    assert set(found) == {"gzip -9", "bigram of tokens", "unigram of tokens"}


def test_other_data_keeps_the_tokenizer_which_lies_beside_the_weights(
    folder: Path, tmp_path: Path
) -> None:
    changes = {"batch": 4, "steps": 2, "evaluate_every": 2, "warmup": 0}
    sizes = {"name": "transformer-lm", "vocabulary": 400, "width": 8, "heads": 1, "tied": True}
    fields = vars(recipe.load("austen-transformer")) | changes | {"name": "tiny"}
    data = {"corpus": "novels", "vocabulary": 400, "length": 16}
    plan = recipe.parse("tiny", {**fields, "task": "wordpiece-text", "model": sizes, "data": data})
    card = trained.train(plan, tmp_path / "out")
    name = "novels-text-400.tokenizer"
    assert (tmp_path / "out" / name).read_text() == tokenization.load(
        "novels", ("text",), 400
    ).to_str()
    (folder / "test.jsonl").write_text(json.dumps({"text": PROSE[-1]}))
    other = trained.evaluate("tiny", tmp_path / "out", folder)
    assert other["scores"] != card["scores"]


def test_too_short() -> None:
    with pytest.raises(RecipeError, match="novels is too short for windows of 100000 pieces"):
        task(length=60_000, memory=40_000)
