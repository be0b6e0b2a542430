"""Sites: stable names, kinds, and masks taken apart; constants that are constants."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxpress.capture import Call, capture, capture_calls
from fxpress.ops.mask_layout import compile_mask
from fxpress.ops.sparse_attention import sparse_attention
from fxpress.passes import all_passes
from fxpress.passes.dataflow import Constants, constant_value, is_noop, mask_factors
from fxpress.passes.fuse_attention import FuseAttention
from fxpress.passes.prune_attention import PruneAttention
from fxpress.passes.sites import AttentionSite, attention_sites, linear_sites
from fxpress.program import Program
from fxpress.rewrite import PassContext
from fxpress.testing import assert_equivalent

aten = torch.ops.aten


class Attention(nn.Module):
    """Self-attention of two heads of four, or attention to a second sequence."""

    def __init__(self, **fixed: Any) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))
        self.fixed = fixed

    def forward(
        self, x: Tensor, memory: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """(B, N, 8) and (B, M, 8) to (B, 2, N, 4)."""
        other = x if memory is None else memory
        flat = (self.q(x), self.k(other), self.v(other))
        q, k, v = (t.view(t.shape[0], t.shape[1], 2, 4).transpose(1, 2) for t in flat)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **self.fixed)


class Masked(nn.Module):
    """Attention under a mask that is computed from the input."""

    def __init__(self, mask: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.attention = Attention()
        self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, 8) to (B, 2, N, 4)."""
        return self.attention(x, mask=self.mask(x))  # type: ignore[no-any-return]


class Twice(nn.Module):
    """Self-attention whose sequence is made anew for each projection."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, 8) to (N, 8), of the first row."""
        q, k = self.q(x[0].relu()), self.k(x[0].relu())
        return (q @ k.mT).softmax(-1) @ x[0]  # type: ignore[no-any-return]


X = torch.randn(3, 5, 8)


def only(program: Program) -> AttentionSite:
    (site,) = attention_sites(program)
    return site


def tril(n: int) -> Tensor:
    return torch.ones(n, n, dtype=torch.bool).tril()


def padding(x: Tensor) -> Tensor:
    return (x[:, :, 0] > -9)[:, None, None]


def additive(keep: Tensor) -> Tensor:
    return torch.where(keep, 0.0, -torch.inf)


def test_a_sequence_that_is_computed_twice_is_one() -> None:
    program = capture(Twice().eval(), (X,))
    FuseAttention().run(program, PassContext())
    assert only(program).kind == "self"


# What amounts to causality, and whether something remains beside it.
CAUSAL: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "triangle": (lambda x: tril(x.shape[1]), False),
    "positions": (
        lambda x: torch.arange(x.shape[1])[None] <= torch.arange(x.shape[1])[:, None],
        False,
    ),
    "batched": (lambda x: tril(x.shape[1]).expand(x.shape[0], 1, -1, -1), False),
    "by_input_shape": (lambda x: torch.ones_like(x[0, :, :1] @ x[0, :, :1].T).tril() > 0, False),
    "additive": (lambda x: additive(tril(x.shape[1])), False),
    "low": (lambda x: (~tril(x.shape[1])).float() * -1e9, False),
    "with_padding": (lambda x: tril(x.shape[1]) & padding(x), True),
    "padding_first": (lambda x: torch.logical_and(padding(x), tril(x.shape[1])), True),
    "sum": (lambda x: additive(tril(x.shape[1])) + additive(padding(x)), True),
    "where": (lambda x: additive(tril(x.shape[1]) & padding(x)), True),
    "bias": (lambda x: additive(tril(x.shape[1])) + x[:, None, :, :1], True),
    "bias_inside": (lambda x: torch.where(tril(x.shape[1]), x[:, None, :, :1], -torch.inf), True),
}

# What lies within causality without being all of it: the whole mask remains beside it.
WITHIN: dict[str, Callable[[Tensor], Tensor]] = {
    "band": lambda x: tril(x.shape[1]).triu(-1),
    "band_with_padding": lambda x: tril(x.shape[1]).triu(-1) & padding(x),
    "slope": lambda x: additive(tril(x.shape[1])) - torch.arange(x.shape[1]).flip(0),
    "two_remainders": lambda x: tril(x.shape[1]) & padding(x) & (x[:, None, :, :1] > -9),
}

NOT_CAUSAL: dict[str, Callable[[Tensor], Tensor]] = {
    "one_later": lambda x: torch.ones(x.shape[1], x.shape[1]).tril(1) > 0,
    "padding": padding,
    "causal_in_one_element": lambda x: torch.stack([tril(5), tril(5), tril(5) | True])[:, None],
    "other_values": lambda x: tril(x.shape[1]).float(),
    "or": lambda x: tril(x.shape[1]) | padding(x),
}


@pytest.mark.parametrize("name", CAUSAL)
def test_causality_is_recognized_by_value(name: str) -> None:
    mask, remains = CAUSAL[name]
    site = only(capture(Masked(mask).eval(), (X,)))
    assert site.is_causal
    assert site.kind == "causal"
    assert site.mask is not None
    assert (site.padding is not None) == remains


@pytest.mark.parametrize("name", WITHIN)
def test_what_lies_within_causality_keeps_its_whole_mask(name: str) -> None:
    model = Masked(WITHIN[name]).eval()
    program = capture(model, (X,))
    site = only(program)
    assert site.kind == "causal"
    assert site.is_causal
    assert site.padding is site.mask is site.node.args[3]
    decisions = {site.name: {"mask": tril(X.shape[1]).expand(site.heads, -1, -1)}}
    assert PruneAttention().run(program, PassContext(decisions=decisions)).rewrites
    assert_equivalent(program, model, (X,))


@pytest.mark.parametrize("name", NOT_CAUSAL)
def test_what_is_not_causal_stays(name: str) -> None:
    site = only(capture(Masked(NOT_CAUSAL[name]).eval(), (X,)))
    assert not site.is_causal
    assert site.kind == "self"
    assert site.padding is None
    assert site.mask is site.node.args[3]


@pytest.mark.parametrize("name", ["triangle", "positions", "with_padding", "sum"])
def test_causality_holds_for_dynamic_sizes(name: str) -> None:
    mask, remains = CAUSAL[name]
    calls: list[Call] = [((torch.randn(b, n, 8),), {}) for b, n in ((3, 5), (4, 7))]
    site = only(capture_calls(Masked(mask).eval(), calls))
    assert site.is_causal
    assert (site.padding is not None) == remains


def test_causal_at_one_size_only_is_not_causal() -> None:
    def mask(x: Tensor) -> Tensor:
        rows, columns = torch.arange(x.shape[1])[:, None], torch.arange(x.shape[1])[None]
        return (columns <= rows) | (rows >= 6)

    calls: list[Call] = [((torch.randn(b, n, 8),), {}) for b, n in ((3, 5), (4, 7))]
    site = only(capture_calls(Masked(mask).eval(), calls))
    assert not site.is_causal


def test_factors_beside_causality_are_told_apart() -> None:
    program = capture(Masked(WITHIN["two_remainders"]).eval(), (X,))
    node = next(program.calls(aten.scaled_dot_product_attention.default))
    assert len(mask_factors(program, node.args[3], (5, 5)).rest) == 2  # type: ignore[arg-type]


def test_facts_of_a_call() -> None:
    site = only(capture(Attention(scale=0.25).eval(), (X, torch.randn(3, 6, 8))))
    assert site.kind == "cross"
    assert site.scale == 0.25
    assert site.heads == 2
    assert site.shape == (3, 2, 2, 5, 6, 4, 4)
    assert (site.q, site.k, site.v) == site.node.args[:3]
    assert (site.mask, site.padding, site.is_causal) == (None, None, False)


def test_the_flag_and_the_default_scale() -> None:
    site = only(capture(Attention(is_causal=True).eval(), (X,)))
    assert site.kind == "causal"
    assert site.scale == 0.5


def test_inputs_that_were_not_projected_count_as_sources() -> None:
    class Bare(nn.Module):
        def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
            sdpa = F.scaled_dot_product_attention
            return sdpa(q, k, k), sdpa(q, q.flip(2), q)

    first, second = attention_sites(
        capture(Bare(), (torch.randn(1, 2, 5, 4), torch.randn(1, 2, 6, 4)))
    )
    assert (first.kind, second.kind) == ("cross", "self")


def test_names_are_paths_and_counted() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = Attention()
            self.two = Attention()

        def forward(self, x: Tensor) -> Tensor:
            y = self.one(x) + self.two(x)
            return y + self.one(x * 2)  # type: ignore[no-any-return]

    program = capture(Twice().eval(), (X,))
    assert [s.name for s in attention_sites(program)] == ["one", "two", "one#2"]
    assert [s.name for s in linear_sites(program)][:2] == ["one.q", "one.k"]
    assert [s.name for s in linear_sites(program)][-1] == "one.v#2"
    inside = replace(program, path="encoder")
    assert [s.name for s in attention_sites(inside)] == [
        "encoder.one",
        "encoder.two",
        "encoder.one#2",
    ]
    assert [s.path for s in attention_sites(inside)] == ["one", "two", "one"]
    assert [s.name for s in attention_sites(capture(Attention().eval(), (X,)))] == ["root"]


def test_pruned_attention_counts_for_names() -> None:
    layout = compile_mask(torch.ones(2, 5, 5, dtype=torch.bool).tril(), device="cpu")

    class Mixed(nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(sparse_attention(q, q, q, layout), q, q)

    program = capture(Mixed(), (torch.randn(1, 2, 5, 4),))
    assert [s.name for s in attention_sites(program)] == ["root#2"]


def test_other_ranks_and_dropout_are_no_sites() -> None:
    class Others(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            sdpa, four = F.scaled_dot_product_attention, x[:, None]
            return sdpa(x, x, x), sdpa(four, four, four, dropout_p=0.1)

    assert not attention_sites(capture(Others(), (X,)))


def test_linear_sites() -> None:
    class Maps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(8, 12)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.up(x), x[0, 0].expand(3, -1).new_ones(3, 12))

    (site,) = linear_sites(capture(Maps(), (X,)))
    assert (site.name, site.weight, site.shape, site.tokens) == ("up", "up.weight", (12, 8), 15)


# Constants ---------------------------------------------------------------------------------------


class Values(nn.Module):
    """Some values that depend on the input, and some that do not."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("table", torch.arange(4.0))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """One output for each question."""
        return (
            self.get_buffer("table") * 2,
            torch.arange(3) + 1,
            torch.zeros_like(x).sum(),
            self.weight * 2,
            x + 1,
            torch.rand(3) + 1,
            torch.ones(1 << 27).sum(),
        )


def test_constants() -> None:
    program = capture(Values(), (torch.ones(2),))
    output = next(n for n in program.graph.nodes if n.op == "output")
    table, count, zero, *others = output.args[0]
    assert constant_value(program, table).tolist() == [0, 2, 4, 6]
    assert constant_value(program, count).tolist() == [1, 2, 3]
    assert constant_value(program, zero).item() == 0
    # A parameter trains, an input varies, a random number differs, a large tensor costs too much.
    assert [constant_value(program, node) for node in others] == [None] * 4


def test_scalars() -> None:
    program = capture(Values(), (torch.ones(2),))
    constants = Constants(program)
    assert constants.scalar(3) == 3.0
    assert constants.scalar(None) is None
    output = next(n for n in program.graph.nodes if n.op == "output")
    assert constants.scalar(output.args[0][2]) == 0.0
    assert constants.scalar(output.args[0][1]) is None


def test_noops() -> None:
    class Idle(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = F.dropout(x, 0.5, training=False).expand(3, 5, 8).to(torch.float32)
            return x.to(torch.float64).expand(2, 3, 5, 8)

    nodes = [n for n in capture(Idle(), (X,)).graph.nodes if n.op == "call_function"]
    assert [is_noop(node) for node in nodes] == [True] * 3 + [False] * 2


def test_passes_are_found_by_being_there() -> None:
    found = all_passes()
    assert {"fuse-attention", "prune-attention"} <= set(found)
    assert all(kind.name == name for name, kind in found.items())
    assert list(found) == sorted(found)
    for name, kind in found.items():
        assert kind.__module__ == f"fxpress.passes.{name.replace('-', '_')}"


class Windowed(nn.Module):
    """Causal attention that sees the last twelve keys only."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, N, D) -> the same."""
        at = torch.arange(x.shape[2])
        near = (at[None] <= at[:, None]) & (at[:, None] - at[None] < 12)
        return F.scaled_dot_product_attention(x, x, x, attn_mask=near)


def test_a_window_wider_than_the_captured_size_stays_a_mask() -> None:
    x = torch.randn(2, 2, 8, 4)
    dynamic = {"x": {2: torch.export.Dim("tokens", min=2, max=64)}}
    program = capture(Windowed(), (x,), dynamic_shapes=dynamic)
    assert only(program).padding is only(program).mask is not None
