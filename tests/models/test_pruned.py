"""Real trained models, pruned as the configuration says: equal to the masked reference."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from fnmatch import fnmatch
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fxpress
from fxpress import zoo
from fxpress.testing import assert_equivalent
from fxpress.zoo import registry, smollm2, whisper
from fxpress.zoo.pretrained import DownloadError
from fxpress.zoo.samples import DATA, read_texts

pytestmark = pytest.mark.pretrained

SITES = {
    "minilm": {"self": 6},
    "smollm2": {"causal": 30},
    "whisper-tiny": {"self": 4, "causal": 4, "cross": 4},
    "whisper-tiny-encoder": {"self": 4},
}
NAMES = sorted(SITES)


def prose() -> list[str]:
    return read_texts(DATA / "austen" / "calibration.txt")


def trained(name: str) -> tuple[Any, list[dict[str, Any]]]:
    """A pretrained model with calibration batches; skips only where it cannot be fetched."""
    try:
        model = zoo.create_model(name, pretrained=True)
    except DownloadError as error:
        pytest.skip(str(error))
    if name == "smollm2":
        return model, [{"input_ids": smollm2.windows(prose(), 1024)[:1], "use_cache": False}]
    batches = registry.entry(name).calibration(None, 2)
    if name == "whisper-tiny":
        # A decoder that reads much more than a prompt says has more to prune.
        read = whisper.tokenizer()(" ".join(prose()[:4]), return_tensors="pt").input_ids[:, :128]
        batches = [x | {"decoder_input_ids": read, "use_cache": False} for x in batches]
    return model, batches


def check(
    o: fxpress.OptimizedModule, name: str, level: Callable[[str], float]
) -> dict[str, Tensor]:
    """Every site of the model is pruned as far as was asked for; return the masks."""
    record = o.passes["prune-attention"]
    assert Counter(entry["kind"] for entry in record.ledger.values()) == SITES[name]
    assert len(record.rewrites) == len(record.masks) == sum(SITES[name].values())
    for site, layout in record.masks.items():
        assert 0.9 - level(site) < layout.live_density < 1.1 - level(site)
    return {site: layout.to_dense() for site, layout in record.masks.items()}


# All of Whisper, and so its encoder.
@pytest.mark.parametrize("name", ["minilm", "whisper-tiny"])
@pytest.mark.parametrize("pruned", [0.5, 0.8])
def test_pruned_blocks_equal_the_masked_reference(
    name: str, pruned: float, masked: Callable[..., Any]
) -> None:
    model, batches = trained(name)
    config = {"prune-attention": {"pruned": pruned, "block": 16}}
    o = fxpress.optimize(model, batches, judge="off", config=config)
    masks = check(o, name, lambda _: pruned)
    assert_equivalent(o, masked(model, masks), (), batches[0])


def test_smollm2_at_two_levels_equals_the_masked_reference(masked: Callable[..., Any]) -> None:
    """One run for both levels, layer by layer in turn: it takes its time."""
    model, batches = trained("smollm2")
    odd = "model.layers.*[13579].self_attn"
    config: dict[str, Any] = {"prune-attention": {"pruned": 0.5, "block": 16}}
    config |= {odd: {"prune-attention": {"pruned": 0.8}}}
    o = fxpress.optimize(model, batches, judge="off", config=config)
    masks = check(o, "smollm2", lambda site: 0.8 if fnmatch(site, odd) else 0.5)
    assert_equivalent(o, masked(model, masks), (), batches[0])


class CountSoftmaxes(TorchDispatchMode):
    """Counts softmaxes over (B, H, Nq, Nk): what attention in eager form cannot do without."""

    count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten._softmax.default and args[0].ndim == 4:
            self.count += 1
        return func(*args, **(kwargs or {}))


def shortened(batch: dict[str, Any]) -> dict[str, Any]:
    """Fewer tokens: counting attention takes no long texts."""
    short = {"input_ids", "attention_mask", "decoder_input_ids"}
    return {k: v[:, :32] if k in short else v for k, v in batch.items()}


@pytest.mark.parametrize("name", NAMES)
def test_every_attention_is_recognised(name: str) -> None:
    model, batches = trained(name)
    batch = shortened(batches[0])
    found = fxpress.explain(model, (), batch).attention
    assert all(site.recognised for site in found)
    assert Counter(site.kind for site in found) == SITES[name]
    model.set_attn_implementation("eager")
    with torch.no_grad(), CountSoftmaxes() as softmaxes:  # type: ignore[no-untyped-call]
        model(**batch)
    assert len(found) == softmaxes.count
