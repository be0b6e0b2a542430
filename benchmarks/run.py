"""Run every GPU benchmark, write benchmarks/results/<device>.json, and print short tables.

python benchmarks/run.py [--seconds 290] [--only NAME ...] [--tune [NAME ...]] [--commit ID]
    [--out FILE]
"""

from __future__ import annotations

import argparse
import datetime as dt
import importlib
import json
import platform
import re
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

FOLDER = Path(__file__).resolve().parent
# Shares of the time; what one leaves is for those after it.
BENCHMARKS = {"vvma": 0.22, "sparse_attention": 0.42, "wide": 0.09, "prefill": 0.27}


def load(name: str) -> ModuleType:
    """Import a file of this folder, by a name that its worker processes find too."""
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
    return importlib.import_module(name)


def commit() -> str:
    """The commit measured, "+" where the tree differs from it; empty where there is no git."""
    command = ["git", "-C", str(FOLDER), "describe", "--always", "--dirty=+"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def environment(commit: str) -> dict[str, Any]:
    """What the figures depend on."""
    import triton

    return {
        "device": torch.cuda.get_device_name(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "commit": commit,
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "command": " ".join(["python", "benchmarks/run.py", *sys.argv[1:]]),
    }


def main() -> None:
    """Parse the command line, measure, write."""
    parser = argparse.ArgumentParser(description="Run the GPU benchmarks.")
    parser.add_argument("--seconds", type=float, default=290, help="time to spend in all")
    parser.add_argument(
        "--tune",
        nargs="*",
        choices=list(BENCHMARKS),
        help="also time every tile size and option, of these or of all",
    )
    parser.add_argument(
        "--only", nargs="+", choices=list(BENCHMARKS), help="these; others stay as they are"
    )
    parser.add_argument("--commit", default="", help="what is measured, where there is no git")
    parser.add_argument("--out", type=Path, help="file to write instead of results/<device>.json")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/run.py: no CUDA device")
    facts = environment(arguments.commit or commit())
    tuned = list(BENCHMARKS) if arguments.tune == [] else arguments.tune or ()
    device = re.sub(r"\W+", "-", torch.cuda.get_device_name()).strip("-").lower()
    path = arguments.out or FOLDER / "results" / f"{device}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"environment": facts}
    if arguments.only and path.exists():
        results = json.loads(path.read_text(encoding="utf-8"))
    chosen = {name: BENCHMARKS[name] for name in arguments.only or BENCHMARKS}
    end = time.monotonic() + arguments.seconds
    while chosen:
        left = (end - time.monotonic()) / sum(chosen.values())
        name = next(iter(chosen))
        seconds = left * chosen.pop(name)
        measured = load(name).measure(seconds, tuning=name in tuned)
        results[name] = measured | ({"environment": facts} if arguments.only else {})
        path.write_text(json.dumps(results, separators=(",", ":")) + "\n", encoding="utf-8")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
