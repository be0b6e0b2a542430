"""`normalize-linear`: every spelling of a product with a weight, and every refusal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxpress.capture import capture
from fxpress.passes.normalize_linear import NormalizeLinear
from fxpress.passes.sites import linear_sites
from fxpress.program import Program
from fxpress.rewrite import PassContext, PassRecord
from fxpress.testing import assert_equivalent
from fxpress.verify import verify

aten = torch.ops.aten

B, T, N, M = 2, 3, 4, 5


class Apply(nn.Module):
    """A function of an input, a weight and a bias, as a module."""

    def __init__(self, function: Callable[..., Any], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(shape)) for shape in shapes)

    def forward(self, x: Tensor) -> Any:
        return self.function(x, *self.weights)


def normalize(model: nn.Module, *args: Any, **dynamic: Any) -> tuple[Program, PassRecord]:
    program = capture(model, args, **dynamic)
    before = program.copy()
    record = NormalizeLinear().run(program, PassContext())
    verify(program, "normalize-linear", before)
    return program, record


def targets(program: Program) -> list[Any]:
    return [node.target for node in program.graph.nodes if node.op == "call_function"]


def matmul_bias(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return b + x @ w


def conv1d_module(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """The layer of that name in transformers: a view, `addmm`, a view back."""
    return torch.addmm(b, x.view(-1, N), w).view(B, T, M)


def conv1d_last(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """A convolution over tensors whose channels lie last, as speech models have it."""
    return nn.functional.conv1d(x.transpose(1, 2), w, b).transpose(1, 2)


Case = tuple[Callable[..., Any], tuple[tuple[int, ...], ...], tuple[int, ...]]

SPELLINGS: dict[str, Case] = {
    "matmul": (lambda x, w: x @ w, ((N, M),), (B, T, N)),
    "matmul, transposed": (lambda x, w: x @ w.t(), ((M, N),), (B, T, N)),
    "matmul, twice transposed": (lambda x, w: x @ w.t().t(), ((N, M),), (B, T, N)),
    "matmul, permuted": (lambda x, w: x @ w.permute(1, 0), ((M, N),), (B, T, N)),
    "matmul and bias": (matmul_bias, ((N, M), (M,)), (B, T, N)),
    "mm": (torch.mm, ((N, M),), (T, N)),
    "addmm": (lambda x, w, b: torch.addmm(b, x, w), ((N, M), (M,)), (T, N)),
    "addmm of views": (conv1d_module, ((N, M), (M,)), (B, T, N)),
    "linear, transposed": (lambda x, w: nn.functional.linear(x, w.t()), ((N, M),), (B, T, N)),
    "einsum": (lambda x, w: torch.einsum("btn,mn->btm", x, w), ((M, N),), (B, T, N)),
    "einsum, turned": (lambda x, w: torch.einsum("nm,btn->btm", w, x), ((N, M),), (B, T, N)),
}
MOVING: dict[str, Case] = {
    "einsum, inner letter": (
        lambda x, w: torch.einsum("bnt,mn->bmt", x, w),
        ((M, N),),
        (B, N, T),
    ),
    "conv1d": (conv1d_last, ((M, N, 1), (M,)), (B, T, N)),
    "conv1d, one sequence": (
        lambda x, w: nn.functional.conv1d(x.t(), w).permute(1, 0),
        ((M, N, 1),),
        (T, N),
    ),
    "conv2d": (
        lambda x, w, b: nn.functional.conv2d(x.permute(0, 3, 1, 2), w, b),
        ((M, N, 1, 1), (M,)),
        (B, T, T, N),
    ),
    "conv2d, padding by name": (
        lambda x, w: nn.functional.conv2d(x.permute(0, -1, 1, 2), w, padding="same").sum(1),
        ((M, N, 1, 1),),
        (B, T, T, N),
    ),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_spelling_becomes_one_linear(name: str) -> None:
    function, shapes, size = SPELLINGS[name]
    model, x = Apply(function, *shapes), torch.randn(size)
    program, record = normalize(model, x)
    assert targets(program) == [aten.linear.default]
    assert not record.declined
    assert [site.shape for site in linear_sites(program)] == [(M, N)]
    assert_equivalent(program, model, (x,))


@pytest.mark.parametrize("name", MOVING)
def test_a_spelling_becomes_one_linear_between_permutations(name: str) -> None:
    function, shapes, size = MOVING[name]
    model, x = Apply(function, *shapes), torch.randn(size)
    program, record = normalize(model, x)
    assert targets(program).count(aten.linear.default) == 1
    assert {aten.linear.default, aten.permute.default} <= set(targets(program))
    assert not {n for n in targets(program) if "conv" in str(n) or "einsum" in str(n)}
    assert aten.contiguous.default not in targets(program)
    assert not record.declined
    assert_equivalent(program, model, (x,))


@pytest.mark.parametrize("name", [*SPELLINGS, *MOVING])
def test_gradients_are_those_of_the_model(name: str) -> None:
    function, shapes, size = (SPELLINGS | MOVING)[name]
    model, x = Apply(function, *shapes), torch.randn(size)
    program, _ = normalize(model, x)

    def gradients(module: Any) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                gradient: Tensor
                (gradient,) = torch.autograd.grad(module(x).square().sum(), x)
                return gradient

        return run

    class Gradients(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return gradients(self.model)(x)

    assert_equivalent(gradients(program), Gradients(), (x,))


def test_a_view_that_counts_on_contiguity_still_works() -> None:
    model = Apply(lambda x, w: torch.einsum("mn,nt->mt", w, x).view(-1), (M, N))
    x = torch.randn(N, T)
    program, record = normalize(model, x)
    assert record.rewrites
    assert_equivalent(program, model, (x,))


def test_views_behind_a_product_that_was_just_made() -> None:
    def both(x: Tensor, w: Tensor, u: Tensor, b: Tensor) -> Tensor:
        y = nn.functional.conv1d(x.transpose(1, 2), w).transpose(1, 2)
        return torch.addmm(b, y.reshape(-1, M), u).view(B, T, N)

    model, x = Apply(both, (M, N, 1), (M, N), (N,)), torch.randn(B, T, N)
    program, record = normalize(model, x)
    assert record.counts()["linear-from-matmul"] == record.counts()["linear-from-convolution"] == 1
    assert_equivalent(program, model, (x,))


def test_where_the_data_decides_a_size() -> None:
    def chosen(x: Tensor, w: Tensor, u: Tensor) -> Tensor:
        kept = x[x[:, 0] > 0]
        torch._check(kept.shape[0] >= 1)  # torch 2.11 captures no convolution without
        y = torch.einsum("tn,mn->mt", kept, u)
        return nn.functional.conv1d(kept.t()[None], w) + y

    model, x = Apply(chosen, (M, N, 1), (M, N)), torch.randn(9, N)
    program, record = normalize(model, x)
    assert record.counts()["linear-from-einsum"] == 1
    assert_equivalent(program, model, (x,))


def test_no_weight_is_copied() -> None:
    model, x = Apply(matmul_bias, (N, M), (M,)), torch.randn(B, T, N)
    program, _ = normalize(model, x)
    ours = {t.untyped_storage().data_ptr() for t in program.tensors().values()}
    assert ours == {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert len(list(program.graph_module.parameters())) == 2


def test_training_leaves_the_model_alone() -> None:
    model, x = Apply(lambda x, w: x @ w, (N, M)), torch.randn(B, T, N)
    kept = next(model.parameters()).detach().clone()
    program, _ = normalize(model, x)
    program(x).sum().backward()
    torch.optim.SGD(program.graph_module.parameters(), lr=1.0).step()
    assert torch.equal(next(model.parameters()), kept)
    assert not torch.equal(program(x), model(x))


def test_one_weight_for_two_calls() -> None:
    model = Apply(lambda x, w: (x @ w).relu() @ w, (N, N))
    x = torch.randn(B, T, N)
    program, record = normalize(model, x)
    assert record.counts() == {"linear-from-matmul": 2}
    assert len({site.weight for site in linear_sites(program)}) == 1
    assert_equivalent(program, model, (x,))


def test_a_head_tied_to_the_embedding_stays_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(M, N)

        def forward(self, tokens: Tensor) -> Tensor:
            embedded: Tensor = self.embedding(tokens)
            return embedded @ self.embedding.weight.t()

    model, tokens = Tied(), torch.randint(M, (B, T))
    program, _ = normalize(model, tokens)
    assert len(list(program.graph_module.parameters())) == 1
    assert [site.weight for site in linear_sites(program)] == ["embedding.weight"]
    assert_equivalent(program, model, (tokens,))


def test_parts_of_one_parameter_are_weights_of_their_own() -> None:
    """Attention of torch to another sequence: three projections of three inputs in one tensor."""

    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(N, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor
            y, _ = self.attention(x, x.sin(), x.cos())
            return y

    model, x = Cross().eval(), torch.randn(B, T, N)
    program, record = normalize(model, x)
    assert not record.declined
    assert [site.shape for site in linear_sites(program)] == [(N, N)] * 4
    held = sum(t.numel() for t in program.tensors().values())
    assert held == sum(p.numel() for p in model.parameters())
    assert_equivalent(program, model, (x,))
    kept = model.attention.in_proj_weight.detach().clone()
    program(x).sum().backward()
    torch.optim.SGD(program.graph_module.parameters(), lr=1.0).step()
    assert torch.equal(model.attention.in_proj_weight, kept)


def test_views_are_unwrapped_for_a_dynamic_size() -> None:
    def flattened(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return torch.addmm(b, x.view(-1, N), w).view(*x.shape[:-1], M)

    model, x = Apply(flattened, (N, M), (M,)), torch.randn(B, T, N)
    dynamic = {"x": {1: torch.export.Dim("t", min=2, max=64)}}
    program, record = normalize(model, x, dynamic_shapes=dynamic)
    assert record.counts() == {"linear-from-matmul": 1, "unwrap-linear": 1}
    longer = torch.randn(B, 2 * T, N)
    assert_equivalent(program, model, (longer,))


def test_a_view_to_other_sizes_stays() -> None:
    model = Apply(lambda x, w: (x.view(-1, N) @ w).view(T, B, M), (N, M))
    x = torch.randn(B, T, N)
    program, record = normalize(model, x)
    assert record.counts() == {"linear-from-matmul": 1}
    assert_equivalent(program, model, (x,))


def test_a_product_that_is_used_twice_keeps_its_views() -> None:
    def twice(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        flat = x.view(-1, N) @ w
        return flat.view(B, T, M), flat

    model, x = Apply(twice, (N, M)), torch.randn(B, T, N)
    program, record = normalize(model, x)
    assert record.counts() == {"linear-from-matmul": 1}
    assert_equivalent(program, model, (x,))


REFUSED: list[tuple[str, Callable[..., Any], tuple[tuple[int, ...], ...], tuple[int, ...]]] = [
    (
        "the weight is read in another layout too: a copy would untie it",
        lambda x, w: nn.functional.linear(x @ w, w),
        ((N, M),),
        (T, N),
    ),
    (
        "the weight is read in another layout too: a copy would untie it",
        lambda x, w: x.t() @ w[1:] + w.sum(),
        ((T + 1, M),),
        (T, N),
    ),
    ("the weight is computed by aten.mul", lambda x, w: x @ (w * 2), ((N, M),), (T, N)),
    (
        "the weight is computed by aten.tanh",
        lambda x, w: nn.functional.linear(x, w.tanh()),
        ((M, N),),
        (T, N),
    ),
    ("the weight stands on the left: it maps columns", lambda x, w: w @ x, ((M, N),), (N, T)),
    (
        "addmm scales its terms by beta and alpha",
        lambda x, w, b: torch.addmm(b, x, w, beta=0.5),
        ((N, M), (M,)),
        (T, N),
    ),
    (
        "what addmm adds is no bias: it differs between rows",
        lambda x, w, b: torch.addmm(b, x, w),
        ((N, M), (T, M)),
        (T, N),
    ),
    (
        "the weight is computed by aten.exp",
        lambda x, w: torch.einsum("tn,nm->tm", x, w.exp()),
        ((N, M),),
        (T, N),
    ),
    (
        "the einsum tn,nm->tnm is no product with a matrix",
        lambda x, w: torch.einsum("tn,nm->tnm", x, w),
        ((N, M),),
        (T, N),
    ),
    (
        "the einsum tn,mk->tnmk is no product with a matrix",
        lambda x, w: torch.einsum("tn,mk->tnmk", x, w),
        ((M, N),),
        (T, N),
    ),
    (
        "the weight is computed by aten.tanh",
        lambda x, w: nn.functional.conv1d(x, w.tanh()),
        ((M, N, 1),),
        (B, N, T),
    ),
    (
        "a convolution of patches that is dilated",
        lambda x, w, b: nn.functional.conv1d(x, w, b, stride=2, dilation=2),
        ((M, N, 2), (M,)),
        (B, N, 3 * T),
    ),
    (
        "a convolution of patches that pads",
        lambda x, w: nn.functional.conv2d(x, w, stride=2, padding=1),
        ((M, N, 2, 2),),
        (B, N, 4, 6),
    ),
    (
        "a convolution of width one that pads",
        lambda x, w: nn.functional.conv1d(x, w, padding=1),
        ((M, N, 1),),
        (B, N, T),
    ),
    (
        "a convolution of width one in groups",
        lambda x, w: nn.functional.conv1d(x, w, groups=2),
        ((M - 1, N // 2, 1),),
        (B, N, T),
    ),
]


@pytest.mark.parametrize(("reason", "function", "shapes", "size"), REFUSED)
def test_refusals(reason: str, function: Any, shapes: Any, size: Any) -> None:
    model, x = Apply(function, *shapes), torch.randn(size)
    program = capture(model, (x,))
    before = str(program)
    record = NormalizeLinear().run(program, PassContext())
    assert [decline.reason.startswith(reason) for decline in record.declined] == [True]
    assert not record.rewrites
    assert str(program) == before


NOT_A_LINEAR = [
    (lambda x: x @ x.t(), (), (T, N)),  # both from the input
    (lambda x, w: x @ w, ((N,),), (T, N)),  # a vector
    (nn.functional.conv1d, ((M, N, 3),), (B, N, T)),
    (lambda x, w: torch.einsum("tn,sn->ts", x, x) + w, ((T, T),), (T, N)),
]


# Not where channels do not lie last: the copy would cost more than the convolution.
NOT_MOVED = [
    (nn.functional.conv1d, ((M, N, 1),), (B, N, T)),
    (lambda x, w: nn.functional.conv1d(x.transpose(1, 2), w), ((M, N, 1),), (B, T, N)),
    (lambda x, w: nn.functional.conv1d(x, w).mT, ((M, N, 1),), (B, N, T)),
]


@pytest.mark.parametrize(("function", "shapes", "size"), [*NOT_A_LINEAR, *NOT_MOVED])
def test_what_is_no_linear_is_left_alone(function: Any, shapes: Any, size: Any) -> None:
    model, x = Apply(function, *shapes), torch.randn(size)
    program = capture(model, (x,))
    before = str(program)
    record = NormalizeLinear().run(program, PassContext())
    assert (record.rewrites, record.declined, str(program)) == ([], [], before)


def test_graph(golden: Callable[[str, str], None]) -> None:
    program = capture(Apply(conv1d_module, (N, M), (M,)), (torch.randn(B, T, N),))
    before = str(program)
    NormalizeLinear().run(program, PassContext())
    golden(f"before:\n{before}\n\nafter:\n{program}", "passes/normalize_linear.txt")
