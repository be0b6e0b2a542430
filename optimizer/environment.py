"""The one module that reads the environment.

| variable | meaning |
|---|---|
| `FXPRESS_DEBUG` | 1: tracebacks, reports; 2: rule counts; 3: graphs between passes; 4: kernels |
| `FXPRESS_DUMP` | folder that receives graphs and kernels as files |
| `FXPRESS_FUEL` | apply only the first n rewrites (bisection) |
| `FXPRESS_CACHE` | folder for generated kernels and converted models; default `~/.cache/fxpress` |
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from fxpress.errors import PlanError

__all__ = ["cache_folder", "debug_level", "dump_folder", "fuel", "limited_fuel"]


def _whole_number(name: str) -> int | None:
    text = os.environ.get(name, "").strip()
    if not text:
        return None
    if not text.isdigit():
        raise PlanError(f"{name} is {text!r}: set it to a whole number, or unset it")
    return int(text)


def debug_level() -> int:
    """The level of `FXPRESS_DEBUG`; 0 where it is unset."""
    return _whole_number("FXPRESS_DEBUG") or 0


def fuel() -> int | None:
    """How many rewrites may be applied in all; None: no limit."""
    return _whole_number("FXPRESS_FUEL")


@contextlib.contextmanager
def limited_fuel(units: int) -> Iterator[None]:
    """Let runs that begin within apply only the first `units` rewrites, by `FXPRESS_FUEL`."""
    before = os.environ.get("FXPRESS_FUEL")
    os.environ["FXPRESS_FUEL"] = str(units)
    try:
        yield
    finally:
        if before is None:
            del os.environ["FXPRESS_FUEL"]
        else:
            os.environ["FXPRESS_FUEL"] = before


def dump_folder() -> Path | None:
    """The folder that graphs and kernels are written to, or None."""
    text = os.environ.get("FXPRESS_DUMP", "").strip()
    return Path(text) if text else None


def cache_folder() -> Path:
    """The folder of generated kernels and converted models, made for its owner only."""
    text = os.environ.get("FXPRESS_CACHE", "").strip()
    folder = Path(text) if text else Path.home() / ".cache" / "fxpress"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder
