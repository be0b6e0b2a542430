"""Training recipes: one YAML file in `recipes/` each, data and nothing else.

A recipe says what is trained on what and how. Its `reduced` section overrides it, one level deep,
for a run of minutes on two CPU cores.
"""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fxpress.errors import FxpressError

__all__ = ["Recipe", "RecipeError", "list_recipes", "load", "parse"]

FOLDER = Path(__file__).parent / "recipes"
OPTIMIZERS = ("adamw", "rmsprop")
STORED = ("float32", "float16")


class RecipeError(FxpressError, ValueError):
    """A recipe that does not exist, or that says what cannot be."""


@dataclass(frozen=True)
class Recipe:
    """How a model is trained; everything that a run's result depends on, but the data's bytes."""

    name: str
    description: str
    source: str  # the paper
    task: str  # the name of an objective of the zoo
    data: dict[str, Any]  # what that task takes
    model: dict[str, Any]  # the name of a model of the zoo, and its sizes
    batch: int  # sequences of a step
    steps: int
    evaluate_every: int  # steps; a checkpoint is written as often
    optimizer: str
    learning_rate: float  # its highest: it rises for `warmup` steps and falls as a cosine to 0
    warmup: int = 0  # steps
    weight_decay: float = 0.0
    clip: float = 1.0  # largest norm of the gradient
    label_smoothing: float = 0.0  # in training only
    seed: int = 0
    stored: str = "float32"  # the type of the weights that are written, and that the scores are of
    reduced: bool = False

    def __post_init__(self) -> None:
        for key in ("batch", "steps", "evaluate_every", "learning_rate", "clip"):
            if getattr(self, key) <= 0:
                raise RecipeError(f"{self.name}: {key} is {getattr(self, key)}: it must be above 0")
        if not 0 <= self.label_smoothing < 1:
            raise RecipeError(f"{self.name}: label_smoothing must be from 0 to 1, 1 left out")
        if self.optimizer not in OPTIMIZERS:
            names = ", ".join(OPTIMIZERS)
            raise RecipeError(f"{self.name}: optimizer is {self.optimizer!r}: give one of {names}")
        if self.stored not in STORED:
            raise RecipeError(f"{self.name}: stored is {self.stored!r}: give {' or '.join(STORED)}")
        if "name" not in self.model:
            raise RecipeError(f"{self.name}: model needs a name, one of fxpress.zoo.list_models()")


def list_recipes() -> list[str]:
    """The names, in alphabetic order."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load(name: str, *, reduced: bool = False) -> Recipe:
    """The recipe of that name, or its reduced form.

    Raises:
        RecipeError: there is none (the message offers the nearest name), or it is malformed.
    """
    import yaml

    if name not in list_recipes():
        near = difflib.get_close_matches(name, list_recipes(), n=1, cutoff=0.0)[0]
        raise RecipeError(f"the zoo has no recipe {name!r}: did you mean {near!r}?")
    text = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    return parse(name, yaml.safe_load(text), reduced=reduced)


def parse(name: str, fields: dict[str, Any], *, reduced: bool = False) -> Recipe:
    """A recipe from what its file says.

    Raises:
        RecipeError: a field is unknown, missing, of another type or out of its range.
    """
    full = {key: value for key, value in fields.items() if key != "reduced"}
    changes = fields.get("reduced", {}) if reduced else {}
    merged = full | {
        key: full.get(key, {}) | value if isinstance(value, dict) else value
        for key, value in changes.items()
    }
    return Recipe(**_checked(name, merged | {"name": name, "reduced": reduced}))


def _checked(name: str, fields: dict[str, Any]) -> dict[str, Any]:
    """The fields, of which each is known, of its type, and none that is needed is missing."""
    known = {field.name: field for field in dataclasses.fields(Recipe)}
    if unknown := sorted(fields.keys() - known.keys()):
        raise RecipeError(f"{name}: unknown field {unknown[0]!r}: there are {', '.join(known)}")
    needed = {n for n, field in known.items() if field.default is dataclasses.MISSING}
    if missing := sorted(needed - fields.keys()):
        raise RecipeError(f"{name}: {', '.join(missing)} is missing")
    for key, value in fields.items():
        kind = str(known[key].type).partition("[")[0]
        accepted = ("float", "int") if kind == "float" else (kind,)
        if type(value).__name__ not in accepted:
            raise RecipeError(f"{name}: {key} is {value!r}: give a value of type {kind}")
    return fields
