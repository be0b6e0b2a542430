"""Attention of well-known architectures, against a count that knows nothing of graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxpress.capture import capture
from fxpress.passes.fuse_attention import FuseAttention
from fxpress.passes.sites import attention_sites
from fxpress.program import Program
from fxpress.rewrite import PassContext
from fxpress.testing import assert_equivalent
from fxpress.verify import verify
from tests.passes.architectures import tokens
from tests.passes.attention_count import AttentionCount

aten = torch.ops.aten

Build = Callable[[str], nn.Module]
Call = Mapping[str, Any]


SMALL = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 50,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def hugging_face(model: str, config: str, **sizes: Any) -> Build:
    """A small random model of transformers, by the names of its classes."""

    def build(attention: str) -> nn.Module:
        import transformers

        made = getattr(transformers, config)(**sizes, attn_implementation=attention)
        built: nn.Module = getattr(transformers, model)(made)
        return built

    return build


def causal(name: str, **more: Any) -> tuple[Build, Call]:
    build = hugging_face(f"{name}ForCausalLM", f"{name}Config", **SMALL, **more)
    return build, tokens() | {"use_cache": False}


GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 50, "n_positions": 32}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 50}
VIT = {name: SMALL[name] for name in list(SMALL)[:4]} | {"image_size": 8, "patch_size": 4}
DISTILBERT = {"dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 2, "vocab_size": 50}
WHISPER = {
    "vocab_size": 50,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "num_mel_bins": 4,
    "max_source_positions": 8,
    "max_target_positions": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}

# name: (model, call, attentions)
MODELS: dict[str, tuple[Build, Call, list[str]]] = {
    "bert": (hugging_face("BertModel", "BertConfig", **SMALL), tokens(), ["self"] * 2),
    "llama": (*causal("Llama", num_key_value_heads=1), ["causal"] * 2),
    "mistral": (*causal("Mistral", num_key_value_heads=1), ["causal"] * 2),
    "mistral_windowed": (
        *causal("Mistral", num_key_value_heads=1, sliding_window=6),
        ["causal"] * 2,
    ),
    "qwen2": (*causal("Qwen2", num_key_value_heads=1), ["causal"] * 2),
    "opt": (*causal("OPT", ffn_dim=32, word_embed_proj_dim=16), ["causal"] * 2),
    "gpt2": (
        hugging_face("GPT2LMHeadModel", "GPT2Config", **GPT2, bos_token_id=1, eos_token_id=2),
        tokens() | {"use_cache": False},
        ["causal"] * 2,
    ),
    "t5": (
        hugging_face("T5ForConditionalGeneration", "T5Config", **T5),
        tokens() | {"decoder_input_ids": tokens()["input_ids"], "use_cache": False},
        ["self", "self", *["causal", "cross"] * 2],
    ),
    "t5_padded": (
        hugging_face("T5ForConditionalGeneration", "T5Config", **T5),
        tokens()
        | {f"decoder_{name}": value for name, value in tokens().items()}
        | {"use_cache": False},
        ["self", "self", *["causal", "cross"] * 2],
    ),
    "distilbert": (
        hugging_face("DistilBertModel", "DistilBertConfig", **DISTILBERT),
        tokens(),
        ["self"] * 2,
    ),
    "vit": (
        hugging_face("ViTModel", "ViTConfig", **VIT),
        {"pixel_values": torch.linspace(-1, 1, 384).view(2, 3, 8, 8)},
        ["self"] * 2,
    ),
    "whisper": (
        hugging_face("WhisperForConditionalGeneration", "WhisperConfig", **WHISPER),
        {
            "input_features": torch.linspace(-1, 1, 128).view(2, 4, 16),
            "decoder_input_ids": tokens()["input_ids"],
            "use_cache": False,
        },
        ["self", "causal", "cross"],
    ),
}


def check(model: nn.Module, call: Call, kinds: list[str]) -> Program:
    """Fuse, and compare with the eager run in count and outputs."""
    with AttentionCount() as count, torch.no_grad():
        model(**call)
    program = capture(model, kwargs=call)
    before = program.copy()
    record = FuseAttention().run(program, PassContext())
    verify(program, "fuse-attention", before)
    found = attention_sites(program)
    assert [site.kind for site in found] == kinds
    assert len(found) + len(record.declined) == count.total
    assert not record.declined
    assert not FuseAttention().run(program, PassContext()).rewrites
    assert_equivalent(program, model, (), call)
    return program


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_transformers(
    name: str, attention: str, assert_same_gradients: Callable[..., None]
) -> None:
    build, call, kinds = MODELS[name]
    model = build(attention).eval()
    program = check(model, call, kinds)
    assert_same_gradients(program.graph_module, model, (), call)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_causal_without_a_mask(name: str) -> None:
    build, call, kinds = MODELS[name]
    without = {key: value for key, value in call.items() if key != "attention_mask"}
    program = check(build("eager").eval(), without, kinds)
    assert all(site.is_causal and site.mask is None for site in attention_sites(program))


def test_padding_is_what_remains_beside_causality() -> None:
    build, call, kinds = MODELS["llama"]
    program = check(build("eager").eval(), call, kinds)
    for site in attention_sites(program):
        assert site.padding is not None
        assert site.padding.meta["val"].dtype == torch.bool
        assert tuple(site.padding.meta["val"].shape) == (2, 1, 1, 8)


class WithMask(nn.Module):
    """torch's own layer, called with a mask."""

    def __init__(self, layer: nn.Module, **fixed: Any) -> None:
        super().__init__()
        self.layer = layer
        self.fixed = fixed

    def forward(self, x: Tensor) -> Any:
        """The layer over one sequence (and itself as memory)."""
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        if isinstance(self.layer, nn.MultiheadAttention):
            return self.layer(x, x, x, attn_mask=mask, **self.fixed)
        if isinstance(self.layer, nn.TransformerDecoderLayer):
            return self.layer(x, x.flip(0), tgt_mask=mask)
        return self.layer(x, src_mask=mask)


def torch_layers() -> dict[str, tuple[nn.Module, list[str]]]:
    mha = nn.MultiheadAttention(16, 2, batch_first=True)
    encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    decoder = nn.TransformerDecoderLayer(16, 2, 32, batch_first=True)
    return {
        "attention": (WithMask(mha, need_weights=False), ["causal"]),
        "attention_weights": (WithMask(mha, need_weights=True), ["causal"]),
        "encoder": (WithMask(encoder), ["causal"]),
        "encoder_stack": (nn.TransformerEncoder(encoder, 2, enable_nested_tensor=False), []),
        "decoder": (WithMask(decoder), ["causal", "cross"]),
    }


@pytest.mark.parametrize("name", torch_layers())
def test_torch_layers(name: str, assert_same_gradients: Callable[..., None]) -> None:
    model, kinds = torch_layers()[name]
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        argument = "src" if name == "encoder_stack" else "x"
        call = {argument: torch.randn(3, 5, 16)}
        program = check(model.eval(), call, kinds or ["self", "self"])
        assert_same_gradients(program.graph_module, model, (), call)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
