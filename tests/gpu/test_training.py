"""The trainer on a CUDA device: bfloat16, a kill and what goes on, types of recurrent layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fxpress.zoo import objectives, recipe, trained, training
from fxpress.zoo.recipe import Recipe

pytestmark = pytest.mark.gpu

FIELDS: dict[str, Any] = {
    "description": "-",
    "source": "-",
    "task": "copying",
    "data": {"T": 3},
    "batch": 16,
    "steps": 60,
    "evaluate_every": 20,
    "optimizer": "adamw",
    "learning_rate": 0.01,
}
MODELS: list[dict[str, Any]] = [
    {"name": "lstm-lm", "vocabulary": 10, "width": 32},
    {"name": "rum-lm", "vocabulary": 10, "width": 16, "lambda_": 1},
    {"name": "transformer-lm", "vocabulary": 10, "width": 32, "layers": 2, "context": 32},
    {"name": "transformer-xl", "vocabulary": 10, "width": 32, "layers": 2},
]


class KilledError(Exception):
    """Stands for a kill."""


def kill(_: training.State) -> None:
    raise KilledError


def tiny(model: dict[str, Any]) -> Recipe:
    return recipe.parse("tiny", FIELDS | {"model": model})


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model["name"])
def test_it_learns_goes_on_after_a_kill_and_scores_the_same_on_a_cpu(
    tmp_path: Path, model: dict[str, Any]
) -> None:
    with pytest.raises(KilledError):
        trained.train(tiny(model), tmp_path, device="cuda", progress=kill)
    card = trained.train(tiny(model), tmp_path, device="cuda")
    losses = [entry["train"] for entry in card["history"]]
    assert len(losses) == 3
    assert losses == sorted(losses, reverse=True)
    assert torch.cuda.get_device_name() in card["machine"]
    on_cpu = trained.evaluate("tiny", tmp_path)["scores"]
    # Of the same weights in float32, in sums of another order.
    assert {k: round(v, 2) for k, v in on_cpu.items()} == {
        k: round(v, 2) for k, v in card["scores"].items()
    }


def test_what_goes_on_has_everything_in_its_place(tmp_path: Path) -> None:
    plan = tiny(MODELS[0])
    task, path = objectives.task_of(plan), tmp_path / "checkpoint.safetensors"
    before = training.Run(plan, task, torch.device("cuda"))
    before.advance(before.module)
    before.save(path)
    after = training.Run(plan, task, torch.device("cuda"))
    after.resume(path)
    kept, found = (run.optimizer.state_dict()["state"] for run in (before, after))
    devices = [
        {(i, name): x.device.type for i, slots in state.items() for name, x in slots.items()}
        for state in (kept, found)
    ]
    assert devices[0] == devices[1]  # counts of steps on the CPU, the others on the device
    for name, x in before.module.state_dict().items():
        assert torch.equal(x, after.module.state_dict()[name])
    assert json.dumps(after.state.history) == json.dumps(before.state.history)


def test_recurrent_layers_take_no_float16() -> None:
    plan = tiny(MODELS[0])
    run = training.Run(plan, objectives.task_of(plan), torch.device("cuda"))
    layer = run.module.get_submodule("layer.layer")
    x = torch.randn(2, 5, 32, device="cuda")
    with (
        training.recurrent_layers_in_float32(run.module),
        torch.autocast("cuda", torch.bfloat16),
    ):
        y, _ = layer(x.bfloat16())
    assert y.dtype == torch.float32
