"""Whisper without its weights: features, decoding, words that changed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fxpress.zoo import create_model, whisper
from fxpress.zoo.registry import entry
from fxpress.zoo.samples import read_rows


class Numbers:
    """Stands for the tokenizer: prints ids."""

    def batch_decode(self, ids: Tensor, *, skip_special_tokens: bool) -> list[str]:
        special = whisper.END if skip_special_tokens else ids.max() + 1
        return [" ".join(str(i) for i in row if i < special) for row in ids.tolist()]


class Plain(nn.Module):
    """What a rewritten encoder may be: no convolutions to look at, a tensor comes out."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_features: Tensor) -> Tensor:
        states: Tensor = self.encoder(input_features)[0]
        return states


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A small model with random weights that are large enough to say different things."""
    monkeypatch.setattr(whisper, "tokenizer", Numbers)
    model = create_model("whisper-tiny")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model


def test_features_of_a_second_are_padded_to_thirty() -> None:
    second = np.sin(np.arange(16_000, dtype=np.float32))
    x = whisper.features([second, 0 * second])
    assert x.shape == (2, 80, 3000)
    sound, padding, silence = x[0, :, :90], x[0, :, 200:], x[1]
    assert sound.amax() > sound.amin() >= padding.amax() == padding.amin()
    assert silence.amax() == silence.amin()


def test_built_in_calibration_is_one_recording_a_batch() -> None:
    both = entry("whisper-tiny").calibration(limit=2)
    encoder = entry("whisper-tiny-encoder").calibration(limit=2)
    assert len(both) == len(encoder) == 2
    assert torch.equal(both[1]["input_features"], encoder[1]["input_features"])
    assert torch.equal(encoder[1]["input_features"][0], whisper.voice_prompts("calibration", 2)[1])
    assert both[0]["decoder_input_ids"].tolist() == [[whisper.START, whisper.NO_TIMESTAMPS]]


def test_decodes_like_generate(small: Any) -> None:
    x = whisper.voice_prompts("heldout", 2)
    ours = whisper.transcribe(small, x, max_new_tokens=8)
    states = small.model.encoder(x)[0]
    ids = torch.tensor([[whisper.START, whisper.NO_TIMESTAMPS]] * 2)
    for _ in range(8):  # without a cache: the whole prefix again each time
        with torch.no_grad():
            logits = small(encoder_outputs=(states,), decoder_input_ids=ids).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    assert ours == Numbers().batch_decode(ids[:, 2:], skip_special_tokens=True)
    assert len(set(" ".join(ours).split())) > 1


def test_a_replaced_encoder_is_used(small: Any) -> None:
    x = whisper.voice_prompts("heldout", 2)
    said = whisper.transcribe(small, x, max_new_tokens=6)
    small.model.encoder = Plain(small.model.encoder)
    assert whisper.transcribe(small, x, max_new_tokens=6) == said


def test_suppressed_tokens_are_never_said(small: Any) -> None:
    x = whisper.voice_prompts("heldout", 1)
    first, second = whisper.transcribe(small, x, max_new_tokens=2)[0].split()
    small.generation_config.suppress_tokens = [int(second)]
    small.generation_config.begin_suppress_tokens = [int(first)]
    said = whisper.transcribe(small, x, max_new_tokens=6)[0].split()
    assert second not in said
    assert said[0] != first


def test_word_changes() -> None:
    assert whisper.word_changes(["Please, hold!", "no"], ["please hold", "No."]) == 0
    assert whisper.word_changes(["a b c d"], ["a x c d"]) == 1 / 4
    assert whisper.word_changes(["a b", "c d"], ["a", "c e d"]) == 2 / 4
    assert whisper.word_changes([""], [""]) == 0
    with pytest.raises(ValueError, match="2 texts and 1"):
        whisper.word_changes(["a", "b"], ["a"])


def test_word_errors_are_not_of_spelling() -> None:
    assert whisper.word_errors(["I am sorry, press twenty-two."], ["I'm sorry. Press 22"]) == 0
    assert whisper.word_errors(["the last caller was"], ["The last color was"]) == 1 / 4


def test_each_held_out_prompt_has_its_words() -> None:
    rows = read_rows(whisper.PROMPTS / "heldout.jsonl", ("prompt", "text"))
    recorded = sorted(path.stem for path in (whisper.PROMPTS / "heldout").glob("*.flac"))
    assert [row["prompt"] for row in rows] == recorded


def test_a_model_is_scored_on_all_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    said = iter(row["text"] for row in read_rows(whisper.PROMPTS / "heldout.jsonl", ("text",)))
    monkeypatch.setattr(whisper, "voice_prompts", lambda _: torch.zeros(68, 1))
    monkeypatch.setattr(whisper, "transcribe", lambda _, x: [next(said) for _ in x])
    assert whisper.SCORE.measure(nn.Identity()) == {"word_error_rate": 0}
    assert next(said, None) is None
