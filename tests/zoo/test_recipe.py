"""Recipes: each file is valid in both forms, and one clear error says what is wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from fxpress.errors import FxpressError
from fxpress.zoo import corpora, objectives, recipe, tokenization
from fxpress.zoo.recipe import RecipeError, parse
from fxpress.zoo.registry import create_model
from fxpress.zoo.samples import DATA, read_texts
from tests.models.samples import marked

FIELDS: dict[str, Any] = {
    "description": "-",
    "source": "-",
    "task": "copying",
    "data": {"T": 4},
    "model": {"name": "gru-lm", "vocabulary": 10, "width": 8},
    "batch": 4,
    "steps": 6,
    "evaluate_every": 2,
    "optimizer": "adamw",
    "learning_rate": 0.01,
    "reduced": {"steps": 3, "model": {"width": 4}},
}


@pytest.fixture
def one_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Stands for every corpus: a few rows with all the fields there are; nothing is downloaded."""
    texts = read_texts(DATA / "austen" / "calibration.txt")[:60]
    rows = [
        {"text": text, "summary": text[:40], "en": text[:90], "de": text[:80], "label": i % 2}
        | {"image": bytes([i] * 28 * 28)}
        for i, text in enumerate(texts)
    ]
    monkeypatch.setattr(corpora, "load", lambda *_, **__: Dataset.from_list(rows))
    monkeypatch.setattr(tokenization, "cache_folder", lambda: tmp_path)
    tokenization.load.cache_clear()
    yield
    tokenization.load.cache_clear()


@pytest.mark.usefixtures("one_corpus")
@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize("name", marked(recipe.list_recipes()))
def test_every_recipe_fits_its_model(name: str, reduced: bool) -> None:
    plan = recipe.load(name, reduced=reduced)
    assert (plan.name, plan.reduced) == (name, reduced)
    inputs, targets = objectives.task_of(plan).splits["valid"][0]
    logits = create_model(**plan.model)(*(x[:2] for x in inputs))
    assert logits.shape[:-1] == targets[:2].shape
    assert int(targets.max()) < logits.shape[-1]


def test_reduced_overrides_one_level_deep() -> None:
    full, reduced = parse("r", FIELDS), parse("r", FIELDS, reduced=True)
    assert (full.steps, reduced.steps) == (6, 3)
    assert reduced.model == {"name": "gru-lm", "vocabulary": 10, "width": 4}
    changed = dataclasses.replace(reduced, steps=6, model=full.model, reduced=False)
    assert changed == full


def test_unknown_name_offers_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r"'austen-lsmt': did you mean 'austen-lstm'\?") as caught:
        recipe.load("austen-lsmt")
    assert isinstance(caught.value, FxpressError)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": 6}, "r: unknown field 'step'"),
        ({"steps": "six"}, "r: steps is 'six': give a value of type int"),
        ({"steps": True}, "r: steps is True"),
        ({"steps": 0}, "r: steps is 0: it must be above 0"),
        ({"label_smoothing": 1.0}, "r: label_smoothing must be from 0 to 1"),
        ({"learning_rate": -1.0}, "r: learning_rate is -1.0"),
        ({"optimizer": "adan"}, "r: optimizer is 'adan': give one of adamw, rmsprop"),
        ({"stored": "int8"}, "r: stored is 'int8': give float32 or float16"),
        ({"model": {"width": 8}}, "r: model needs a name"),
        ({"reduced": {"steps": 3, "models": {}}}, "r: unknown field 'models'"),
    ],
)
def test_a_bad_field_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse("r", FIELDS | change, reduced="reduced" in change)


def test_a_missing_field_is_named() -> None:
    fields = {key: value for key, value in FIELDS.items() if key not in ("batch", "task")}
    with pytest.raises(RecipeError, match="r: batch, task is missing"):
        parse("r", fields)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "copy"}, "r: task is 'copy': give one of .*copying, .*recall"),
        ({"data": {"length": 4}}, "r: data is .* unexpected keyword argument 'length'"),
    ],
)
def test_a_bad_task_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        objectives.task_of(parse("r", FIELDS | change))
