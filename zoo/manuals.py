"""Technical prose: the documentation of Linux and of Python. A row is a file.

Files are held out by the hash of their name.
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator
from pathlib import Path

from fxpress.zoo.corpora import SPLITS, Row, Splits, corpus, split_of
from fxpress.zoo.debian import Apt, deb_members

__all__ = ["linux_doc", "python_doc"]


@corpus("linux-doc", license="GPL-2.0", source="linux-doc-6.1 of Debian 12")
def linux_doc(downloads: Path) -> Splits:
    """Rows of "text" and "document"; the package holds every file twice, here it is once."""
    return _files(Apt(downloads), "linux-doc-6.1", r"\.(rst|txt)(\.gz)?$")


@corpus("python-doc", license="PSF-2.0", source="python3.11-doc of Debian 12")
def python_doc(downloads: Path) -> Splits:
    """Rows of "text" and "document": the sources of the pages."""
    return _files(Apt(downloads), "python3.11-doc", r"/_sources/.*\.txt(\.gz)?$")


def _files(apt: Apt, package: str, pattern: str) -> Splits:
    """The text files of a package whose paths match, without translations and second copies."""
    rows: dict[str, list[Row]] = {split: [] for split in SPLITS}
    files = dict(deb_members(apt.download(package)[package], pattern))
    for document, text in _documents(files):
        rows[split_of(document)].append({"text": text, "document": document})
    return rows


def _documents(files: dict[str, bytes]) -> Iterator[tuple[str, str]]:
    """Name and text of each file, in the order of the paths."""
    seen: set[str] = set()
    for path in sorted(files):
        data = gzip.decompress(files[path]) if path.endswith(".gz") else files[path]
        text = data.decode("utf-8", "replace").strip()
        if text and text not in seen and "/translations/" not in path:
            seen.add(text)
            yield re.sub(r".*/(_sources|Documentation)/|(\.rst|\.txt|\.gz)+$", "", path), text
