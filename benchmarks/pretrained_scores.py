"""Score the models of the zoo that were trained elsewhere: benchmarks/results/pretrained.json.

python benchmarks/pretrained_scores.py [NAME ...]

Without names all of them; what was measured before is kept for the others. `zoo_tables.py` makes a
section of docs/results.md of it.
"""

from __future__ import annotations

import datetime as dt
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch

from fxpress.zoo import registry, trained

RESULTS = Path(__file__).resolve().parent / "results" / "pretrained.json"


def measured(name: str, score: registry.Score) -> dict[str, Any]:
    """What `fxpress zoo eval NAME` says, and about what."""
    entry, start = registry.entry(name), time.perf_counter()
    found = trained.evaluate(name)
    seconds = time.perf_counter() - start
    return {
        "task": score.task,
        "source": entry.source,
        "parameters": sum(p.numel() for p in entry.build(pretrained=True).parameters()),
        "data": score.data,
        "headline": score.headline,
        **found,
        "seconds": round(seconds, 1),
        "machine": f"cpu, {torch.get_num_threads()} thread(s), {platform.machine()}",
        "torch": torch.__version__,
        "date": dt.datetime.now(tz=dt.UTC).date().isoformat(),
    }


def main() -> None:
    """Score one after the other, and write after each."""
    torch.set_num_threads(1)
    before = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    scores = {name: e.score for name, e in registry.entries().items() if e.score is not None}
    for name in sys.argv[1:] or scores:
        before[name] = measured(name, scores[name])
        RESULTS.write_text(json.dumps(dict(sorted(before.items())), indent=1) + "\n")
        print(f"{name}: {before[name]['scores']}, to compare with {before[name]['baselines']}")


if __name__ == "__main__":
    main()
