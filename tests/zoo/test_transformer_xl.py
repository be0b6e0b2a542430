"""Transformer-XL: relative attention against a loop, segments against the whole, what is found."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fxpress
from fxpress.testing import BITWISE, assert_equivalent
from fxpress.zoo.transformer_xl import RelativeAttention, Segment, TransformerXL, relative_shift

HEADS, WIDTH, MEMORY = 2, 8, 5


def small(memory: int = MEMORY) -> TransformerXL:
    """Weights and biases large enough for each to matter."""
    model = TransformerXL(20, WIDTH, layers=3, heads=HEADS, memory=memory).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" not in name:
                p.normal_(0, 0.4)
    return model


def ids(length: int) -> Tensor:
    return torch.randint(20, (2, length))


def by_loop(attention: RelativeAttention, context: Tensor, n: int) -> Tensor:
    """The formula of the paper, a query, a key and a distance at a time."""
    d = WIDTH // HEADS
    batch, keys, _ = context.shape
    rows = []
    for i in range(keys - n, keys):
        heads = []
        for h in range(HEADS):
            part = slice(h * d, (h + 1) * d)
            q = context[:, i] @ attention.q.weight[part].T
            scores, values = [], []
            for j in range(max(0, i - attention.memory), i + 1):
                k = context[:, j] @ attention.k.weight[part].T
                r = attention.r.weight[part] @ sinusoid(i - j).to(context)
                score = ((q + attention.u[h]) * k).sum(-1) + (q + attention.w[h]) @ r
                scores.append(score / math.sqrt(d))
                values.append(context[:, j] @ attention.v.weight[part].T)
            weights = torch.stack(scores).softmax(0)
            heads.append((weights[..., None] * torch.stack(values)).sum(0))
        rows.append(torch.cat(heads, -1))
    assert len(rows) == n
    out: Tensor = attention.out(torch.stack(rows, 1).view(batch, n, WIDTH))
    return out


def sinusoid(t: int) -> Tensor:
    angles = [t / 10_000 ** (c / (WIDTH // 2)) for c in range(WIDTH // 2)]
    return torch.tensor([*map(math.sin, angles), *map(math.cos, angles)], dtype=torch.float64)


def loose(attention: RelativeAttention) -> RelativeAttention:
    with torch.no_grad():
        for p in attention.parameters():
            p.normal_()
    return attention


@pytest.mark.parametrize(("n", "keys"), [(4, 4), (4, 9), (1, 6), (9, 9)])
def test_relative_attention_is_the_formula(n: int, keys: int) -> None:
    attention = loose(RelativeAttention(WIDTH, HEADS, MEMORY))

    class Loop(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = attention

        def forward(self, context: Tensor) -> Tensor:
            return by_loop(self.attention, context, n)

    context = torch.randn(2, keys, WIDTH)
    assert_equivalent(lambda x: attention(x, n), Loop(), (context,))


def test_gradients_are_those_of_the_formula() -> None:
    attention = loose(RelativeAttention(WIDTH, HEADS, MEMORY))

    def gradients(of: Callable[..., Tensor]) -> Callable[[Tensor], list[Tensor]]:
        def run(context: Tensor) -> list[Tensor]:
            module = copy.deepcopy(attention).to(context.dtype)
            context = context.clone().requires_grad_()
            with torch.enable_grad():
                loss = (of(module, context, 4).sin()).sum()
            return list(torch.autograd.grad(loss, [context, *module.parameters()]))

        return run

    context = torch.randn(2, 9, WIDTH)
    assert_equivalent(gradients(RelativeAttention.forward), gradients(by_loop), (context,))


def test_the_shift_puts_distances_under_keys() -> None:
    n, keys = 3, 5
    distances = torch.arange(keys).flip(0).expand(1, n, keys)
    (shifted,) = relative_shift(distances)
    for i in range(n):
        for j in range(keys - n + i + 1):
            assert shifted[i, j] == keys - n + i - j


@pytest.mark.parametrize("cuts", [(4, 4, 4, 4), (1, 9, 6), (7, 9), (16,)])
def test_segments_with_memory_are_one_pass(cuts: tuple[int, ...]) -> None:
    model = small()

    def pieces(x: Tensor) -> Tensor:
        memory, said = None, []
        for piece in x.split(cuts, 1):
            logits, memory = model.advance(piece, memory)
            said.append(logits)
        return torch.cat(said, 1)

    assert_equivalent(pieces, model, (ids(16),))


def test_three_layers_see_three_memories_back() -> None:
    model = small(memory=2)
    other = (x := ids(12)).clone()
    other[:, 3] = (x[:, 3] + 1) % 20
    changed = (model(x) != model(other)).any(-1).any(0)
    assert changed.tolist() == [3 <= t <= 3 + 3 * 2 for t in range(12)]


def test_what_was_earlier_fills_the_memory_and_gets_no_gradient() -> None:
    model = small()
    x, earlier = ids(4), ids(9)
    _, memory = model.advance(earlier)
    assert [tuple(m.shape) for m in memory] == [(2, MEMORY, WIDTH)] * 3
    assert_equivalent(lambda x, _: model.advance(x, memory)[0], model, (x, earlier))
    assert not torch.equal(model(x, earlier), model(x))
    seen: list[Tensor] = []
    hook = model.tokens.register_forward_hook(lambda _, __, out: seen.append(out))
    model(x, earlier).sum().backward()
    hook.remove()
    assert [out.requires_grad for out in seen] == [False, True]
    assert all(p.grad is not None for p in model.parameters())


def test_no_position_sees_the_future() -> None:
    model = small()
    other = (x := ids(9)).clone()
    other[:, 6:] = (x[:, 6:] + 1) % 20
    assert_equivalent(
        lambda x: model(x)[:, :6], lambda _: model(other)[:, :6], (x,), exactness=BITWISE
    )


def test_its_attention_is_recognised() -> None:
    model = small()
    found = fxpress.explain(model, (ids(8), ids(8))).attention
    # Of what was earlier the last layer is only remembered.
    assert [site.recognised for site in found] == [True] * 5
    _, memory = model.advance(ids(8))
    found = fxpress.explain(Segment(model), (ids(8), memory)).attention
    assert [(site.kind, site.recognised) for site in found] == [("cross", True)] * 3


def test_a_segment_is_optimized_with_its_memory() -> None:
    model = small()
    calls = [(ids(8), model.advance(ids(8))[1]) for _ in range(3)]
    config = {"prune-attention": {"pruned": 0.5, "granularity": "element"}}
    o = fxpress.optimize(Segment(model), calls, judge="off", config=config)
    assert len(o.passes["prune-attention"].masks) == 3
    exact = fxpress.optimize(Segment(model), calls, max_divergence=0.0)
    assert_equivalent(exact, Segment(model), calls[0])


def test_refuses_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="width 10 is odd, or no multiple of 4 heads"):
        TransformerXL(width=10, heads=4)
