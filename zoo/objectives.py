"""What a recipe trains for: how batches are drawn, what is held out, and how a model is scored.

Every task has the same form: a model takes the inputs of a batch and gives logits (B, ..., V), and
the loss is their cross-entropy to targets (B, ...), where `IGNORED` marks what is not asked.

A module of this package offers an objective by decorating the function that builds its task:

    @objective("text", reads_data=True)
    def text(train: str, test: str, length: int, data: Path | None = None) -> Task: ...

It is found as models are: by looking through the modules that lie beside this one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxpress.zoo.recipe import Recipe, RecipeError
from fxpress.zoo.registry import offered

__all__ = [
    "IGNORED",
    "Batch",
    "Objective",
    "Task",
    "objective",
    "objective_of",
    "seed_of",
    "sha256_of",
    "task_of",
]

IGNORED = -100  # torch's own mark for targets that do not count

Batch = tuple[tuple[Tensor, ...], Tensor]  # what the model takes, by position; targets
Calibration = Callable[[Mapping[str, Any], Path | None, int], list[Any]]


@dataclass(frozen=True)
class Task:
    """A task with its data.

    Attributes:
        draw: a batch to train on: so many rows, from a generator.
        splits: the batches of "valid", which choose the best weights, and of "test".
        asked: of the shape of the targets: which of them an accuracy is taken over.
        metrics: what to report, from the mean loss in nats and the accuracy.
        headline: the metric to show where there is room for one.
        baselines: the headline metric of what a model is to be compared with.
        sha256: of the data.
        decoded: further metrics of the test data, of what a model says when it is let to.
        beside: texts to write beside the weights, by file name.
    """

    draw: Callable[[int, torch.Generator], Batch]
    splits: dict[str, list[Batch]]
    asked: Callable[[Tensor], Tensor]
    metrics: Callable[[float, float], dict[str, float]]
    headline: str
    baselines: dict[str, float]
    sha256: str
    decoded: Callable[[nn.Module], dict[str, float]] = lambda _model: {}
    beside: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Objective:
    """What a recipe can name as its task.

    Attributes:
        name: what the recipe says.
        build: makes the task from the recipe's `data`, by keyword.
        reads_data: whether `build` also takes `data`, a user's folder.
        calibration: turns a user's file, or a sample that comes with the zoo, into at most so many
            batches, given the recipe's `data`; None: batches are drawn as in training.
    """

    name: str
    build: Callable[..., Task]
    reads_data: bool
    calibration: Calibration | None


def objective(
    name: str, *, reads_data: bool = False, calibration: Calibration | None = None
) -> Callable[[Callable[..., Task]], Objective]:
    """Offer the decorated function under `name`."""
    return lambda build: Objective(name, build, reads_data, calibration)


@cache
def objectives() -> dict[str, Objective]:
    """Every objective by name, in alphabetic order; imports the modules of the zoo."""
    return {o.name: o for o in sorted(offered(Objective), key=lambda o: o.name)}


def objective_of(recipe: Recipe) -> Objective:
    """What a recipe trains for.

    Raises:
        RecipeError: there is no such objective.
    """
    if recipe.task not in objectives():
        names = ", ".join(objectives())
        raise RecipeError(f"{recipe.name}: task is {recipe.task!r}: give one of {names}")
    return objectives()[recipe.task]


def task_of(recipe: Recipe, data: Path | None = None) -> Task:
    """The task of a recipe.

    Args:
        recipe: whose task.
        data: a folder with the files of the splits, in place of the recipe's own data.

    Raises:
        RecipeError: the task is unknown, takes no data, or not such settings.
        CalibrationError: the data cannot be read, or is too short.
    """
    found = objective_of(recipe)
    if data is not None and not found.reads_data:
        raise RecipeError(f"{recipe.name} draws its sequences: it takes no data")
    given = {} if data is None else {"data": data}
    try:
        return found.build(**recipe.data, **given)
    except TypeError as error:
        raise RecipeError(f"{recipe.name}: data is {recipe.data}: {error}") from error


def call_of(batch: Batch) -> Any:
    """The inputs of a batch as calibration data: a tensor, or a tuple of several."""
    inputs, _ = batch
    return inputs[0] if len(inputs) == 1 else inputs


def seed_of(*purpose: str | int) -> int:
    """A seed of its own for each purpose.

    Torch's generator on CPU takes the low 32 bits of a seed and drops the others, so that seeds
    made by shifting would meet: they are hashed.
    """
    digest = hashlib.sha256(repr(purpose).encode()).digest()
    return int.from_bytes(digest[:4], "little")


def sha256_of(*tensors: Tensor) -> str:
    """The hash of data, in order."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
