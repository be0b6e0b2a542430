"""How the command line prints: tables, and JSON alone where that was asked for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

__all__ = ["show", "table"]


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of equal length, the first the header, in columns."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def show(facts: Any, text: Any, as_json: bool) -> None:
    """Print facts as JSON, or else the text made of them."""
    print(json.dumps(facts, indent=1) if as_json else text)
