"""`fxpress zoo train`, `eval` and `show`: progress to standard error, scores as a table."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from fxpress.cli_tables import table

__all__ = ["progress", "render_scores"]


def progress(recipe: Any) -> Callable[[Any], None]:
    """A line after each evaluation of a training run."""

    def tell(state: Any) -> None:
        last = state.history[-1]
        left = state.seconds / state.step * (recipe.steps - state.step)
        print(
            f"{recipe.name}: step {state.step} of {recipe.steps}, loss {last['train']:.4f}, "
            f"held out {last['valid']:.4f}, {state.seconds:.0f} s, {left:.0f} s left",
            file=sys.stderr,
        )

    return tell


def render_scores(found: Mapping[str, Any]) -> str:
    """Scores, and what to compare them with."""
    rows = [[name, f"{value:.4f}"] for name, value in found["scores"].items()]
    others = [[f"({name})", f"{value:.4f}"] for name, value in found["baselines"].items()]
    return table([["score on the test data", ""], *rows, *others])
