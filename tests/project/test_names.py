"""Names that have no place here, and the one place that reads the environment."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from typing import Any

FORBIDDEN_FILES = {"utils", "helpers", "common", "misc", "manager", "engine"}
ARCHITECTURES = re.compile(
    r"(al|de|distil|ro)?bert\w*|bart|electra|falcon|gemma\d*|gpt\d*|llama\d*|mi(s|x)tral|mpnet"
    r"|qwen\d*|t5|vit|wav2vec\d*|whisper|xlnet"
)


def _words(text: str) -> set[str]:
    """The words of an identifier or a string: `BertSelfAttention` -> bert, self, attention."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", text)
    return set(re.findall(r"[a-z][a-z0-9]*", spaced.lower()))


def _identifiers(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Every name that a module defines or uses, with its line."""
    for node in ast.walk(tree):
        for field in ("id", "attr", "arg", "name", "module"):
            value = getattr(node, field, None)
            if isinstance(value, str):
                yield getattr(node, "lineno", 0), value


def test_every_file_has_a_telling_name(sources: list[Any], test_sources: list[Any]) -> None:
    parts = {part for source in sources + test_sources for part in source.path.parts}
    assert not {part for part in parts if part.removesuffix(".py") in FORBIDDEN_FILES}


def test_no_architecture_is_named_in_core_or_passes(sources: list[Any]) -> None:
    found = []
    for source in sources:
        if source.folder not in ("optimizer", "passes"):
            continue
        strings = [(node.lineno, node.value) for node in source.strings()]
        for line, text in [*_identifiers(source.tree), *strings]:
            found += [
                f"{source.path}:{line} {word}"
                for word in _words(text)
                if ARCHITECTURES.fullmatch(word)
            ]
    assert not found


def test_one_module_reads_the_environment(sources: list[Any]) -> None:
    assert [
        str(source.path)
        for source in sources
        if source.folder == "optimizer"
        and any(name in ("environ", "getenv") for _, name in _identifiers(source.tree))
    ] == ["optimizer/environment.py"]


def test_only_that_module_names_its_variables(sources: list[Any]) -> None:
    assert {
        source.path.name
        for source in sources
        for node in source.strings()
        if re.fullmatch(r"FXPRESS_[A-Z]+", node.value)
    } == {"environment.py"}
