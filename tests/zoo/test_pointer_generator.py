"""The pointer-generator: a distribution, formulas by a loop, steps against the whole, padding."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fxpress
from fxpress.testing import assert_equivalent
from fxpress.zoo.decoding import beam_search, greedy
from fxpress.zoo.pointer_generator import PointerGenerator
from fxpress.zoo.tokenization import END, PAD, START

LAYERS = [("lstm", "lstm"), ("rum", "rum"), ("lstm", "rum"), ("rum", "lstm")]
VOCABULARY, WIDTH = 30, 8


def small(encoder: str = "lstm", decoder: str = "lstm") -> PointerGenerator:
    model = PointerGenerator(VOCABULARY, WIDTH, encoder, decoder).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not name.startswith(("encoder", "decoder", "embedding")):
                p.normal_(0, 0.5)
    return model


def texts() -> Tensor:
    """Two sources, one shorter."""
    source = torch.randint(END + 1, VOCABULARY, (2, 9))
    source[0, -1] = END
    source[1, 5:] = torch.tensor([END, PAD, PAD, PAD])
    return source


def target(length: int = 6) -> Tensor:
    ids = torch.randint(END + 1, VOCABULARY, (2, length))
    ids[:, 0] = START
    return ids


class Loop(nn.Module):
    """The formulas of the paper, a row, a step and a source position at a time."""

    def __init__(self, model: PointerGenerator) -> None:
        super().__init__()
        self.model = model

    def forward(self, source: Tensor, ids: Tensor) -> Tensor:
        m = self.model
        _, states, _, *parts = m.encode(source)
        x = m.embedding(ids) * WIDTH**0.5
        y, _ = m.decoder(x, tuple(part.transpose(0, 1) for part in parts))
        rows = [
            torch.stack(
                [self.mixed(source[b], states[b], y[b, t], x[b, t]) for t in range(len(y[b]))]
            )
            for b in range(len(source))
        ]
        return torch.stack(rows).log()

    def mixed(self, source: Tensor, states: Tensor, s: Tensor, x: Tensor) -> Tensor:
        m, n = self.model, int((source != PAD).sum())
        energies = [
            m.energy.weight[0] @ torch.tanh(m.key.weight @ h + m.key.bias + m.query.weight @ s)
            for h in states[:n]
        ]
        a = torch.stack(energies).softmax(0)
        c = sum((a[i] * states[i] for i in range(n)), torch.zeros_like(s))
        p = torch.sigmoid(m.says.weight[0] @ torch.cat([c, s, x]) + m.says.bias)
        found = m.combine.weight @ torch.cat([c, s]) + m.combine.bias
        mixed = list((p * (m.embedding.weight @ found + m.output_bias).softmax(0)).unbind())
        for i in range(n):
            mixed[int(source[i])] = mixed[int(source[i])] + (1 - p[0]) * a[i]
        return torch.stack(mixed)


@pytest.mark.parametrize(("encoder", "decoder"), LAYERS)
def test_it_is_the_formula(encoder: str, decoder: str) -> None:
    model = small(encoder, decoder)
    assert_equivalent(model, Loop(model), (texts(), target()))


def test_gradients_are_those_of_the_formula() -> None:
    model, source, ids = small(), texts(), target()

    def gradients(
        made: Callable[[PointerGenerator], nn.Module],
    ) -> Callable[[Tensor], list[Tensor]]:
        def run(scale: Tensor) -> list[Tensor]:
            mine = copy.deepcopy(model).to(scale.dtype)
            with torch.enable_grad():
                loss = (made(mine)(source, ids) * scale).sum()
            return list(torch.autograd.grad(loss, list(mine.parameters())))

        return run

    scale = torch.randn(2, 6, VOCABULARY)
    assert_equivalent(gradients(lambda m: m), gradients(Loop), (scale,))


def test_probabilities_sum_to_one() -> None:
    model, source, ids = small(), texts(), target()
    ones = torch.ones(2, 6)
    assert_equivalent(lambda _: model(source, ids).exp().sum(-1), lambda x: x, (ones,))


@pytest.mark.parametrize(("encoder", "decoder"), LAYERS)
def test_steps_say_what_the_whole_says(encoder: str, decoder: str) -> None:
    model = small(encoder, decoder)

    def steps(source: Tensor, ids: Tensor) -> Tensor:
        state, said = model.encode(source), []
        for tokens in ids.unbind(1):
            log, state = model.step(tokens, state)
            said.append(log)
        return torch.stack(said, 1)

    assert_equivalent(steps, model, (texts(), target()))


@pytest.mark.parametrize("layer", ["lstm", "rum"])
def test_padding_changes_nothing(layer: str) -> None:
    model, source, ids = small(layer, layer), texts(), target()

    def padded(source: Tensor, ids: Tensor) -> Tensor:
        said: Tensor = model(torch.cat([source, torch.full_like(source, PAD)], 1), ids)
        return said

    assert_equivalent(padded, model, (source[1:, :6], ids[1:]))


def test_what_is_copied_is_in_the_source() -> None:
    model = small()
    with torch.no_grad():
        model.says.weight.zero_()
        model.says.bias.fill_(-40.0)  # nothing is said, all is copied
    source = texts()
    for search in (greedy, beam_search):
        said = search(model, source, 12)
        for row, ids in zip(source, said, strict=True):
            assert set(ids.tolist()) <= set(row.tolist()) | {END}


def test_greedy_is_the_likeliest_of_each_step() -> None:
    model, source = small(), texts()
    said = greedy(model, source, 8)
    read = torch.cat([torch.full_like(said[:, :1], START), said[:, :-1]], 1)
    likeliest = model(source, read).argmax(-1)
    for row, wanted in zip(said.tolist(), likeliest.tolist(), strict=True):
        n = row.index(END) + 1 if END in row else len(row)
        assert row[:n] == wanted[:n]


@pytest.mark.parametrize(("encoder", "decoder"), LAYERS)
def test_it_is_captured_and_optimized(encoder: str, decoder: str) -> None:
    model = small(encoder, decoder)
    calls = [(texts(), target()) for _ in range(3)]
    o = fxpress.optimize(model, calls, max_divergence=0.0, config={"factor-vvma": False})
    assert_equivalent(o, model, calls[0])
    (site,) = fxpress.explain(model, calls[0]).attention
    assert not site.recognised
    assert "product" in str(site.reason)


def test_refuses_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="the layer is 'gru': give one of lstm, rum"):
        PointerGenerator(encoder="gru")
    with pytest.raises(ValueError, match="width 7 is odd"):
        PointerGenerator(width=7)
