"""Parallel text: sentences and messages in pairs, none of them in two splits."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from fxpress.zoo import parallel_text
from fxpress.zoo.corpora import SPLITS, Splits, split_of
from fxpress.zoo.debian import Description


def document(split: str, number: int = 0) -> str:
    """A name that falls into a split."""
    names = (f"d{i}" for i in range(10_000))
    found = [name for name in names if split_of(name, valid=0.03, test=0.03) == split]
    return found[number]


def english(splits: Splits) -> dict[str, list[str]]:
    return {split: [row["en"] for row in splits[split]] for split in SPLITS}


def test_no_sentence_is_in_two_splits() -> None:
    core = [
        (document("train"), "press the key 3 now", "jetzt Taste 3 drücken"),
        (document("test"), "Press the key 7 now!", "Jetzt Taste 7 drücken!"),
        (document("train"), "this is said only here", "das steht nur hier"),
        (document("valid"), "another way to say it", "das steht nur dort"),
        (document("train", 1), "a fourth one of four", "das steht nur DORT."),
    ]
    extra = [
        ("more", "this is one of the others", "das ist eine andere"),
        ("more", "another way to say it", "das steht woanders"),
    ]
    found = english(parallel_text.split_pairs(core, extra, "de"))
    assert found["test"] == ["Press the key 7 now!"]
    assert found["valid"] == ["another way to say it"]
    assert found["train"] == ["this is said only here", "this is one of the others"]


def test_held_out_sentences_are_the_same_with_more_to_train_on() -> None:
    core = [
        (document(s, i), f"one sentence {s} {i}", f"ein Satz {s} {i}")
        for s in SPLITS
        for i in (0, 1)
    ]
    few = parallel_text.split_pairs(core, [], "de")
    many = parallel_text.split_pairs(
        core, [("m", "a message of some length", "eine Meldung")], "de"
    )
    assert all(few[split] == many[split] for split in ("test", "valid"))
    assert len(list(many["train"])) == len(list(few["train"])) + 1


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("three words only", "nur drei Wörter"),
        ("the same in both languages", "the same in both languages"),
        ("a sentence of some length", "kurz"),
        ("a b c d", "ein Satz, der dreimal so lang wie jener ist"),
    ],
)
def test_pairs_that_can_be_no_translations_are_left_out(source: str, target: str) -> None:
    found = parallel_text.split_pairs([("d", source, target)], [], "de")
    assert not any(found[split] for split in SPLITS)


def catalogue(messages: dict[str, str]) -> bytes:
    """A compiled gettext catalogue."""
    keys = sorted(messages)
    texts = [x.encode() for x in keys] + [messages[x].encode() for x in keys]
    n, at = len(keys), 28 + 16 * len(keys)
    table = b""
    for text in texts:
        table += struct.pack("<II", len(text), at)
        at += len(text) + 1
    head = struct.pack("<7I", 0x950412DE, 0, n, 28, 28 + 8 * n, 0, 0)
    return head + table + b"".join(text + b"\0" for text in texts)


HELP = {
    "en-US": '<p id="a">Choose a file. Then press a key.</p><p id="b">One. Two.</p><p id="c">x</p>',
    "de": '<p id="a">Wählen Sie. Dann <b>drücken</b> Sie.</p><p id="b">Eins</p><p id="d">x</p>',
}
MESSAGES = {
    "": "Content-Type: text/plain; charset=UTF-8\n",
    "menu\x04_Open the <b>file</b>": "_Öffnen der <b>Datei</b>",
}
PAGES = {
    "C": "<page><title>A title</title><p>First</p></page>",
    "de": "<page><title>Ein Titel</title><p>Erstes</p></page>",
}


class FakeApt:
    """Packages with one file of each kind."""

    def __init__(self, folder: Path, languages: tuple[str, ...]) -> None:
        self.folder, self.languages = folder, languages

    def download(self, *packages: str) -> dict[str, Path]:
        return {package: self.folder / package for package in packages}

    def sources(self) -> dict[str, str]:
        return {"tool-bin": "tool"}

    def descriptions(self, language: str) -> dict[tuple[str, str], Description]:
        said = {
            "en": ("a tool", ("It works well.", ".", "It is fast.")),
            "de": ("ein Werkzeug", ("Es geht gut.", ".", "Es ist schnell.")),
        }
        return {("tool-bin", "1"): Description("tool-bin", "1", *said[language])}


def fake_members(deb: Path, pattern: str) -> Iterator[tuple[str, bytes]]:
    if deb.name.startswith("libreoffice-help"):
        language = "en-US" if deb.name.endswith("en-us") else "de"
        yield f"usr/help/{language}/one.html", HELP[language].encode()
    if deb.name == "gettext":
        yield "usr/share/locale/de/LC_MESSAGES/tool.mo", catalogue(MESSAGES)
    if deb.name == "gnome-user-docs":
        for language, page in PAGES.items():
            yield f"usr/share/help/{language}/app/index.page", page.encode()


def test_sentences_of_every_source_are_paired(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs: list[tuple[str, str, str]] = []

    def keep(core: list[tuple[str, str, str]], extra: object, language: str) -> Splits:
        pairs.extend([*core, *extra])  # type: ignore[misc]
        return {split: [] for split in SPLITS}

    monkeypatch.setattr(parallel_text, "Apt", FakeApt)
    monkeypatch.setattr(parallel_text, "deb_members", fake_members)
    monkeypatch.setattr(parallel_text, "split_pairs", keep)
    (full,) = (corpus for corpus in parallel_text.PARALLEL if corpus.name == "en-de-full")
    full.build(tmp_path)
    assert pairs == [
        ("libreoffice-help/one.html", "Choose a file.", "Wählen Sie."),
        ("libreoffice-help/one.html", "Then press a key.", "Dann drücken Sie."),
        ("debian/tool", "a tool", "ein Werkzeug"),
        ("debian/tool", "It works well.", "Es geht gut."),
        ("debian/tool", "It is fast.", "Es ist schnell."),
        ("gettext/tool", "Open the file", "Öffnen der Datei"),
        ("manual/app/index.page", "A title", "Ein Titel"),
        ("manual/app/index.page", "First", "Erstes"),
    ]
