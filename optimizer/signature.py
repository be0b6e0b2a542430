"""How a call of a module is bound to the flat inputs of its captured graph.

A call may spell the same arguments in many ways: by position, by keyword, with a default written
out. `Signature` brings them to one form, so that a graph captured from one spelling serves all.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

__all__ = ["Signature"]


def _is_default(parameter: inspect.Parameter, value: Any) -> bool:
    if value is parameter.default:
        return True
    plain = isinstance(value, (bool, int, float, str))
    return plain and type(value) is type(parameter.default) and value == parameter.default


@dataclass(frozen=True)
class Signature:
    """The original `forward` signature and the structure of the captured call."""

    python: inspect.Signature
    structure: Any

    @staticmethod
    def of(
        module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[Signature, tuple[Any, ...], dict[str, Any]]:
        """The signature of a module for one call, with that call in its canonical form.

        Raises:
            TypeError: the arguments do not fit the module's `forward`.
        """
        python = inspect.signature(module.forward)
        canonical = _canonical(python, args, kwargs)
        return Signature(python, pytree.tree_structure(canonical)), *canonical

    def flatten(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any] | str:
        """The flat inputs of a call, or why its structure is not the captured one."""
        try:
            canonical = _canonical(self.python, args, kwargs)
        except TypeError as error:
            return str(error)
        leaves, structure = pytree.tree_flatten(canonical)
        if structure != self.structure:
            return f"captured with the arguments {self.names()}, called with {_names(canonical)}"
        return leaves

    def unflatten(self, leaves: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The canonical call that flat inputs stand for."""
        args, kwargs = pytree.tree_unflatten(list(leaves), self.structure)
        return args, kwargs

    def names(self) -> list[str]:
        """Names of the captured arguments."""
        blank = pytree.tree_unflatten([None] * self.structure.num_leaves, self.structure)
        return _names(blank)


def _names(canonical: tuple[Any, ...]) -> list[str]:
    args, kwargs = canonical
    return [f"#{index}" for index in range(len(args))] + list(kwargs)


def _canonical(
    python: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments by keyword where `forward` allows it; written-out defaults dropped.

    A default that a tensor stands behind, or before further positional arguments, is kept.
    """
    bound = python.bind(*args, **kwargs)
    positional: list[Any] = []
    named: dict[str, Any] = {}
    by_position = any(
        python.parameters[name].kind is inspect.Parameter.VAR_POSITIONAL and value
        for name, value in bound.arguments.items()
    )
    for name, value in bound.arguments.items():
        parameter = python.parameters[name]
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            positional.extend(value)
        elif parameter.kind is inspect.Parameter.VAR_KEYWORD:
            named.update(value)
        elif parameter.kind is inspect.Parameter.POSITIONAL_ONLY or (
            by_position and parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        ):
            positional.append(value)
        elif isinstance(value, Tensor) or not _is_default(parameter, value):
            named[name] = value
    return tuple(positional), named
