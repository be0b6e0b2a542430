"""Parallel text from Debian packages: LibreOffice's help, package descriptions, program messages.

Style: menus, options, technical prose; many short lines. Whole help files and source packages are
held out, and no English sentence of one split occurs in another, not even with other digits or
punctuation; no translation that is held out is trained on.
"""

from __future__ import annotations

import gettext
import html
import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from fxpress.zoo.corpora import SPLITS, Corpus, Row, Splits, split_of
from fxpress.zoo.debian import Apt, deb_members

__all__ = ["PARALLEL", "split_pairs"]

Pair = tuple[str, str, str]  # document, English, translation

WORDS = range(4, 101)  # of an English sentence that is kept
LENGTHS = (0.4, 2.8)  # characters of a translation to those of its source
SENTENCE_END = re.compile(r"(?<=[.!?:])\s+(?=[A-ZÄÖÜ*\-\"(])")

# Of each language: apt's name, the folder of LibreOffice's help.
LANGUAGES = {"de": ("de", "de"), "fr": ("fr", "fr"), "pt": ("pt_BR", "pt-BR")}

# The packages that give more than 150 pairs of messages per megabyte of download.
MESSAGES = """
anjuta-common apt aptitude-common audacity-data bash binutils-common claws-mail-i18n coreutils
darktable debconf-i18n digikam-data dpkg epiphany-browser-data evolution-common
evolution-data-server-common filezilla-common freeciv-data gcc-12-locales geany-common gedit-common
gettext gimp-data git gnome-control-center-data gnome-software-common gnucash-common gnumeric-common
gnupg-l10n gramps hexchat-common inkscape kdepim-runtime kexi-data konsole konversation-data
korganizer krita-l10n ktorrent-data libglib2.0-data libgtk-3-common libreoffice-l10n-de mutt
nautilus-data phpmyadmin pidgin-data poedit-common remmina-common rhythmbox-data rkward-data
subversion tellico-data transmission-gtk util-linux-locales vlc-l10n
""".split()  # noqa: SIM905

MANUALS = """
gnome-user-docs gimp-help-en gimp-help-de debian-reference-en debian-reference-de
""".split()  # noqa: SIM905

PAGE = re.compile(
    r"/(?:help/(C|de)/(.+\.(?:page|docbook))|gimp/2\.0/help/(en|de)/(.+\.html)"
    r"|(debian-reference/.+)\.(en|de)\.html)$"
)
CATALOGUE = r"/de/LC_MESSAGES/[^/]+\.mo$|/de/[^/]+\.mo$"


# Where the pairs come from ------------------------------------------------------------------------


def _plain(markup: str) -> str:
    return " ".join(html.unescape(re.sub(r"<[^>]+>", "", markup)).split())


def _sentences(document: str, source: str, target: str) -> Iterator[Pair]:
    """The sentences of two paragraphs in pairs, where both have as many."""
    a, b = SENTENCE_END.split(source), SENTENCE_END.split(target)
    if len(a) == len(b):
        yield from ((document, x, y) for x, y in zip(a, b, strict=True))


def _help_elements(deb: Path, folder: str) -> dict[str, dict[str, str]]:
    """Of each file of the help: the text of its elements by their ids."""
    tag = re.compile(r'<(p|h[1-6]|li|td)\b[^>]*\bid="([^"]+)"[^>]*>(.*?)</\1>', re.DOTALL)
    files = {}
    for name, data in deb_members(deb, rf"/help/{folder}/.*\.html$"):
        found: dict[str, str] = {}
        for _, key, body in tag.findall(data.decode("utf-8", "replace")):
            if text := _plain(body):
                found.setdefault(key, text)
        files[name.split(f"/help/{folder}/")[1]] = found
    return files


def _libreoffice_help(apt: Apt, folder: str) -> Iterator[Pair]:
    """The help files of two languages have the same names, their elements the same ids."""
    packages = "libreoffice-help-en-us", f"libreoffice-help-{folder.lower()}"
    debs = apt.download(*packages)
    source, target = (
        _help_elements(debs[package], name)
        for package, name in zip(packages, ("en-US", folder), strict=True)
    )
    for name in sorted(source.keys() & target.keys()):
        for key, text in source[name].items():
            if key in target[name]:
                yield from _sentences(f"libreoffice-help/{name}", text, target[name][key])


def _descriptions(apt: Apt, language: str) -> Iterator[Pair]:
    """Synopses, and the sentences of long descriptions; a document is a source package."""
    en, other, source = apt.descriptions("en"), apt.descriptions(language), apt.sources()
    for key in sorted(en.keys() & other.keys()):
        document = "debian/" + source.get(key[0], key[0])
        yield document, en[key].synopsis, other[key].synopsis
        a, b = en[key].paragraphs(), other[key].paragraphs()
        if len(a) == len(b):
            for x, y in zip(a, b, strict=True):
                yield from _sentences(document, x, y)


def _clean_message(text: str) -> str:
    """Without markup and keyboard accelerators."""
    text = re.sub(r"</?[A-Za-z][^<>]*>", "", text)
    return " ".join(html.unescape(re.sub(r"[&_](?=\w)", "", text)).split())


def _messages(name: str, catalogue: bytes) -> Iterator[Pair]:
    """The entries of a compiled gettext catalogue."""
    entries = vars(gettext.GNUTranslations(io.BytesIO(catalogue)))["_catalog"]
    for key, target in entries.items():
        source, plural = key if isinstance(key, tuple) else (key, 0)
        if source and plural == 0 and isinstance(target, str):
            text = source.split("\x04")[-1]  # what stands before it is a context
            yield f"gettext/{name}", _clean_message(text), _clean_message(target)


def _blocks(data: bytes, tags: str) -> list[tuple[str, str]]:
    """The tags of a document, and the text of each up to the next."""
    text = re.sub(r"<!--.*?-->", "", data.decode("utf-8", "replace"), flags=re.DOTALL)
    found = re.findall(rf"<({tags})\b[^>]*>(.*?)</\1>", text, re.DOTALL)
    return [(tag, _plain(re.split(rf"<(?:{tags})\b", body)[0])) for tag, body in found]


def _same_structure(name: str, source: bytes, target: bytes) -> Iterator[Pair]:
    """The blocks of two documents by position, where their sequences of tags agree."""
    tags = "para|title" if name.endswith(".docbook") else r"p|title|desc|cite|h[1-6]|td"
    a, b = _blocks(source, tags), _blocks(target, tags)
    if [tag for tag, _ in a] == [tag for tag, _ in b]:
        for (_, x), (_, y) in zip(a, b, strict=True):
            yield f"manual/{name}", x, y


def _language_of(path: re.Match[str]) -> tuple[str, str]:
    """Name of a page, and "en" or "de"."""
    language, name = next(
        pair for pair in ((path[1], path[2]), (path[3], path[4]), (path[6], path[5])) if pair[0]
    )
    return name, "de" if language == "de" else "en"


def _messages_and_manuals(apt: Apt) -> Iterator[Pair]:
    """What the full corpus has more."""
    debs = apt.download(*MESSAGES, *MANUALS)
    pages: dict[str, dict[str, bytes]] = {}
    for package in sorted(debs):
        for path, data in deb_members(debs[package], f"{CATALOGUE}|{PAGE.pattern}"):
            if path.endswith(".mo"):
                yield from _messages(Path(path).stem, data)
            elif page := PAGE.search(path):
                name, language = _language_of(page)
                pages.setdefault(name, {})[language] = data
    for name, both in sorted(pages.items()):
        if len(both) == 2:
            yield from _same_structure(name, both["en"], both["de"])


# What is kept, and where --------------------------------------------------------------------------


def _usable(source: str, target: str) -> bool:
    shortest, longest = LENGTHS
    fits = len(source.split()) in WORDS and shortest <= len(target) / len(source) <= longest
    return source != target and fits


def _letters(text: str) -> str:
    """What makes a sentence the same: its letters, without case."""
    return re.sub(r"[\W\d_]+", " ", text.lower()).strip()


def split_pairs(core: Iterable[Pair], extra: Iterable[Pair], language: str) -> Splits:
    """Rows of "en", the language, and "document".

    Held-out documents come from `core` alone, so that they are the same with and without `extra`;
    what they say is taken out of train.
    """
    rows: dict[str, list[Row]] = {split: [] for split in SPLITS}
    core = [pair for pair in core if _usable(*pair[1:])]
    seen: set[str] = set()
    held_out: set[str] = set()
    for split in ("test", "valid", "train"):
        pairs = [pair for pair in core if split_of(pair[0], valid=0.03, test=0.03) == split]
        if split == "train":
            held_out = {_letters(row[language]) for s in ("test", "valid") for row in rows[s]}
            pairs += [pair for pair in extra if _usable(*pair[1:])]
        for document, source, target in pairs:
            if _letters(source) not in seen and _letters(target) not in held_out:
                seen.add(_letters(source))
                rows[split].append({"en": source, language: target, "document": document})
    return rows


def _corpus(language: str, *, full: bool = False) -> Corpus:
    apt_language, folder = LANGUAGES[language]

    def build(downloads: Path) -> Splits:
        apt = Apt(downloads, languages=("en", apt_language))
        core = [*_libreoffice_help(apt, folder), *_descriptions(apt, apt_language)]
        return split_pairs(core, _messages_and_manuals(apt) if full else [], language)

    more = "; messages of 54 packages, GNOME, GIMP and Debian manuals" if full else ""
    return Corpus(
        f"en-{language}{'-full' * full}",
        "MPL-2.0 and each package's" + (", GPL, LGPL, FDL" if full else ""),
        f"LibreOffice help and package descriptions of Debian{more}",
        build,
    )


PARALLEL = (*(_corpus(language) for language in LANGUAGES), _corpus("de", full=True))
