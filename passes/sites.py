"""The places in a program that passes work on: attention and linear maps, by stable names."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from fxpress.passes.contractions import Bank, bank_of
from fxpress.passes.dataflow import RESHAPES, MaskFactors, argument, mask_factors, peel, sizes
from fxpress.passes.indicators import value_key
from fxpress.passes.patches import Patches, patches_of
from fxpress.program import Program, attribute, module_path

__all__ = ["FACTORED_BANK", "AttentionSite", "LinearSite", "attention_sites", "linear_sites"]

aten = torch.ops.aten

FACTORED_BANK = "factor-bank"
"""The rule of the nodes that a factored bank becomes."""

_ATTENTION = aten.scaled_dot_product_attention.default
_PROJECTIONS: dict[Any, int] = {aten.linear.default: 1, aten.addmm.default: 2, aten.mm.default: 1}
_PROJECTIONS |= {aten.matmul.default: 1, aten.conv1d.default: 1, aten.conv2d.default: 1}


@dataclass(frozen=True)
class AttentionSite:
    """One attention call.

    Attributes:
        name: module path (`root` for the root), with `#n` from the second call there on.
        node: the call.
        path: module path within the program.
        kind: `"self"`, `"causal"` or `"cross"`.
        q: queries (B, H, Nq, D).
        k: keys (B, Hkv, Nk, D).
        v: values (B, Hkv, Nk, Dv).
        mask: the mask argument, or None.
        padding: what is left of the mask where causality is split off it, the whole mask where that
            is more than one factor; broadcasts to (B, H, Nq, Nk); boolean or additive.
        is_causal: by flag, or because constant factors of the mask drop all keys after their row;
            aligned at the first row.
        scale: of the scores.
        heads: H.
        shape: (B, H, Hkv, Nq, Nk, D, Dv); dynamic sizes as captured.
    """

    name: str
    node: fx.Node
    path: str
    kind: str
    q: fx.Node
    k: fx.Node
    v: fx.Node
    mask: fx.Node | None
    padding: fx.Node | None
    is_causal: bool
    scale: float
    heads: int
    shape: tuple[int, int, int, int, int, int, int]


@dataclass(frozen=True)
class LinearSite:
    """One linear map by a weight of the model.

    Attributes:
        name: module path, with `#n` from the second call in the same module on.
        node: the `aten.linear` call, that of a convolution over patches, or of a bank of experts.
        weight: name of the weight.
        shape: (m, n), output and input features, of one matrix where there are several.
        tokens: vectors that one call maps by each matrix, as captured.
        cut: how a convolution or a bank of experts reads vectors off it; None where they are its
            last axis.
    """

    name: str
    node: fx.Node
    weight: str
    shape: tuple[int, int]
    tokens: int
    cut: Patches | Bank | None = None

    @property
    def source(self) -> fx.Node:
        """What the call maps, as it is read by now: another site may have been replaced."""
        if isinstance(self.cut, Bank):
            return self.cut.contraction.x
        source = self.node.args[0]
        assert isinstance(source, fx.Node)
        return source

    @property
    def kind(self) -> str:
        """`"linear"`, `"patches"` or `"experts"`."""
        if self.cut is None:
            return "linear"
        return "patches" if isinstance(self.cut, Patches) else "experts"

    @property
    def experts(self) -> int | None:
        """Matrices of a bank; None: it is no bank."""
        return self.cut.experts if isinstance(self.cut, Bank) else None

    def matrix(self, program: Program) -> Tensor:
        """The weight as (m, n), that of a bank as (experts, m, n)."""
        if isinstance(self.cut, Bank):
            return self.cut.matrices()
        weight: Tensor = attribute(program.graph_module, self.weight)
        return weight.flatten(1)

    def vectors(self, x: Tensor) -> Tensor:
        """The vectors (tokens, n) of a value of the source, (experts, tokens, n) of a bank."""
        if self.cut is None:
            return x.flatten(0, -2)
        x = self.cut.cut(x)
        if not isinstance(self.cut, Bank):
            return x.flatten(0, -2)
        if not self.cut.is_shared:
            return x.flatten(1, -2)
        return x.flatten(0, -2).expand(self.cut.experts, -1, -1)

    def replaced(self, by: Callable[[fx.Node], fx.Node]) -> fx.Node:
        """Nodes with the output of the call, from another map of the same vectors."""
        if self.cut is None:
            return by(self.source)
        return self.cut.restore(by(self.cut.emit(self.source)), self.node)


def attention_sites(program: Program) -> list[AttentionSite]:
    """Every attention call on four-dimensional tensors, in graph order.

    Attention that was put under a static mask is no site any more, but counts for the names.
    """
    found: list[AttentionSite] = []
    names = _Names(program)
    # Layers share their masks, and reading one costs Nq * Nk.
    factors = functools.cache(functools.partial(mask_factors, program))
    for node in program.graph.nodes:
        if node.op == "call_function" and node.target in (_ATTENTION, _sparse_attention()):
            name = names.next(node)
            if node.target is _ATTENTION and _is_canonical(node):
                found.append(_attention_site(node, name, factors))
    return found


def _sparse_attention() -> Any:
    packet = getattr(torch.ops.fxpress, "sparse_attention", None)
    return packet.default if packet is not None else None


def _is_canonical(node: fx.Node) -> bool:
    q = node.args[0]
    assert isinstance(q, fx.Node)
    return bool(argument(node, 4, "dropout_p", 0.0) == 0.0 and q.meta["val"].ndim == 4)


class _Names:
    """Names by module path, counted: the same before and after a call is replaced."""

    def __init__(self, program: Program) -> None:
        self._region = program.path
        self._seen: Counter[str] = Counter()

    def next(self, node: fx.Node) -> str:
        parts = (self._region, module_path(node))
        path = ".".join(part for part in parts if part) or "root"
        self._seen[path] += 1
        return path if self._seen[path] == 1 else f"{path}#{self._seen[path]}"


def _attention_site(
    node: fx.Node, name: str, factors: Callable[[fx.Node, tuple[int, int]], MaskFactors]
) -> AttentionSite:
    q, k, v = (n for n in node.args[:3] if isinstance(n, fx.Node))
    mask, is_causal = argument(node, 3, "attn_mask"), bool(argument(node, 5, "is_causal", False))
    (batch, heads, queries, width), (_, kv_heads, keys, _) = sizes(q), sizes(k)
    scale: Any = node.kwargs.get("scale")
    padding = None
    if mask is not None and not is_causal:
        parts = factors(mask, (queries, keys))
        if parts.is_causal:
            is_causal = True
            padding = mask if len(parts.rest) > 1 else next(iter(parts.rest), None)
    return AttentionSite(
        name=name,
        node=node,
        path=module_path(node),
        kind=_kind(q, k, is_causal),
        q=q,
        k=k,
        v=v,
        mask=mask,
        padding=padding,
        is_causal=is_causal,
        scale=float(scale) if scale is not None else width**-0.5,
        heads=heads,
        shape=(batch, heads, kv_heads, queries, keys, width, sizes(v)[-1]),
    )


def _kind(q: fx.Node, k: fx.Node, is_causal: bool) -> str:
    if not _sources(q) & _sources(k):
        return "cross"
    return "causal" if is_causal else "self"


def _sources(node: fx.Node) -> set[Any]:
    """The sequences that a tensor was projected from; without a projection, the inputs."""
    projected: set[Any] = set()
    inputs: set[Any] = set()
    stack, seen = [node], set()
    while stack:
        top = stack.pop()
        if top in seen:
            continue
        seen.add(top)
        if (source := _projected(top)) is not None:
            projected.add(value_key(peel(source, RESHAPES)))  # computed twice it is the same
        elif top.op == "placeholder":
            inputs.add(top)
        else:
            stack += top.all_input_nodes
    return projected or inputs


def _projected(node: fx.Node) -> fx.Node | None:
    """The input of a product with a weight."""
    position = _PROJECTIONS.get(node.target) if node.op == "call_function" else None
    if position is None:
        return None
    source, weight = node.args[position - 1], node.args[position]
    assert isinstance(source, fx.Node)
    assert isinstance(weight, fx.Node)
    return source if peel(weight, RESHAPES).op == "get_attr" else None


def linear_sites(program: Program) -> list[LinearSite]:
    """Every linear map by a weight of the model, in graph order.

    That is every `aten.linear`, and every convolution over patches and bank of experts, which stay
    what they are for as long as nothing factors them. A map that was factored is no site any more,
    but counts for the names.
    """
    found: list[LinearSite] = []
    names, operators, banks = _Names(program), _factored_calls(), set()
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        if (bank := _factored_bank(node)) or node.target in operators:
            if bank not in banks:  # its nodes are many, and one call
                names.next(node)
            banks |= {bank} - {""}
        elif (map_ := _map(node, program)) is not None:
            site = replace(map_, name=names.next(node))
            if site.weight:
                found.append(site)
    return found


def _factored_calls() -> set[Any]:
    """What linear maps become, where those operators are defined."""
    packets = (getattr(torch.ops.fxpress, n, None) for n in ("vvma_linear", "low_rank_linear"))
    return {p.default for p in packets if p is not None}


def _factored_bank(node: fx.Node) -> str:
    """The site of the bank that a node is a part of, now that it is factored; "" of others."""
    made = node.meta.get("provenance")
    return made.site if made is not None and made.rule == FACTORED_BANK else ""


def _map(node: fx.Node, program: Program) -> LinearSite | None:
    """The linear map that a call is, without its name; without a weight where that is computed."""
    read = patches_of(node) or bank_of(node, program)
    cut = read if isinstance(read, (Patches, Bank)) else None
    if cut is None and node.target is not aten.linear.default:
        return None
    if isinstance(cut, Bank):
        weight = cut.contraction.weight.source
        m, n = cut.shape
    else:
        weight = node.args[1]  # type: ignore[assignment]
        m, *inner = sizes(weight)
        n = math.prod(inner)
    target = str(weight.target) if weight.op == "get_attr" else ""
    experts = cut.experts if isinstance(cut, Bank) else 1
    tokens = math.prod(sizes(node)) // (m * experts)
    return LinearSite("", node, target, (m, n), tokens, cut)
