"""What every test shares: import guard, threads, seeds, hypothesis profiles, golden files."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# With the root on sys.path (`python -m pytest`) our `kernels/` shadows the package of that name
# which transformers imports.
_ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != _ROOT]

import difflib
import random
from collections.abc import Callable

import hypothesis
import numpy as np
import pytest
import torch

GOLDEN = _ROOT / "tests" / "golden"

# Workers of pytest-xdist share the cores: one thread each. Sums also come out the same everywhere.
torch.set_num_threads(1)

hypothesis.settings.register_profile("local", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--update-golden`."""
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/golden/ files")


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Give each test the same random numbers, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - libraries under test draw from the global state
    torch.manual_seed(0)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Compare a text with a file of tests/golden/: `golden(text, "name.txt")`.

    With `--update-golden` the file is written. Otherwise a difference, or a missing file, fails
    with a unified diff.
    """
    update: bool = request.config.getoption("--update-golden")

    def compare(text: str, name: str) -> None:
        path = GOLDEN / name
        text = text.rstrip("\n") + "\n"
        if update:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        expected = path.read_text(encoding="utf-8") if path.exists() else ""
        if text != expected:
            lines = expected.splitlines(), text.splitlines()
            diff = difflib.unified_diff(*lines, f"golden/{name}", "now", lineterm="")
            pytest.fail("\n".join([*diff, "If this is meant: pytest --update-golden"]), pytrace=False)

    return compare
