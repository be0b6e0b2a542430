"""Decoding: step by step says what the whole says at once, padded or not; greedy and beams."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxpress import zoo
from fxpress.testing import assert_equivalent
from fxpress.zoo import bergamot, g2p, tokenization
from fxpress.zoo.decoding import beam_search, greedy

# Model, the sizes of a small one, and how a row of its source ends and is padded.
MODELS: dict[str, tuple[dict[str, Any], int, int]] = {
    "transformer-seq2seq": (
        {"vocabulary": 30, "width": 16, "heads": 2, "inner": 24},
        tokenization.END,
        tokenization.PAD,
    ),
    "lstm-seq2seq": (
        {"vocabulary": 30, "width": 16, "layers": 2},
        tokenization.END,
        tokenization.PAD,
    ),
    "bergamot-en-pt": (
        {"vocabulary": 30, "width": 16, "heads": 2, "inner": 24},
        bergamot.END,
        bergamot.END,
    ),
    "g2p": ({"width": 16}, g2p.LETTERS.index("</s>"), g2p.PAD),
}
LENGTHS = (9, 4, 1)  # of sources, their ends left out


@pytest.fixture(params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(name: str) -> Any:
    """A model whose weights are large enough to say different things for different sources."""
    made = zoo.create_model(name, **MODELS[name][0])
    for p in made.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=0.5)
    return made


def sources(name: str, lengths: tuple[int, ...] = LENGTHS) -> Tensor:
    _, end, pad = MODELS[name]
    rows = [[*torch.randint(3, 29, (n,)).tolist(), end] for n in lengths]
    return tokenization.pad(rows, pad)


def targets(model: Any, rows: int = len(LENGTHS), length: int = 7) -> Tensor:
    ids = torch.randint(4, 30, (rows, length))
    ids[:, 0] = model.start
    return ids


class StepByStep(nn.Module):
    """The logits of a target read a token at a time."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        state, said = self.model.encode(source), []
        for t in range(target.shape[1]):
            logits, state = self.model.step(target[:, t], state)
            said.append(logits)
        return torch.stack(said, 1)


def test_steps_say_what_the_whole_says_at_once(model: Any, name: str) -> None:
    assert_equivalent(StepByStep(model), model, (sources(name), targets(model)))


def test_padding_changes_nothing(model: Any, name: str) -> None:
    source, target = sources(name), targets(model)

    def alone(source: Tensor, target: Tensor) -> Tensor:
        rows = [source[i : i + 1, : n + 1] for i, n in enumerate(LENGTHS)]
        return torch.cat([model(x, target[i : i + 1]) for i, x in enumerate(rows)])

    assert_equivalent(alone, model, (source, target))
    wider = torch.nn.functional.pad(source, (0, 3), value=MODELS[name][2])
    assert_equivalent(lambda _, t: model(wider, t), model, (source, target))


class Beginning(nn.Module):
    """The logits of the first five tokens."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        logits: Tensor = self.model(source, target)[:, :5]
        return logits


def test_the_source_is_read_and_the_future_is_not(model: Any, name: str) -> None:
    source, target = sources(name), targets(model)
    beginning, other = Beginning(model), target.clone()
    other[:, 5:] = 3
    assert_equivalent(lambda s, _: beginning(s, other), beginning, (source, target))
    assert (model(source, other)[:, 5:] != model(source, target)[:, 5:]).any()
    changed = source.clone()
    changed[:, 0] = (source[:, 0] - 3 + 1) % 26 + 3
    assert (model(changed, target) != model(source, target)).flatten(1).any(1).all()


def greedy_at_once(model: Any, source: Tensor, limit: int) -> Tensor:
    """Greedy decoding that reads all of the target again for each token."""
    said = torch.full((len(source), 1), model.start)
    done = torch.zeros(len(source), dtype=torch.bool)
    while said.shape[1] <= limit and not done.all():
        token = model(source, said)[:, -1].argmax(-1).masked_fill(done, model.end)
        done |= token == model.end
        said = torch.cat([said, token[:, None]], 1)
    return said[:, 1:]


@torch.no_grad()
def test_greedy_tokens_are_those_found_at_once(model: Any, name: str) -> None:
    source = sources(name, (8, 5, 3, 2, 6, 1))
    found = greedy(model, source, 12)
    assert len({tuple(row) for row in found.tolist()}) > 1
    assert torch.equal(found, greedy_at_once(model, source, 12))
    assert torch.equal(found, beam_search(model, source, 12, width=1))


class Chain(nn.Module):
    """Tokens by a table of probabilities of what follows what, whatever the source."""

    start, end = 0, 1

    def __init__(self, table: list[list[float]]) -> None:
        super().__init__()
        self.table = torch.tensor(table).log()

    def encode(self, source: Tensor) -> tuple[Tensor, ...]:
        return (source,)

    def step(self, tokens: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        return self.table[tokens], state


# From the start: 2 is likelier than 3, but what follows 2 is uncertain.
CHAIN = Chain(
    [
        [0.0, 0.0, 0.6, 0.4],
        [0.0, 1.0, 0.0, 0.0],
        [0.0, 0.4, 0.3, 0.3],
        [0.0, 0.9, 0.05, 0.05],
    ]
)


def test_a_beam_finds_what_greedy_misses() -> None:
    source = torch.zeros(2, 1, dtype=torch.long)
    assert greedy(CHAIN, source, 5).tolist() == [[2, 1]] * 2
    assert beam_search(CHAIN, source, 5, width=3).tolist()[0][:2] == [3, 1]


def test_beams_end_at_the_limit_and_no_later() -> None:
    endless = Chain([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    source = torch.zeros(1, 1, dtype=torch.long)
    assert greedy(endless, source, 4).tolist() == [[2] * 4]
    assert beam_search(endless, source, 4, width=2).tolist() == [[2] * 4]


def test_length_weighs_as_far_as_it_is_asked_to() -> None:
    # One token of .5, or three of .7 each (.343 in all).
    table = [[0.0, 0.5, 0.5, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0, 0.0]]
    table += [[0.0, 0.0, 0.0, 0.0, 1.0], [0.0, 0.8, 0.2, 0.0, 0.0]]
    source = torch.zeros(1, 1, dtype=torch.long)
    short = beam_search(Chain(table), source, 6, width=4, alpha=0.0)
    long = beam_search(Chain(table), source, 6, width=4, alpha=1.0)
    assert short[0, 0] == 1
    assert long[0].tolist()[:4] == [2, 3, 4, 1]


def test_rows_are_decoded_as_they_are_alone(model: Any, name: str) -> None:
    source = sources(name)
    together = beam_search(model, source, 6, width=3)
    for i, n in enumerate(LENGTHS):
        alone = beam_search(model, source[i : i + 1, : n + 1], 6, width=3)
        assert torch.equal(together[i, : alone.shape[1]], alone[0])


class Chosen(nn.Module):
    """Some rows of what a step says."""

    def __init__(self, model: Any, rows: Tensor) -> None:
        super().__init__()
        self.model, self.rows = model, rows

    def forward(self, tokens: Tensor, *state: Tensor) -> Tensor:
        logits: Tensor = self.model.step(tokens, state)[0][self.rows]
        return logits


def test_rows_of_a_state_can_be_kept_and_moved(model: Any, name: str) -> None:
    source, rows = sources(name), torch.tensor([2, 0])
    state = model.encode(source)
    tokens = torch.full((len(source),), model.start)
    _, after = model.step(tokens, state)
    assert all(len(x) == len(source) for x in (*state, *after))

    def moved(tokens: Tensor, *state: Tensor) -> Tensor:
        logits: Tensor = model.step(tokens[rows], tuple(x[rows] for x in state))[0]
        return logits

    assert_equivalent(moved, Chosen(model, rows), (torch.tensor([4, 5, 6]), *after))
