"""Every command of docs/commands.md is run, and prints what stands there, figures aside."""

from __future__ import annotations

import re
import runpy
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fxpress import environment

Run = Any  # conftest.Run

PAGE = Path(__file__).resolve().parents[2] / "docs" / "commands.md"
FILE = re.compile(r"^```python\n# (\w+\.py)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CONSOLE = re.compile(r"(?<=^```console\n)(.*?)(?=^```$)", re.MULTILINE | re.DOTALL)


def _without_figures(text: str) -> str:
    """Figures, and what depends on how wide they are, differ from machine to machine."""
    return re.sub(r"\s+", " ", re.sub(r"\d[\d.,e+-]*((?<=\+)\w+)?", "#", text))


def _transcript(block: str, run: Run) -> Iterator[str]:
    """The commands of a block, each followed by what it prints now."""
    for line in block.splitlines():
        if not line.startswith("$ fxpress "):
            continue
        command, _, head = line.partition(" | head -")
        done = run(*shlex.split(command)[2:])
        assert done.code == 0, done.err
        printed = [x for x in done.out.rstrip().splitlines() if not x.startswith("a busy machine")]
        yield "\n".join([line, *printed[: int(head) if head else None]])


def test_the_page_is_what_the_commands_print(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.chdir(tmp_path)
    text = PAGE.read_text(encoding="utf-8")
    for name, content in FILE.findall(text):
        (tmp_path / name).write_text(content)
        if name.startswith("make_"):
            runpy.run_path(str(tmp_path / name))
    now = CONSOLE.sub(lambda block: "\n\n".join(_transcript(block[1], run)) + "\n", text)
    if request.config.getoption("--update-golden"):
        PAGE.write_text(now, encoding="utf-8")
        return
    assert _without_figures(now).split("$ ") == _without_figures(text).split("$ ")


def test_the_variables_of_the_page_are_those_of_the_module() -> None:
    table = re.compile(r"^\| `FXPRESS_.*$", re.MULTILINE)
    assert table.findall(PAGE.read_text()) == table.findall(environment.__doc__ or "")
