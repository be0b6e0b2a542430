"""Every reason that a pass can decline for is met in some test."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Any


def _reason(call: ast.Call) -> ast.expr | None:
    """The reason that `Decline(reason, at=node)` is given."""
    by_name = [keyword.value for keyword in call.keywords if keyword.arg == "reason"]
    return next(iter([*call.args, *by_name]), None)


def _constant_prefix(reason: ast.expr) -> str:
    """The text of a reason up to its first placeholder."""
    head = reason.values[0] if isinstance(reason, ast.JoinedStr) else reason
    return str(head.value).rstrip() if isinstance(head, ast.Constant) else ""


def _reasons(source: Any) -> Iterator[tuple[str, str]]:
    """Yield place and constant prefix of each reason that a module spells out."""
    for node in ast.walk(source.tree):
        if not (isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Decline")):
            continue
        reason = _reason(node)
        branches = [reason.body, reason.orelse] if isinstance(reason, ast.IfExp) else [reason]
        for branch in branches:
            if isinstance(branch, ast.Constant | ast.JoinedStr):
                yield f"{source.path}:{node.lineno}", _constant_prefix(branch)


def test_every_decline_is_hit(sources: list[Any], test_sources: list[Any]) -> None:
    passes = [source for source in sources if source.folder == "passes"]
    reasons = [pair for source in passes for pair in _reasons(source)]
    texts = [node.value for source in test_sources for node in source.strings()]
    assert reasons, "no reason found: is it still spelled Decline(...)?"
    assert not [
        f"{place}: {prefix!r}" if prefix else f"{place}: a reason starts with constant text"
        for place, prefix in reasons
        if not prefix or not any(prefix in text for text in texts)
    ]
