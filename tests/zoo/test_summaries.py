"""The objective of summarization, on the zoo's own descriptions and the tokenizer that ships."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fxpress.errors import CalibrationError
from fxpress.zoo import objectives, recipe, summaries, tokenization, trained
from fxpress.zoo.objectives import IGNORED, Task
from fxpress.zoo.registry import entry
from fxpress.zoo.samples import DATA, read_rows
from fxpress.zoo.tokenization import END, PAD, START

FILE = DATA / "summaries" / "descriptions.jsonl"
ROWS = read_rows(FILE, summaries.FIELDS)
HELD_OUT = ROWS[12:]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The descriptions as a corpus: the first 8 to train on, 4 and 4 held out."""
    for split, rows in {"train": ROWS[:8], "valid": ROWS[8:12], "test": HELD_OUT}.items():
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def plan(**changes: Any) -> recipe.Recipe:
    fields = vars(recipe.load("summary-lstm", reduced=True))
    return recipe.parse("r", fields | {"batch": 4, **changes})


def task(folder: Path, **settings: Any) -> Task:
    return objectives.task_of(plan(data=plan().data | settings), folder)


def texts(ids: Tensor) -> list[str]:
    tokenizer = tokenization.load("debian-summaries", summaries.FIELDS, 4096)
    return tokenization.decode(tokenizer, ids.masked_fill(ids == IGNORED, PAD))


def test_a_batch_is_texts_and_their_summaries(folder: Path) -> None:
    (((source, read), targets),) = task(folder).splits["test"]
    assert dict(zip(texts(source), texts(targets), strict=True)) == {
        row["text"]: row["summary"] for row in HELD_OUT
    }
    assert (read[:, 0] == START).all()
    following = targets[:, :-1]
    kept = (following != IGNORED) & (following != END)
    assert torch.equal(read[:, 1:][kept], following[kept])


def test_long_ones_are_cut_and_still_end(folder: Path) -> None:
    (((source, read), targets),) = task(folder, source=20, target=6).splits["test"]
    assert (source.shape[1], read.shape[1]) == (20, 6)
    for side in (source, targets):
        assert ((side == END).sum(1) == 1).all()
    for said in texts(source):
        assert any(row["text"].startswith(said) for row in HELD_OUT)


def test_what_is_drawn_is_trained_on_alone(folder: Path) -> None:
    training = task(folder)
    seen: set[str] = set()
    for seed in range(40):
        (source, _), _ = training.draw(4, torch.Generator().manual_seed(seed))
        assert len(source) == 4
        seen |= set(texts(source))
    assert seen == {row["text"] for row in ROWS[:8]}


class Repeats:
    """Stands for a model: says the first pieces of the source, then ends."""

    start, end = START, END

    def __init__(self, length: int) -> None:
        self.length = length

    def parameters(self) -> Any:
        return iter([torch.zeros(1)])

    def encode(self, source: Tensor) -> tuple[Tensor, ...]:
        return source, torch.zeros(len(source), 1, dtype=torch.long)

    def step(self, tokens: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        source, at = state
        following = source.gather(1, at)[:, 0]
        following = torch.where(at[:, 0] < self.length, following, torch.tensor(END))
        return torch.nn.functional.one_hot(following, 4096) * 50.0, (source, at + 1)


@pytest.mark.parametrize("beam", [1, 3])
def test_rouge_is_of_what_is_said(folder: Path, beam: int) -> None:
    first: Any = Repeats(10)
    found = task(folder, beam=beam).decoded(first)
    (((source, _), _),) = task(folder).splits["test"]
    said = dict(zip(texts(source), texts(source[:, :10]), strict=True))
    candidates = [said[row["text"]] for row in HELD_OUT]
    expected = summaries.rouge(candidates, [row["summary"] for row in HELD_OUT])
    assert found.keys() == expected.keys()
    assert all(math.isclose(found[name], expected[name]) for name in expected)  # another order
    assert 0 < found["rouge_2"] < found["rouge_1"] < 1


def test_rouge_by_hand() -> None:
    # Three of three words of the answer, of five said; one of two pairs, of four; in order "a b".
    found = summaries.rouge(["a b x c y"], ["c a b"])
    assert math.isclose(found["rouge_1"], 2 * 3 / (5 + 3))
    assert math.isclose(found["rouge_2"], 2 * 1 / (4 + 2))
    assert math.isclose(found["rouge_l"], 2 * 2 / (5 + 3))


def test_it_is_compared_with_the_first_sentence(folder: Path) -> None:
    assert summaries.lead("It is 1.5 times as fast! So they say.") == "It is 1.5 times as fast!"
    leads = [summaries.lead(row["text"]) for row in HELD_OUT]
    rouge = summaries.rouge(leads, [row["summary"] for row in HELD_OUT])
    ((name, value),) = task(folder).baselines.items()
    assert name == "lead sentence"
    assert math.isclose(value, rouge["rouge_1"])


@pytest.mark.parametrize("layer", ["lstm", "rum"])
def test_it_trains_and_scores(folder: Path, tmp_path: Path, layer: str) -> None:
    sizes = {"name": "pointer-generator", "width": 8, "encoder": layer, "decoder": layer}
    tiny = plan(model=sizes, steps=40, evaluate_every=20, warmup=0)
    card = trained.train(tiny, tmp_path / "out", data=folder)
    assert {"loss", "rouge_1", "rouge_2", "rouge_l"} <= set(card["scores"])
    first, last = card["history"]
    assert last["train"] < first["train"]
    assert trained.evaluate("r", tmp_path / "out", folder)["scores"] == card["scores"]


def test_calibration_is_of_descriptions(tmp_path: Path) -> None:
    batches = entry("summary-lstm").calibration(limit=3)
    assert [len(source) for source, _ in batches] == [4, 4, 4]
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"text": "A tool.", "summary": "tool", "more": 1}))
    ((source, read),) = entry("summary-lstm").calibration(other)
    assert (texts(source), texts(read)) == (["A tool."], ["tool"])
    other.write_text(json.dumps({"text": "A tool."}))
    with pytest.raises(CalibrationError, match='"text" and "summary"'):
        entry("summary-lstm").calibration(other)
