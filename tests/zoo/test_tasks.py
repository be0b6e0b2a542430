"""The memory tasks against restatements that read one sequence at a time."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from fxpress.zoo import tasks

BATCHES, SEEDS = st.integers(1, 9), st.integers(0, 2**31)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(st.integers(1, 60), BATCHES, SEEDS)
def test_copying(T: int, batch: int, seed: int) -> None:
    inputs, targets = tasks.copying(T, batch, seeded(seed))
    assert inputs.shape == targets.shape == (batch, T + 20)
    for row, target in zip(inputs.tolist(), targets.tolist(), strict=True):
        symbols = row[:10]
        assert set(symbols) <= set(range(1, 9))
        assert row == symbols + [0] * (T - 1) + [9] + [0] * 10
        assert target == [0] * (T + 10) + symbols


def test_copying_loss_without_memory() -> None:
    """Certain of the blanks, guessing the symbols; the two figures are METHODS'."""
    T = 200
    _, targets = tasks.copying(T, 4, seeded(0))
    guess = torch.full((4, T + 20, 10), -torch.inf)
    guess[:, : T + 10, 0] = 0.0
    guess[:, T + 10 :, 1:9] = math.log(1 / 8)
    loss = F.cross_entropy(guess.flatten(0, 1), targets.flatten()).item()
    assert round(loss, 4) == round(tasks.copying_memoryless_loss(T), 4) == 0.0945
    assert round(tasks.copying_memoryless_loss(500), 4) == 0.0400


@given(st.integers(1, 30).map(lambda n: 2 * n), BATCHES, SEEDS)
def test_associative_recall(T: int, batch: int, seed: int) -> None:
    inputs, targets = tasks.associative_recall(T, batch, seeded(seed))
    assert inputs.shape == (batch, T + 3)
    assert targets.shape == (batch,)
    keys, first_value = set(range(1, T // 2 + 1)), T // 2 + 1
    for row, target in zip(inputs.tolist(), targets.tolist(), strict=True):
        told = dict(zip(row[:T:2], row[1:T:2], strict=True))
        assert told.keys() == keys
        assert set(told.values()) <= set(range(first_value, first_value + 10))
        assert row[T : T + 2] == [0, 0]
        assert told[row[-1]] - first_value == target
        assert max(row) < T // 2 + 11


@pytest.mark.parametrize("task", [tasks.copying, tasks.associative_recall])
def test_the_generator_decides(task: object) -> None:
    assert callable(task)
    first, again, other = task(20, 8, seeded(1)), task(20, 8, seeded(1)), task(20, 8, seeded(2))
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[0], other[0])


def test_every_symbol_key_and_class_comes_up() -> None:
    inputs, _ = tasks.copying(5, 200, seeded(0))
    assert set(inputs[:, :10].flatten().tolist()) == set(range(1, 9))
    inputs, targets = tasks.associative_recall(10, 400, seeded(0))
    assert set(targets.tolist()) == set(range(10))
    assert set(inputs[:, 0].tolist()) == set(inputs[:, -1].tolist()) == set(range(1, 6))


def test_refusals() -> None:
    with pytest.raises(ValueError, match="T of at least 1"):
        tasks.copying(0, 2, seeded(0))
    for T in (0, 7):
        with pytest.raises(ValueError, match="even T"):
            tasks.associative_recall(T, 2, seeded(0))
