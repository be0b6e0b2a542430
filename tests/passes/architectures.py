"""Small random models of transformers, one of each architecture, with a call for each.

Only sizes are given: what a configuration does not know of them it does not get.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["ARCHITECTURES", "Architecture", "tokens"]

_WIDTHS = ("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "embedding_size", "emb_dim")
_WIDE = ["intermediate_size", "hidden_dim", "d_ff", "ffn_dim", "encoder_ffn_dim", "d_inner"]
_WIDE += ["decoder_ffn_dim", "n_inner", "ffn_hidden_size"]
_LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "num_encoder_layers")
_HEADS = ["num_attention_heads", "num_heads", "n_head", "n_heads", "encoder_attention_heads"]
_HEADS += ["decoder_attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads"]
_HEAD_WIDTHS = ("head_dim", "d_kv", "d_head", "attention_head_size")
_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_target_positions")

SIZES: dict[str, Any] = {
    **dict.fromkeys((*_WIDTHS, "word_embed_proj_dim", "moe_intermediate_size"), 16),
    **dict.fromkeys(_WIDE, 32),
    **dict.fromkeys(_LAYERS, 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_decoder_layers"), 1),
    **dict.fromkeys(_HEADS, 2),
    **dict.fromkeys(_HEAD_WIDTHS, 8),
    **dict.fromkeys(_POSITIONS, 32),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    "num_experts_per_tok": 2,
    "shared_expert_intermediate_size": 16,
    "num_key_value_heads": 1,
    "vocab_size": 50,
    "rotary_dim": 4,
    "image_size": 8,
    "patch_size": 4,
    "num_mel_bins": 4,
    "max_source_positions": 8,
    "sliding_window": 6,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}


def tokens() -> dict[str, Any]:
    """Two rows, the second one padded on the right."""
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[1, 5:] = 0
    return {"input_ids": torch.arange(16).view(2, 8) + 3, "attention_mask": mask}


def _continued() -> dict[str, Any]:
    return tokens() | {"use_cache": False}


def _answered() -> dict[str, Any]:
    return _continued() | {"decoder_input_ids": tokens()["input_ids"]}


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def _image(size: int = 8) -> Callable[[], dict[str, Any]]:
    return lambda: {"pixel_values": _random(2, 3, size, size)}


def _wave() -> dict[str, Any]:
    return {"input_values": _random(2, 400)}


def _spectrum() -> dict[str, Any]:
    spoken = {"decoder_input_ids": tokens()["input_ids"], "use_cache": False}
    return {"input_features": _random(2, 4, 16)} | spoken


@dataclass(frozen=True)
class Architecture:
    """One architecture.

    Attributes:
        name: the common start of its class names.
        head: the end of the model's class name.
        call: makes the keyword arguments of a call.
        sizes: settings beside `SIZES`.
        config: name of the configuration, where it is not `name` and `Config`.
        declined: reason for which its attention is left as it is.
    """

    name: str
    head: str
    call: Callable[[], dict[str, Any]]
    sizes: Mapping[str, Any] = field(default_factory=dict)
    config: str = ""
    declined: str = ""

    def attentions(self) -> list[str]:
        """How its attention can be spelled: by itself, and by the operator of torch."""
        import transformers

        kind = getattr(transformers, self.name + self.head)
        return ["eager", "sdpa"] if kind._supports_sdpa else ["eager"]

    def build(self, attention: str) -> nn.Module:
        """The model in eval mode, its attention spelled one of these ways."""
        import transformers

        kind = getattr(transformers, self.config or f"{self.name}Config")
        known = {name for base in kind.__mro__ for name in getattr(base, "__annotations__", {})}
        given = {name: size for name, size in SIZES.items() if name in known} | dict(self.sizes)
        config = kind(**given)
        config._experts_implementation = "batched_mm"  # the grouped kernel takes no float64
        torch.manual_seed(0)
        model_kind = getattr(transformers, self.name + self.head)
        model: nn.Module = model_kind._from_config(config, attn_implementation=attention)
        return model.eval()


def _encoders() -> list[Architecture]:
    plain = "Bert Roberta Albert Electra DistilBert MPNet ConvBert MobileBert SqueezeBert Esm "
    plain += "RoFormer ModernBert XLM Nystromformer XLNet OpenAIGPT CTRL"
    sizes: dict[str, dict[str, Any]] = {
        "MobileBert": {"intra_bottleneck_size": 16, "true_hidden_size": 16},
    }
    found = [Architecture(n, "Model", tokens, sizes.get(n, {})) for n in plain.split()]
    relative: dict[str, Any] = {"relative_attention": True, "max_relative_positions": -1}
    relative |= {"pos_att_type": ["c2p", "p2c"], "position_biased_input": False}
    shared = {"position_buckets": 4, "norm_rel_ebd": "layer_norm", "share_att_key": True}
    found.append(Architecture("Deberta", "Model", tokens, relative))
    found.append(Architecture("DebertaV2", "Model", tokens, relative | shared))
    return found


def _decoders() -> list[Architecture]:
    plain = "GPTNeoX GPTJ OPT Bloom Mpt Llama Mistral Mixtral Qwen2 Qwen3Moe Gemma Phi3 Cohere "
    plain += "GPTBigCode BioGpt StableLm"
    found = [Architecture(n, "ForCausalLM", _continued) for n in plain.split()]
    cap = "a soft cap (tanh) stands between scores and softmax"
    local = {"attention_types": [[["global", "local"], 1]], "window_size": 4}
    found.append(Architecture("Gemma2", "ForCausalLM", _continued, declined=cap))
    found.append(Architecture("GPT2", "LMHeadModel", _continued))
    found.append(Architecture("GPTNeo", "ForCausalLM", _continued, local))
    found.append(Architecture("Falcon", "ForCausalLM", _continued, {"alibi": True}))
    return found


def _translators() -> list[Architecture]:
    plain = "T5 UMT5 LongT5 Bart Pegasus"
    return [Architecture(n, "ForConditionalGeneration", _answered) for n in plain.split()]


def _watchers() -> list[Architecture]:
    found = [Architecture(n, "Model", _image()) for n in ("ViT", "Beit", "Dinov2")]
    stages = {"image_size": 32, "embed_dim": 8, "depths": [2, 2], "num_heads": [1, 2]}
    stages |= {"window_size": 4}
    found += [Architecture(n, "Model", _image(32), stages) for n in ("Swin", "Swinv2")]
    small = {"depths": [1] * 4, "hidden_sizes": [8, 8, 16, 16], "num_attention_heads": [1, 1, 2, 2]}
    found.append(Architecture("Segformer", "Model", _image(32), small))
    windows = {"window_block_indices": [0], "window_size": 2}
    relative = {"image_size": 16, "use_relative_position_embeddings": True}
    found.append(Architecture("VitDet", "Model", _image(16), windows | relative))
    return found


def _listeners() -> list[Architecture]:
    front: dict[str, Any] = {"conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3)}
    front |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    front |= {"num_feat_extract_layers": 2}
    relative = front | {"position_embeddings_type": "relative"}
    return [
        Architecture("Wav2Vec2", "Model", _wave, front),
        Architecture("WavLM", "Model", _wave, front),
        Architecture("Wav2Vec2Conformer", "Model", _wave, relative),
        Architecture("Whisper", "ForConditionalGeneration", _spectrum),
    ]


ARCHITECTURES = {
    architecture.name: architecture
    for group in (_encoders, _decoders, _translators, _watchers, _listeners)
    for architecture in group()
}
