"""Objects that hold tensors, made known to `torch.utils._pytree`.

Export takes and returns tensors in known containers only. A dataclass, a cache or any other object
with a `__dict__` is one as well: its attributes that hold tensors are what it contains, all others
describe it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

__all__ = ["register_containers"]

_PLAIN = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device, type)


@dataclass(frozen=True, eq=False)
class _Shell:
    """An object without its tensors.

    Attributes:
        kind: its class.
        held: names of the attributes that hold tensors.
        rest: all other attributes, by name.
    """

    kind: type
    held: tuple[str, ...]
    rest: dict[str, Any]

    def __eq__(self, other: object) -> bool:
        """Equal in class, names and plain values; what is not plain says nothing about a graph."""
        if not isinstance(other, _Shell):
            return NotImplemented
        mine, theirs = (
            {name: value for name, value in shell.rest.items() if isinstance(value, _PLAIN)}
            for shell in (self, other)
        )
        return (self.kind, self.held, mine) == (other.kind, other.held, theirs)

    def __hash__(self) -> int:
        """As far as it is the same for equal shells."""
        return hash((self.kind, self.held))


def register_containers(value: Any) -> bool:
    """Make every class known whose objects hold tensors in a value; whether there was any.

    Args:
        value: arguments or outputs of a call, nested in any way.
    """
    found = False
    while unknown := {type(leaf) for leaf in pytree.tree_leaves(value) if _holds_tensors(leaf)}:
        for kind in unknown:
            pytree.register_pytree_node(
                kind, _flatten, _unflatten, flatten_with_keys_fn=_flatten_with_keys
            )
        found = True
    return found


def _holds_tensors(leaf: Any) -> bool:
    """Whether a leaf is an object that contains tensors, at any depth."""
    waiting, seen = [leaf], set()
    while waiting:
        top = waiting.pop()
        if id(top) in seen or not _is_object(top):
            continue
        seen.add(id(top))
        for value in _attributes(top):
            if isinstance(value, Tensor):
                return True
            waiting.append(value)
    return False


def _is_object(value: Any) -> bool:
    known = (Tensor, nn.Module, *_PLAIN)
    return hasattr(value, "__dict__") and not isinstance(value, known) and not callable(value)


def _attributes(value: Any) -> Iterator[Any]:
    for attribute in vars(value).values():
        yield from pytree.tree_leaves(attribute)


def _flatten(value: Any) -> tuple[list[Any], _Shell]:
    held = tuple(
        name
        for name, attribute in vars(value).items()
        if any(isinstance(x, Tensor) or _holds_tensors(x) for x in pytree.tree_leaves(attribute))
    )
    rest = {name: attribute for name, attribute in vars(value).items() if name not in held}
    return [vars(value)[name] for name in held], _Shell(type(value), held, rest)


def _unflatten(children: Any, shell: _Shell) -> Any:
    value: Any = object.__new__(shell.kind)
    value.__dict__.update(shell.rest)
    value.__dict__.update(zip(shell.held, children, strict=True))
    return value


def _flatten_with_keys(value: Any) -> tuple[list[tuple[Any, Any]], _Shell]:
    children, shell = _flatten(value)
    keys = [pytree.GetAttrKey(name) for name in shell.held]
    return list(zip(keys, children, strict=True)), shell
