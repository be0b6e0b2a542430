"""`make demo`: Whisper tiny.en on short voice prompts, optimized on CPU.

Each prompt of a few seconds sits in a window of 30 s: 1,500 frames, most of them silence. Attention
pruning learns from 24 prompts which keys each head needs for which rows, and judges itself on other
prompts. The model comes from PyPI, the prompts are in the repository.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fxpress
from fxpress.zoo import create_model, whisper

__all__ = ["main", "spoken_batches"]

_JUDGED = 12
_TRANSCRIBED = 24


def spoken_batches(model: Any, features: Tensor) -> list[dict[str, Any]]:
    """One batch a prompt: its features, and its own transcript as what the decoder reads.

    Args:
        model: the speech model.
        features: (B, 80, 3000).
    """
    batches = []
    for row in features.split(1):
        ids = whisper.transcript_ids(model, row)
        batches.append({"input_features": row, "decoder_input_ids": ids, "use_cache": False})
    return batches


def main() -> None:
    """Optimize, print the report, write `demo/report.html` and `demo/plan`."""
    threads = torch.get_num_threads()
    print(f"fxpress demo: Whisper tiny.en on voice prompts, CPU, {threads} threads", flush=True)
    model = create_model("whisper-tiny", pretrained=True)
    heldout = whisper.voice_prompts("heldout")
    calibration = spoken_batches(model, whisper.voice_prompts("calibration"))
    judged = spoken_batches(model, heldout[:_JUDGED])

    start = time.perf_counter()
    optimized = fxpress.optimize(model, calibration, validation_data=judged)
    seconds = time.perf_counter() - start

    print(optimized.report)
    print(f"\noptimize took {seconds:.0f} s; now {_TRANSCRIBED} other prompts are transcribed")
    page = optimized.report.to_html("demo/report.html")
    optimized.report.to_json("demo/report.json")
    folder = optimized.plan.save(Path("demo/plan"))
    others = heldout[_JUDGED : _JUDGED + _TRANSCRIBED]
    before = whisper.transcribe(model, others)
    pruned = fxpress.hf.attach(create_model("whisper-tiny", pretrained=True), optimized.plan)
    after = whisper.transcribe(pruned, others)
    changed = whisper.word_changes(before, after)
    print(f"words changed in their transcripts: {100 * changed:.1f} %")
    print(f"\nreport: {page}   plan: {folder}")
    if not optimized.report.as_dict()["changed"]:
        sys.exit("the demo found nothing to gain on this machine; the report says why")


if __name__ == "__main__":
    main()
