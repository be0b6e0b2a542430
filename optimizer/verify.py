"""The invariants of a program, checked after every pass.

Valid in, valid out: a lint-clean graph with fresh metadata, no mutation, no new aliasing between
inputs and outputs, the original output structure, and provenance on every node that a pass made.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxpress.errors import VerifyError
from fxpress.program import Program, attribute, format_node

__all__ = ["mutates", "verify"]

_AROUND = 4


def verify(program: Program, after: str = "capture", before: Program | None = None) -> None:
    """Check every invariant.

    Args:
        program: the program to check.
        after: name of the pass to blame.
        before: the program as the pass found it; with it, the output structure must be unchanged.

    Raises:
        VerifyError: naming the pass and the invariant, with the graph around the fault.
    """
    try:
        program.graph.lint()
    except RuntimeError as error:
        raise VerifyError(f"after {after}: the graph is not well-formed: {error}") from error
    for node in program.graph.nodes:
        if fault := _node_fault(program, node):
            raise VerifyError(f"after {after}: {fault}\n{_around(program, node)}")
    if before is not None:
        _check_outputs(program, before, after)


def _node_fault(program: Program, node: fx.Node) -> str:
    if node.op in ("call_module", "call_method"):
        return f"{node.name} is a {node.op}: only operators and get_attr are allowed"
    if node.op == "get_attr" and not hasattr_path(program, str(node.target)):
        return f"{node.name} reads {node.target}, which the program does not hold"
    if node.op != "output" and "val" not in node.meta:
        return f"{node.name} has no metadata (shape, dtype)"
    if mutates(node) and not node.meta.get("epilogue"):
        return f"{node.name} mutates its input"
    return ""


def hasattr_path(program: Program, target: str) -> bool:
    """Whether a `get_attr` target resolves."""
    try:
        attribute(program.graph_module, target)
    except AttributeError:
        return False
    return True


def mutates(node: fx.Node) -> bool:
    """Whether a node calls an operator that writes into an input."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _leaves(program: Program) -> list[Any]:
    output = next(n for n in reversed(program.graph.nodes) if n.op == "output")
    return pytree.tree_leaves(output.args[0])


def _describe(leaf: Any) -> Any:
    if not isinstance(leaf, fx.Node):
        return leaf
    value = leaf.meta.get("val")
    return (value.dtype, value.ndim) if isinstance(value, Tensor) else type(value)


def _passes_through(leaves: list[Any]) -> list[bool]:
    return [isinstance(leaf, fx.Node) and leaf.op == "placeholder" for leaf in leaves]


def _check_outputs(program: Program, before: Program, after: str) -> None:
    now, then = _leaves(program), _leaves(before)
    if [_describe(leaf) for leaf in now] != [_describe(leaf) for leaf in then]:
        raise VerifyError(f"after {after}: the outputs changed: {then} became {now}")
    if _passes_through(now) != _passes_through(then):
        raise VerifyError(f"after {after}: an output is now an input itself (new aliasing)")


def _around(program: Program, node: fx.Node) -> str:
    nodes = list(program.graph.nodes)
    at = nodes.index(node)
    shown = nodes[max(0, at - _AROUND) : at + _AROUND + 1]
    return "\n".join(("--> " if n is node else "    ") + format_node(n) for n in shown)
