"""Graph passes, one per file: a new pass is found by being there."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from typing import TYPE_CHECKING

from fxpress.passes.vvma_fit import VvmaFit, fit_vvma

if TYPE_CHECKING:
    from fxpress.rewrite import Pass

__all__ = ["VvmaFit", "all_passes", "fit_vvma"]


def all_passes() -> dict[str, type[Pass]]:
    """Every pass of this package by name, in the order of the names.

    A pass is a concrete class with `name` and `phase`, defined in a module of this package.
    """
    found: dict[str, type[Pass]] = {}
    for module in pkgutil.iter_modules(__path__, f"{__name__}."):
        for kind in vars(importlib.import_module(module.name)).values():
            if _is_pass(kind) and kind.__module__ == module.name:
                assert kind.name not in found, f"two passes are called {kind.name}"
                found[kind.name] = kind
    return dict(sorted(found.items()))


def _is_pass(kind: object) -> bool:
    from fxpress.rewrite import Pass

    concrete = inspect.isclass(kind) and issubclass(kind, Pass) and not inspect.isabstract(kind)
    return concrete and hasattr(kind, "name") and hasattr(kind, "phase")
