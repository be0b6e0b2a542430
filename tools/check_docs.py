"""Check the Markdown files: relative links resolve, and Python blocks compile.

Prints one line per fault, as `file:line: what`, and exits with 1 if there is any.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```\s*$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+\s+(.+?)\s*$", re.MULTILINE)
EXTERNAL = ("http://", "https://", "mailto:")


def without_code(text: str) -> str:
    """Blank out fenced blocks and inline code; line numbers stay."""
    text = FENCE.sub(lambda block: "\n" * block.group().count("\n"), text)
    return re.sub(r"`[^`\n]+`", "", text)


def anchors(text: str) -> set[str]:
    """Return the fragments that the headings of a Markdown text can be reached by."""
    headings = HEADING.findall(FENCE.sub("", text))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(path: Path, text: str) -> Iterator[tuple[int, str]]:
    """Yield line and fault of each relative link that leads nowhere."""
    prose = without_code(text)
    for link in LINK.finditer(prose):
        line, target = prose.count("\n", 0, link.start()) + 1, link.group(1)
        if target.startswith(EXTERNAL):
            continue
        name, _, fragment = target.partition("#")
        file = path.parent / name if name else path
        if not file.exists():
            yield line, f"{target} does not exist"
        elif fragment and fragment not in anchors(file.read_text(encoding="utf-8")):
            yield line, f"{target} names no heading of that file"


def broken_blocks(path: Path, text: str) -> Iterator[tuple[int, str]]:
    """Yield line and fault of each Python block that does not compile."""
    for block in FENCE.finditer(text):
        if block.group(1) != "python":
            continue
        line = text.count("\n", 0, block.start()) + 1
        try:
            compile(block.group(2), str(path), "exec")
        except SyntaxError as error:
            yield line + (error.lineno or 0), f"Python block: {error.msg}"


def main() -> int:
    """Check every Markdown file that git tracks."""
    listing = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others"]
    names = subprocess.check_output([*listing, "--exclude-standard", "*.md"], text=True)
    faults = 0
    for path in sorted(ROOT / name for name in names.split("\0") if name):
        text = path.read_text(encoding="utf-8")
        for line, fault in sorted([*broken_links(path, text), *broken_blocks(path, text)]):
            print(f"{path.relative_to(ROOT)}:{line}: {fault}")
            faults += 1
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
