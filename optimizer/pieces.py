"""Tensors that a loop of Python puts together piece by piece, as one `stack` or `cat`.

    y = empty(...); y[:, 0] = a; y[:, 1] = b    ->  stack([a, b], 1)     every place is written
    cat([cat([a, b], 1), c], 1)                 ->  cat([a, b, c], 1)

What is read back from such a tensor is what was written there. Nothing is computed otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from fxpress.program import is_contiguous, same_sizes

__all__ = ["join_pieces"]

aten = torch.ops.aten

_SCATTERS = {aten.select_scatter.default, aten.slice_scatter.default}
_READS = {aten.select.int, aten.slice.Tensor}


def join_pieces(graph: fx.Graph) -> None:
    """Rewrite a graph in place; what nothing reads any more is left to the caller."""
    for node in list(graph.nodes):
        if node.target in _READS:
            _read_back(node)
        elif node.target in _SCATTERS and all(user.target not in _SCATTERS for user in node.users):
            _join_written(node)
        elif node.target is aten.cat.default:
            _flatten(node)


@dataclass(frozen=True)
class _Piece:
    """One place of a tensor that is read or written.

    Attributes:
        base: the tensor.
        form: the dimension, and whether a slice of width one keeps it.
        index: where along it.
        value: what is written, or None.
    """

    base: fx.Node
    form: tuple[int, bool]
    index: int
    value: fx.Node | None = None


def _piece(node: fx.Node) -> _Piece | None:
    """The place that a node reads or writes; None where it is not a single one."""
    kept = node.target in (aten.slice.Tensor, aten.slice_scatter.default)
    base, *rest = node.args
    value = rest.pop(0) if node.target in _SCATTERS else None
    numbers = [number for number in rest if type(number) is int]
    if not isinstance(base, fx.Node) or node.kwargs or len(numbers) != len(rest):
        return None
    shape = base.meta["val"].shape
    if len(numbers) < 2 + kept or type(count := shape[numbers[0]]) is not int or not count:
        return None
    dim, index, *end = numbers
    if kept and (
        range(count)[index : end[0]] != range(count)[index:][:1] or end[1:] not in ([], [1])
    ):
        return None
    found = _source(value) if isinstance(value, fx.Node) else None
    return _Piece(base, (dim % len(shape), kept), index % count, found)


def _source(value: fx.Node) -> fx.Node:
    """What is written, where it was copied into a place of its own shape and type."""
    copied = value.args[1] if value.target is aten.copy.default else None
    return copied if isinstance(copied, fx.Node) and _alike(copied, value) else value


def _alike(a: fx.Node, b: fx.Node) -> bool:
    mine, other = a.meta["val"], b.meta["val"]
    return bool(mine.dtype == other.dtype) and same_sizes(mine, other)


def _written(node: fx.Node, form: tuple[int, bool]) -> Iterator[_Piece]:
    """What was written in places of one form, the last first; at its end, what was there before."""
    while node.target in _SCATTERS and (piece := _piece(node)) and piece.form == form:
        yield piece
        node = piece.base


def _read_back(node: fx.Node) -> None:
    """Read what was written: select(select_scatter(y, a, 1, t), 1, t)  ->  a."""
    only_place = all(n.target is aten.copy.default and n.args[1] is not node for n in node.users)
    read = None if only_place else _piece(node)
    if read is None:
        return
    for piece in _written(read.base, read.form):
        if piece.index == read.index:
            assert piece.value is not None
            node.replace_all_uses_with(piece.value)
            return


def _join_written(last: fx.Node) -> None:
    """Replace writes that leave nothing of what was there before."""
    piece = _piece(last)
    if piece is None or not is_contiguous(last.meta["val"]):
        return
    values: dict[int, fx.Node | None] = {}
    for written in _written(last, piece.form):
        values.setdefault(written.index, written.value)
    dim, kept = piece.form
    if len(values) != last.meta["val"].shape[dim]:
        return
    pieces = [values[at] for at in range(len(values))]
    if any(n.meta["val"].dtype != last.meta["val"].dtype for n in pieces if n is not None):
        return
    with last.graph.inserting_before(last):
        target = aten.cat.default if kept else aten.stack.default
        joined = last.graph.call_function(target, (pieces, dim))
    joined.meta = dict(last.meta)
    last.replace_all_uses_with(joined)


def _flatten(node: fx.Node) -> None:
    """Join at once, without what is empty: cat([cat([a, b]), c])  ->  cat([a, b, c])."""
    dim, flat = _dimension(node), list[fx.Node]()
    for piece in node.args[0]:  # type: ignore[union-attr]
        assert isinstance(piece, fx.Node)
        single = piece.target is aten.cat.default and len(piece.users) == 1
        if single and piece.meta["val"].ndim == node.meta["val"].ndim and _dimension(piece) == dim:
            flat += piece.args[0]  # type: ignore[arg-type]
        else:
            flat.append(piece)
    some = [piece for piece in flat if not _is_empty(piece, dim, node.meta["val"].dtype)]
    if some and some != node.args[0]:
        node.args, node.kwargs = (some, dim), {}


def _is_empty(piece: fx.Node, dim: int, dtype: torch.dtype) -> bool:
    held = piece.meta["val"]
    return held.dtype == dtype and (list(held.shape) == [0] or str(held.shape[dim]) == "0")


def _dimension(node: fx.Node) -> int:
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    assert isinstance(dim, int)
    return int(dim % node.meta["val"].ndim)
