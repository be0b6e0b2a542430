"""What the tests of artifacts share: a saved model, and the means of somebody who alters it."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parent.parent / "optimizer"))

from models import batches, stack

import fxpress


def canonical(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Altered:
    """The files of an artifact, to be changed and written back, with or without new seals.

    Sealed as docs/artifact.md describes it, by no code of fxpress.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.is_zip = path.suffix == ".zip"
        if self.is_zip:
            with zipfile.ZipFile(path) as archive:
                self.files = {name: archive.read(name) for name in archive.namelist()}
        else:
            self.files = {file.name: file.read_bytes() for file in path.iterdir()}

    def json(self, name: str) -> Any:
        return json.loads(self.files[name])

    def edit(self, name: str, change: Callable[[Any], Any]) -> None:
        """Change a JSON file in place and seal everything again."""
        value = self.json(name)
        change(value)
        self.files[name] = canonical(value)
        self.seal()

    def seal(self, **manifest: Any) -> None:
        """Write back with a manifest of the files as they are, some of its fields replaced."""
        old = self.json("manifest.json")
        entries = {
            name: {"bytes": len(data), "sha256": sha256(data)}
            for name, data in sorted(self.files.items())
            if name != "manifest.json"
        }
        content = {"schema": old["schema"], "fxpress": old["fxpress"], "files": entries} | manifest
        self.files["manifest.json"] = canonical(content | {"sha256": sha256(canonical(content))})
        self.write()

    def write(self) -> None:
        """Write the files as they are."""
        if self.is_zip:
            with zipfile.ZipFile(self.path, "w") as archive:
                for name, data in self.files.items():
                    archive.writestr(name, data)
            self.seal_zip()
            return
        shutil.rmtree(self.path)
        self.path.mkdir()
        for name, data in self.files.items():
            (self.path / name).write_bytes(data)

    def seal_zip(self) -> None:
        """Give the zip the comment that its bytes call for."""
        with zipfile.ZipFile(self.path, "a") as archive:
            archive.comment = b"sha256:" + b"0" * 64
        data = self.path.read_bytes()[:-64]
        self.path.write_bytes(data + sha256(data).encode())


@pytest.fixture(scope="session")
def optimized() -> fxpress.OptimizedModule:
    """Two pruned layers of attention."""
    config = {"prune-attention": {"pruned": 0.5, "block": 16}}
    return fxpress.optimize(stack(2).eval(), batches(), judge="off", config=config)


@pytest.fixture(scope="session")
def alter() -> type[Altered]:
    """Open an artifact to alter it."""
    return Altered


@pytest.fixture(params=["folder", "zip"])
def saved(
    request: pytest.FixtureRequest, optimized: fxpress.OptimizedModule, tmp_path: Path
) -> Altered:
    """The artifact of that model, to be altered."""
    name = "model.zip" if request.param == "zip" else "model.fxpress"
    return Altered(optimized.save(tmp_path / name))
