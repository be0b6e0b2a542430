"""Whisper's weights from a CTranslate2 file, under the names that transformers gives them."""

from __future__ import annotations

import struct
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from fxpress.zoo.pretrained import PretrainedError

__all__ = ["read_ctranslate2", "state_dict"]

LAYERS = 4  # of the encoder, and of the decoder


def read_ctranslate2(f: BinaryIO) -> dict[str, Tensor]:
    """The tensors of a CTranslate2 model file (binary version 6), as fp32."""
    dtypes = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}

    def number(code: str) -> int:
        return int(struct.unpack("<" + code, f.read(struct.calcsize(code)))[0])

    def string() -> str:
        return f.read(number("H")).rstrip(b"\0").decode()

    if (version := number("I")) != 6:
        raise PretrainedError(f"the weights are CTranslate2 binary version {version}, expected 6")
    string(), number("I")  # name and revision of the model specification
    tensors = {}
    for _ in range(number("I")):
        name = string()
        shape = [number("I") for _ in range(number("B"))]
        dtype = dtypes[number("B")]
        array = np.frombuffer(f.read(number("I")), dtype).reshape(shape)
        tensors[name] = torch.tensor(array.astype(np.float32))
    return tensors


def state_dict(w: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the names of WhisperForConditionalGeneration."""
    embedding = w["decoder/embeddings/weight"]
    state = {"model.decoder.embed_tokens.weight": embedding, "proj_out.weight": embedding}
    for conv in ("conv1", "conv2"):
        state |= _linear(w, f"encoder/{conv}", f"model.encoder.{conv}")
    for side in ("encoder", "decoder"):
        state[f"model.{side}.embed_positions.weight"] = w[f"{side}/position_encodings/encodings"]
        state |= _norm(w, f"{side}/layer_norm", f"model.{side}.layer_norm")
        for i in range(LAYERS):
            source, target = f"{side}/layer_{i}", f"model.{side}.layers.{i}"
            state |= _attention(w, f"{source}/self_attention", f"{target}.self_attn", 3)
            if side == "decoder":
                state |= _attention(w, f"{source}/attention", f"{target}.encoder_attn", 2)
            state |= _linear(w, f"{source}/ffn/linear_0", f"{target}.fc1")
            state |= _linear(w, f"{source}/ffn/linear_1", f"{target}.fc2")
            state |= _norm(w, f"{source}/ffn/layer_norm", f"{target}.final_layer_norm")
    return state


def _attention(w: dict[str, Tensor], source: str, target: str, fused: int) -> dict[str, Tensor]:
    """One attention and its norm; `fused` projections (3: q, k, v; 2: k, v) share a matrix."""
    last = 1 if fused == 3 else 2
    state = {}
    for kind in ("weight", "bias"):
        parts = list(w[f"{source}/linear_{last - 1}/{kind}"].chunk(fused))
        if fused == 2:
            parts.insert(0, w[f"{source}/linear_0/{kind}"])
        for name, part in zip(("q_proj", "k_proj", "v_proj"), parts, strict=True):
            state[f"{target}.{name}.{kind}"] = part
    if state.pop(f"{target}.k_proj.bias").any():  # Whisper's keys have none
        raise PretrainedError("a key bias of the weights is not zero: the package has changed")
    state |= _linear(w, f"{source}/linear_{last}", f"{target}.out_proj")
    return state | _norm(w, f"{source}/layer_norm", f"{target}_layer_norm")


def _linear(w: dict[str, Tensor], source: str, target: str) -> dict[str, Tensor]:
    return {f"{target}.{kind}": w[f"{source}/{kind}"] for kind in ("weight", "bias")}


def _norm(w: dict[str, Tensor], source: str, target: str) -> dict[str, Tensor]:
    return {f"{target}.weight": w[f"{source}/gamma"], f"{target}.bias": w[f"{source}/beta"]}
