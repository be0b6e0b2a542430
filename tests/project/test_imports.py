"""Who may import what: zoo, passes and kernels build on the core, and it on none of them."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

UPPER = {"passes": "fxpress.passes", "kernels": "fxpress.kernels", "zoo": "fxpress.zoo"}
DOORS = {"api.py", "cli.py", "explain.py"}  # where the core meets what is built on it
LAZY = ["triton", "transformers", "datasets", "matplotlib", "jinja2", "typer", "rich"]


def _within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def _crossings(sources: list[Any], folder: str, packages: list[str]) -> Iterator[str]:
    """Name each import of one of `packages` by a module that lies in `folder`."""
    for source in sources:
        if source.folder != folder or source.path.name in DOORS:
            continue
        for line, name in source.imports():
            if any(_within(name, package) for package in packages):
                yield f"{source.path}:{line} imports {name}"


def test_core_imports_nothing_built_on_it(sources: list[Any]) -> None:
    assert not list(_crossings(sources, "optimizer", list(UPPER.values())))


@pytest.mark.parametrize("folder", UPPER)
def test_passes_kernels_and_zoo_import_only_the_core(sources: list[Any], folder: str) -> None:
    others = [package for name, package in UPPER.items() if name != folder]
    assert not list(_crossings(sources, folder, others))


def test_passes_know_no_triton(sources: list[Any]) -> None:
    assert not list(_crossings(sources, "passes", ["triton"]))


def _defines_pass(source: Any) -> bool:
    """Whether a class of the module states its `phase`, as each pass does."""
    bodies = [node.body for node in source.tree.body if isinstance(node, ast.ClassDef)]
    statements = [ast.unparse(node) for body in bodies for node in body]
    return any(text.startswith(("phase =", "phase:")) for text in statements)


def test_no_pass_imports_another(sources: list[Any]) -> None:
    passes = [s for s in sources if s.folder == "passes" and _defines_pass(s)]
    names = [source.module for source in passes]
    assert names, "no pass found: does each class still state its phase?"
    assert not [
        f"{source.path}:{line} imports {name}"
        for source in passes
        for line, name in source.imports()
        if name != source.module and name in names
    ]


def test_import_loads_nothing_heavy() -> None:
    script = "; ".join(
        [
            "import sys, torch, numpy, networkx, safetensors.torch",
            "before = set(sys.modules)",
            "import fxpress",
            f"print(*sorted(set({LAZY}) & (set(sys.modules) - before)))",
        ]
    )
    loaded = subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.PIPE)
    assert loaded.stdout.split() == []
