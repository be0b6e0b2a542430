"""What every test shares: import guard, threads, seeds, hypothesis profiles, golden files."""

from __future__ import annotations

import difflib
import gc
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"

# `python -m pytest` puts the root on sys.path, where our `kernels/` shadows the package of that
# name which transformers imports.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]

# Workers of pytest-xdist share the cores: one thread each. Sums also come out the same everywhere.
torch.set_num_threads(1)

# A test that shares two cores may be slow without being wrong.
_PATIENT = hypothesis.settings(
    deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.register_profile("local", _PATIENT)
hypothesis.settings.register_profile("ci", _PATIENT, derandomize=True, database=None)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--update-golden`."""
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/golden/ files")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect what cannot run in this process; `make test` and `make gpu` start the right ones."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    cannot_run = [
        item
        for item in items
        if (item.get_closest_marker("gpu") and not torch.cuda.is_available())
        or (ROOT / "tests" / "kernels_interpreter" in item.path.parents) != interpreted
    ]
    config.hook.pytest_deselected(items=cannot_run)
    items[:] = [item for item in items if item not in cannot_run]


def pytest_collection_finish() -> None:
    """Look for garbage among what tests make alone, and seldom: captures make much that stays."""
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)


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
            pytest.fail("\n".join([*diff, "if meant: pytest --update-golden"]), pytrace=False)

    return compare
