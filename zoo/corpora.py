"""Texts and images to train on, by name: built once from public packages, kept in a cache.

A module of this package offers a corpus by decorating the function that yields its rows:

    @corpus("debian-summaries", license=..., source=...)
    def debian_summaries(downloads: Path) -> Splits: ...

It is found as models are. Rows are read through the `datasets` library, as are a user's own files
and, where there is a network, the sets of the hub: `load` takes any of the three.
"""

from __future__ import annotations

import difflib
import hashlib
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from filelock import FileLock

from fxpress.environment import cache_folder
from fxpress.errors import CalibrationError, FxpressError
from fxpress.zoo.registry import offered

__all__ = [
    "SPLITS",
    "Corpus",
    "CorpusError",
    "Row",
    "Splits",
    "corpora",
    "corpus",
    "load",
    "split_of",
]

SPLITS = ("train", "valid", "test")
HUB = "hub:"  # in front of a name of the hub
JOINED = "+"  # between names
KINDS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}

Row = dict[str, Any]
Splits = Mapping[str, Iterable[Row]]


class CorpusError(CalibrationError):
    """A corpus that does not exist, or cannot be built here: what is missing."""


@dataclass(frozen=True)
class Corpus:
    """A corpus: where it comes from, and how its rows are made.

    Attributes:
        name: what recipes say.
        license: of the data.
        source: the packages it is made from.
        build: the rows of every split, given a folder to download into.
    """

    name: str
    license: str
    source: str
    build: Callable[[Path], Splits]


def corpus(
    name: str,
    *,
    license: str,  # noqa: A002
    source: str,
) -> Callable[[Callable[[Path], Splits]], Corpus]:
    """Offer the decorated function under `name`."""
    return lambda build: Corpus(name, license, source, build)


@cache
def corpora() -> dict[str, Corpus]:
    """Every corpus by name, in alphabetic order; imports the modules of the zoo."""
    return {c.name: c for c in sorted(offered(Corpus), key=lambda c: c.name)}


def load(source: str | Path, split: str, *, streaming: bool = False) -> Any:
    """The rows of a split, as a `datasets.Dataset`.

    Args:
        source: the name of a corpus, or of several with "+" between them, one after the other; a
            folder with a file for each split (train.jsonl and so on; .txt has one row "text" a
            line); or "hub:OWNER/NAME".
        split: "train", "valid" or "test"; of the hub whatever it has.
        streaming: read rows as they are asked for, and keep nothing (an IterableDataset).

    Raises:
        CorpusError: there is no such corpus, folder or split, or it cannot be built or read.
    """
    from datasets import concatenate_datasets, disable_progress_bars, load_dataset

    disable_progress_bars()
    if isinstance(source, str) and len(names := source.split(JOINED)) > 1:
        return concatenate_datasets([load(name, split, streaming=streaming) for name in names])
    kept = str(cache_folder() / "datasets")
    if isinstance(source, str) and source.startswith(HUB):
        arguments: tuple[Any, ...] = (source.removeprefix(HUB),)
        files = None
    else:
        path = _file(source if isinstance(source, Path) else _built(source), split)
        arguments, files = (KINDS[path.suffix],), {split: str(path)}
    try:
        return load_dataset(
            *arguments, data_files=files, split=split, cache_dir=kept, streaming=streaming
        )
    except Exception as error:  # the library raises what it likes
        reason = " ".join(str(error).split())[:200]
        raise CorpusError(f"{source} cannot be read: {reason}") from error


def _file(folder: Path, split: str) -> Path:
    """The file of a split."""
    for suffix in KINDS:
        if (path := folder / f"{split}{suffix}").is_file():
            return path
    kinds = ", ".join(KINDS)
    raise CorpusError(f"{folder} has no file for {split!r}: {split} with one of {kinds}")


def _built(name: str) -> Path:
    """The folder of a corpus, from the cache or else built now, all of it or nothing."""
    if name not in corpora():
        near = difflib.get_close_matches(name, corpora(), n=1, cutoff=0.0)
        raise CorpusError(f"there is no corpus {name!r}: did you mean {near[0]!r}?")
    cached = cache_folder() / "corpora"
    cached.mkdir(exist_ok=True)
    folder = cached / name
    with FileLock(cached / f"{name}.lock"):
        if not folder.is_dir():
            with tempfile.TemporaryDirectory(dir=cached, prefix="partial-") as partial:
                out = Path(partial, "out")
                out.mkdir()
                _write(corpora()[name], Path(partial), out)
                out.rename(folder)
    return folder


def _write(made: Corpus, downloads: Path, out: Path) -> None:
    from datasets import Dataset

    try:
        rows = made.build(downloads)
        for split in SPLITS:
            # Not JSON lines: a row may hold bytes, such as an image.
            Dataset.from_list(list(rows[split])).to_parquet(str(out / f"{split}.parquet"))
    except FxpressError as error:
        raise CorpusError(f"the corpus {made.name} cannot be built here: {error}") from error


def split_of(document: str, valid: float = 0.05, test: float = 0.05) -> str:
    """The split that a document belongs to, by the hash of its name.

    It does not depend on the other documents, so a corpus may grow without moving any.
    """
    x = int.from_bytes(hashlib.sha256(document.encode()).digest()[:8], "big") / 2**64
    return "test" if x < test else "valid" if x < test + valid else "train"
