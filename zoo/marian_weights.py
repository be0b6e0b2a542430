"""A Transformer student's weights from a Marian file, under the names that `fxpress.zoo` uses."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fxpress.zoo.pretrained import PretrainedError

__all__ = ["read_marian", "state_dict"]

FLOAT32, INTGEMM8 = 0x404, 0x4101  # Marian's numbers of types


def read_marian(path: Path) -> dict[str, Tensor]:
    """The items of a Marian binary file, as fp32.

    Raises:
        PretrainedError: an item is of a type other than fp32 and int8.
    """
    data = path.read_bytes()
    _, count = struct.unpack_from("<QQ", data)
    heads = [struct.unpack_from("<QQQQ", data, 16 + 32 * i) for i in range(count)]
    at = 16 + 32 * count
    names, shapes = [], []
    for length, *_ in heads:
        names.append(data[at : at + length].rstrip(b"\0").decode())
        at += length
    for _, _, dims, _ in heads:
        shapes.append(struct.unpack_from(f"<{dims}i", data, at))
        at += 4 * dims
    at += 8 + struct.unpack_from("<Q", data, at)[0]  # padding
    items = {}
    for name, shape, (_, kind, _, size) in zip(names, shapes, heads, strict=True):
        if np.prod(shape) > 0 and not name.startswith("special:"):
            items[name] = _item(name, shape, kind, data[at : at + size])
        at += size
    return items


def _item(name: str, shape: tuple[int, ...], kind: int, data: bytes) -> Tensor:
    """An item as fp32: an int8 matrix lies transposed, but for the embedding."""
    n = int(np.prod(shape))
    if kind == FLOAT32:
        return torch.tensor(np.frombuffer(data, np.float32, n).reshape(shape))
    if kind != INTGEMM8:
        raise PretrainedError(f"{name} has the unknown type {kind:#x}: the package has changed")
    multiplier = np.frombuffer(data, np.float32, 1, offset=n)[0]  # it follows the matrix
    matrix = np.frombuffer(data, np.int8, n).astype(np.float32) / multiplier
    return torch.tensor(matrix.reshape(shape) if name == "Wemb" else matrix.reshape(shape[::-1]).T)


def state_dict(items: dict[str, Tensor], encoder: int, decoder: int) -> dict[str, Tensor]:
    """The state of a `bergamot.Bergamot` of so many layers."""
    state = {
        "embedding.weight": items["Wemb"],
        "output_bias": items["decoder_ff_logit_out_b"].flatten(),
    }

    def linear(ours: str, weight: str, bias: str | None = None) -> None:
        state[f"{ours}.weight"] = items[weight].T.contiguous()
        if bias is not None:
            state[f"{ours}.bias"] = items[bias].flatten()

    def norm(ours: str, theirs: str) -> None:
        state[f"{ours}.weight"] = items[f"{theirs}_ln_scale"].flatten()
        state[f"{ours}.bias"] = items[f"{theirs}_ln_bias"].flatten()

    def block(ours: str, theirs: str, attention: str) -> None:
        for name, letter in {"q": "q", "k": "k", "v": "v", "out": "o"}.items():
            weight, bias = (f"{theirs}_{attention}_{kind}{letter}" for kind in "Wb")
            linear(f"{ours}.attention.{name}", weight, bias)
        norm(f"{ours}.attention_norm", f"{theirs}_{attention}_Wo")
        linear(f"{ours}.feed_forward.up", f"{theirs}_ffn_W1", f"{theirs}_ffn_b1")
        linear(f"{ours}.feed_forward.down", f"{theirs}_ffn_W2", f"{theirs}_ffn_b2")
        norm(f"{ours}.feed_forward_norm", f"{theirs}_ffn_ffn")

    for i in range(encoder):
        block(f"encoder.{i}", f"encoder_l{i + 1}", "self")
    for i in range(decoder):
        theirs = f"decoder_l{i + 1}"
        block(f"decoder.{i}", theirs, "context")
        linear(f"decoder.{i}.recurrence.forget", f"{theirs}_rnn_Wf", f"{theirs}_rnn_bf")
        linear(f"decoder.{i}.recurrence.candidate", f"{theirs}_rnn_W")
        norm(f"decoder.{i}.recurrence_norm", f"{theirs}_rnn_ffn")
    return state
