"""Debian packages and their descriptions, without root and without touching the system's state.

apt runs with lists and a cache of its own. It reads the sources that the machine already has, so no
address is written here.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fxpress.zoo.pretrained import DownloadError

__all__ = ["Apt", "Description", "deb_members"]


@dataclass(frozen=True)
class Description:
    """A package's description in one language."""

    package: str
    md5: str  # of the English text: joins the languages
    synopsis: str
    lines: tuple[str, ...]  # the long text; a line "." separates paragraphs

    def paragraphs(self) -> list[str]:
        """The long text, one string per paragraph, line breaks and list indents undone."""
        blocks: list[list[str]] = [[]]
        for line in self.lines:
            if line.strip() == ".":
                blocks.append([])
            else:
                blocks[-1].append(line.strip())
        return [" ".join(b) for b in blocks if b]

    def text(self) -> str:
        """The long text in one line."""
        return " ".join(self.paragraphs())


class Apt:
    """A private view of the machine's Debian sources.

    Args:
        folder: where lists and packages are kept.
        languages: of the descriptions.

    Raises:
        DownloadError: apt is missing, or fails.
    """

    def __init__(self, folder: Path, languages: tuple[str, ...] = ("en",)) -> None:
        for tool in ("apt-get", "apt-config", "dpkg-deb"):
            if not shutil.which(tool):
                raise DownloadError(f"{tool} is not installed: this needs a Debian system")
        root = folder.absolute() / "apt"
        self._lists, self._debs = root / "lists", root / "debs"
        for needed in (self._lists / "partial", root / "cache/archives/partial", self._debs):
            needed.mkdir(parents=True, exist_ok=True)
        # Given on the command line, because the machine's own configuration would win over a file.
        self._options = [
            f"-oDir::State::Lists={self._lists}",
            f"-oDir::Cache={root / 'cache'}",
            f"-oAcquire::Languages={','.join(languages)}",
            "-oAPT::Sandbox::User=root",  # the private folders need not be open to user _apt
        ]
        _run(["apt-get", *self._options, "update"])

    def index(self, kind: str, language: str = "") -> str:
        """The text of Debian's own main index of that kind, point releases in, updates out."""
        wanted = ["Component: main", "Origin: Debian", f"Identifier: {kind}"]
        wanted += [f"Language: {language}"] if language else []
        form = ["--format", "$(CODENAME) $(FILENAME)"]
        listed = _run(["apt-get", *self._options, "indextargets", *form, *wanted])
        names = [x.split(" ", 1) for x in listed.splitlines()]
        paths = [path for release, path in names if "-" not in release]
        if not paths:
            raise DownloadError(f"the machine's Debian sources offer no {kind} {language}".rstrip())
        shell = _run(["apt-config", "shell", "D", "Dir::Bin::methods/d"])
        helper = Path(shell.split("'")[1]).parent / "apt-helper"  # reads any compression
        return _run([str(helper), "cat-file", paths[0]])

    def descriptions(self, language: str) -> dict[tuple[str, str], Description]:
        """The descriptions in one language, by (package, md5), in the index's order."""
        found = {}
        head = rf"Package: (\S+)\nDescription-md5: (\w+)\nDescription-{language}: (.*)"
        stanza = re.compile(rf"^{head}((?:\n .*)*)", re.MULTILINE)
        for package, md5, synopsis, long in stanza.findall(self.index("Translations", language)):
            lines = tuple(x[1:] for x in long.split("\n")[1:])
            found[package, md5] = Description(package, md5, synopsis.strip(), lines)
        return found

    def fields(self, name: str, default: str = "") -> dict[str, str]:
        """One field of every package of the index, by package name."""
        found = {}
        for stanza in self.index("Packages").split("\n\n"):
            package = re.search(r"^Package: (\S+)", stanza, re.MULTILINE)
            value = re.search(rf"^{name}: (\S+)", stanza, re.MULTILINE)
            if package:
                found[package[1]] = value[1] if value else default
        return found

    def sources(self) -> dict[str, str]:
        """The source package of every binary package: the documents to split by."""
        return {p: s or p for p, s in self.fields("Source").items()}

    def download(self, *packages: str) -> dict[str, Path]:
        """Download packages, installing nothing; each one's .deb."""
        _run(["apt-get", *self._options, "download", *packages], self._debs)
        return {
            p: max(self._debs.glob(f"{p}_*.deb"), key=lambda f: f.stat().st_mtime) for p in packages
        }


def deb_members(deb: Path, pattern: str) -> Iterator[tuple[str, bytes]]:
    """The regular files of a .deb whose path matches `pattern`; links are left out."""
    wanted = re.compile(pattern)
    unpack = ["dpkg-deb", "--fsys-tarfile", str(deb)]
    with (
        subprocess.Popen(unpack, stdout=subprocess.PIPE) as process,  # noqa: S603
        tarfile.open(fileobj=process.stdout, mode="r|") as tar,
    ):
        for member in tar:
            if wanted.search(member.name) and (file := tar.extractfile(member)) is not None:
                yield member.name, file.read()
    if process.returncode:
        raise DownloadError(f"dpkg-deb could not read {deb.name}")


def _run(command: list[str], folder: Path | None = None) -> str:
    """What a command prints; where it fails, its last line about an error."""
    done = subprocess.run(  # noqa: S603
        command, capture_output=True, text=True, check=False, cwd=folder
    )
    if done.returncode:
        lines = [x for x in (done.stderr or done.stdout).splitlines() if x.strip()]
        errors = [x for x in lines if x.lower().startswith(("error", "e:"))] or lines
        raise DownloadError(f"{command[0]}: {errors[-1] if errors else done.returncode}")
    return done.stdout
