"""What is built is what lies in the four folders."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def settings(root: Path) -> dict[str, Any]:
    text = (root / "pyproject.toml").read_text(encoding="utf-8")
    settings: dict[str, Any] = tomllib.loads(text)["tool"]["setuptools"]
    return settings


@pytest.fixture(scope="module")
def folders(settings: dict[str, Any]) -> dict[str, str]:
    """Folder of the repository -> package it is imported as."""
    return {folder: package for package, folder in settings["package-dir"].items()}


def test_listed_packages_are_those_on_disk(
    root: Path, settings: dict[str, Any], folders: dict[str, str]
) -> None:
    on_disk = {
        ".".join([package, *init.parent.relative_to(root / folder).parts])
        for folder, package in folders.items()
        for init in (root / folder).rglob("__init__.py")
    }
    assert on_disk == set(settings["packages"])


def test_no_subpackage_lies_in_two_places(root: Path, folders: dict[str, str]) -> None:
    assert not [name for name in folders if (root / "optimizer" / name).exists()]


def test_wheel_holds_every_file_of_the_packages(
    root: Path, folders: dict[str, str], tmp_path: Path
) -> None:
    copy = tmp_path / "source"  # the build leaves folders behind, and reads those of the last one
    for folder in folders:
        shutil.copytree(
            root / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__", "*.md")
        )
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        if (root / name).exists():
            shutil.copy(root / name, copy)
    expected = {
        "/".join([*package.split("."), *path.relative_to(copy / folder).parts])
        for folder, package in folders.items()
        for path in (copy / folder).rglob("*")
        if path.is_file()
    }

    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", tmp_path, copy], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}

    assert "fxpress/py.typed" in names
    assert names == expected
