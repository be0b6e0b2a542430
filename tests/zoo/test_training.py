"""The trainer: it learns, and a run that was killed ends where one that was not does."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxpress.testing import BITWISE, assert_equivalent
from fxpress.zoo import objectives, recipe, registry, trained, training
from fxpress.zoo.pretrained import PretrainedError
from fxpress.zoo.recipe import Recipe, RecipeError

FIELDS: dict[str, Any] = {
    "description": "-",
    "source": "-",
    "task": "copying",
    "data": {"T": 3},
    "model": {"name": "gru-lm", "vocabulary": 10, "width": 16},
    "batch": 8,
    "steps": 60,
    "evaluate_every": 20,
    "optimizer": "adamw",
    "learning_rate": 0.01,
}


class KilledError(Exception):
    """Stands for a kill."""


def tiny(**changes: Any) -> Recipe:
    return recipe.parse("tiny", FIELDS | changes)


def kill_at(step: int) -> training.Progress:
    def kill(state: training.State) -> None:
        if state.step == step:
            raise KilledError

    return kill


def test_the_loss_falls(tmp_path: Path) -> None:
    card = trained.train(tiny(), tmp_path)
    losses = [entry["train"] for entry in card["history"]]
    assert len(losses) == 3
    assert losses == sorted(losses, reverse=True)
    untrained = training.Run(tiny(), objectives.task_of(tiny()), torch.device("cpu")).module
    before, _ = training.evaluate(untrained, objectives.task_of(tiny()), "test")
    assert card["scores"]["loss"] < before


# RUM draws in training what to keep of its state, and RMSProp has other slots than AdamW.
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optimizer": "rmsprop", "warmup": 10},
        {"model": {"name": "rum-lm", "vocabulary": 10, "width": 8, "zoneout": 0.2}, "steps": 30},
    ],
)
def test_a_killed_run_ends_as_one_that_was_not(tmp_path: Path, changes: dict[str, Any]) -> None:
    plan = tiny(**changes)
    whole = trained.train(plan, tmp_path / "whole")
    with pytest.raises(KilledError):
        trained.train(plan, tmp_path / "killed", progress=kill_at(20))
    assert not (tmp_path / "killed" / "tiny.json").exists()
    torch.rand(3)  # whatever was drawn in between
    resumed = trained.train(plan, tmp_path / "killed")
    for fact in ("history", "weights_sha256", "scores"):
        assert resumed[fact] == whole[fact]


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    first = trained.train(tiny(), tmp_path)
    again = trained.train(tiny(), tmp_path, progress=kill_at(60))
    assert again["weights_sha256"] == first["weights_sha256"]
    assert again["seconds"] == first["seconds"]


def test_a_kill_while_writing_leaves_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KilledError):
        trained.train(tiny(), tmp_path, progress=kill_at(20))

    def write_half(tensors: Any, path: Path, about: Any) -> None:
        path.write_bytes(b"half")
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(training, "save_file", write_half)
        with pytest.raises(KilledError):
            trained.train(tiny(), tmp_path)
    assert [h["step"] for h in trained.train(tiny(), tmp_path)["history"]] == [20, 40, 60]


def test_the_best_weights_are_kept(tmp_path: Path) -> None:
    plan = tiny(learning_rate=100.0, clip=1e9, warmup=40, steps=40)  # it diverges
    module, state = training.train(plan, objectives.task_of(plan), tmp_path / "c.safetensors")
    valid, _ = training.evaluate(module, objectives.task_of(plan), "valid")
    assert valid == state.best == min(entry["valid"] for entry in state.history)


def test_the_seed_decides(tmp_path: Path) -> None:
    cards = [
        trained.train(tiny(seed=seed, steps=20), tmp_path / str(i))
        for i, seed in enumerate((1, 1, 2))
    ]
    assert cards[0]["weights_sha256"] == cards[1]["weights_sha256"] != cards[2]["weights_sha256"]


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path: Path) -> None:
    trained.train(tiny(), tmp_path)
    with pytest.raises(RecipeError, match="of another recipe or other data than tiny: remove it"):
        trained.train(tiny(seed=1), tmp_path)


def test_written_weights_are_the_model(tmp_path: Path) -> None:
    card = trained.train(tiny(steps=20), tmp_path)
    module = trained.load_module("tiny", tmp_path)
    assert not module.training
    weights = load_file(tmp_path / "tiny.safetensors")
    assert sum(x.numel() for x in weights.values()) == card["parameters"]
    assert trained.evaluate("tiny", tmp_path)["scores"] == card["scores"]
    again = trained.load_module("tiny", tmp_path)
    ids = torch.randint(10, (2, 23))
    assert_equivalent(again, module, (ids,), exactness=BITWISE)


def test_scores_are_of_the_weights_as_stored(tmp_path: Path) -> None:
    card = trained.train(tiny(steps=20, stored="float16"), tmp_path)
    weights = load_file(tmp_path / "tiny.safetensors")
    assert {x.dtype for x in weights.values()} == {torch.float16}
    module = trained.load_module("tiny", tmp_path)
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    assert trained.evaluate("tiny", tmp_path)["scores"] == card["scores"]


def test_frozen_weights_stay_and_are_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(pretrained: bool = False, **sizes: Any) -> nn.Module:
        module = registry.create_model("gru-lm", **sizes)
        frozen = module.get_parameter("tokens.weight").requires_grad_(False)
        with torch.no_grad():  # as if it were fetched: the same in each model that is built
            frozen.fill_(0.5)
        return module

    entries = registry.entries() | {"frozen": replace(registry.entry("gru-lm"), build=build)}
    monkeypatch.setattr(registry, "entries", lambda: entries)
    plan = tiny(model={"name": "frozen", "vocabulary": 10, "width": 16}, weight_decay=0.1)
    card = trained.train(plan, tmp_path)
    weights = load_file(tmp_path / "tiny.safetensors")
    assert "tokens.weight" not in weights
    assert sum(x.numel() for x in weights.values()) == card["parameters"] - 160
    module = trained.load_module("tiny", tmp_path)
    assert (module.get_parameter("tokens.weight") == 0.5).all()
    assert trained.evaluate("tiny", tmp_path)["scores"] == card["scores"]


def test_weights_that_are_not_there_or_not_those(tmp_path: Path) -> None:
    with pytest.raises(PretrainedError, match="has no trained tiny: `fxpress zoo train tiny`"):
        trained.load_module("tiny", tmp_path)
    trained.train(tiny(steps=20), tmp_path)
    (tmp_path / "tiny.safetensors").write_bytes(b"other")
    with pytest.raises(PretrainedError, match="not what its card was written for"):
        trained.load_module("tiny", tmp_path)


TRANSLATING = {  # by this seed one process gets 8 targets, the other 12
    "seed": 3,
    "task": "translation",
    "data": {
        "corpus": "en-de",
        "languages": ["en", "de"],
        "vocabulary": 4096,
        "length": 32,
        "sample_size": 2,
    },
    "model": {"name": "lstm-seq2seq", "width": 8, "dropout": 0.0},
    "label_smoothing": 0.1,
    "batch": 4,
}
SENTENCES = [
    ("Close the window.", "Schließen Sie das Fenster."),
    ("No.", "Nein."),
    ("Yes.", "Ja."),
    ("Opens the file that was named last in the list.", "Öffnet die zuletzt genannte Datei."),
]


@pytest.fixture
def sentences(tmp_path: Path) -> Path:
    lines = "".join(f"{json.dumps({'en': en, 'de': de})}\n" for en, de in SENTENCES)
    folder = tmp_path / "sentences"
    folder.mkdir()
    for split in ("train", "valid", "test"):
        (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    return folder


@pytest.mark.parametrize("translating", [False, True])
def test_two_processes_train_as_one(tmp_path: Path, sentences: Path, translating: bool) -> None:
    """Weighted shares: the mean of their gradients is the gradient of the whole batch."""
    fields = FIELDS | {"steps": 1, "evaluate_every": 1} | (TRANSLATING if translating else {})
    data = sentences if translating else None
    script = tmp_path / "two.py"
    script.write_text(
        "import sys; from pathlib import Path; from fxpress.zoo import recipe, trained\n"
        f"plan = recipe.parse('tiny', {fields})\n"
        "data = Path(sys.argv[2]) if sys.argv[2:] else None\n"
        "trained.train(plan, Path(sys.argv[1]), data=data)\n"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    command = [*launch, str(script), str(tmp_path / "two"), *([str(data)] if data else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    trained.train(recipe.parse("tiny", fields), tmp_path / "one", data=data)
    one, two = (trained.load_module("tiny", tmp_path / n) for n in ("one", "two"))
    inputs = [torch.randint(3, 10, (2, 23)) for _ in range(1 + translating)]
    assert_equivalent(two, one, tuple(inputs))
    cards = [trained.load_card("tiny", tmp_path / n) for n in ("one", "two")]
    assert [card["processes"] for card in cards] == [1, 2]
    first, second = (torch.tensor(card["history"][0]["train"]) for card in cards)
    assert_equivalent(lambda: second, lambda: first, ())


@pytest.mark.parametrize("layer_type", [nn.GRU, nn.LSTM])
def test_recurrent_layers_stay_out_of_autocast(layer_type: type[nn.GRU | nn.LSTM]) -> None:
    model = nn.Sequential(layer_type(8, 8, 2))
    layer: Any = model[0]
    x = torch.randn(5, 3, 8).bfloat16().float()
    _, state = layer(x)

    def under_autocast(x: Tensor) -> Any:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            # From linear layers before it come values of the lower type.
            return layer(x.bfloat16(), pytree.tree_map(torch.clone, state))

    with training.recurrent_layers_in_float32(model):
        got = under_autocast(x)
    assert_equivalent(lambda _: got, lambda x: layer(x, state), (x,), exactness=BITWISE)
    assert "forward" not in vars(layer)


def run_command(arguments: str) -> int:
    from fxpress.cli import main

    with pytest.raises(SystemExit) as exit_:
        main(["zoo", *arguments.split()])
    return int(exit_.value.code or 0)


def test_the_command_line_trains_and_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = tiny(steps=20)
    monkeypatch.setattr(
        recipe, "load", lambda _, reduced: dataclasses.replace(plan, reduced=reduced)
    )
    assert run_command(f"train tiny --reduced --out {tmp_path} --json") == 0
    out, err = capsys.readouterr()
    card = json.loads(out)
    assert card["recipe"]["reduced"]
    assert "tiny: step 20 of 20, loss " in err
    assert run_command(f"eval tiny --weights {tmp_path} --json") == 0
    assert json.loads(capsys.readouterr().out)["scores"] == card["scores"]
    assert run_command(f"eval tiny --weights {tmp_path}") == 0
    assert "(without memory)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train austen-lsmt", "did you mean 'austen-lstm'?"),
        ("eval tiny", "has no trained tiny"),
        ("train copying-gru --data nowhere", "draws its sequences"),
        ("train austen-gru --data nowhere", "nowhere/train.txt cannot be read"),
    ],
)
def test_bad_input_is_one_line(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(arguments) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
