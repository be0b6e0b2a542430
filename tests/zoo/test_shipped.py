"""The weights that ship: small, what their cards say, and of the recipes as they are now."""

from __future__ import annotations

from pathlib import Path

import pytest

from fxpress import zoo
from fxpress.errors import CalibrationError
from fxpress.zoo import recipe, tokenization, trained
from fxpress.zoo.pretrained import PretrainedError
from fxpress.zoo.registry import entry
from tests.models.samples import build, marked

NAMES = sorted(path.stem for path in trained.SHIPPED.glob("*.json"))
QUICK = ["copying-gru", "recall-gru", "austen-gru"]  # to score: one of each task


def test_there_are_weights_and_they_are_small() -> None:
    assert set(QUICK) <= set(NAMES)
    files = [*trained.SHIPPED.iterdir()]
    assert {path.stem for path in files if path.suffix != tokenization.SUFFIX} == set(NAMES)
    assert sum(path.stat().st_size for path in files) < 25_000_000


RISING = ("accuracy", "bleu", "rouge_1")  # headlines of which more is better


@pytest.mark.parametrize("name", marked(NAMES))
def test_a_card_is_of_the_recipe_as_it_is_now(name: str) -> None:
    card = trained.load_card(name)
    assert recipe.Recipe(**card["recipe"]) == recipe.load(name, reduced=True)
    assert entry(name).has_weights
    model = build(name)
    assert not model.training
    assert sum(p.numel() for p in model.parameters()) == card["parameters"]


@pytest.mark.parametrize("name", NAMES)
def test_each_beats_what_it_is_compared_with(name: str) -> None:
    card = trained.load_card(name)
    score, others = card["scores"][card["headline"]], card["baselines"].values()
    assert score > max(others) if card["headline"] in RISING else score < min(others)


@pytest.mark.parametrize("name", QUICK)
def test_scores_are_what_the_card_says(name: str) -> None:
    card, found = trained.load_card(name), trained.evaluate(name)
    # Another processor or torch sums in another order; a figure of the table stays what it is.
    for figures in ("scores", "baselines"):
        now, then = ({k: round(v, 2) for k, v in one[figures].items()} for one in (found, card))
        assert now == then


def test_trained_weights_fix_the_sizes() -> None:
    with pytest.raises(PretrainedError, match="austen-gru: the weights fix the sizes: drop width"):
        zoo.create_model("austen-gru", pretrained=True, width=8)
    assert sum(p.numel() for p in zoo.create_model("austen-gru", width=8).parameters()) < 10_000


def test_drawn_sequences_read_no_file() -> None:
    first, second = entry("copying-gru").calibration(limit=2)
    assert first.shape == second.shape
    with pytest.raises(CalibrationError, match="copying-gru draws its sequences: it reads no x"):
        entry("copying-gru").calibration(Path("x.txt"))
