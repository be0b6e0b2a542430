"""The models of the zoo by name.

A module of this package offers a model by decorating its build function:

    @model("rum-lm", description=..., license=..., source=..., calibration=...)
    def rum_lm(pretrained: bool = False, **kwargs) -> nn.Module: ...

The decorator turns the function into an `Entry`; the registry finds it by looking through the
modules that lie beside this one, so a new file needs no list edited. A module may also
offer a tuple of entries.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, Protocol, TypeVar

from torch import nn

from fxpress import zoo
from fxpress.errors import FxpressError

__all__ = [
    "Entry",
    "Score",
    "UnknownModelError",
    "create_model",
    "entry",
    "list_models",
    "model",
    "offered",
]

Kind = TypeVar("Kind")


class UnknownModelError(FxpressError, ValueError):
    """The zoo has no model of that name."""


class Build(Protocol):
    """Make a model in eval mode; `pretrained=False` gives random weights, without a download."""

    def __call__(self, pretrained: bool = False, **kwargs: Any) -> nn.Module:
        """Build the model."""
        ...


class Calibration(Protocol):
    """Turn a user's file into at most `limit` batches; a small built-in sample if path is None."""

    def __call__(self, path: Path | None = None, limit: int = 32) -> list[Any]:
        """Read the batches."""
        ...


@dataclass(frozen=True)
class Score:
    """How a model that was trained elsewhere is scored; a recipe's has its objective's metrics.

    Attributes:
        task: what the model is asked, in words.
        data: what it is asked about, in words.
        headline: the metric to show where there is room for one.
        measure: the metrics of the trained model.
        baselines: the headline metric of what to compare it with.
    """

    task: str
    data: str
    headline: str
    measure: Callable[[Any], dict[str, float]]
    baselines: Callable[[], dict[str, float]] = dict


@dataclass(frozen=True)
class Entry:
    """One model of the zoo: how to build it, and how to make its calibration data."""

    name: str
    description: str
    license: str  # of the weights, where they are downloaded
    source: str  # the paper, and the package that holds the weights
    build: Build
    calibration: Calibration
    has_weights: bool = True  # False: there are only random ones
    score: Score | None = None  # of a model trained elsewhere


def model(
    name: str,
    *,
    description: str,
    license: str,  # noqa: A002
    source: str,
    calibration: Calibration,
    has_weights: bool = True,
    score: Score | None = None,
) -> Callable[[Build], Entry]:
    """Offer the decorated build function under `name`."""

    def offer(build: Build) -> Entry:
        return Entry(name, description, license, source, build, calibration, has_weights, score)

    return offer


@cache
def entries() -> dict[str, Entry]:
    """Every entry by name, in alphabetic order; imports the modules of the zoo."""
    return {e.name: e for e in sorted(offered(Entry), key=lambda e: e.name)}


def offered(kind: type[Kind]) -> list[Kind]:
    """What the modules of the zoo offer of a kind, one by one or in tuples; imports them."""
    names = [info.name for info in pkgutil.iter_modules(zoo.__path__)]
    modules = [importlib.import_module(f"{zoo.__name__}.{name}") for name in names]
    values = [value for m in modules for value in vars(m).values()]
    several = [value for value in values if isinstance(value, tuple)]
    return [v for v in (*values, *chain(*several)) if isinstance(v, kind)]


def list_models(pattern: str = "*") -> list[str]:
    """The names that match a shell-style pattern, such as ``"whisper*"``."""
    return [name for name in entries() if fnmatchcase(name, pattern)]


def entry(name: str) -> Entry:
    """The entry of that name.

    Raises:
        UnknownModelError: there is none; the message offers the nearest name.
    """
    if name in entries():
        return entries()[name]
    near = difflib.get_close_matches(name, entries(), n=1, cutoff=0.0)[0]
    raise UnknownModelError(
        f"the zoo has no model {name!r}: did you mean {near!r}? (fxpress.zoo.list_models() has all)"
    )


def create_model(name: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build a model of the zoo, in eval mode.

    Args:
        name: one of `list_models()`.
        pretrained: fetch the trained weights (once, into a cache), instead of a small model with
            random weights.
        **kwargs: what the model's build function takes, such as ``attn_implementation`` for
            transformers' models or sizes.

    Raises:
        UnknownModelError: the zoo has no such model.
        PretrainedError: there are no trained weights, or they could not be fetched or converted.
    """
    return entry(name).build(pretrained, **kwargs)
