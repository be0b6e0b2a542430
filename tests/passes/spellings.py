"""Random spellings of one attention, and of one product with a weight, as users write them.

`attentions()` and `linears()` are the strategies. What was drawn is plain data, so that a
counterexample can be read.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
import torch
import torch.nn.functional as F
from hypothesis.strategies import DrawFn
from torch import Tensor, nn

__all__ = ["Attention", "Linear", "attentions", "linears"]

B, N, M, E, H = 2, 6, 5, 8, 2  # batch, queries, keys of another sequence, features, heads
D = E // H
LOW = torch.finfo(torch.float32).min

PROJECTIONS = ("separate", "chunk", "split", "unbind", "slices", "interleaved", "permuted")
SHARES = ("own", "own", "broadcast", "expand", "repeat", "five dimensions", "concatenated")
FORMS = ("apart", "apart", "merged", "merged and viewed", "einsum", "einsum", "windows")
SCALES = ("none", "product", "quotient", "query", "key", "both", "tensor", "temperature", "learned")
CAUSAL = ("", "fill", "where", "add", "lifted", "float", "product", "put", "lowest")
PADDING = ("", "", "fill", "where", "add", "float", "product", "infinite")
BIASES = ("", "", "alibi", "table", "parameter", "shift", "gathered")
SOFTMAXES = (
    "function",
    "method",
    "operator",
    "float32",
    "cast",
    "log",
    "logsumexp",
    "by hand",
    "after maximum",
    "after detached maximum",
    "summed apart",
    "reciprocal",
)
AFTER = ("", "", "dropout", "cleared", "contiguous", "head scale", "row gate", "half")
VALUES = ("operator", "matmul", "transposed", "einsum")
SHAPES = ("self", "self", "cross", "rolled windows")


@dataclass(frozen=True)
class Attention:
    """One attention.

    Attributes:
        shape: over what: itself, another sequence, windows of a rolled sequence.
        projection: how q, k and v come about.
        share: how heads share keys.
        form: how batch and heads lie in the product.
        orders: for einsum: letters of q, k, v, scores and result (b h i j d).
        keys_first: whether the scores are k q^T, transposed.
        scale, bias, causal, padding: each with its spelling.
        masks_first: whether bias and padding are applied before the scale.
        softmax, after, values: how it goes on.
        returned: whether the weights are returned too.
    """

    shape: str
    projection: str
    share: str
    form: str
    orders: tuple[str, ...]
    keys_first: bool
    scale: str
    bias: str
    causal: str
    padding: str
    masks_first: bool
    softmax: str
    after: str
    values: str
    returned: bool
    seed: int

    def build(self) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
        """The model in eval mode; its inputs x (B, N, E) and kept (B, N)."""
        torch.manual_seed(self.seed)
        kept = torch.rand(B, N) > 0.4
        kept[:, ::3] = True  # every window and every row keeps a key
        return _Attention(self).eval(), (torch.randn(B, N, E), kept)


@st.composite
def attentions(draw: DrawFn) -> Attention:
    """One attention in any spelling."""

    def one_of(choices: tuple[str, ...]) -> str:
        return draw(st.sampled_from(choices))

    shape, share, form = one_of(SHAPES), one_of(SHARES), one_of(FORMS)
    if shape != "self" and form == "windows":
        form = "apart"
    if share == "broadcast" and form.startswith("merged"):
        share = "expand"
    orders = tuple(
        "".join(draw(st.permutations(letters)))
        for letters in ("bhid", "bhjd", "bhjd", "bhij", "bhid")
    )
    scale, bias = one_of(SCALES), one_of(BIASES)
    causal = one_of(CAUSAL) if shape == "self" else ""
    padding = one_of(PADDING)
    if padding == "infinite" and causal == "product":
        causal = "fill"  # no number times zero
    # A learned scale of unknown sign may not follow what is filled.
    masks_first = draw(st.booleans()) and scale not in ("temperature", "learned")
    return Attention(
        shape,
        one_of(PROJECTIONS),
        share,
        form,
        orders,
        draw(st.booleans()),
        scale,
        "" if shape == "cross" and bias == "shift" else bias,
        causal,
        padding,
        masks_first,
        one_of(SOFTMAXES),
        one_of(AFTER),
        one_of(VALUES),
        draw(st.booleans()),
        draw(st.integers(0, 3)),
    )


class _Attention(nn.Module):
    """Attention as it was drawn."""

    def __init__(self, drawn: Attention) -> None:
        super().__init__()
        self.drawn = drawn
        heads = H if drawn.share == "own" else 1
        self.to_q = nn.Linear(E, E)
        self.to_k = nn.Linear(E, heads * D, bias=False)  # a bias of keys changes no weight
        self.to_v = nn.Linear(E, heads * D)
        self.to_qkv = nn.Linear(E, 3 * E, bias=False)
        self.out = nn.Linear(E, E)
        self.temperature = nn.Parameter(torch.rand(H, 1, 1) + 0.5)
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.table = nn.Parameter(torch.randn(2 * N - 1, H))
        self.bias = nn.Parameter(torch.randn(H, N, N))
        self.relative = nn.Parameter(torch.randn(2 * N - 1, D))
        self.register_buffer("tril", torch.tril(torch.ones(1, 1, 16, 16)))

    def forward(self, x: Tensor, kept: Tensor) -> Any:
        if self.drawn.shape == "rolled windows":
            rolled, kept = (t.roll(-1, 1).reshape(B * 2, N // 2, *t.shape[2:]) for t in (x, kept))
            kept = kept | (torch.arange(N // 2) == 0)
            y, p = self.attend(rolled, rolled, kept)
            y = y.reshape(B, N, E).roll(1, 1)
        elif self.drawn.shape == "cross":
            y, p = self.attend(x, x.flip(1)[:, :M].tanh(), kept[:, :M])
        else:
            y, p = self.attend(x, x, kept)
        return (self.out(y), p) if self.drawn.returned else self.out(y)

    def attend(self, x: Tensor, memory: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        """Attention of x (b, n, E) to memory (b, m, E), of which some is kept (b, m)."""
        drawn = self.drawn
        q, k, v = self.project(x, memory)
        if drawn.form == "windows":
            q, k, v = (t.unflatten(2, (2, -1)) for t in (q, k, v))
            kept = kept.unflatten(1, (2, -1))
        form = _Form(drawn, tuple(q.shape[:-2]), q.shape[-2], k.shape[-2])
        around = q, kept
        q, k = self.scaled_operands(q, k)
        scores = form.scores(q, k)
        steps = [self.scaled, self.biased, self.padded, self.causal]
        if drawn.masks_first:
            steps = [self.biased, self.padded, self.scaled, self.causal]
        for step in steps:
            scores = step(scores, form, *around)
        scores = form.joined(scores)
        p = _SOFTMAX[drawn.softmax](scores, form.order.index("j") - len(form.order))
        p = self.after(p, form, *around)
        y = form.result(p, v)
        if drawn.form == "windows":
            y = y.flatten(2, 3)
        return y.transpose(1, 2).reshape(x.shape), p

    def project(self, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Q (b, H, n, D), k and v (b, H or 1, m, D)."""
        drawn = self.drawn
        if drawn.share != "own" or drawn.shape == "cross" or drawn.projection == "separate":
            parts = self.to_q(x), self.to_k(memory), self.to_v(memory)
            q, k, v = (t.view(*t.shape[:2], -1, D).transpose(1, 2) for t in parts)
            return q, *_shared(drawn.share, k, v)
        fused, (b, n, _) = self.to_qkv(x), x.shape
        if drawn.projection == "permuted":
            q, k, v = fused.reshape(b, n, 3, H, D).permute(2, 0, 3, 1, 4)
            return q, k, v
        if drawn.projection == "unbind":
            parts = fused.view(b, n, 3, H, D).unbind(2)
            q, k, v = (t.transpose(1, 2) for t in parts)
            return q, k, v
        if drawn.projection == "interleaved":
            q, k, v = fused.view(b, n, H, 3 * D).transpose(1, 2).chunk(3, -1)
            return q, k, v
        cut: dict[str, Callable[[], Any]] = {
            "chunk": lambda: fused.chunk(3, dim=-1),
            "split": lambda: torch.split(fused, E, dim=2),
            "slices": lambda: (fused[..., :E], fused[..., E : 2 * E], fused[..., 2 * E :]),
        }
        q, k, v = (t.view(b, n, H, D).permute(0, 2, 1, 3) for t in cut[drawn.projection]())
        return q, k, v

    def scaled_operands(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys, where they are scaled."""
        if self.drawn.scale == "query":
            return q / math.sqrt(D), k
        if self.drawn.scale == "key":
            return q, D**-0.5 * k
        if self.drawn.scale == "both":
            return q * D**-0.25, k * D**-0.25
        return q, k

    def scaled(self, scores: Tensor, form: _Form, _q: Tensor, _kept: Tensor) -> Tensor:
        """Scores, where they are scaled."""
        root = math.sqrt(D)
        if self.drawn.scale == "product":
            return scores * (1.0 / root)
        if self.drawn.scale == "quotient":
            return scores / root
        if self.drawn.scale == "tensor":
            return scores / torch.sqrt(torch.tensor(float(D)))
        if self.drawn.scale == "temperature":
            return scores / form.fit(form.by_head(self.temperature))
        return self.scale * scores if self.drawn.scale == "learned" else scores

    def biased(self, scores: Tensor, form: _Form, q: Tensor, _kept: Tensor) -> Tensor:
        """Scores with a bias of positions."""
        n, m = form.n, form.m
        distance = torch.arange(m)[None] - torch.arange(n)[:, None]
        if self.drawn.bias == "alibi":
            slopes = torch.tensor([2.0 ** -(h + 1) for h in range(H)]).view(H, 1, 1)
            return scores + form.fit(form.by_head(slopes * -distance.abs()))
        if self.drawn.bias == "table":
            values = F.embedding((distance + n - 1).clamp(0, 2 * N - 2), self.table)
            return scores + form.fit(form.by_head(values.permute(2, 0, 1)))
        if self.drawn.bias == "parameter":
            return form.fit(form.by_head(self.bias[:, :n, :m])) + scores
        if self.drawn.bias == "shift":
            rows = q @ self.relative[: 2 * n - 1].t()
            shifted = F.pad(rows, (1, 0)).view(*q.shape[:-2], 2 * n, n)[..., 1:, :]
            return scores + form.fit(shifted.reshape(rows.shape)[..., :m])
        if self.drawn.bias == "gathered":
            rows = q @ self.relative.t()
            index = (distance + n - 1).clamp(0, 2 * N - 2).expand(*q.shape[:-2], n, m)
            return scores + form.fit(torch.gather(rows, -1, index))
        return scores

    def padded(self, scores: Tensor, form: _Form, _q: Tensor, kept: Tensor) -> Tensor:
        """Scores without padding."""
        mask = form.fit(form.by_key(kept))
        fill = -math.inf if self.drawn.padding == "infinite" else LOW
        return _masked(self.drawn.padding, scores, mask, fill)

    def causal(self, scores: Tensor, form: _Form, _q: Tensor, _kept: Tensor) -> Tensor:
        """Scores without later keys."""
        n, m = form.n, form.m
        kept = self.get_buffer("tril")[..., :n, :m] != 0
        if self.drawn.causal == "lowest":
            kept = torch.arange(m)[None] <= torch.arange(n)[:, None]
        if self.drawn.causal == "lifted":
            low = torch.triu(torch.full((n, m), -math.inf), diagonal=1)
            return scores + form.fit(low.to(scores.dtype))
        if self.drawn.causal == "put":
            if form.order[-2:] != "ij" or form.flat:
                return scores.masked_fill(~form.fit(kept.view(n, m)), -math.inf)
            scores = scores.clone()
            scores[..., kept.view(n, m).logical_not()] = -math.inf
            return scores
        return _masked(self.drawn.causal, scores, form.fit(kept.view(n, m)), -math.inf)

    def after(self, p: Tensor, form: _Form, q: Tensor, kept: Tensor) -> Tensor:
        """What is done to weights, though it changes nothing or belongs elsewhere."""
        if self.drawn.after == "dropout":
            return F.dropout(p, 0.1, self.training)
        if self.drawn.after == "cleared":
            return p.masked_fill(~form.fit(form.by_key(kept), form.flat), 0.0)
        if self.drawn.after == "contiguous":
            return p.contiguous().to(q.dtype)
        if self.drawn.after == "head scale":
            return p * form.fit(form.by_head(self.temperature), form.flat)
        if self.drawn.after == "row gate":
            return p * form.fit(torch.sigmoid(q[..., :1]), form.flat)
        return p * 0.5 if self.drawn.after == "half" else p


def _shared(share: str, k: Tensor, v: Tensor) -> list[Tensor]:
    """Keys and values (b, 1, m, D) for all heads."""
    spelled: dict[str, Callable[[Tensor], Tensor]] = {
        "own": lambda t: t,
        "broadcast": lambda t: t,
        "expand": lambda t: t.expand(-1, H, -1, -1),
        "repeat": lambda t: t.repeat_interleave(H, dim=1),
        "five dimensions": lambda t: t[:, :, None].expand(-1, -1, H, -1, -1).flatten(1, 2),
        "concatenated": lambda t: torch.cat([t] * H, dim=1),
    }
    return [spelled[share](t) for t in (k, v)]


def _masked(spelling: str, scores: Tensor, kept: Tensor, fill: float) -> Tensor:
    """Scores with a fill where a mask is False."""
    ones = kept.to(scores.dtype)
    spelled: dict[str, Callable[[], Tensor]] = {
        "": lambda: scores,
        "fill": lambda: scores.masked_fill(~kept, fill),
        "infinite": lambda: scores.masked_fill(kept.logical_not(), fill),
        "lowest": lambda: scores.masked_fill(kept == 0, LOW),
        "where": lambda: torch.where(kept, scores, fill),
        "add": lambda: scores + torch.zeros_like(ones).masked_fill(~kept, LOW),
        "float": lambda: scores + (1.0 - ones) * -1e9,
        "product": lambda: scores * ones - 1e9 * (1 - ones),
    }
    return spelled[spelling]()


class _Form:
    """How batch, heads, queries and keys lie in the product of queries and keys.

    Attributes:
        lead: sizes in front of queries (b, H), with windows (b, H, 2).
        order: letters of the scores, "-" for windows and "f" for a batch merged with heads.
        flat: whether softmax and values are in another layout than the masks.
    """

    def __init__(self, drawn: Attention, lead: tuple[int, ...], n: int, m: int) -> None:
        self.drawn, self.lead, self.n, self.m = drawn, lead, n, m
        self.order = {4: "bhij", 5: "bh-ij"}[len(lead) + 2]
        self.flat = drawn.form == "merged and viewed"
        if drawn.form == "merged":
            self.order = "fij"
        if drawn.form == "einsum":
            self.order = drawn.orders[3]

    def by_head(self, t: Tensor) -> Tensor:
        """(H, ...) as it broadcasts against (*lead, n, m)."""
        return t[None] if len(self.lead) == 2 else t[None, :, None]

    def by_key(self, t: Tensor) -> Tensor:
        """(b, m), with windows (b, 2, m), as it broadcasts against (*lead, n, m)."""
        return t[:, None, None] if len(self.lead) == 2 else t[:, None, :, None]

    def fit(self, t: Tensor, flat: bool = False) -> Tensor:
        """A tensor that broadcasts against (*lead, n, m), in the order of the scores."""
        if self.order == "fij" or flat:
            if t.ndim == 2:
                return t
            return t.expand(*self.lead, *t.shape[-2:]).reshape(-1, *t.shape[-2:])
        if self.order in ("bhij", "bh-ij"):
            return t
        whole = t[(None,) * (4 - t.ndim)]
        return whole.permute(["bhij".index(letter) for letter in self.order])

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """The product of queries and keys."""
        if self.drawn.form == "einsum":
            return self.contracted((self.drawn.orders[0], q), (self.drawn.orders[1], k), self.order)
        if self.drawn.form.startswith("merged"):
            q, k = (t.reshape(-1, *t.shape[-2:]) for t in (q, k))
        first, second = (k, q) if self.drawn.keys_first else (q, k)
        product = first @ second.transpose(-1, -2)
        if self.drawn.form == "merged" and self.drawn.scale == "none":
            nothing = torch.zeros(1, dtype=q.dtype)
            product = torch.baddbmm(nothing, first, second.mT, beta=0, alpha=0.5)
        if self.drawn.keys_first:
            product = product.transpose(-1, -2)
        return product.view(*self.lead, self.n, self.m) if self.flat else product

    def joined(self, scores: Tensor) -> Tensor:
        """Scores as the softmax takes them."""
        return scores.view(-1, self.n, self.m) if self.flat else scores

    def result(self, p: Tensor, v: Tensor) -> Tensor:
        """The product with v, (*lead, n, D)."""
        if self.drawn.form == "einsum":
            order = self.drawn.orders[4]
            y = self.contracted((self.order, p, True), (self.drawn.orders[2], v), order)
            return y.permute([order.index(letter) for letter in "bhid"])
        if self.drawn.form.startswith("merged"):
            v = v.reshape(-1, *v.shape[-2:])
        spelled: dict[str, Callable[[], Tensor]] = {
            "operator": lambda: p @ v,
            "matmul": lambda: p.matmul(v.contiguous()),
            "transposed": lambda: (v.mT @ p.mT).mT,
            "einsum": lambda: torch.einsum("...ij,...jd->...id", p, v),
        }
        y = spelled[self.drawn.values]()
        return y.reshape(*self.lead, self.n, D)

    def contracted(self, left: Any, right: Any, out: str) -> Tensor:
        """An einsum of operands (..., last two) brought to their letters first."""
        terms, operands = [], []
        for letters, operand, *is_there in (left, right):
            shared = operand.shape[1] == 1 and not is_there  # heads share it: no letter
            plain, term = (
                text.replace("h", "") if shared else text
                for text in ("bhid" if "i" in letters else "bhjd", letters)
            )
            t = operand[:, 0] if shared else operand
            operands.append(t if is_there else t.permute([plain.index(x) for x in term]))
            terms.append(term)
        if self.drawn.keys_first:
            terms, operands = terms[::-1], operands[::-1]
        return torch.einsum(f"{','.join(terms)}->{out}", *operands)


def _by_hand(scores: Tensor, dim: int) -> Tensor:
    e = torch.exp(scores)
    return e / e.sum(dim, keepdim=True)


def _after_maximum(scores: Tensor, dim: int) -> Tensor:
    e = torch.exp(scores - torch.max(scores, dim=dim, keepdim=True)[0])
    return e / (torch.sum(e, dim=dim, keepdim=True) + 1e-9)


def _after_detached_maximum(scores: Tensor, dim: int) -> Tensor:
    e = (scores - scores.amax(dim, keepdim=True).detach()).exp()
    return e / e.sum(dim).unsqueeze(dim)


def _reciprocal(scores: Tensor, dim: int) -> Tensor:
    e = (scores - scores.max(dim, keepdim=True).values).exp()
    return e * e.sum(dim, keepdim=True).reciprocal()


def _summed_apart(scores: Tensor, dim: int) -> Tensor:
    e = scores.float().exp()
    return (e / e.sum(dim).unsqueeze(dim)).type_as(scores)


_SOFTMAX: dict[str, Callable[[Tensor, int], Tensor]] = {
    "function": F.softmax,
    "method": lambda scores, dim: scores.softmax(dim % scores.ndim),
    "operator": torch.softmax,
    "float32": lambda scores, dim: F.softmax(scores, dim=dim, dtype=torch.float32).to(scores.dtype),
    "cast": lambda scores, dim: scores.float().softmax(dim).type_as(scores),
    "log": lambda scores, dim: F.log_softmax(scores, dim).exp(),
    "logsumexp": lambda scores, dim: (scores - scores.logsumexp(dim).unsqueeze(dim)).exp(),
    "by hand": _by_hand,
    "after maximum": _after_maximum,
    "after detached maximum": _after_detached_maximum,
    "summed apart": _summed_apart,
    "reciprocal": _reciprocal,
}


# Products with a weight --------------------------------------------------------------------------

FEATURES, WIDTH = 4, 5  # n, m
PRODUCTS = (
    "function",
    "operator",
    "mm",
    "addmm",
    "einsum",
    "bmm",
    "batch of one",
    "inner",
    "tensordot",
    "conv1d",
    "conv2d",
    "module of views",
    "left einsum",
    "tied",
)
READINGS = ("as it is", "t", "transpose", "permute", "mT", "T")
BIASED = ("none", "after", "before", "fused")


PARTS: dict[str, Callable[[Tensor], Tensor]] = {
    "select": lambda w: w[1],
    "unbind": lambda w: w.unbind()[2],
    "chunk": lambda w: w.chunk(3)[1],
    "split": lambda w: w.split(len(w) // 3)[2],
    "slice": lambda w: w[: len(w) // 3],
}


@dataclass(frozen=True)
class Linear:
    """One product with a weight.

    Attributes:
        product: the operator.
        reading: how the weight is turned, where it is stored the other way.
        bias: whether and where one is added.
        lead: sizes in front of the features.
        axes, out: for einsum: order of the letters of x and of the result.
        part: how it is taken from the parameter, where that holds several weights.
    """

    product: str
    reading: str
    bias: str
    lead: tuple[int, ...]
    axes: tuple[int, ...]
    out: tuple[int, ...]
    part: str
    seed: int

    def build(self) -> tuple[nn.Module, tuple[Tensor]]:
        """The model, and its input (*lead, n), or tokens (*lead) for a tied weight."""
        torch.manual_seed(self.seed)
        if self.product == "tied":
            return _Linear(self), (torch.randint(WIDTH, self.lead),)
        return _Linear(self), (torch.randn(*self.lead, FEATURES),)


@st.composite
def linears(draw: DrawFn) -> Linear:
    """One product with a weight in any spelling."""
    product = draw(st.sampled_from(PRODUCTS))
    rank = {"bmm": 2, "conv1d": 2, "conv2d": 3}.get(product) or draw(st.integers(1, 3))
    places = st.permutations(range(rank + 1))
    return Linear(
        product,
        draw(st.sampled_from(READINGS)),
        draw(st.sampled_from(BIASED)),
        (2, 3, 2)[:rank],
        tuple(draw(places)),
        tuple(draw(places)),
        draw(st.sampled_from(("whole", *PARTS))) if product != "tied" else "whole",
        draw(st.integers(0, 3)),
    )


class _Linear(nn.Module):
    """The product as it was drawn."""

    def __init__(self, drawn: Linear) -> None:
        super().__init__()
        self.drawn = drawn
        by_rows = drawn.product in ("function", "inner", "conv1d", "conv2d", "tied")
        shape = (WIDTH, FEATURES) if by_rows else (FEATURES, WIDTH)
        if drawn.reading != "as it is" and not drawn.product.startswith("conv"):
            shape = shape if drawn.product == "tied" else shape[::-1]
        several = () if drawn.part == "whole" else (3,)
        self.weight = nn.Parameter(torch.randn(*several, *shape))
        if drawn.part in ("chunk", "split", "slice"):
            self.weight = nn.Parameter(self.weight.detach().flatten(0, 1))
        self.bias = nn.Parameter(torch.randn(WIDTH))

    def turned(self) -> Tensor:
        """The weight as its product takes it."""
        turns: dict[str, Callable[[Tensor], Tensor]] = {
            "as it is": lambda w: w,
            "t": lambda w: w.t(),
            "transpose": lambda w: w.transpose(-1, 0),
            "permute": lambda w: w.permute(1, 0),
            "mT": lambda w: w.mT,
            "T": lambda w: w.T,
        }
        return turns[self.drawn.reading](self.part())

    def part(self) -> Tensor:
        """The weight, of those that the parameter holds."""
        return PARTS[self.drawn.part](self.weight) if self.drawn.part != "whole" else self.weight

    def forward(self, x: Tensor) -> Tensor:
        drawn = self.drawn
        if drawn.product == "tied":
            x = F.embedding(x, self.weight)
        product: Callable[[Tensor], tuple[Tensor, bool]]
        product = getattr(self, "_" + drawn.product.replace(" ", "_"))
        y, fused = product(x)
        if drawn.bias == "none" or fused:
            return y
        return y + self.bias if drawn.bias == "after" else self.bias + y

    @property
    def _fused(self) -> Tensor | None:
        return self.bias if self.drawn.bias == "fused" else None

    def _function(self, x: Tensor) -> tuple[Tensor, bool]:
        return F.linear(x, self.turned(), self._fused), self._fused is not None

    def _operator(self, x: Tensor) -> tuple[Tensor, bool]:
        return x @ self.turned(), False

    def _tied(self, x: Tensor) -> tuple[Tensor, bool]:
        if self.drawn.reading == "as it is":
            return F.linear(x, self.weight), False
        return torch.matmul(x, self.turned()), False

    def _mm(self, x: Tensor) -> tuple[Tensor, bool]:
        return x.reshape(-1, FEATURES).mm(self.turned()).view(*x.shape[:-1], WIDTH), False

    def _addmm(self, x: Tensor) -> tuple[Tensor, bool]:
        flat = torch.addmm(self.bias, x.view(-1, FEATURES), self.turned())
        return flat.view(*x.shape[:-1], WIDTH), True

    def _module_of_views(self, x: Tensor) -> tuple[Tensor, bool]:
        """The layer that transformers calls Conv1D."""
        size = (*x.size()[:-1], WIDTH)
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.turned()).view(size), True

    def _bmm(self, x: Tensor) -> tuple[Tensor, bool]:
        return torch.bmm(x, self.turned().unsqueeze(0).expand(x.shape[0], -1, -1)), False

    def _batch_of_one(self, x: Tensor) -> tuple[Tensor, bool]:
        return torch.matmul(x, self.turned()[(None,) * (x.ndim - 2)]), False

    def _inner(self, x: Tensor) -> tuple[Tensor, bool]:
        return torch.inner(x, self.turned()), False

    def _tensordot(self, x: Tensor) -> tuple[Tensor, bool]:
        return torch.tensordot(x, self.turned(), dims=([-1], [0])), False

    def _einsum(self, x: Tensor) -> tuple[Tensor, bool]:
        axes, out, plain = self.letters()
        moved = x.permute(self.drawn.axes)
        y = torch.einsum(f"{axes},nm->{out}", moved, self.turned())
        return y.permute([out.index(letter) for letter in plain]), False

    def _left_einsum(self, x: Tensor) -> tuple[Tensor, bool]:
        axes, out, plain = self.letters()
        moved = x.permute(self.drawn.axes)
        y = torch.einsum(f"n m, {axes} -> {out}", self.turned(), moved)
        return y.permute([out.index(letter) for letter in plain]), False

    def letters(self) -> tuple[str, str, str]:
        """Letters of x and of the result as drawn, and of the result in order."""
        lead = "abc"[: len(self.drawn.lead)]
        axes = "".join((lead + "n")[place] for place in self.drawn.axes)
        out = "".join((lead + "m")[place] for place in self.drawn.out)
        return axes, out, lead + "m"

    def _conv1d(self, x: Tensor) -> tuple[Tensor, bool]:
        y = F.conv1d(x.transpose(1, 2), self.part()[..., None], self._fused)
        return y.transpose(1, 2), self._fused is not None

    def _conv2d(self, x: Tensor) -> tuple[Tensor, bool]:
        y = F.conv2d(x.permute(0, 3, 1, 2), self.part().view(WIDTH, -1, 1, 1), self._fused)
        return y.permute(0, 2, 3, 1), self._fused is not None
