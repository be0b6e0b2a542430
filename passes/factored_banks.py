"""A bank of linear maps in factored form, one set of factors for each expert.

    low rank   y_e = U_e (D_e x_e)
    vvma       y_ei = sum_t M_et z_eti,    z_eti = sum_j v_etij * x_ej

Each stage is one einsum over all experts, where a call for each expert would cost as many launches
as there are. Cores may be those of all experts (share="layer"). The notation is that of
`fxpress.ops.vvma_linear`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

__all__ = ["factored_bank"]

aten = torch.ops.aten


def factored_bank(
    x: fx.Node, factors: Sequence[fx.Node], ranks: Sequence[int], sizes: Sequence[int], shared: bool
) -> fx.Node:
    """The outputs (E, ..., m) of a factored bank.

    Args:
        x: (E, ..., n), or (..., n) where all experts map the same vectors.
        factors: down (E, r, n) and up (E, m, r), or core (E, r, k, k), (E, p, r, k, k) or, of all
            experts, (r, k, k), and vectors (E, r, p, q, k).
        ranks: numbers of dimensions of the factors.
        sizes: (m, n), and k where there is one.
        shared: whether all experts map the same vectors.
    """
    graph, (first, second), (m, n) = x.graph, factors, sizes[:2]
    given = "" if shared else "e"
    if ranks[1] == 3:
        down = _einsum(graph, f"{given}...n,ern->e...r", x, first)
        return _einsum(graph, "e...r,emr->e...m", down, second)
    block = sizes[2]
    if missing := -n % block:
        x = graph.call_function(aten.constant_pad_nd.default, (x, [0, missing]))
    x = graph.call_function(aten.unflatten.int, (x, -1, [(n + missing) // block, block]))
    z = _einsum(graph, f"{given}...qc,erpqc->e...rpc", x, second)
    core = {3: "rac", 4: "erac", 5: "eprac"}[ranks[0]]
    y = _einsum(graph, f"e...rpc,{core}->e...pa", z, first)
    y = graph.call_function(aten.flatten.using_ints, (y, -2, -1))
    return graph.call_function(aten.slice.Tensor, (y, -1, 0, m)) if m % block else y


def _einsum(graph: fx.Graph, equation: str, *operands: fx.Node) -> fx.Node:
    return graph.call_function(aten.einsum.default, (equation, list(operands)))
