"""A summarisation corpus: the long description of a Debian package, and its synopsis.

Whole source packages are held out: the binaries of one share most of their text.
"""

from __future__ import annotations

from pathlib import Path

from fxpress.zoo.corpora import SPLITS, Row, Splits, corpus, split_of
from fxpress.zoo.debian import Apt

__all__ = ["debian_summaries"]

LEAST_WORDS = 20  # of a text


@corpus(
    "debian-summaries",
    license="each package's",
    source="package descriptions (English) of Debian's main index",
)
def debian_summaries(downloads: Path) -> Splits:
    """Rows of "text", "summary" and "document" (the source package); each text once."""
    apt = Apt(downloads)
    source = apt.sources()
    rows: dict[str, list[Row]] = {split: [] for split in SPLITS}
    found = [(source.get(d.package, d.package), d) for d in apt.descriptions("en").values()]
    seen = set()
    for split in ("test", "valid", "train"):  # a shared text stays where it is held out
        of_split = (pair for pair in found if split_of(pair[0]) == split)
        for document, d in sorted(of_split, key=lambda pair: (pair[0], pair[1].package)):
            text = d.text()
            if len(text.split()) >= LEAST_WORDS and text not in seen:
                seen.add(text)
                rows[split].append({"text": text, "summary": d.synopsis, "document": document})
    return rows
