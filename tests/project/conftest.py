"""The project's own source, parsed once for the tests that hold its rules."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {
    "optimizer": "fxpress",
    "passes": "fxpress.passes",
    "kernels": "fxpress.kernels",
    "zoo": "fxpress.zoo",
}


@dataclass(frozen=True)
class Source:
    """One module: where it lies, what it is imported as, and its syntax tree."""

    path: Path  # relative to the root
    module: str
    tree: ast.Module

    @property
    def folder(self) -> str:
        return self.path.parts[0]

    def docstrings(self) -> set[ast.expr]:
        """The string nodes that stand alone: docstrings and notes below attributes."""
        return {node.value for node in ast.walk(self.tree) if isinstance(node, ast.Expr)}

    def strings(self) -> list[ast.Constant]:
        """The string constants that are not docstrings."""
        prose = self.docstrings()
        constants = (node for node in ast.walk(self.tree) if isinstance(node, ast.Constant))
        return [node for node in constants if isinstance(node.value, str) and node not in prose]

    def imports(self) -> list[tuple[int, str]]:
        """Line and full name of every import; `from a import b` counts as a and as a.b."""
        found = []
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                found += [(node.lineno, alias.name) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{self.path}:{node.lineno}: relative import"
                found.append((node.lineno, node.module or ""))
                found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
        return found


def _parse(path: Path) -> Source:
    folder, *rest = path.relative_to(ROOT).with_suffix("").parts
    parts = [PACKAGES.get(folder, folder), *(part for part in rest if part != "__init__")]
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    return Source(path.relative_to(ROOT), ".".join(parts), tree)


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def sources() -> list[Source]:
    """Every module of the four folders."""
    return [_parse(path) for folder in PACKAGES for path in sorted((ROOT / folder).rglob("*.py"))]


@pytest.fixture(scope="session")
def test_sources() -> list[Source]:
    """Every module of the tests."""
    return [_parse(path) for path in sorted((ROOT / "tests").rglob("*.py"))]
