"""Run the GPU benchmarks: `python benchmarks/run.py`, within about five minutes on an H100.

Writes `benchmarks/results/<device>.json`, after each row: a run that is cut short leaves what
it measured, and prints a short table last. `make_tables.py` turns the files into documentation.
"""

from __future__ import annotations

import argparse
import datetime as dt
import importlib.util
import json
import platform
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

FOLDER = Path(__file__).resolve().parent
METHOD = (
    "Each figure times one call recorded as a CUDA graph, the L2 cache flushed before each run: "
    "median, 20 % and 80 % quantiles in milliseconds. Every row is checked against the dense "
    "reference first. `ours` is the operator as it is; `best` is the fastest of `trials`."
)


def load(name: str) -> ModuleType:
    """Import a file that stands beside this one (the folder itself is not on the path)."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def commit() -> str:
    """Return the commit that is checked out, or "unknown"."""
    command = ["git", "-C", str(FOLDER), "rev-parse", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()


def facts() -> dict[str, Any]:
    """Say what was measured, on what, with what."""
    import triton

    return {
        "device": torch.cuda.get_device_name(),
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "command": "python benchmarks/" + " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        },
        "method": METHOD,
    }


def print_table(headings: list[str], lines: list[list[str]]) -> None:
    """Print columns, aligned."""
    widths = [max(map(len, column)) for column in zip(headings, *lines, strict=True)]
    for line in [headings, *lines]:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))


def main() -> None:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument(
        "--output", type=Path, default=FOLDER / "results", help="folder to write to"
    )
    parser.add_argument("--seconds", type=float, default=270, help="about how long to take")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/run.py: no CUDA device")
    benchmark = load("sparse_attention")
    result = facts()
    result["floor"] = benchmark.measure(torch.zeros(1, device="cuda").zero_)
    rows: list[dict[str, Any]] = []
    result["sparse_attention"] = rows
    name = re.sub(r"\W+", "-", result["device"]).strip("-").lower()
    path = arguments.output / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    for row in benchmark.rows(arguments.seconds):
        rows.append(row)
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(*benchmark.summary(row), flush=True)
    print(f"\n{result['device']}, milliseconds; written to {path}")
    print_table(benchmark.HEADINGS, [benchmark.summary(row) for row in rows])


if __name__ == "__main__":
    main()
