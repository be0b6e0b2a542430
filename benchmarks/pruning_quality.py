"""What static masks cost in quality: SmolLM2's perplexity and MiniLM's sentence vectors, on CPU.

    python benchmarks/pruning_quality.py [--learn 10] [--judge 4] [--threads 1] [--out FILE]

Nothing is retrained. Masks are learned on the calibration part of the built-in prose and judged on
its held-out part. SmolLM2 is profiled once: from its mean attention maps come the masks of every
granularity, and `fxpress.hf.attach` runs the model under each. The file is written after every row.
`benchmarks/pruning_tables.py` turns it into docs/quality.md.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fxpress
from fxpress import zoo
from fxpress.kernels import compile_mask
from fxpress.passes.masks import (
    live_cells,
    pool_blocks,
    random_mask,
    threshold_masks,
    window_mask,
)
from fxpress.zoo import minilm, registry, smollm2
from fxpress.zoo.samples import DATA, read_texts

OUT = Path(__file__).resolve().parent / "results" / "pruning-quality.json"
LENGTH = 1024  # tokens of a window of SmolLM2
TILE = (64, 32)
LEVELS = (0.5, 0.8, 0.9)
SINKS = 4
SEED = 0
BLOCKS = {"element": (1, 1), "block 16": (16, 16), "block 64": (64, 64), "column of 64": (64, 1)}
EQUAL_TILES = "block 16"  # whose tile density the last two masks have

Masks = dict[str, Tensor]  # by site, bool (H, Nq, Nk)
Save = Callable[[], None]


def environment(threads: int) -> dict[str, Any]:
    """What the figures depend on."""
    versions = {name: metadata.version(name) for name in ("fxpress", "torch", "transformers")}
    return versions | {
        "triton": "not used",
        "device": "cpu",
        "processor": platform.machine(),
        "threads": threads,
        "python": platform.python_version(),
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "commit": "",
        "command": " ".join(["python", "benchmarks/pruning_quality.py", *sys.argv[1:]]),
        "seed": SEED,
    }


def prose(part: str) -> list[str]:
    """The paragraphs of "calibration" or "heldout"."""
    return read_texts(DATA / "austen" / f"{part}.txt")


# SmolLM2 ------------------------------------------------------------------------------------------


def mean_maps(model: Any, windows: Tensor) -> Masks:
    """Mean attention (H, N, N) of every site over `windows` (B, N)."""
    batches = [{"input_ids": row, "use_cache": False} for row in windows.split(1)]
    config = {"prune-attention": {"pruned": 0.5, "granularity": "element"}}
    record = fxpress.optimize(model, batches, judge="off", config=config).passes["prune-attention"]
    return dict(record.mean_attention)


def tile_density(masks: Mapping[str, Tensor]) -> float:
    """Tiles of 64 x 32 with a kept cell, as a share of all N^2."""
    tiles = torch.cat([pool_blocks(mask.float(), TILE) > 0 for mask in masks.values()])
    return float(tiles.float().mean())


def window_of_equal_tiles(live: Tensor, target: float) -> Tensor:
    """The window + sinks (N, N) of whole tiles that needs most nearly a share `target` of them."""
    windows = [
        window_mask(live, share, sinks=SINKS, block=TILE)
        for share in torch.linspace(0.02, 1, 50).tolist()
    ]
    return min(windows, key=lambda mask: abs(tile_density({"": mask[None]}) - target))


def candidates(maps: Masks, pruned: float) -> Iterator[tuple[str, Masks]]:
    """Yield the masks to compare at one level; the last two at the tile density of block 16."""
    live = live_cells(LENGTH, LENGTH, causal=True)
    universe = dict.fromkeys(maps, live)
    heads = {site: map_.shape[0] for site, map_ in maps.items()}
    target = 1.0
    for name, block in sorted(BLOCKS.items(), key=lambda item: item[0] != EQUAL_TILES):
        learned = threshold_masks(maps, universe, pruned, block=block, scope="global")
        target = tile_density(learned) if name == EQUAL_TILES else target
        yield name, learned
        del learned

    def for_all(draw: Callable[[int, int], Tensor]) -> Masks:
        return {site: draw(index, heads[site]) for index, site in enumerate(heads)}

    def random(share: float, block: tuple[int, int], index: int, count: int) -> Tensor:
        return random_mask(live, count, share, seed=SEED + index, block=block)

    window = window_mask(live, 1 - pruned, sinks=SINKS, block=(1, 1))
    yield "window + sinks", for_all(lambda _, count: window.expand(count, -1, -1))
    wide = window_of_equal_tiles(live, target)
    yield "window + sinks, equal tiles", for_all(lambda _, count: wide.expand(count, -1, -1))
    yield "random block 16", for_all(partial(random, 1 - pruned, (16, 16)))
    share = target / tile_density({"": live[None]})
    yield "random tiles, equal tiles", for_all(partial(random, share, TILE))


@torch.no_grad()
def perplexity(model: Any, windows: Tensor) -> float:
    """Of the next tokens of all windows (B, N)."""
    losses = []
    for row in windows.split(1):
        logits = model(input_ids=row, use_cache=False).logits[0, :-1]
        losses.append(F.cross_entropy(logits, row[0, 1:]))
    return float(torch.stack(losses).mean().exp())


def measure_smollm2(results: dict[str, Any], save: Save, learn: int, judge: int) -> None:
    """Perplexity and densities of every mask at every level, into `results["smollm2"]`."""
    model: Any = zoo.create_model("smollm2", pretrained=True)
    learned_on = smollm2.windows(prose("calibration"), LENGTH)[:learn]
    judged_on = smollm2.windows(prose("heldout"), LENGTH)[:judge]
    before = perplexity(model, judged_on)
    table = {"learned_on": len(learned_on), "judged_on": len(judged_on), "length": LENGTH}
    results["smollm2"] = table | {"perplexity": before, "rows": []}
    maps = mean_maps(model, learned_on)
    live = live_cells(LENGTH, LENGTH, causal=True)
    for pruned in LEVELS:
        for name, masks in candidates(maps, pruned):
            start = time.perf_counter()
            plan = fxpress.Plan({"prune-attention": {s: {"mask": m} for s, m in masks.items()}})
            after = perplexity(fxpress.hf.attach(model, plan), judged_on)
            kept = sum(int(mask.sum()) for mask in masks.values())
            row = {
                "mask": name,
                "pruned": pruned,
                "live_density": kept / sum(m.shape[0] * int(live.sum()) for m in masks.values()),
                "tile_density": tile_density(masks),
                "packed_density": packed_density(masks),
                "perplexity": after,
                "change": after / before - 1,
            }
            results["smollm2"]["rows"].append(row)
            save()
            print(
                f"SmolLM2 {pruned:.0%} {name:28} perplexity {row['change']:+.1%} "
                f"live {row['live_density']:.3f} tiles {row['tile_density']:.3f} "
                f"packed {row['packed_density']:.3f} in {time.perf_counter() - start:.0f} s",
                flush=True,
            )


def packed_density(masks: Masks) -> float:
    """What the CPU's packed columns compute, as a share of all N^2 (of the middle site)."""
    middle = list(masks.values())[len(masks) // 2]
    return compile_mask(middle, device="cpu").tile_density


# MiniLM -------------------------------------------------------------------------------------------


@torch.no_grad()
def cosine(model: Any, optimized: Any, batches: list[dict[str, Tensor]]) -> float:
    """Mean cosine of sentence vectors to those of the original."""
    cosines = []
    for batch in batches:
        a, b = (
            minilm.embed(m(**batch).last_hidden_state, batch["attention_mask"])
            for m in (model, optimized)
        )
        cosines.append(torch.cosine_similarity(a, b))
    return float(torch.cat(cosines).mean())


def measure_minilm(results: dict[str, Any], save: Save, learn: int, judge: int) -> None:
    """Cosines at every block, level and kind of mask, into `results["minilm"]`."""
    model: Any = zoo.create_model("minilm", pretrained=True)
    read = registry.entry("minilm").calibration
    learned_on = read(DATA / "austen" / "calibration.txt", learn)
    judged_on = read(DATA / "austen" / "heldout.txt", judge)
    results["minilm"] = {"learned_on": len(learned_on), "judged_on": len(judged_on), "rows": []}
    for block in (8, 16):
        for kind in ("learned", "window", "random"):
            for pruned in (0.5, 0.7, 0.8, 0.9):
                settings = {"pruned": pruned, "block": block, "mask": kind, "scope": "global"}
                config = {"prune-attention": settings}
                o = fxpress.optimize(model, learned_on, judge="off", config=config)
                layouts = o.passes["prune-attention"].masks.values()
                masks = {str(i): layout.to_dense() for i, layout in enumerate(layouts)}
                kept = torch.cat([mask.float() for mask in masks.values()]).mean()
                row = {
                    "mask": kind,
                    "block": block,
                    "pruned": pruned,
                    "live_density": float(kept),
                    "tile_density": tile_density(masks),
                    "cosine": cosine(model, o, judged_on),
                }
                results["minilm"]["rows"].append(row)
                save()
                print(f"MiniLM block {block} {kind:8} {pruned:.0%} {row['cosine']:.3f}", flush=True)


def main() -> None:
    """Parse the command line, measure, write."""
    parser = argparse.ArgumentParser(description="Quality under static masks, not retrained.")
    parser.add_argument("--learn", type=int, default=10, help="windows (batches) to learn from")
    parser.add_argument("--judge", type=int, default=4, help="windows (batches) to judge on")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(SEED)
    results: dict[str, Any] = {"environment": environment(arguments.threads)}

    def save() -> None:
        arguments.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")

    measure_smollm2(results, save, arguments.learn, arguments.judge)
    measure_minilm(results, save, arguments.learn, arguments.judge)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
