"""Cut the Austen sample of the zoo from Debian's r-cran-janeaustenr.

Usage, on a Debian system:

    apt-get download r-cran-janeaustenr
    python tools/make_austen.py r-cran-janeaustenr_*.deb zoo/data/austen

calibration.txt holds the beginnings of four novels, heldout.txt the beginning of Persuasion; one
paragraph a line, headings left out. (Northanger Abbey is left for validation elsewhere.)
"""

from __future__ import annotations

import argparse
import io
import struct
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

CALIBRATION = ("emma", "mansfield park", "pride and prejudice", "sense and sensibility")
HELDOUT = ("persuasion",)
MAX_CHARACTERS = 140_000  # of each part
MIN_WORDS = 5  # shorter paragraphs are headings, mostly
DATABASE = "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"


def r_strings(data: bytes) -> list[str]:
    """The character vector in one serialized R object (XDR format, version 3)."""
    stream = io.BytesIO(data)

    def integer() -> int:
        return int(struct.unpack(">i", stream.read(4))[0])

    if stream.read(2) != b"X\n" or integer() != 3:
        sys.exit("the package's objects are not in R's XDR format 3: it has changed")
    stream.read(8)  # the versions of R that wrote it and that can read it
    stream.read(integer())  # the name of the encoding
    if integer() & 0xFF != 16:
        sys.exit("an object of the package is not a character vector: it has changed")
    strings = []
    for _ in range(integer()):
        integer()  # flags of the element
        strings.append(stream.read(max(integer(), 0)).decode("utf-8"))
    return strings


def novels(database: bytes) -> Iterator[tuple[str, str]]:
    """Title and text from R's lazy-load database: size, zlib stream, again and again."""
    while database:
        stream = zlib.decompressobj()
        lines = r_strings(stream.decompress(database[4:]))
        database = stream.unused_data
        yield lines[0].lower(), "\n".join(lines)


def paragraphs(text: str, limit: int) -> list[str]:
    """The first paragraphs, each on one line, of at most `limit` characters in all."""
    chosen: list[str] = []
    for block in text.split("\n\n"):
        line = " ".join(block.split())
        if len(line.split()) < MIN_WORDS:
            continue
        limit -= len(line) + 1
        if limit < 0:
            break
        chosen.append(line)
    return chosen


def main() -> None:
    """Unpack the Debian package and write the two parts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("deb", type=Path, help="the Debian package")
    parser.add_argument("out", type=Path, help="folder to fill")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as unpacked:
        subprocess.run(["dpkg-deb", "-x", args.deb, unpacked], check=True)
        texts = dict(novels(Path(unpacked, DATABASE).read_bytes()))
    for part, titles in (("calibration", CALIBRATION), ("heldout", HELDOUT)):
        lines = [x for t in titles for x in paragraphs(texts[t], MAX_CHARACTERS // len(titles))]
        (args.out / f"{part}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
