"""Synthetic tasks that ask for long memory (Dangovski et al. 2019, arXiv 1710.09537)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["associative_recall", "copying", "copying_memoryless_loss"]

SYMBOLS, LENGTH, BLANK, MARKER = 8, 10, 0, 9  # copying: 10 symbols from 1..8
VALUES = 10  # associative recall: classes of the answer


def copying(T: int, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Copying memory: say 10 symbols again after T steps.

    Inputs are 10 symbols from {1..8}, T − 1 blanks (0), the marker 9, 10 blanks; targets are
    T + 10 blanks, then the symbols. The loss is the cross-entropy over all steps.

    Args:
        T: steps between the last symbol and the first of its copy; at least 1.
        batch: B, number of sequences.
        generator: where the symbols are drawn from.

    Returns:
        Inputs and targets, each (B, T + 20), of ten classes.

    Raises:
        ValueError: T is below 1.
    """
    if T < 1:
        raise ValueError(f"copying needs T of at least 1, not {T}")
    symbols = _draw(1, SYMBOLS + 1, (batch, LENGTH), generator)
    inputs = symbols.new_full((batch, T + 2 * LENGTH), BLANK)
    targets = inputs.clone()
    inputs[:, :LENGTH] = symbols
    inputs[:, LENGTH + T - 1] = MARKER
    targets[:, -LENGTH:] = symbols
    return inputs, targets


def copying_memoryless_loss(T: int) -> float:
    """The loss in nats of guessing the copied symbols: 10 ln 8 / (T + 20)."""
    return LENGTH * math.log(SYMBOLS) / (T + 2 * LENGTH)


def associative_recall(T: int, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Associative recall: which value followed this key?

    Inputs are T/2 pairs of key and value, then two zeros, then the key asked for. Each of the T/2
    keys comes once, in random order; its value is one of 10. Of the T/2 + 11 tokens 0 is the zero,
    1..T/2 are the keys, the last ten the values.

    Args:
        T: length of the pairs; even, at least 2.
        batch: B, number of sequences.
        generator: where everything is drawn from.

    Returns:
        Inputs (B, T + 3), and targets (B,): the value's class, 0..9.

    Raises:
        ValueError: T is odd or below 2.
    """
    if T < 2 or T % 2:
        raise ValueError(f"associative recall needs an even T of at least 2, not {T}")
    pairs = T // 2
    order = torch.rand(batch, pairs, generator=generator, device=generator.device)
    keys = order.argsort(1) + 1
    values = _draw(0, VALUES, (batch, pairs), generator)
    asked = _draw(0, pairs, (batch, 1), generator)
    told = torch.stack([keys, values + pairs + 1], 2).flatten(1)
    inputs = torch.cat([told, told.new_zeros(batch, 2), keys.gather(1, asked)], 1)
    return inputs, values.gather(1, asked)[:, 0]


def _draw(low: int, high: int, size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Whole numbers from low to high - 1, where the generator lives."""
    return torch.randint(low, high, size, generator=generator, device=generator.device)
