"""Models by name: found without a list, built without a download, exportable."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fxpress import zoo
from fxpress.cli_inputs import as_call
from fxpress.errors import FxpressError
from fxpress.testing import assert_equivalent
from fxpress.zoo.pretrained import PretrainedError
from fxpress.zoo.registry import Entry, UnknownModelError, entries, entry

NAMES = zoo.list_models()
UNTRAINED = [name for name in NAMES if name.endswith("-lm")]
IDS = torch.arange(24).reshape(2, 12)
INPUTS: dict[str, dict[str, Any]] = {
    "bergamot-en-pt": {"source": IDS, "target": IDS},
    "r8-minilm": {"ids": IDS, "mask": torch.ones_like(IDS)},
    "minilm": {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)},
    "smollm2": {"input_ids": IDS, "use_cache": False},
    "whisper-tiny": {
        "input_features": torch.zeros(1, 80, 3000),
        "decoder_input_ids": IDS[:1],
        "use_cache": False,
    },
    "whisper-tiny-encoder": {"input_features": torch.zeros(1, 80, 3000)},
    "wide": {"x": torch.ones(1, 2048)},
}


def test_names() -> None:
    promised = {"minilm", "smollm2", "whisper-tiny", "whisper-tiny-encoder"}
    promised |= {"transformer-lm", "rum-lm", "lstm-lm", "gru-lm", "rnn-lm"}
    assert promised <= set(NAMES)
    assert sorted(NAMES) == NAMES
    assert zoo.list_models("whisper*") == ["whisper-tiny", "whisper-tiny-encoder"]
    assert zoo.list_models("no-such*") == []


def test_unknown_name_offers_the_nearest() -> None:
    with pytest.raises(UnknownModelError, match=r"'minlm': did you mean 'minilm'\?") as caught:
        zoo.create_model("minlm")
    assert isinstance(caught.value, FxpressError)
    assert isinstance(caught.value, ValueError)
    with pytest.raises(UnknownModelError, match="did you mean"):
        entry("")


@pytest.mark.parametrize("name", NAMES)
def test_entry_says_what_it_is(name: str) -> None:
    e = entry(name)
    assert isinstance(e, Entry)
    assert all([e.description, e.license, e.source])
    for function, parameters in ((e.build, ["pretrained"]), (e.calibration, ["path", "limit"])):
        assert list(inspect.signature(function).parameters)[: len(parameters)] == parameters


def test_a_new_file_is_a_new_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = (
        "from torch import nn\nfrom fxpress.zoo.registry import model\n"
        "@model('test-only', description='-', license='-', source='-', calibration=None)\n"
        "def build(pretrained=False):\n    return nn.Identity().eval()\n"
    )
    (tmp_path / "added_by_a_test.py").write_text(source)
    monkeypatch.setattr(zoo, "__path__", [*zoo.__path__, str(tmp_path)])
    entries.cache_clear()
    try:
        assert zoo.list_models("test-*") == ["test-only"]
        assert isinstance(zoo.create_model("test-only"), torch.nn.Identity)
    finally:
        sys.modules.pop("fxpress.zoo.added_by_a_test", None)
        entries.cache_clear()


# torch's recurrent layers keep their weights in a plain list as well, which export remarks on.
@pytest.mark.filterwarnings("ignore:The tensor attributes .* were assigned during export")
@pytest.mark.parametrize("name", NAMES)
def test_builds_small_and_exports(name: str) -> None:
    model = zoo.create_model(name)
    assert not model.training
    assert name == "wide" or sum(p.numel() for p in model.parameters()) < 4_000_000
    args, kwargs = as_call(INPUTS.get(name) or entry(name).calibration(limit=1)[0])
    args = tuple(x[:2, :6] for x in args)
    exported = torch.export.export(model, args, kwargs, strict=False).module()
    assert_equivalent(exported, model, args, kwargs)


@pytest.mark.parametrize("name", UNTRAINED)
def test_untrained_models_say_so(name: str) -> None:
    with pytest.raises(PretrainedError, match=f"{name} has no trained weights"):
        zoo.create_model(name, pretrained=True)


@pytest.mark.parametrize("name", UNTRAINED)
def test_built_in_calibration_fits_the_model(name: str) -> None:
    batches = entry(name).calibration(limit=3)
    assert len(batches) == 3
    assert batches[0].shape == batches[1].shape
    assert not torch.equal(batches[0], batches[1])
    with torch.no_grad():
        assert zoo.create_model(name)(batches[0]).isfinite().all()


@pytest.mark.parametrize("name", UNTRAINED)
def test_calibration_reads_a_file(name: str, tmp_path: Path) -> None:
    path = tmp_path / "texts.txt"
    path.write_text("Aa" * 300)
    batches = entry(name).calibration(path, 2)
    assert {int(i) for batch in batches for i in batch.flatten()} == {ord("A"), ord("a")}


@pytest.mark.parametrize("name", ["minilm", "smollm2", "whisper-tiny"])
def test_sizes_and_attention_are_free_without_weights(name: str) -> None:
    field = "d_model" if name.startswith("whisper") else "hidden_size"
    sizes: dict[str, Any] = {field: 16}
    model: Any = zoo.create_model(name, attn_implementation="eager", **sizes)
    assert model.config._attn_implementation == "eager"
    assert getattr(model.config, field) == 16
    with pytest.raises(PretrainedError, match="has no hiden_size"):
        zoo.create_model(name, hiden_size=16)


def test_import_is_light() -> None:
    script = (
        "import sys, fxpress.zoo as z; z.list_models(); print(sorted("
        "{'transformers', 'datasets', 'soundfile', 'jiwer'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.PIPE)
    assert done.stdout.split() == [b"[]"]
