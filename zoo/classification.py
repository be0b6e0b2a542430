"""The objective of text classification: which class is a text of?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxpress.zoo import corpora, minilm, tokenization
from fxpress.zoo.objectives import Batch, Task, objective, sha256_of
from fxpress.zoo.recipe import RecipeError
from fxpress.zoo.samples import DATA, read_texts

__all__ = ["classification", "f1_of", "naive_bayes", "outputs", "task_of_classes"]

ROWS = 64  # texts of a held-out batch
CALIBRATION_ROWS = 4
FIELDS = ("text",)
Encode = Callable[[Sequence[str]], list[list[int]]]


def _calibration(settings: Mapping[str, Any], path: Path | None, limit: int) -> list[Any]:
    """Batches of 4 texts, cut or padded to the recipe's length: of a file, or of the zoo's own."""
    file = path or DATA / "notices" / f"{settings['sample']}.txt"
    texts = read_texts(file)[: limit * CALIBRATION_ROWS]
    length = settings["length"]
    rows = [row[:length] for row in _encoder(settings["corpus"], settings.get("vocabulary"))(texts)]
    ids = tokenization.pad([*rows, [tokenization.PAD] * length])[:-1]
    return [_inputs(part) for part in ids.split(CALIBRATION_ROWS)]


@objective("classification", reads_data=True, calibration=_calibration)
def classification(
    corpus: str,
    length: int,
    sample: str,  # noqa: ARG001
    vocabulary: int | None = None,
    data: Path | None = None,
) -> Task:
    """Which class is a text of? The classes are the labels of train, in alphabetic order.

    Args:
        corpus: a name that `corpora.load` takes, whose rows have "text" and "label".
        length: tokens of a text that are read; the rest is cut off.
        sample: the zoo's own texts to calibrate on, a file of `data/notices`.
        vocabulary: tokens of the corpus' tokenizer; None: those of MiniLM.
        data: a folder with train.jsonl, valid.jsonl and test.jsonl (or .csv, .parquet), in place of
            the corpus; the tokenizer stays.

    Raises:
        CorpusError: the data cannot be had or read.
        RecipeError: a held-out text has a label that no text of train has.
    """
    encode = _encoder(corpus, vocabulary)
    rows = {split: corpora.load(data or corpus, split)[:] for split in corpora.SPLITS}
    labels = sorted(set(rows["train"]["label"]))
    known, valid, test = (
        (
            [row[:length] for row in encode(rows[split]["text"])],
            _classes(rows[split]["label"], labels, split),
        )
        for split in corpora.SPLITS
    )

    def draw(count: int, generator: torch.Generator) -> Batch:
        chosen = torch.randint(len(known[0]), (count,), generator=generator)
        return _batch(*known, chosen.tolist())

    return task_of_classes(
        draw,
        {"valid": _batches(*valid), "test": _batches(*test)},
        known[1],
        test[1],
        ("naive Bayes", naive_bayes(*known, test[0])),
        sha256_of(*(x for part in (known, valid, test) for x in (_joined(part[0]), part[1]))),
        {} if vocabulary is None else tokenization.beside(corpus, FIELDS, vocabulary),
    )


def task_of_classes(
    draw: Callable[[int, torch.Generator], Batch],
    held_out: dict[str, list[Batch]],
    known: Tensor,
    right: Tensor,
    other: tuple[str, Tensor],
    sha256: str,
    beside: dict[str, str] | None = None,
) -> Task:
    """A task whose rows are each of one class: accuracy, and the mean F1 of the classes.

    Args:
        draw: as in `Task`.
        held_out: the splits.
        known: the classes (n,) of train, of which the commonest is a baseline.
        right: those of test, in the order of `other`.
        other: a baseline's name, and the classes that it gives to the rows of test.
        sha256: of the data.
        beside: as in `Task`.
    """
    name, said = other
    majority = known.bincount().argmax()
    return Task(
        draw,
        held_out,
        lambda targets: torch.ones_like(targets, dtype=torch.bool),
        lambda loss, accuracy: {"accuracy": accuracy, "loss": loss},
        "accuracy",
        {
            "commonest class": (right == majority).double().mean().item(),
            name: (said == right).double().mean().item(),
        },
        sha256,
        lambda module: {"macro_f1": f1_of(*outputs(module, held_out["test"]))},
        beside or {},
    )


def _encoder(corpus: str, vocabulary: int | None) -> Encode:
    """What makes texts into tokens."""
    if vocabulary is None:
        wordpiece = minilm.tokenizer()
        limit = wordpiece.model_max_length
        return lambda texts: wordpiece(list(texts), truncation=True, max_length=limit).input_ids
    tokenizer = tokenization.load(corpus, FIELDS, vocabulary)
    return lambda texts: tokenization.encode(tokenizer, texts)


def _classes(found: Sequence[Any], labels: list[Any], split: str) -> Tensor:
    """The class of each label (n,)."""
    number = {label: i for i, label in enumerate(labels)}
    if unknown := sorted({str(label) for label in found if label not in number}):
        raise RecipeError(f"{split} has the label {unknown[0]!r}, which no text of train has")
    return torch.tensor([number[label] for label in found])


def _batches(rows: list[list[int]], classes: Tensor) -> list[Batch]:
    """All texts, in the order of their lengths, so that little of a batch is padding."""
    order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
    return [_batch(rows, classes, order[i : i + ROWS]) for i in range(0, len(order), ROWS)]


def _batch(rows: list[list[int]], classes: Tensor, chosen: list[int]) -> Batch:
    return _inputs(tokenization.pad([rows[row] for row in chosen])), classes[chosen]


def _inputs(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens (B, N), and a mask (B, N) that is 1 where one stands."""
    return ids, (ids != tokenization.PAD).long()


def _joined(rows: list[list[int]]) -> Tensor:
    return torch.tensor([token for row in rows for token in row], dtype=torch.long)


@torch.no_grad()
def outputs(module: nn.Module, batches: list[Batch]) -> tuple[Tensor, Tensor]:
    """The class that a model gives to each row of the batches (n,), and the right one (n,)."""
    device = next(module.parameters()).device
    said = [module(*(x.to(device) for x in inputs)).argmax(-1).cpu() for inputs, _ in batches]
    return torch.cat(said), torch.cat([targets for _, targets in batches])


def f1_of(said: Tensor, right: Tensor) -> float:
    """The mean over classes, those said or right, of F1 = 2 tp / (2 tp + fp + fn)."""
    classes = int(torch.cat([said, right]).max()) + 1
    hits = right[said == right].bincount(minlength=classes)
    seen = said.bincount(minlength=classes) + right.bincount(minlength=classes)
    return (2 * hits / seen)[seen > 0].mean().item()


def naive_bayes(rows: list[list[int]], classes: Tensor, others: list[list[int]]) -> Tensor:
    """The classes that multinomial naive Bayes gives to `others`, from the tokens of `rows`.

    Counts are smoothed by one (McCallum and Nigam 1998).
    """
    tokens, read = _joined(rows), _joined(others)
    size, kinds = int(torch.cat([tokens, read]).max()) + 1, int(classes.max()) + 1
    of = classes.repeat_interleave(_lengths(rows))
    counts = 1 + (of * size + tokens).bincount(minlength=kinds * size).double().view(kinds, size)
    log_p = (counts / counts.sum(1, keepdim=True)).log()
    starts = _lengths(others).cumsum(0) - _lengths(others)
    scores = F.embedding_bag(read, log_p.T.contiguous(), starts, mode="sum")
    return (classes.bincount().double().log() + scores).argmax(1)


def _lengths(rows: list[list[int]]) -> Tensor:
    return torch.tensor([len(row) for row in rows])
