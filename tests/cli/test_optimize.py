"""`fxpress optimize`: its options, its data, what it writes and what it prints."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import fxpress
from fxpress.cli_inputs import from_config, read_arrays
from fxpress.errors import CalibrationError
from fxpress.testing import BITWISE, assert_equivalent

Run = Any  # conftest.Run
OPTIMIZE = ("optimize", "--model", "attend:model", "--calib", "x.npy", "--judge", "off")


def test_the_report_and_nothing_else_is_json(run: Run) -> None:
    done = run(*OPTIMIZE, "--config", "half.yaml", "--json", "--seed", "3")
    assert done.code == 0
    assert done.json["schema"] == 1
    assert done.json["seed"] == 3
    assert [s["status"] for s in done.json["sites"] if s["pass"] == "prune-attention"] == [
        "rewritten",
        "rewritten",
    ]


def test_what_is_written_can_be_read(run: Run, place: Path, tmp_path: Path) -> None:
    out, page, plan = (tmp_path / name for name in ("m.fxpress", "r.html", "plan"))
    files = ("--out", str(out), "--report", str(page), "--save-plan", str(plan))
    assert run(*OPTIMIZE, "--config", "half.yaml", *files).code == 0
    assert "prune-attention" in page.read_text()
    again = tmp_path / "again.fxpress"
    replay = ("optimize", "--model", "attend.py:model", "--plan", str(plan), "--out", str(again))
    assert run(*replay).code == 0
    x = torch.from_numpy(np.load(place / "x.npy"))[:8]
    first, second = fxpress.load(out), fxpress.load(again)
    assert first.passes["prune-attention"].masks
    assert_equivalent(second, first, (x,), exactness=BITWISE)


def test_a_budget_by_a_function_of_the_user(run: Run) -> None:
    judged = ("--judge", "modelled", "--validation-fn", "attend:score", "--max-drop", "0.1")
    done = run(*OPTIMIZE, *judged, "--config", "half.yaml", "--validation", "x.npy", "--json")
    assert done.code == 0, done.err
    assert done.json["quality"] | {"after": 1.0} == {
        "metric": "validation_fn score",
        "before": 1.0,
        "after": 1.0,
        "drop": 0.0,
        "budget": 0.1,
    }


def _write(path: Path, x: torch.Tensor) -> None:
    writers: dict[str, Callable[[], Any]] = {
        ".npz": lambda: np.savez(path, x=x.numpy()),
        ".npy": lambda: np.save(path, x.numpy()),
        ".safetensors": lambda: save_file({"x": x}, path),
        ".json": lambda: path.write_text(json.dumps([{"x": part.tolist()} for part in x.split(8)])),
    }
    writers[path.suffix]()


@pytest.mark.parametrize("suffix", [".npz", ".npy", ".safetensors", ".json"])
def test_arrays_are_cut_into_batches_of_eight(suffix: str, tmp_path: Path) -> None:
    x = torch.randn(20, 3)
    path = tmp_path / f"x{suffix}"
    _write(path, x)
    found = [b["x"] if isinstance(b, dict) else b for b in read_arrays(path)]
    assert [len(batch) for batch in found] == [8, 8, 4]
    assert torch.equal(torch.cat(found), x)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """The configuration of a small model of transformers, with a text beside it."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "vocab_size": 256}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"model_type": "bert", **sizes, **heads}
    (tmp_path / "config.json").write_text(json.dumps(text))
    (tmp_path / "text.txt").write_text("a word\n" + "word " * 80)
    return tmp_path / "config.json"


def test_a_model_of_a_configuration_reads_bytes_without_a_tokenizer(run: Run, config: Path) -> None:
    data = ("--calib", str(config.with_name("text.txt")))
    done = run("explain", "--model", f"hf-config:{config}", *data, "--json")
    assert done.code == 0, done.err
    assert [site["shape"][3] for site in done.json["attention"]] == [64]


def test_a_tokenizer_beside_the_configuration_reads_lines_that_are_long_enough(
    config: Path,
) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"word": 7, "?": 0}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(config.parent)
    subject = from_config(config)
    (batch,) = subject.read(config.with_name("text.txt"), 8)
    assert batch["input_ids"].tolist() == [[7] * 64]
    config.with_name("short.txt").write_text("a word\n")
    with pytest.raises(CalibrationError, match="no line has 64 tokens"):
        subject.read(config.with_name("short.txt"), 8)


@pytest.mark.parametrize("command", [[sys.executable, "-m", "fxpress"], ["fxpress"]])
def test_the_command_is_there(command: list[str]) -> None:
    script = Path(sys.executable).with_name("fxpress")
    command = [str(script)] if command == ["fxpress"] else command
    done = subprocess.run(
        [*command, "passes", "--json"], capture_output=True, text=True, check=True
    )
    assert [entry["name"] for entry in json.loads(done.stdout)][-1] == "factor-vvma"
