"""Lay a checkout's packages out as a tree of symlinks under the names they are imported by.

Type checkers cannot follow an editable install's import hook, and `tools/replay.py` must import the
packages of a commit that is not installed. Both need a folder that holds `fxpress/`:

    .typing/fxpress/graph.py  ->  optimizer/graph.py
    .typing/fxpress/ops       ->  optimizer/ops
    .typing/fxpress/passes    ->  passes

The mapping is read from `[tool.setuptools.package-dir]`, so it stands in one place.
"""

from __future__ import annotations

import argparse
import shutil
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def package_folders(root: Path) -> dict[str, Path]:
    """Return import name -> folder, parents first, as `root`'s pyproject.toml states it."""
    settings = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    mapping: dict[str, str] = settings["tool"]["setuptools"]["package-dir"]
    return {name: root / mapping[name] for name in sorted(mapping)}


def lay_tree(root: Path, tree: Path) -> None:
    """Replace `tree` by symlinks to the packages of the checkout at `root`.

    A package that has sub-packages elsewhere becomes a real folder of links, for its sub-packages
    to stand in; links to whole folders do for the rest.
    """
    shutil.rmtree(tree, ignore_errors=True)
    folders = package_folders(root)
    for name, folder in folders.items():
        target = tree.joinpath(*name.split("."))
        target.parent.mkdir(parents=True, exist_ok=True)
        if any(other.startswith(f"{name}.") for other in folders):
            target.mkdir()
            for entry in folder.iterdir():
                (target / entry.name).symlink_to(entry)
        else:
            target.symlink_to(folder)


def main() -> None:
    """Lay out `.typing/` for the checkout this script stands in."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout to lay out")
    parser.add_argument("--tree", type=Path, default=ROOT / ".typing", help="the folder to write")
    arguments = parser.parse_args()
    lay_tree(arguments.root.resolve(), arguments.tree)


if __name__ == "__main__":
    main()
