"""What a recipe trains for: how batches are drawn, what is held out, and how a model is scored.

Every task has the same form: tokens (B, N) go in, logits (B, N, V) come out, and the loss is the
cross-entropy to targets (B, N), where `IGNORED` marks what is not asked.
"""

from __future__ import annotations

import gzip
import hashlib
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fxpress.zoo import tasks
from fxpress.zoo.recipe import Recipe, RecipeError
from fxpress.zoo.samples import DATA, read_texts

__all__ = ["IGNORED", "TASKS", "Batch", "Task", "seed_of", "task_of"]

IGNORED = -100  # torch's own mark for targets that do not count
BYTES = 256
VALID_SHARE = 10  # one part in so many of a training text chooses the best weights
HELD_OUT = 4, 256  # batches of a drawn split, sequences of each

Batch = tuple[Tensor, Tensor]  # inputs, targets


@dataclass(frozen=True)
class Task:
    """A task with its data.

    Attributes:
        draw: a batch to train on: so many sequences, from a generator.
        splits: the batches of "valid", which choose the best weights, and of "test".
        asked: (B, N), which of the targets an accuracy is taken over.
        metrics: what to report, from the mean loss in nats and the accuracy.
        headline: the metric to show where there is room for one.
        baselines: the headline metric of what a model is to be compared with.
        sha256: of the data.
    """

    draw: Callable[[int, torch.Generator], Batch]
    splits: dict[str, list[Batch]]
    asked: Callable[[Tensor], Tensor]
    metrics: Callable[[float, float], dict[str, float]]
    headline: str
    baselines: dict[str, float]
    sha256: str


def task_of(recipe: Recipe, data: Path | None = None) -> Task:
    """The task of a recipe.

    Args:
        recipe: whose task.
        data: a folder with train.txt and test.txt (or .jsonl), in place of the recipe's own texts.

    Raises:
        RecipeError: the task is unknown, takes no data, or not such settings.
        CalibrationError: a text cannot be read, or is too short.
    """
    if recipe.task not in TASKS:
        names = ", ".join(TASKS)
        raise RecipeError(f"{recipe.name}: task is {recipe.task!r}: give one of {names}")
    settings = dict(recipe.data)
    if data is not None:
        if recipe.task != "text":
            raise RecipeError(f"{recipe.name} draws its sequences: it takes no data")
        settings |= {split: _file(data, split) for split in ("train", "test")}
    try:
        return TASKS[recipe.task](**settings)
    except TypeError as error:
        raise RecipeError(f"{recipe.name}: data is {recipe.data}: {error}") from error


def _file(folder: Path, split: str) -> str:
    """The file of a split; where there is none, the name under which it is missed."""
    path = folder / f"{split}.jsonl"
    return str(path.absolute() if path.exists() else path.with_suffix(".txt").absolute())


# --- text -----------------------------------------------------------------------------------


def text(train: str, test: str, length: int) -> Task:
    """Which byte comes next? Files are relative to the zoo's own; the last tenth of train is valid.

    A window is `length` inputs and the targets one byte later; windows of a held-out text follow
    each other, so that each byte but the first is predicted once, from `length` bytes or less.
    """
    whole, held_out = (_bytes(DATA / name) for name in (train, test))
    cut = len(whole) - len(whole) // VALID_SHARE
    known, valid = whole[:cut], whole[cut:]
    if min(len(known), len(valid), len(held_out)) <= length:
        raise RecipeError(f"{train} or {test} is too short for windows of {length} bytes")

    def draw(rows: int, generator: torch.Generator) -> Batch:
        starts = torch.randint(len(known) - length, (rows, 1), generator=generator)
        windows = known[starts + torch.arange(length + 1)]
        return windows[:, :-1], windows[:, 1:]

    return Task(
        draw,
        {"valid": _windows(valid, length), "test": _windows(held_out, length)},
        lambda targets: targets != IGNORED,
        lambda loss, accuracy: {
            "bits_per_byte": loss / math.log(2),
            "perplexity_per_byte": math.exp(loss),
            "accuracy": accuracy,
        },
        "bits_per_byte",
        text_baselines(known, held_out),
        _sha256(whole, held_out),
    )


def _bytes(path: Path) -> Tensor:
    """The paragraphs of a file as bytes (n,) of int64, a line each."""
    return torch.frombuffer(
        bytearray("\n".join(read_texts(path)).encode()), dtype=torch.uint8
    ).long()


def _windows(data: Tensor, length: int, rows: int = 64) -> list[Batch]:
    """Batches (rows, length) of inputs and targets; the end of the text is padded."""
    short = -(len(data) - 1) % length
    inputs = torch.cat([data[:-1], data.new_zeros(short)]).view(-1, length)
    targets = torch.cat([data[1:], data.new_full((short,), IGNORED)]).view(-1, length)
    return list(zip(inputs.split(rows), targets.split(rows), strict=True))


def text_baselines(train: Tensor, test: Tensor) -> dict[str, float]:
    """Bits per byte of gzip on the test text, and of byte counts of the training text.

    Counts are smoothed by one for each byte; the bigram falls back to the unigram (Jelinek and
    Mercer 1980, with the weight of Witten and Bell 1991).
    """
    counts = Counter(train.tolist())
    pairs = Counter(zip(train[:-1].tolist(), train[1:].tolist(), strict=True))
    followers = Counter(first for first, _ in pairs)

    def unigram(byte: int) -> float:
        return (counts[byte] + 1) / (len(train) + BYTES)

    def bigram(first: int, byte: int) -> float:
        kinds, seen = followers[first], counts[first]
        return (
            (pairs[first, byte] + kinds * unigram(byte)) / (seen + kinds) if seen else unigram(byte)
        )

    following = list(zip(test[:-1].tolist(), test[1:].tolist(), strict=True))
    return {
        "gzip -9": 8 * len(gzip.compress(bytes(test.tolist()), 9)) / len(test),
        "unigram": -sum(math.log2(unigram(b)) for _, b in following) / len(following),
        "bigram": -sum(math.log2(bigram(a, b)) for a, b in following) / len(following),
    }


# --- memory ---------------------------------------------------------------------------------


def copying(T: int) -> Task:
    """Say ten symbols again after T steps; the accuracy is that of the ten symbols."""
    return _drawn(
        lambda rows, generator: tasks.copying(T, rows, generator),
        lambda targets: targets != tasks.BLANK,
        "loss",
        {"without memory": tasks.copying_memoryless_loss(T)},
    )


def recall(T: int) -> Task:
    """Which value followed this key? It is asked at the last step, as the value's token."""

    def draw(rows: int, generator: torch.Generator) -> Batch:
        inputs, values = tasks.associative_recall(T, rows, generator)
        targets = torch.full_like(inputs, IGNORED)
        targets[:, -1] = values + T // 2 + 1
        return inputs, targets

    return _drawn(
        draw,
        lambda targets: targets != IGNORED,
        "accuracy",
        {"guessing": 1 / tasks.VALUES, "commonest value told": commonest_value_accuracy(T)},
    )


def commonest_value_accuracy(T: int, sequences: int = 20_000) -> float:
    """Accuracy, over drawn sequences, of answering the value told most often, whatever the key."""
    generator = torch.Generator().manual_seed(seed_of("commonest value"))
    inputs, _ = tasks.associative_recall(T, sequences, generator)
    told = F.one_hot(inputs[:, 1:T:2] - T // 2 - 1, tasks.VALUES).sum(1)  # (sequences, values)
    return told.amax(1).sum().item() / (sequences * (T // 2))


def _drawn(
    draw: Callable[[int, torch.Generator], Batch],
    asked: Callable[[Tensor], Tensor],
    headline: str,
    baselines: dict[str, float],
) -> Task:
    """A task whose sequences are drawn without end; those held out have seeds of their own."""
    batches, rows = HELD_OUT
    splits = {}
    for split in ("valid", "test"):
        generator = torch.Generator().manual_seed(seed_of(split))
        splits[split] = [draw(rows, generator) for _ in range(batches)]
    tested = [tensor for batch in splits["test"] for tensor in batch]
    return Task(
        draw,
        splits,
        asked,
        lambda loss, accuracy: {"loss": loss, "accuracy": accuracy},
        headline,
        baselines,
        _sha256(*tested),
    )


def seed_of(*purpose: str | int) -> int:
    """A seed of its own for each purpose.

    Torch's generator on CPU takes the low 32 bits of a seed and drops the others, so that seeds
    made by shifting would meet: they are hashed.
    """
    digest = hashlib.sha256(repr(purpose).encode()).digest()
    return int.from_bytes(digest[:4], "little")


def _sha256(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


TASKS: dict[str, Callable[..., Task]] = {"text": text, "copying": copying, "recall": recall}
