"""Generated kernels as text: hashed, cached in files, and imported from there.

Triton reads a kernel's source back from its file, so the file has to exist, and to hold exactly
what was generated: it lies in a folder of its owner's, under the hash of its text, and is compared
with the text before each import.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from fxpress.environment import cache_folder
from fxpress.errors import LoweringError

__all__ = ["KernelSource"]


@dataclass(frozen=True)
class KernelSource:
    """The text of a generated Triton module.

    Attributes:
        name: what it computes, as an identifier.
        text: a Python module that defines the function `kernel`.
        warps: warps of a program.
        stages: stages of the software pipeline.
    """

    name: str
    text: str
    warps: int
    stages: int

    @property
    def digest(self) -> str:
        """Hash of the text."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def load(self) -> ModuleType:
        """Import the module from the cache, writing it first where it is missing.

        Raises:
            LoweringError: if the cache folder belongs to, or can be written by, somebody else.
        """
        return _load(self.name, self.text, self.digest)

    def __str__(self) -> str:
        return self.text


def _owned_folder() -> Path:
    folder = cache_folder() / "kernels"
    folder.mkdir(mode=0o700, exist_ok=True)
    state = folder.stat()
    if state.st_uid != os.getuid() or state.st_mode & 0o022:
        raise LoweringError(
            f"{folder} is not yours alone to write: generated kernels are imported from there; "
            f"set FXPRESS_CACHE to a folder that is"
        )
    return folder


def _write(path: Path, text: str) -> None:
    """Write atomically: another process may be importing the same kernel."""
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(name).replace(path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            Path(name).unlink()


@functools.cache
def _load(name: str, text: str, digest: str) -> ModuleType:
    path = _owned_folder() / f"{name}_{digest[:20]}.py"
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        _write(path, text)
    spec = importlib.util.spec_from_file_location(f"fxpress_generated_{name}_{digest[:20]}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
