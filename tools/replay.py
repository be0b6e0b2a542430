"""Show how the graphs and kernels of the zoo differ between another commit and the working tree.

A refactor shows no difference, and a change of a pass shows what it changes and nothing else:

    make replay BASE=main

Every model of the zoo, with random weights, is captured and optimized on its calibration sample at
both commits; the program after each pass and the generated kernel sources are compared as text.
Exits with 1 where they differ, and where a model fails in the working tree.
"""

from __future__ import annotations

import argparse
import difflib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from typing_tree import ROOT, lay_tree

CONFIG = {"prune-attention": {"pruned": 0.5, "block": 16}}
BATCHES = 4
FAILED = "#### failed: "


def arguments_of(batch: Any) -> dict[str, Any]:
    """Turn a calibration batch into what `fxpress.capture` takes."""
    if isinstance(batch, Mapping):
        return {"kwargs": batch}
    return {"args": tuple(batch) if isinstance(batch, tuple | list) else (batch,)}


def texts_of(name: str) -> Iterator[tuple[str, Any]]:
    """Yield title and text of what is made of one model of the zoo, stage by stage."""
    import torch

    import fxpress
    from fxpress.zoo.registry import create_model, entry

    torch.manual_seed(0)
    model, batches = create_model(name), entry(name).calibration(limit=BATCHES)
    yield "captured", fxpress.capture(model, **arguments_of(batches[0]))
    optimized = fxpress.optimize(model, batches, judge="off", config=CONFIG)
    for title, record in optimized.passes.items():
        yield f"after {title}", record.after
    for site, source in sorted(optimized.sources.items()):
        yield f"kernel of {site}", source


def print_zoo(pattern: str) -> None:
    """Print every stage of every model; a model that fails prints its error in that place."""
    import torch

    from fxpress import zoo

    torch.set_num_threads(1)
    for name in zoo.list_models(pattern):
        try:
            for title, text in texts_of(name):
                print(f"#### {name}: {title}\n{text}\n")
        except Exception as error:  # noqa: BLE001 - a failure is a result to compare like another
            print(f"{FAILED}{name}: {type(error).__name__}: {error}\n")


def zoo_at(root: Path, tree: Path, pattern: str) -> list[str]:
    """Return the lines that the checkout at `root` prints, in a process that imports only it."""
    lay_tree(root, tree)
    script = Path(__file__).resolve()
    path = os.pathsep.join([str(tree), str(script.parent)])
    environment = os.environ | {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
    command = [sys.executable, str(script), "--print", "--models", pattern]
    return subprocess.check_output(command, env=environment, text=True).splitlines()


@contextmanager
def checkout(commit: str, folder: Path) -> Iterator[Path]:
    """Check out `commit` into `folder` for the time of the block."""
    git = ["git", "-C", str(ROOT), "worktree"]
    subprocess.run([*git, "add", "--quiet", "--detach", folder, commit], check=True)
    try:
        yield folder
    finally:
        subprocess.run([*git, "remove", "--force", folder], check=True)


def main() -> int:
    """Compare the working tree with a commit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("base", nargs="?", default="main", help="the commit to compare with")
    parser.add_argument("--models", default="*", help="only models that match this pattern")
    parser.add_argument("--print", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.print:
        print_zoo(arguments.models)
        return 0

    with tempfile.TemporaryDirectory(prefix="fxpress-replay-") as name:
        scratch = Path(name)
        with checkout(arguments.base, scratch / "base") as base:
            before = zoo_at(base, scratch / "base-tree", arguments.models)
        after = zoo_at(ROOT, scratch / "tree", arguments.models)
    diff = list(difflib.unified_diff(before, after, arguments.base, "working tree", lineterm=""))
    print(*diff, sep="\n")
    failed = [line for line in after if line.startswith(FAILED)]
    print(*failed, sep="\n", file=sys.stderr)
    changed = "differ" if diff else "are the same"
    print(f"replay: {len(after)} lines of graphs and kernels {changed}", file=sys.stderr)
    return 1 if diff or failed else 0


if __name__ == "__main__":
    sys.exit(main())
