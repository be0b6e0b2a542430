"""`hf.attach`: generation with a key/value cache says what the masked model says without one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fxpress
from fxpress import zoo
from fxpress.errors import LoweringError, PlanError
from fxpress.testing import BITWISE, assert_equivalent
from fxpress.zoo import smollm2
from fxpress.zoo.pretrained import DownloadError

HALF = {"prune-attention": {"pruned": 0.5, "granularity": "element"}}
PROMPT, NEW = 8, 16
STEPS = PROMPT + NEW
FRAMES = 40


def pruned(model: Any, batches: list[dict[str, Any]]) -> tuple[fxpress.Plan, dict[str, Tensor]]:
    """A plan that prunes half of every attention, and its masks."""
    o = fxpress.optimize(model, batches, judge="off", config=HALF)
    record = o.passes["prune-attention"]
    return o.plan, {site: layout.to_dense() for site, layout in record.masks.items()}


def step_by_step(reference: Any, ids: Tensor, name: str, inputs: dict[str, Any]) -> Tensor:
    """Greedy continuation of `ids` without a cache."""
    with torch.no_grad():
        for _ in range(NEW):
            logits = reference(**{name: ids}, **inputs, use_cache=False).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    return ids


# Weights large enough for attention to decide what is said.
@pytest.fixture
def llama() -> Any:
    return zoo.create_model(
        "smollm2", vocab_size=512, initializer_range=0.3, tie_word_embeddings=False
    )


@pytest.fixture
def whisper() -> Any:
    ends: dict[str, Any] = {"pad_token_id": 0, "eos_token_id": None}
    return zoo.create_model(
        "whisper-tiny", vocab_size=512, max_source_positions=FRAMES, init_std=0.3, **ends
    )


def token_ids(rows: int, length: int = STEPS) -> Tensor:
    return torch.randint(3, 512, (rows, length))


GREEDY = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def test_generation_equals_the_masked_model(llama: Any, masked: Callable[..., Any]) -> None:
    plan, masks = pruned(llama, [{"input_ids": token_ids(2), "use_cache": False}])
    assert len(masks) == 2
    prompt = token_ids(3)[:, :PROMPT]
    expected = step_by_step(masked(llama, masks), prompt, "input_ids", {})
    dense = llama.generate(prompt, **GREEDY)
    fxpress.hf.attach(llama, plan)
    assert torch.equal(llama.generate(prompt, **GREEDY), expected)
    assert not torch.equal(dense, expected)
    assert torch.equal(llama.generate(prompt, cache_implementation="static", **GREEDY), expected)
    assert torch.equal(copy.deepcopy(llama).generate(prompt, **GREEDY), expected)


def test_the_rows_of_cross_attention_are_steps(whisper: Any, masked: Callable[..., Any]) -> None:
    x = {"input_features": torch.randn(2, 80, 2 * FRAMES)}
    plan, masks = pruned(whisper, [x | {"decoder_input_ids": token_ids(2), "use_cache": False}])
    assert len(masks) == 6
    start = token_ids(2)[:, :2]
    expected = step_by_step(masked(whisper, masks), start, "decoder_input_ids", x)
    assert not torch.equal(expected, step_by_step(whisper, start, "decoder_input_ids", x))
    fxpress.hf.attach(whisper, plan)
    states = (whisper.model.encoder(x["input_features"])[0],)
    past, ids, last = None, start, start
    with torch.no_grad():
        for _ in range(NEW):
            out = whisper(
                encoder_outputs=states, decoder_input_ids=last, past_key_values=past, use_cache=True
            )
            past, last = out.past_key_values, out.logits[:, -1:].argmax(-1)
            ids = torch.cat([ids, last], 1)
    assert torch.equal(ids, expected)


def test_padding_is_kept(masked: Callable[..., Any]) -> None:
    model: Any = zoo.create_model("minilm")
    padding = torch.ones(2, STEPS, dtype=torch.long)
    padding[1, PROMPT:] = 0
    batch = {"input_ids": token_ids(2), "attention_mask": padding}
    plan, masks = pruned(model, [batch])
    reference = masked(model, masks)
    assert_equivalent(fxpress.hf.attach(model, plan), reference, (), batch)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_beyond_its_mask_a_call_is_dense(attention: str) -> None:
    model: Any = zoo.create_model("smollm2", vocab_size=512, attn_implementation=attention)
    plan, _ = pruned(model, [{"input_ids": token_ids(2), "use_cache": False}])
    original = copy.deepcopy(model)
    fxpress.hf.attach(model, plan)
    longer = {"input_ids": token_ids(2, STEPS + 1), "use_cache": False}
    assert_equivalent(model, original, (), longer, exactness=BITWISE)
    within = {"input_ids": token_ids(2), "use_cache": False}
    assert not torch.equal(model(**within).logits, original(**within).logits)


def test_an_empty_plan_undoes(llama: Any) -> None:
    batch = {"input_ids": token_ids(2), "use_cache": False}
    original = copy.deepcopy(llama)
    fxpress.hf.attach(llama, pruned(llama, [batch])[0])
    fxpress.hf.attach(llama, fxpress.Plan())
    assert_equivalent(llama, original, (), batch, exactness=BITWISE)
    assert llama.config._attn_implementation == "sdpa"


def test_what_does_not_fit_is_refused(llama: Any) -> None:
    plan, masks = pruned(llama, [{"input_ids": token_ids(2), "use_cache": False}])
    with pytest.raises(PlanError, match=r"no module 'model\.layers\.0\.self_attn'"):
        fxpress.hf.attach(zoo.create_model("minilm"), plan)
    with pytest.raises(PlanError, match="no transformers attention"):
        fxpress.hf.attach(torch.nn.Linear(2, 2), fxpress.Plan())
    mask = next(iter(masks.values()))
    repeated = fxpress.Plan({"prune-attention": {"model.layers.0.self_attn#2": {"mask": mask}}})
    with pytest.raises(PlanError, match="repeated call"):
        fxpress.hf.attach(llama, repeated)
    fxpress.hf.attach(llama, plan)
    attention = llama.model.layers[0].self_attn
    states = torch.randn(1, PROMPT, 32)
    angles = llama.model.rotary_emb(states, torch.arange(PROMPT)[None])
    with pytest.raises(LoweringError, match="LlamaAttention passes softcap"):
        attention(states, position_embeddings=angles, attention_mask=None, softcap=30.0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_on_the_left_is_refused(attention: str) -> None:
    model: Any = zoo.create_model("smollm2", vocab_size=512, attn_implementation=attention)
    plan, _ = pruned(model, [{"input_ids": token_ids(2), "use_cache": False}])
    padding = torch.ones(2, PROMPT, dtype=torch.long)
    padding[1, :3] = 0
    fxpress.hf.attach(model, plan)
    with pytest.raises(LoweringError, match="padded on the left"):
        model.generate(token_ids(2, PROMPT), attention_mask=padding, **GREEDY)


@pytest.mark.pretrained
def test_smollm2_generates_under_its_masks(masked: Callable[..., Any]) -> None:
    try:
        model: Any = zoo.create_model("smollm2", pretrained=True)
    except DownloadError as error:
        pytest.skip(str(error))
    text = ["It is a truth universally acknowledged, that a single man in possession of a good"]
    ids = smollm2.windows(text)[:1]
    plan, masks = pruned(model, [{"input_ids": ids.repeat(1, 3), "use_cache": False}])
    expected = step_by_step(masked(model, masks), ids, "input_ids", {})
    fxpress.hf.attach(model, plan)
    assert torch.equal(model.generate(ids, **GREEDY), expected)
