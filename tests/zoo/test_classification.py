"""Classification: baselines and metrics by hand, data kept apart, models that read masks."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fxpress import zoo
from fxpress.errors import CalibrationError
from fxpress.testing import BITWISE, assert_equivalent
from fxpress.zoo import classification, image_classification, objectives, recipe, tokenization
from fxpress.zoo.objectives import Task
from fxpress.zoo.recipe import RecipeError
from fxpress.zoo.registry import entry
from fxpress.zoo.samples import DATA, read_texts

TEXTS = {
    "train": [("profit rose", "earn"), ("loss narrowed", "earn"), ("the ship sank", "ship")],
    "valid": [("profit fell", "earn")],
    "test": [("profit rose again", "earn"), ("the ship", "ship")],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A few labelled texts."""
    for split, rows in TEXTS.items():
        write(tmp_path / f"{split}.jsonl", rows)
    return tmp_path


def write(path: Path, rows: list[tuple[str, str]]) -> None:
    lines = [json.dumps({"text": text, "label": label}) for text, label in rows]
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture(autouse=True)
def shipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer in the place of the corpus' own, which may have to be trained."""
    made = tokenization.train([text for rows in TEXTS.values() for text, _ in rows], 300)
    monkeypatch.setattr(tokenization, "load", lambda *_key: made)


def task(folder: Path, **settings: Any) -> Task:
    fields = recipe.load("r8-encoder", reduced=True)
    plan = recipe.parse("r", {**vars(fields), "data": fields.data | settings})
    return objectives.task_of(plan, folder)


def test_texts_and_classes_go_together(folder: Path) -> None:
    found = task(folder)
    tokenizer = tokenization.load()
    ((ids, mask), classes), *rest = found.splits["test"]
    assert not rest
    assert classes.tolist() == [1, 0]  # the shorter text first
    said = [
        tokenizer.decode(row[kept.bool()].tolist()) for row, kept in zip(ids, mask, strict=True)
    ]
    assert [text.strip() for text in said] == ["the ship", "profit rose again"]
    assert (ids[mask == 0] == tokenization.PAD).all()
    (ids, _), classes = found.draw(100, torch.Generator().manual_seed(0))
    drawn = {
        (tokenizer.decode(row.tolist()).strip(), int(y))
        for row, y in zip(ids, classes, strict=True)
    }
    assert drawn == {(text, int(label == "ship")) for text, label in TEXTS["train"]}


def test_long_texts_are_cut(folder: Path) -> None:
    (ids, mask), _ = task(folder, length=2).splits["test"][0]
    assert ids.shape == mask.shape == (2, 2)


def test_a_label_of_test_only_is_refused(folder: Path) -> None:
    write(folder / "test.jsonl", [("wheat", "grain")])
    with pytest.raises(RecipeError, match="test has the label 'grain', which no text of train has"):
        task(folder)


def test_naive_bayes_by_hand() -> None:
    rows, classes = [[0, 1], [0, 0, 2], [2, 2]], torch.tensor([0, 0, 1])
    # Counts and one more: class 0 (4, 2, 2) of 8, class 1 (1, 1, 3) of 5; prior 2 to 1.
    others = [[0], [2], [2, 2], [1, 2, 2]]
    expected = [
        int(1 * p1 > 2 * p0)
        for p0, p1 in (
            (4 / 8, 1 / 5),
            (2 / 8, 3 / 5),
            ((2 / 8) ** 2, (3 / 5) ** 2),
            ((2 / 8) ** 3, (3 / 5) ** 2 / 5),
        )
    ]
    assert classification.naive_bayes(rows, classes, others).tolist() == expected == [0, 1, 1, 1]


def test_f1_by_hand() -> None:
    said, right = torch.tensor([0, 0, 1, 3]), torch.tensor([0, 1, 1, 1])
    # Class 0: 2/3; class 1: 2/4; class 2 is neither said nor right; class 3: 0.
    assert math.isclose(classification.f1_of(said, right), (2 / 3 + 1 / 2) / 3, rel_tol=1e-6)
    assert classification.f1_of(right, right) == 1.0


def test_baselines_and_metrics(folder: Path) -> None:
    found = task(folder)
    assert found.baselines["commonest class"] == 0.5
    assert found.baselines["naive Bayes"] == 1.0
    assert found.metrics(0.25, 0.5) == {"accuracy": 0.5, "loss": 0.25}
    model = zoo.create_model("text-encoder", vocabulary=300, classes=2)
    said, right = classification.outputs(model, found.splits["test"])
    assert found.decoded(model) == {"macro_f1": classification.f1_of(said, right)}
    assert list(found.beside) == ["r8-text-4096.tokenizer"]


@pytest.mark.parametrize("name", ["text-encoder", "text-bag", "minilm-classifier"])
def test_padding_changes_nothing(name: str) -> None:
    torch.manual_seed(0)
    model = zoo.create_model(name, classes=3)
    ids = torch.randint(3, 200, (2, 7))
    padded = torch.cat([ids, torch.zeros(2, 4, dtype=torch.long)], 1)

    mask = (padded != 0).long()
    assert_equivalent(lambda *_: model(padded, mask), model, (ids, torch.ones_like(ids)))


def test_tuned_biases_are_few() -> None:
    model = zoo.create_model("minilm-classifier", classes=3, tuned="biases")
    tuned = [name for name, p in model.named_parameters() if p.requires_grad]
    assert all(name.endswith("bias") or name == "head.weight" for name in tuned)
    assert "bert.encoder.layer.0.attention.self.query.bias" in tuned
    assert all(p.requires_grad for p in zoo.create_model("minilm-classifier").parameters())
    with pytest.raises(ValueError, match="tuned is 'none': give one of all, biases"):
        zoo.create_model("minilm-classifier", tuned="none")


# --- images ---------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Images of 28 x 28, dark ones of class 0 and bright ones of class 1."""
    from datasets import Dataset

    for split, count in (("train", 40), ("valid", 4), ("test", 6)):
        rows = [
            {"image": bytes([20 + i + 150 * (i % 2)]) * 784, "label": i % 2} for i in range(count)
        ]
        Dataset.from_list(rows).to_parquet(str(tmp_path / f"{split}.parquet"))
    return tmp_path


def images_of(folder: Path, **settings: Any) -> Task:
    fields = recipe.load("fashion-vit", reduced=True)
    plan = recipe.parse("r", {**vars(fields), "data": fields.data | settings})
    return objectives.task_of(plan, folder)


def test_images_and_classes_go_together(pictures: Path) -> None:
    found = images_of(pictures, mean=0.0, deviation=1 / 255)
    (((x,), classes),) = found.splits["test"]
    assert x.shape == (6, 1, 28, 28)
    assert x[:, 0, 0, 0].tolist() == [20 + i + 150 * (i % 2) for i in range(6)]
    assert classes.tolist() == [0, 1] * 3
    (x,), classes = found.draw(50, torch.Generator().manual_seed(0))
    assert ((x[:, 0, 0, 0] > 120) == classes.bool()).all()
    assert found.baselines == {"commonest class": 0.5, "nearest class mean": 1.0}


def test_augmented_images_are_moved_and_mirrored() -> None:
    pixels = torch.arange(1, 37, dtype=torch.uint8).view(1, 1, 6, 6).expand(400, 1, 6, 6)
    moved = image_classification.augmented(pixels, torch.Generator().manual_seed(0))
    assert moved.shape == pixels.shape
    assert moved.dtype == torch.uint8
    board = np.zeros((10, 10), np.uint8)
    board[2:8, 2:8] = pixels[0, 0].numpy()
    possible = {board[i : i + 6, j : j + 6].tobytes() for i in range(5) for j in range(5)}
    mirrored = {np.frombuffer(x, np.uint8).reshape(6, 6)[:, ::-1].tobytes() for x in possible}
    assert {x.numpy().tobytes() for x in moved} == possible | mirrored


def test_nearest_mean_by_hand() -> None:
    pixels = torch.tensor([[[0]], [[4]], [[20]]], dtype=torch.uint8).unsqueeze(1)
    others = torch.tensor([[[10]], [[12]]], dtype=torch.uint8).unsqueeze(1)
    classes = torch.tensor([0, 0, 1])
    assert image_classification.nearest_mean(pixels, classes, others).tolist() == [0, 1]


def test_patches_are_seen_by_place() -> None:
    torch.manual_seed(0)
    model: Any = zoo.create_model("vit", side=8, patch=4, width=16, heads=2)
    x = torch.randn(1, 1, 8, 8)
    swapped = torch.cat([x[..., 4:], x[..., :4]], -1)
    with torch.no_grad():
        assert not torch.equal(model(x).round(decimals=3), model(swapped).round(decimals=3))
        model.positions.zero_()
    assert_equivalent(lambda _: model(swapped), model, (x,))


def test_calibration_of_images(tmp_path: Path) -> None:
    batches = entry("fashion-vit").calibration()
    assert [tuple(x.shape) for x in batches] == [(4, 1, 28, 28)] * 32
    path = tmp_path / "x.npy"
    np.save(path, np.full((6, 28, 28), 255, np.uint8))
    first, second = entry("vit").calibration(path)
    assert (first.shape[0], second.shape[0]) == (4, 2)
    assert (first == 1).all()
    np.save(path, np.zeros((6, 28, 28)))
    with pytest.raises(CalibrationError, match=r"holds float64 of shape .*give images as uint8"):
        entry("vit").calibration(path)
    with pytest.raises(CalibrationError, match=r"none\.npy cannot be read: give a \.npy file"):
        entry("vit").calibration(tmp_path / "none.npy")


@pytest.mark.parametrize("name", ["news", "packages"])
def test_own_texts_look_like_the_corpus(name: str) -> None:
    texts = read_texts(DATA / "notices" / f"{name}.txt")
    assert len(texts) == 32
    assert all(20 <= len(text.split()) <= 80 for text in texts)
    if name == "news":
        assert all(text.replace(" ", "").isalpha() and text.islower() for text in texts)


def test_a_model_of_a_folder_is_trained_and_scored(folder: Path, tmp_path: Path) -> None:
    from fxpress.zoo import trained

    fields = vars(recipe.load("r8-bag", reduced=True))
    plan = recipe.parse("r8-bag", {**fields, "steps": 40, "evaluate_every": 20})
    card = trained.train(plan, tmp_path / "out", data=folder)
    assert card["scores"]["accuracy"] == card["scores"]["macro_f1"] == 1.0
    assert (tmp_path / "out" / "r8-text-4096.tokenizer").is_file()
    again, first = (trained.load_module("r8-bag", tmp_path / "out") for _ in range(2))
    ids = torch.randint(3, 300, (2, 5))
    assert_equivalent(again, first, (ids, torch.ones_like(ids)), exactness=BITWISE)
