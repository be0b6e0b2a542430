"""The developer scripts find what they are there to find."""

from __future__ import annotations

from pathlib import Path

import pytest
from check_docs import broken_blocks, broken_links
from typing_tree import lay_tree, package_folders

DOCUMENT = """# A title: with marks

[here](#a-title-with-marks) [there](other.md) [the web](https://example.org/x.md) `[code](no.md)`
"""


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("[a](missing.md)", "missing.md does not exist"),
        ("[a](#nowhere)", "#nowhere names no heading of that file"),
        ("[a](other.md#nowhere)", "other.md#nowhere names no heading of that file"),
    ],
)
def test_check_docs_finds_broken_links(tmp_path: Path, text: str, fault: str) -> None:
    (tmp_path / "other.md").write_text("# Other\n")
    document = tmp_path / "document.md"
    document.write_text(DOCUMENT)
    assert list(broken_links(document, DOCUMENT + text)) == [(4, fault)]
    assert not list(broken_links(document, DOCUMENT))


def test_check_docs_finds_broken_python(tmp_path: Path) -> None:
    text = "```python\nx = 1\n```\n\n```python\nx = (\n```\n\n```sh\nx = (\n```\n"
    assert list(broken_blocks(tmp_path, text)) == [(6, "Python block: '(' was never closed")]


def test_typing_tree_shows_every_file_under_its_import_name(root: Path, tmp_path: Path) -> None:
    lay_tree(root, tmp_path / "tree")
    lay_tree(root, tmp_path / "tree")  # an older tree is no hindrance
    for name, folder in package_folders(root).items():
        laid = tmp_path.joinpath("tree", *name.split("."))
        for path in folder.rglob("*.py"):
            assert (laid / path.relative_to(folder)).samefile(path)
