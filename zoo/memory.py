"""The objectives of the memory tasks (Dangovski et al. 2019): copying, associative recall."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fxpress.zoo import tasks
from fxpress.zoo.objectives import IGNORED, Batch, Task, objective, seed_of, sha256_of

__all__ = ["commonest_value_accuracy", "copying", "recall"]

HELD_OUT = 4, 256  # batches of a drawn split, sequences of each


@objective("copying")
def copying(T: int) -> Task:
    """Say ten symbols again after T steps; the accuracy is that of the ten symbols."""

    def draw(rows: int, generator: torch.Generator) -> Batch:
        inputs, targets = tasks.copying(T, rows, generator)
        return (inputs,), targets

    return _drawn(
        draw,
        lambda targets: targets != tasks.BLANK,
        "loss",
        {"without memory": tasks.copying_memoryless_loss(T)},
    )


@objective("recall")
def recall(T: int) -> Task:
    """Which value followed this key? It is asked at the last step, as the value's token."""

    def draw(rows: int, generator: torch.Generator) -> Batch:
        inputs, values = tasks.associative_recall(T, rows, generator)
        targets = torch.full_like(inputs, IGNORED)
        targets[:, -1] = values + T // 2 + 1
        return (inputs,), targets

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
    tested = [tensor for inputs, targets in splits["test"] for tensor in (*inputs, targets)]
    return Task(
        draw,
        splits,
        asked,
        lambda loss, accuracy: {"loss": loss, "accuracy": accuracy},
        headline,
        baselines,
        sha256_of(*tested),
    )
