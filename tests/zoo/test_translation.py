"""The objective of translation, on the zoo's own sentences and the tokenizer that ships."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxpress import zoo
from fxpress.errors import CalibrationError
from fxpress.zoo import objectives, recipe, tokenization, trained, training, translation
from fxpress.zoo.objectives import IGNORED, Task
from fxpress.zoo.registry import entry
from fxpress.zoo.samples import DATA
from fxpress.zoo.tokenization import END, PAD, START

SENTENCES = DATA / "sentences" / "en-de.jsonl"
NAMES = ["en-de-lstm", "en-de-transformer"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The sentences as a corpus: the first 32 to train on, 8 and 8 held out."""
    lines = SENTENCES.read_text(encoding="utf-8").splitlines()
    for split, (first, last) in {"train": (0, 32), "valid": (32, 40), "test": (40, 48)}.items():
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines[first:last]), encoding="utf-8")
    return tmp_path


def plan(**changes: Any) -> recipe.Recipe:
    fields = vars(recipe.load("en-de-lstm", reduced=True))
    return recipe.parse("r", fields | {"batch": 8, **changes})


def task(folder: Path, **settings: Any) -> Task:
    return objectives.task_of(plan(data=plan().data | settings), folder)


def tokenizer() -> Any:
    return tokenization.load("en-de", ("en", "de"), 4096)


def said(model: nn.Module, texts: list[str]) -> list[str]:
    """Translations by the tokenizer that ships."""
    words = tokenizer()
    encode, decode = partial(tokenization.encode, words), partial(tokenization.decode, words)
    return translation.translate(model, texts, encode, decode)


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_batch_is_sentences_and_their_translations(folder: Path) -> None:
    (((source, read), targets),) = task(folder).splits["test"]
    assert len(source) == len(read) == len(targets) == 8
    answers = tokenization.decode(tokenizer(), targets.masked_fill(targets == IGNORED, PAD))
    asked = tokenization.decode(tokenizer(), source)
    expected = {row["en"]: row["de"] for row in rows(folder / "test.jsonl")}
    assert dict(zip(asked, answers, strict=True)) == expected
    assert (read[:, 0] == START).all()
    following = targets[:, :-1]
    kept = (following != IGNORED) & (following != END)
    assert torch.equal(read[:, 1:][kept], following[kept])
    assert ((targets == END).sum(1) == 1).all()


def test_batches_are_drawn_from_sentences_short_enough(folder: Path) -> None:
    short = task(folder, length=12)
    seen: set[str] = set()
    for seed in range(40):
        (source, read), targets = short.draw(4, torch.Generator().manual_seed(seed))
        assert source.shape[1] <= 12
        assert read.shape == targets.shape
        seen |= set(tokenization.decode(tokenizer(), source))
    known = {
        row["en"]
        for row in rows(folder / "train.jsonl")
        if max(map(len, tokenization.encode(tokenizer(), row.values()))) <= 12
    }
    assert 8 < len(known) < 32
    assert seen == known


def test_a_draw_is_its_seed(folder: Path) -> None:
    one, again, other = (
        task(folder).draw(4, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(one[1], again[1])
    assert one[1].shape != other[1].shape or not torch.equal(one[1], other[1])


class Dictionary(nn.Module):
    """Knows some sentences by heart; a model that does what `translate` asks of one."""

    start, end = START, END

    def __init__(self, pairs: dict[str, str]) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.zeros(1))
        sides = (tokenization.encode(tokenizer(), texts) for texts in (pairs, pairs.values()))
        self.known = {tuple(x): y for x, y in zip(*sides, strict=True)}

    def encode(self, source: Tensor) -> tuple[Tensor, ...]:
        answers = [self.known[tuple(i for i in row if i != PAD)] for row in source.tolist()]
        return tokenization.pad(answers, END), torch.zeros(len(source), dtype=torch.long)

    def step(self, tokens: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        answers, at = state
        logits = nn.functional.one_hot(answers.gather(1, at[:, None])[:, 0], 4096).float()
        return logits, (answers, at + 1)


def test_perfect_translations_score_a_hundred(folder: Path) -> None:
    pairs = {row["en"]: row["de"] for row in rows(folder / "test.jsonl")}
    made = task(folder)
    model = Dictionary(pairs)
    scores = made.decoded(model)
    assert scores == pytest.approx({"bleu": 100.0, "chrf": 100.0})
    assert said(model, list(pairs)) == list(pairs.values())
    wrong = dict(zip(pairs, reversed(pairs.values()), strict=True))
    assert made.decoded(Dictionary(wrong))["bleu"] < 20
    assert 0 < made.baselines["copying the source"] < 20


def test_a_sample_is_fixed_and_not_larger_than_there_is() -> None:
    numbers = [{"n": i} for i in range(100)]
    assert translation.sample(numbers, 5) == translation.sample(iter(numbers), 5)
    assert sorted(row["n"] for row in translation.sample(numbers, 500)) == list(range(100))


def test_the_data_and_the_tokenizer_tell_tasks_apart(folder: Path) -> None:
    whole, part = task(folder), task(folder, length=12)
    assert whole.sha256 != part.sha256
    assert list(whole.beside) == ["en-de-en-de-4096.tokenizer"]


@pytest.mark.parametrize("name", ["lstm-seq2seq", "transformer-seq2seq"])
def test_a_model_learns_sentences_by_heart(name: str, folder: Path, tmp_path: Path) -> None:
    model = {"name": name, "vocabulary": 4096, "width": 64, "dropout": 0.0}
    fast = {"steps": 150, "evaluate_every": 75, "warmup": 10, "learning_rate": 0.006}
    out = tmp_path / "out"
    lines = (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()[:6]
    for split in ("train", "valid", "test"):
        (folder / f"{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    card = trained.train(plan(model=model, **fast), out, data=folder)
    assert card["scores"]["bleu"] > 90
    assert card["scores"]["perplexity_per_token"] < 1.5
    shipped = tokenization.SHIPPED / "en-de-en-de-4096.tokenizer"
    assert (out / shipped.name).read_bytes() == shipped.read_bytes()
    assert trained.evaluate("r", out, folder)["scores"] == card["scores"]


@pytest.mark.parametrize("name", NAMES)
def test_trained_models_translate_sentences_of_the_style(name: str, folder: Path) -> None:
    """Not those of the test split, which come from Debian's packages."""
    model = zoo.create_model(name, pretrained=True)
    loss, accuracy = training.evaluate(model, task(folder), "test")
    assert loss < 4.5 < math.log(4096)
    assert accuracy > 0.3
    text = "This package contains the documentation."
    assert said(model, [text]) == ["Dieses Paket enthält die Dokumentation."]


@pytest.mark.parametrize("name", NAMES)
def test_calibration_reads_pairs_of_a_file(name: str, folder: Path) -> None:
    batches = entry(name).calibration(folder / "valid.jsonl", 2)
    assert [len(source) for source, _ in batches] == [4, 4]
    assert batches[0][1].shape[1] >= batches[1][1].shape[1]  # the longest first
    assert len(entry(name).calibration(None, 3)) == 3
    (folder / "one.jsonl").write_text('{"en": "x"}\n')
    with pytest.raises(CalibrationError, match='not one object with "en" and "de" a line'):
        entry(name).calibration(folder / "one.jsonl")
    with pytest.raises(CalibrationError, match=r'give a \.jsonl file with "en" and "de" a line'):
        entry(name).calibration(folder / "one.txt")
    with pytest.raises(CalibrationError, match="cannot be read"):
        entry(name).calibration(folder / "none.jsonl")
    (folder / "empty.jsonl").write_text("")
    with pytest.raises(CalibrationError, match="holds no row"):
        entry(name).calibration(folder / "empty.jsonl")
