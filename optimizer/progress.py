"""Progress of long work: silent by default, bars where rich and a terminal are there."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["Progress", "progress_for"]


class Progress:
    """Silent progress; the base of those that show something."""

    @contextlib.contextmanager
    def step(self, title: str, total: int | None = None) -> Iterator[Callable[[], None]]:
        """One piece of work of `total` units; call what is yielded after each."""
        del title, total
        yield lambda: None


class _CallbackProgress(Progress):
    """Reports `(title, done, total)` to a callable."""

    def __init__(self, callback: Callable[[str, int, int | None], Any]) -> None:
        self._callback = callback

    @contextlib.contextmanager
    def step(self, title: str, total: int | None = None) -> Iterator[Callable[[], None]]:
        """Report the start and every unit."""
        done = 0

        def advance() -> None:
            nonlocal done
            done += 1
            self._callback(title, done, total)

        self._callback(title, 0, total)
        yield advance


class _BarProgress(Progress):
    """Bars on standard error."""

    @contextlib.contextmanager
    def step(self, title: str, total: int | None = None) -> Iterator[Callable[[], None]]:
        """Show a bar for as long as the work lasts."""
        from rich.console import Console
        from rich.progress import Progress as Bars

        with Bars(console=Console(stderr=True), transient=True) as bars:
            task = bars.add_task(title, total=total)
            yield lambda: bars.advance(task)


def progress_for(wish: Any) -> Progress:
    """Progress as asked for.

    Args:
        wish: None: bars if standard error is a terminal and rich is installed; False: silent;
            True: bars; a callable `(title, done, total)`: called at each unit.
    """
    if callable(wish):
        return _CallbackProgress(wish)
    if wish is None:
        wish = sys.stderr.isatty() and _has_rich()
    return _BarProgress() if wish else Progress()


def _has_rich() -> bool:
    import importlib.util

    return importlib.util.find_spec("rich") is not None
