"""The translator with a recurrent decoder, and its weights out of a Marian file."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxpress
from fxpress import zoo
from fxpress.testing import assert_equivalent
from fxpress.zoo import bergamot, marian_weights, tokenization, translation
from fxpress.zoo.decoding import beam_search, greedy
from fxpress.zoo.pretrained import DownloadError, PretrainedError
from fxpress.zoo.registry import entry
from fxpress.zoo.samples import DATA, read_rows

SIZES: dict[str, Any] = {"vocabulary": 40, "width": 16, "heads": 2, "inner": 24}


def calls(count: int = 1) -> list[tuple[Tensor, Tensor]]:
    source = torch.randint(1, 40, (count, 3, 6))
    source[:, 1, 4:] = bergamot.END
    return [(x, torch.randint(1, 40, (3, 5))) for x in source]


def test_a_cell_is_its_formula() -> None:
    cell = bergamot.SSRU(4)
    x, before = torch.randn(2, 3, 4), torch.randn(2, 4)
    y, after = cell(x, before)
    state = before
    for t in range(3):
        f = torch.sigmoid(cell.forget(x[:, t]))
        state = f * state + (1 - f) * cell.candidate(x[:, t])
        assert_equivalent(lambda t: y[:, t], lambda _, s=state: s.relu(), (t,))
    assert_equivalent(lambda: after, lambda: state, ())


def test_the_first_token_is_not_read() -> None:
    model, ((source, target),) = zoo.create_model("bergamot-en-pt", **SIZES), calls()
    other = target.clone()
    other[:, 0] = 0
    assert_equivalent(lambda s, _: model(s, other), model, (source, target))


def test_its_recurrences_are_seen_and_rolled() -> None:
    model, batches = zoo.create_model("bergamot-en-pt", **SIZES), calls(4)
    found = fxpress.explain(model, batches[0])
    paths = ["decoder.0.recurrence", "decoder.1.recurrence"]
    assert [(s.path, s.recognised) for s in found.recurrences] == [(p, True) for p in paths]
    assert [s.kind for s in found.attention] == ["self", "self", "cross", "cross"]
    o = fxpress.optimize(model, batches, max_divergence=0.0)
    assert len(o.passes["roll-recurrence"].rewrites) == 2
    assert_equivalent(o, model, batches[0])


def marian_file(items: dict[str, tuple[int, tuple[int, ...], bytes]]) -> bytes:
    """Marian's binary format: heads, names, shapes, padding, data."""
    names = [name.encode() + b"\0" for name in items]
    heads = b"".join(
        struct.pack("<4Q", len(name), kind, len(shape), len(data))
        for name, (kind, shape, data) in zip(names, items.values(), strict=True)
    )
    shapes = b"".join(struct.pack(f"<{len(s)}i", *s) for _, s, _ in items.values())
    body = b"".join(data for *_, data in items.values())
    offset = struct.pack("<Q", 5) + bytes(5)
    return struct.pack("<QQ", 1, len(items)) + heads + b"".join(names) + shapes + offset + body


def plain(x: Tensor) -> tuple[int, tuple[int, ...], bytes]:
    return marian_weights.FLOAT32, tuple(x.shape), x.detach().contiguous().numpy().tobytes()


def as_marian(model: bergamot.Bergamot) -> dict[str, tuple[int, tuple[int, ...], bytes]]:
    """A model's weights under Marian's names, as their documentation has them."""
    items = {"Wemb": plain(model.embedding.weight)}
    items["decoder_ff_logit_out_b"] = plain(model.output_bias[None])

    def linear(module: nn.Linear, weight: str, bias: str = "") -> None:
        items[weight] = plain(module.weight.T)
        if bias:
            items[bias] = plain(module.bias[None])

    def norm(module: nn.LayerNorm, name: str) -> None:
        items[f"{name}_ln_scale"] = plain(module.weight[None])
        items[f"{name}_ln_bias"] = plain(module.bias[None])

    for side, attention in (("encoder", "self"), ("decoder", "context")):
        layers: Any = model.get_submodule(side)
        for i, layer in enumerate(layers, 1):
            name = f"{side}_l{i}"
            for ours, letter in (("q", "q"), ("k", "k"), ("v", "v"), ("out", "o")):
                module = layer.attention.get_submodule(ours)
                linear(module, f"{name}_{attention}_W{letter}", f"{name}_{attention}_b{letter}")
            norm(layer.attention_norm, f"{name}_{attention}_Wo")
            linear(layer.feed_forward.up, f"{name}_ffn_W1", f"{name}_ffn_b1")
            linear(layer.feed_forward.down, f"{name}_ffn_W2", f"{name}_ffn_b2")
            norm(layer.feed_forward_norm, f"{name}_ffn_ffn")
            if side == "decoder":
                linear(layer.recurrence.forget, f"{name}_rnn_Wf", f"{name}_rnn_bf")
                linear(layer.recurrence.candidate, f"{name}_rnn_W")
                norm(layer.recurrence_norm, f"{name}_rnn_ffn")
    return items


def test_weights_of_a_marian_file_are_the_model(tmp_path: Path) -> None:
    model = bergamot.Bergamot(**SIZES, encoder_layers=2).eval()
    path = tmp_path / "model.bin"
    path.write_bytes(marian_file(as_marian(model)))
    loaded = bergamot.Bergamot(**SIZES, encoder_layers=2).eval()
    loaded.load_state_dict(marian_weights.state_dict(marian_weights.read_marian(path), 2, 2))
    assert_equivalent(loaded, model, calls()[0])


def test_eight_bit_matrices_lie_transposed_but_for_the_embedding(tmp_path: Path) -> None:
    matrix = np.arange(-3, 3, dtype=np.int8).reshape(2, 3)
    data = matrix.tobytes() + np.float32(2).tobytes()
    kind = marian_weights.INTGEMM8
    path = tmp_path / "model.bin"
    path.write_bytes(marian_file({"Wemb": (kind, (2, 3), data), "W": (kind, (3, 2), data)}))
    items = marian_weights.read_marian(path)
    assert items["Wemb"].tolist() == (matrix / 2).tolist()
    assert items["W"].tolist() == (matrix.T / 2).tolist()
    path.write_bytes(marian_file({"W": (0x999, (3, 2), data)}))
    with pytest.raises(PretrainedError, match="W has the unknown type 0x999"):
        marian_weights.read_marian(path)


def test_trained_weights_fix_the_sizes() -> None:
    with pytest.raises(PretrainedError, match="drop width"):
        zoo.create_model("bergamot-en-pt", pretrained=True, width=8)


def trained() -> Any:
    try:
        return zoo.create_model("bergamot-en-pt", pretrained=True)
    except DownloadError as error:
        pytest.skip(str(error))


@pytest.mark.pretrained
def test_the_trained_model_translates() -> None:
    model = trained()
    assert sum(p.numel() for p in model.parameters()) == 16_907_008
    rows = read_rows(DATA / "sentences" / "en-pt.jsonl", ("en", "pt"))
    sources = [row["en"] for row in rows]
    said = translation.translate(model, sources, bergamot.encode, bergamot.decode)
    assert said[sources.index("How are you today?")] == "Como você está hoje?"
    assert translation.bleu_chrf(said, [row["pt"] for row in rows])["bleu"] > 50


@pytest.mark.pretrained
def test_the_trained_model_is_optimized() -> None:
    model, batches = trained(), entry("bergamot-en-pt").calibration()
    config = {"prune-attention": False, "factor-vvma": False}
    o = fxpress.optimize(model, batches, config=config)
    assert len(o.passes["roll-recurrence"].rewrites) == 2
    for batch in (batches[0], batches[-1]):
        assert_equivalent(o, model, batch)


@pytest.mark.pretrained
@torch.no_grad()
def test_a_beam_is_at_least_as_likely_as_greedy() -> None:
    model = trained()
    source = tokenization.pad(bergamot.encode(["The old house stands near the river."]), 0)
    found = [greedy(model, source, 30), beam_search(model, source, 30, width=4, alpha=0.0)]

    def likelihood(said: Tensor) -> Tensor:
        ended = torch.cat([said[0], said.new_zeros(1)])
        ended = ended[: int((ended == bergamot.END).nonzero()[0]) + 1]
        read = torch.cat([ended.new_zeros(1), ended[:-1]])[None]
        logits: Tensor = model(source, read)[0]
        return logits.log_softmax(-1).gather(1, ended[:, None]).sum()

    first, second = (float(likelihood(said)) for said in found)
    assert second >= first
