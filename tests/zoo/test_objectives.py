"""Tasks: each target once, held-out data apart from what is trained on, baselines recomputed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from fxpress.errors import CalibrationError
from fxpress.zoo import byte_text, memory, objectives, recipe
from fxpress.zoo.objectives import IGNORED, Task
from fxpress.zoo.recipe import RecipeError

TRAIN, TEST = "abcdefghijklmnopqrst" * 3, "zyxwvutsrqponm"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A training and a test text."""
    (tmp_path / "train.txt").write_text(TRAIN)
    (tmp_path / "test.txt").write_text(TEST)
    return tmp_path


def task(data: Path | None = None, **settings: Any) -> Task:
    fields = recipe.load("austen-lstm")
    plan = recipe.parse("r", {**vars(fields), "data": fields.data | settings})
    return objectives.task_of(plan, data)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_windows_predict_each_byte_once(folder: Path) -> None:
    (((inputs,), targets),) = task(folder, length=4).splits["test"]
    assert inputs.shape == targets.shape == (4, 4)
    kept = targets != IGNORED
    assert bytes(targets[kept].tolist()).decode() == TEST[1:]
    assert bytes(inputs[kept].tolist()).decode() == TEST[:-1]


def test_training_sees_nothing_held_out(folder: Path) -> None:
    text = task(folder, length=4)
    (inputs,), targets = text.draw(500, seeded(0))
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    drawn = {bytes(row.tolist()).decode() for row in torch.cat([inputs, targets[:, -1:]], 1)}
    known = TRAIN[:54]  # nine tenths
    assert drawn == {known[i : i + 5] for i in range(50)}
    (((valid,), _),) = text.splits["valid"]
    assert bytes(valid.flatten().tolist()).startswith(TRAIN[54:59].encode())


def test_baselines_of_text() -> None:
    train, test = torch.tensor([0, 1, 0, 1, 0]), torch.tensor([0, 1, 2])
    found = byte_text.text_baselines(train, test)
    one, two = (2 + 1) / (5 + 256), 1 / (5 + 256)
    assert math.isclose(found["unigram"], -(math.log2(one) + math.log2(two)) / 2)
    # 0 was seen three times and followed by one kind of byte, 1 twice and by one.
    after_zero, after_one = (2 + one) / (3 + 1), two / (2 + 1)
    assert math.isclose(found["bigram"], -(math.log2(after_zero) + math.log2(after_one)) / 2)


def test_metrics_of_text(folder: Path) -> None:
    metrics = task(folder, length=4).metrics(math.log(4), 0.5)
    assert metrics == {"bits_per_byte": 2.0, "perplexity_per_byte": 4.0, "accuracy": 0.5}


def test_recall_asks_once_for_the_token_of_the_value() -> None:
    plan = recipe.load("recall-gru", reduced=True)
    (inputs,), targets = objectives.task_of(plan).draw(50, seeded(0))
    assert (targets[:, :-1] == IGNORED).all()
    for row, target in zip(inputs.tolist(), targets[:, -1].tolist(), strict=True):
        assert row[row.index(row[-1]) + 1] == target


def test_commonest_value() -> None:
    assert memory.commonest_value_accuracy(2) == 1.0  # one pair
    # Of two values one is answered: right if they are equal, else half the time.
    assert round(memory.commonest_value_accuracy(4), 2) == 0.55


@pytest.mark.parametrize("name", ["recall-gru", "copying-gru"])
def test_held_out_sequences_are_the_same_each_time_and_no_others(name: str) -> None:
    first, again = (objectives.task_of(recipe.load(name)) for _ in range(2))
    assert first.sha256 == again.sha256
    valid, test = (first.splits[split][0][0][0] for split in ("valid", "test"))
    assert not torch.equal(valid, test)
    assert not torch.equal(first.splits["test"][1][0][0], test)


def test_seeds_differ_in_the_bits_that_count() -> None:
    seeds = [objectives.seed_of("train", seed, step) for seed in range(3) for step in range(300)]
    seeds += [objectives.seed_of("valid"), objectives.seed_of("test")]
    assert len(set(seeds)) == len(seeds)
    assert max(seeds) < 2**32


def test_refusals(folder: Path) -> None:
    with pytest.raises(RecipeError, match="too short for windows of 128 bytes"):
        task(folder)
    with pytest.raises(RecipeError, match="copying-gru draws its sequences"):
        objectives.task_of(recipe.load("copying-gru"), folder)
    with pytest.raises(CalibrationError, match=r"nowhere/train\.txt cannot be read"):
        task(folder / "nowhere")
